"""The whole job on small inputs with the real commands, and what all four scripts promise."""
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
    assert abs(log(trained, "ft")[0]["val_cosine"] - best_lp) < 1e-4, "ft starts at the lp score"
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
    options = re.split(r"\n  (?=-)", command(f"{script}.py", "--help").stdout.split("\noptions:")[1])
    words = [o.split() for o in options if o.strip()]
    silent = [w[0] for w in words if not re.search(r"default: |unset = |show this help", " ".join(w))]
    assert silent in ([], ["--phase"]), "only a required flag has no default"


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
    command("predict.py", SHARED / "kaggle7", "--run", trained, "--sample-submission", sample,
            "--submission", tmp_path / "s.csv", "--out", tmp_path / "p.npz")
    assert pl.read_csv(tmp_path / "s.csv")["imgId_eId"].to_list() == pl.read_csv(sample)["imgId_eId"].to_list()


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(rf"\b({'|'.join(SCRIPTS)})\.py\b", line)]


@pytest.mark.parametrize("line", readme_commands())
def test_every_readme_command_parses(line):
    """The flags that the README shows exist. (.ci/run runs the block under Tests word for word.)"""
    words = shlex.split(line)
    at = next(i for i, w in enumerate(words) if w.removesuffix(".py") in SCRIPTS)
    __import__(words[at].removesuffix(".py")).parse_args(words[at + 1:])
