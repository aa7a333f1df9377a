"""All four scripts one after another with the real commands, and what all of them promise."""
import ast
import importlib
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

import predict
from conftest import ROOT, TINY, command, put

SCRIPTS = "clean", "train", "predict", "ensemble"


def test_end_to_end(trained, tmp_path):
    """`trained` is clean.py, then lp and ft of train.py; here what they wrote goes on to a submission."""
    lp, ft = ([json.loads(line) for line in (trained / p / "metrics.jsonl").open()] for p in ("lp", "ft"))
    start = next(row["val_cosine"] for row in ft if "val_cosine" in row)
    assert abs(start - max(row.get("val_cosine", -1) for row in lp)) < 1e-4, "ft starts at the lp score"
    for n in (1, 2):
        done = command("predict.py", "--run", trained, "--tta", n, "--workers", 1, "--precision", "fp32", cwd=tmp_path)
        assert re.search(r"^val cosine 0\.\d{4} ± 0\.\d{4} \(n = 40\); constant baseline 0\.\d{4}$", done.stdout, re.M)
    one, two = (predict.read_preds(tmp_path / f"preds/tiny-ft-tta{n}.npz") for n in (1, 2))
    measures, scores = predict.measures(len(one["ids"]), one["weight"], one["source"]), predict.read_preds(
        tmp_path / "preds/tiny-ft-tta2.npz")
    scores = (scores["embeddings"] * scores["targets"]).sum(1), scores["groups"]
    for kind in ("balanced", "both"):
        assert f"\nval {kind} {predict.describe(*scores, measures[kind])}; constant" in done.stdout, "clustered, too"
    measured = measures["both"]
    assert abs((one["embeddings"] * one["targets"]).sum(1) @ measured - ft[-1]["best"]) < 1e-4, "what training measured"
    assert (one["ids"] == two["ids"]).all() and np.abs(one["embeddings"] - two["embeddings"]).max() > 1e-4
    assert "plain average" in command("ensemble.py", "--submission", "s.csv", cwd=tmp_path).stdout
    assert len(predict.read_submission(tmp_path / "s.csv")[0]) == 40


def test_each_script_names_the_next(raw, tmp_path):
    """What clean.py prints last, typed in, runs, and so on to the end."""
    done = command("clean.py", raw / "prompts.csv", "--out", "data/a b", "--val-fraction", 0.2, "--size", 32, cwd=tmp_path)
    tiny = ["--model", TINY, "--pretrained", "none"]
    for flags in ([*tiny, "--epochs", 1], ["--epochs", 1, "--lr", 1e-3], ["--workers", 0], ["--weights", "uniform"]):
        *_, found = re.findall("^next: python (.*)", done.stdout, re.M)
        assert "only 40 validation rows: a score on so few says little" in done.stdout
        done = command(*shlex.split(found), *flags, cwd=tmp_path)
    assert done.stdout.endswith("next: python predict.py path/to/images --run 'runs/a b/ft' --tta 2\n")
    explained = command("train.py", ok=False).stderr
    assert explained.count("\n") == 4 and "--phase lp " in explained and "--phase ft " in explained


def test_nothing_is_overwritten(trained, data, raw, tmp_path, monkeypatch):
    """Each script refuses to replace what is there, in one line that names it and the flag that allows it."""
    monkeypatch.chdir(tmp_path)
    files = {name: tmp_path / name for name in ("p.npz", "s.csv", "r.html", "e.json")}
    for file in files.values():
        file.write_text("old")
    before = {p: p.stat().st_mtime_ns for folder in (data, trained, tmp_path) for p in folder.rglob("*")}
    for line, there in ((f"clean.py {raw}/prompts.csv --out {data}", data),
                        (f"train.py --phase lp --data {data} --out {trained}", trained / "lp"),
                        (f"train.py --phase ft --data {data} --out {trained}", trained / "ft"),
                        (f"predict.py --run {trained} --out p.npz", "p.npz"),
                        (f"predict.py --run {trained} --out q.npz --submission s.csv", "s.csv"),
                        (f"predict.py --run {trained} --out q.npz --html r.html", "r.html"),
                        ("ensemble.py a.npz --out p.npz", "p.npz"), ("ensemble.py a.npz --out e.npz", "e.json")):
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit, match=f"^{there}: .*--overwrite.*$"):
            importlib.import_module(line.split(".py")[0]).main()
    assert before == {p: p.stat().st_mtime_ns for folder in (data, trained, tmp_path) for p in folder.rglob("*")}


@pytest.mark.parametrize("line", ["clean.py {}.csv", "clean.py {}", "clean.py t.csv --prompt-col {}", "predict.py {} --run {}",
                                  "clean.py columns.csv", "train.py --phase lp --data {}", "ensemble.py {}.npz"])
def test_no_control_character_reaches_the_terminal(line, tmp_path):
    odd = "\x1b]0;é\x07\x9b2J\u202e"
    columns = ",".join(f"{odd}{i:02000d}" for i in range(9))
    put(tmp_path, {"t.csv": "image,prompt\n", "columns.csv": f"{columns}\n1\n", f"{odd}/1.{odd}": b""})
    args = [word.format(*[odd] * 2) for word in line.split()]
    done = command(*args, ok=False, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})  # which lacks the é
    said = done.stdout + done.stderr
    assert "x1b" in said and said.isascii() and said.replace("\n", "").isprintable() and len(said) < 2000


def test_importing_is_silent_and_light():
    """`--help` answers at once, because the slow packages are imported where they are used."""
    heavy = ["open_clip", "faiss", "sentence_transformers", "transformers", "matplotlib", "timm", "ftfy", "wandb",
             "diffusers", "huggingface_hub"]
    code = f"import {', '.join(SCRIPTS)}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is wrapped
    parse_args = importlib.import_module(script).parse_args
    known = vars(parse_args(["--phase", "lp"] if script == "train" else []))
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out.split("\noptions:\n")[1].split("\n\n$ ")[0]
    shown = {re.search(r"--([\w-]+)", o)[1].replace("-", "_"): re.findall(r"\(default: (.*?)\)", o)
             for o in re.split(r"\n  (?=-)", text)}
    assert known.keys() - shown.keys() <= {"input", "images", "preds"}, "arguments without a flag"
    for key in known.keys() & shown.keys() - {"phase"}:  # which is required
        assert shown[key] == ([] if known[key] in (None, []) else [str(known[key])]), key


def readme_commands():
    texts = [file.read_text() for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)]
    lines = [line.split(" #")[0].strip(" &") for line in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(rf"\b({'|'.join(SCRIPTS)})\.py ?", line) and not line.startswith("#")]


@pytest.mark.parametrize("line", readme_commands())
def test_every_readme_command_parses(line):
    """The flags that README.md and docs/ show exist. (.ci/run runs the block under Tests word for word.)"""
    words = shlex.split(line.replace("$resume", "--resume"))
    script, at = next((w.split("/")[-1][:-3], i) for i, w in enumerate(words) if w.split("/")[-1][:-3] in SCRIPTS)
    importlib.import_module(script).parse_args(words[at + 1:])


def test_every_name_of_fork_me_exists():
    """What README.md says to edit is there to be found, and a flag that spares the edit is one."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", (ROOT / "README.md").read_text().split("## Fork me")[1], re.M)[1:]
    for what, where in rows:
        source = (ROOT / re.search(r"in (\w+\.py)$", where)[1]).read_text()
        for name in re.findall(r"`(\w+)`", where):
            assert re.search(name if name == "AdamW" else rf"^(def )?{name}\b", source, re.M), (what, name)
        for flag in re.findall("`--([^`]+)`", where):
            assert any(f'"--{flag}"' in (ROOT / f"{script}.py").read_text() for script in SCRIPTS), flag
    assert len(rows) > 9


@pytest.mark.parametrize("script", SCRIPTS)
def test_code_that_people_edit_is_short_and_hides_no_error(script):
    """`except Exception` stands around a decoder or a hub download and nowhere else; functions fit on a screen."""
    allowed = {"clean": {"open_rgb", "image_carriers", "find_encoder", "generate"},
               "train": {"make_backbone", "load_last", "read_weights"}, "predict": {"read_preds"}, "ensemble": set()}[script]
    long = {"parse_args": 110, "finetune": 110}
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    wide = {id(node) for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)
            and (not node.type or {"Exception", "BaseException"} & {getattr(n, "id", "") for n in ast.walk(node.type)})}
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = {id(node) for node in ast.walk(function)} & wide
            found, wide = found | ({function.name} if inside else set()), wide - inside
            assert function.end_lineno - function.lineno < long.get(function.name, 75), function.name
    assert found == allowed and not wide, "in these functions only"
