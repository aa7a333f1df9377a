"""What the tests share: the real commands as subprocesses, a small drawn world, and a tiny CLIP (tests/tiny.json)."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests/tiny.json")
SHARED = ROOT.parent / "shared/data"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # golden numbers are CPU numbers
sys.path.insert(0, str(ROOT))

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the development data (../shared/data) is not here")


def command(script, *args, ok=True, cwd=None, env=None, timeout=600):
    """Run `python script args` -> CompletedProcess. With ok=False it must say why on stderr, without a traceback, and
    exit non-zero."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True,
                          cwd=cwd or ROOT, env={**os.environ, **(env or {})}, timeout=timeout)
    if ok:
        assert done.returncode == 0, f"{script} {args}\n{done.stdout}\n{done.stderr}"
    else:
        assert done.returncode != 0, f"{script} {args} went through\n{done.stdout}"
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stderr.strip(), "no message"
    return done


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """200 drawn pairs, clean, as a folder with prompts.csv and images/. Read only: copy before changing."""
    from clean import draw_demo
    folder = tmp_path_factory.mktemp("raw") / "world"
    draw_demo(folder, rows=200, dirt=0)
    return folder


@pytest.fixture(scope="session")
def data(raw, tmp_path_factory):
    """The same, cleaned: 40 validation rows."""
    out = tmp_path_factory.mktemp("data") / "tiny"
    command("clean.py", raw / "prompts.csv", "--out", out, "--val-fraction", 0.2, "--size", 48, "--workers", 1)
    return out


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """lp and ft of the tiny CLIP on it -> run folder."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    flags = ["--data", data, "--out", run, "--batch-size", 32, "--workers", 0, "--precision", "fp32", "--log-every", 1]
    command("train.py", "--phase", "lp", "--model", TINY, "--pretrained", "none", "--epochs", 4, *flags)
    command("train.py", "--phase", "ft", "--epochs", 1, "--lr", 1e-4, *flags)
    return run


@pytest.fixture
def table(tmp_path):
    """A function that writes rows of dicts as a CSV and returns its path."""
    def write(rows, name="pairs.csv"):
        pl.DataFrame(rows).write_csv(tmp_path / name)
        return tmp_path / name
    return write


@pytest.fixture
def copy(tmp_path):
    """A function that copies a folder into tmp_path and returns it."""
    def copy(folder):
        shutil.copytree(folder, tmp_path / folder.name, symlinks=True)
        return tmp_path / folder.name
    return copy
