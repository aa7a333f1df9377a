"""The whole job on small inputs with the real commands, and what all four scripts promise."""
import ast
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from conftest import ROOT, SHARED, command, needs_shared

SCRIPTS = "clean", "train", "predict", "ensemble"


def log(run, phase):
    return [json.loads(line) for line in (run / phase / "metrics.jsonl").read_text().splitlines()]


def test_end_to_end(trained, data, tmp_path):
    best_lp = max(r.get("val_cosine", -1) for r in log(trained, "lp"))
    first = next(r for r in log(trained, "ft") if "val_cosine" in r)
    assert abs(first["val_cosine"] - best_lp) < 1e-4, "ft starts at the lp score"
    for n in (1, 2):
        command("predict.py", "--run", trained / "ft", "--tta", n, "--out", tmp_path / f"{n}.npz", "--workers", 0)
    one, two = (np.load(tmp_path / f"{n}.npz") for n in (1, 2))
    assert (one["ids"] == two["ids"]).all()
    assert np.abs(one["embeddings"] - two["embeddings"]).max() > 1e-4, "the second view is another view"
    done = command("ensemble.py", tmp_path / "1.npz", tmp_path / "2.npz", "--out", tmp_path / "e.npz",
                   "--submission", tmp_path / "s.csv")
    assert "plain average" in done.stdout
    table = pl.read_csv(tmp_path / "s.csv")
    assert table.columns == ["imgId_eId", "val"] and len(table) == 384 * len(one["ids"])


def test_nothing_is_overwritten(trained, data, raw, tmp_path):
    """Each script refuses to write over what is there, names it, and names the flag that allows it."""
    command("predict.py", "--run", trained / "ft", "--out", tmp_path / "p.npz", "--workers", 0)
    for words in (["clean.py", raw / "prompts.csv", "--out", data],
                  ["train.py", "--phase", "lp", "--data", data, "--out", trained],
                  ["predict.py", "--run", trained / "ft", "--out", tmp_path / "p.npz"],
                  ["ensemble.py", tmp_path / "p.npz", "--out", tmp_path / "p.npz"]):
        done = command(*words, ok=False)
        assert "--overwrite" in done.stderr and len(done.stderr.splitlines()) == 1


def test_importing_is_silent_and_light():
    """`--help` answers at once because the slow packages are imported where they are used; importing does nothing."""
    heavy = ["open_clip", "faiss", "sentence_transformers", "transformers", "matplotlib", "timm", "ftfy", "wandb",
             "diffusers"]
    code = f"import {', '.join(SCRIPTS)}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default(script):
    help_text = command(f"{script}.py", "--help").stdout
    assert "(default: None)" not in help_text and f"$ python {script}.py" in help_text
    options = re.split(r"\n  (?=-)", help_text.split("\noptions:")[1])
    words = [o.split() for o in options if o.strip()]
    silent = [w[0] for w in words if not re.search(r"default: |unset = |show this help", " ".join(w))]
    assert set(silent) <= {"--phase", "--soup", "--submission", "--html", "--neighbors", "--holdout-source", "--exclude",
                           "--generate", "--model-kwargs"}, silent


def functions(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


@pytest.mark.parametrize("script, allowed", [
    ("clean", {"open_rgb", "png_prompt", "find_encoder", "generate"}), ("train", {"make_backbone", "load_last"}),
    ("predict", {"read_preds"}), ("ensemble", set())])
def test_broad_excepts_stand_only_around_decoders_and_downloads(script, allowed):
    """Anywhere else they would hide a forker's typo."""
    found = {f.name for f in functions(script) for n in ast.walk(f) if isinstance(n, ast.ExceptHandler)
             and (n.type is None or isinstance(n.type, ast.Name) and n.type.id in ("Exception", "BaseException"))}
    assert found == allowed


@needs_shared
def test_the_encoder_is_the_competitions():
    """Seven public prompts: our targets are the true embeddings of Kaggle's sample_submission.csv."""
    from clean import encode, load_encoder
    prompts = pl.read_csv(SHARED / "kaggle7/prompts.csv")
    true = pl.read_csv(SHARED / "kaggle7/sample_submission.csv")["val"].to_numpy().reshape(7, 384)
    assert np.abs(encode(prompts["prompt"].to_list(), load_encoder(device="cpu")[0]) - true).max() < 1e-6


@needs_shared
def test_submission_has_kaggles_own_rows(trained, tmp_path):
    sample = SHARED / "kaggle7/sample_submission.csv"
    images = sorted((SHARED / "kaggle7").glob("**/*.png"))
    command("predict.py", *images, "--run", trained, "--sample-submission", sample,
            "--submission", tmp_path / "s.csv", "--out", tmp_path / "p.npz")
    assert pl.read_csv(tmp_path / "s.csv")["imgId_eId"].to_list() == pl.read_csv(sample)["imgId_eId"].to_list()


def documented_commands():
    text = "\n".join(p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(rf"(^|[ /])({'|'.join(SCRIPTS)})\.py\b", line) and "tests/" not in line and "$" not in line]


def test_every_documented_command_parses():
    """The flags that README and docs show exist. (.ci/run runs the block under Tests word for word.)"""
    assert len(documented_commands()) > 20
    for line in documented_commands():
        words = shlex.split(line.split("|")[0].split(">")[0].split("&&")[-1].rstrip("; &"))
        at = next(i for i, w in enumerate(words) if w.split("/")[-1].removesuffix(".py") in SCRIPTS and w.endswith(".py"))
        try:
            __import__(words[at].split("/")[-1].removesuffix(".py")).parse_args(words[at + 1:])
        except SystemExit as e:
            assert e.code == 0, line
