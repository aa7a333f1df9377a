"""What the tests share: the real commands as subprocesses, a small synthetic set, and a tiny CLIP (tests/tiny.json)."""
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests/tiny.json")
SHARED = ROOT.parent / "shared/data"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # golden numbers are CPU numbers
sys.path.insert(0, str(ROOT))

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the development data (../shared/data) is not here")


def command(script, *args, ok=True, cwd=None, env=None, timeout=600):
    """Run `python script args` -> CompletedProcess. With ok=False it must exit non-zero and say why on stderr, with no
    traceback."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True,
                          cwd=cwd or ROOT, env={**os.environ, **(env or {})}, timeout=timeout)
    if ok:
        assert done.returncode == 0, f"{script} {args}\n{done.stdout}\n{done.stderr}"
    else:
        assert done.returncode != 0, f"{script} {args} did not fail\n{done.stdout}"
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stderr.strip(), "no message"
    return done


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def png(colour="red", size=(32, 24), **kwargs):
    """The bytes of a PNG of one colour but for a pixel, because clean.py drops images that are blank."""
    image = Image.new("RGB", size, colour)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(out := io.BytesIO(), "PNG", **kwargs)
    return out.getvalue()


def put(place, files, method=zipfile.ZIP_DEFLATED):
    """{name: content} into a zip, a tar or a folder, by its suffix -> its path."""
    files = {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    elif place.name.endswith((".tar", ".tgz", ".gz", ".bz2", ".xz")):
        with tarfile.open(place, "w:" + place.suffix[1:].replace("tar", "").replace("tgz", "gz")) as archive:
            for name, content in files.items():
                (info := tarfile.TarInfo(name)).size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
    return place


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A folder with prompts.csv and images/: 200 pairs of the demo, none corrupted. Read only: copy before changing."""
    from demo import draw_demo
    folder = tmp_path_factory.mktemp("raw") / "demo-raw"
    draw_demo(folder, rows=200, corrupted=0)
    return folder


@pytest.fixture(scope="session")
def data(raw, tmp_path_factory):
    """The data folder that clean.py makes of it, with 40 validation rows."""
    out = tmp_path_factory.mktemp("data") / "tiny"
    command("clean.py", raw / "prompts.csv", "--out", out, "--val-fraction", 0.2, "--size", 48, "--workers", 1)
    return out


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The run folder of a tiny CLIP trained on it: lp, then ft."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    flags = ["--data", data, "--out", run, "--batch-size", 32, "--workers", 0, "--precision", "fp32", "--log-every", 1]
    command("train.py", "--phase", "lp", "--model", TINY, "--pretrained", "none", "--epochs", 4, *flags)
    command("train.py", "--phase", "ft", "--epochs", 1, "--lr", 1e-4, *flags)
    return run


@pytest.fixture
def table(tmp_path):
    """A function that writes rows (dicts) as a CSV and returns its path."""
    def write(rows, name="pairs.csv"):
        pl.DataFrame(rows).write_csv(tmp_path / name)
        return tmp_path / name
    return write


@pytest.fixture
def copy(tmp_path):
    """A function that copies a folder into tmp_path and returns the copy."""
    def copy(folder):
        shutil.copytree(folder, tmp_path / folder.name, symlinks=True)
        return tmp_path / folder.name
    return copy


ODD_NAME = "$_{$\n\x1b\u202e" * 40  # matplotlib would fail on it as a formula


def chart_texts(figure):
    """All that a chart says; nothing in it may be garbled."""
    texts = [t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert all(t.isprintable() and len(t) < 100 for t in texts)
    return texts
