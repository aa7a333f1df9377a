"""predict.py: every kind of input, rows that never shift, views that differ, submissions, resume, readable prompts,
the report in a real browser."""
import base64
import html
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

import predict
from conftest import ROOT, command

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def predicted(path):
    return predict.read_preds(path)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def pictures(raw):
    """12 pictures of the drawn world, sorted."""
    return sorted((raw / "images").rglob("*.*"))[:12]


@pytest.fixture
def go(trained, tmp_path, monkeypatch, capsys):
    """predict.py's main on the trained run with small batches, in this process (a start takes seconds); an exception
    is a traceback and fails the test. -> (stdout, stderr), path of the npz."""
    def go(*args, out="p.npz", run=trained / "ft", ok=True):
        out, code = tmp_path / out, 0
        first = ["--batch-size", 4, "--workers", 0, "--run", run, "--out", out]  # the test's own flags overrule these
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, [*first, *args])])
        capsys.readouterr()
        try:
            predict.run(predict.main)
        except SystemExit as e:
            code = e.code
        done = SimpleNamespace(**capsys.readouterr()._asdict())
        done.err += code if isinstance(code, str) else ""
        assert bool(code) != ok, done
        return SimpleNamespace(stdout=done.out, stderr=done.err), out
    return go


@pytest.fixture(scope="module")
def viewer(trained):
    """A function: views -> the trained tiny net with these views, in float32."""
    return lambda *views: predict.Viewer(trained / "ft/best.safetensors", views, "fp32")


# ---------------------------------------------------------------------------------------------------------------- views

def test_every_view_is_another_view(viewer, pictures):
    """Mistake 4 of others: the same view twice. Here no two views of a picture have the same embedding, and several
    views give their average."""
    each = {v: next(predict.predict(viewer(v), pictures))[1] for v in predict.VIEWS}
    for a in each:
        for b in each:
            assert a == b or np.abs(each[a] - each[b]).max() > 1e-3, f"{a} and {b} see the same"
    several = ["image", "large", "zoom-mirror"]
    mean = np.mean([each[v] for v in several], 0)
    together = next(predict.predict(viewer(*several), pictures))[1]
    assert np.abs(together - mean / np.linalg.norm(mean, axis=1, keepdims=True)).max() < 1e-5


def test_a_view_is_what_its_name_says(viewer, pictures, tmp_path):
    """mirror of a picture = image of its mirror; zoom = image of its centre; large = more pixels through resized
    position embeddings."""
    image = Image.open(pictures[0]).convert("RGB").resize((80, 80))
    side = round(80 * predict.VIEWS["zoom"][1])
    at = (80 - side) // 2
    variants = {"mirror": image.transpose(Image.FLIP_LEFT_RIGHT), "zoom": image.crop((at, at, at + side, at + side))}
    image.save(tmp_path / "image.png")
    for view, variant in variants.items():
        variant.save(tmp_path / "variant.png")
        a = next(predict.predict(viewer(view), [tmp_path / "image.png"]))[1]
        b = next(predict.predict(viewer("image"), [tmp_path / "variant.png"]))[1]
        assert np.abs(a - b).max() < 1e-3, view
    large = viewer("large")
    assert large.shapes == [(40, 1)]  # 1.25 x 32 pixels
    assert large.nets["40"].tower.positional_embedding.shape[0] == 26  # 5 x 5 patches of 8, and the class token


def test_one_decode_for_all_views(viewer, pictures, monkeypatch):
    opened = []
    monkeypatch.setattr(predict, "open_rgb", lambda p: opened.append(p) or Image.open(p).convert("RGB"))
    list(predict.predict(viewer(*predict.VIEWS), pictures))
    assert opened == list(pictures)


def test_tta_and_views_flags(go, pictures):
    _, a = go(*pictures, "--tta", 3, out="a.npz")
    _, b = go(*pictures, "--views", "large", "image", "mirror", out="b.npz")
    a, b = predicted(a), predicted(b)
    assert a["views"] == ["image", "mirror", "large"] and np.abs(a["embeddings"] - b["embeddings"]).max() < 1e-5
    assert "there are" in go(*pictures, "--tta", 99, out="c.npz", ok=False)[0].stderr
    assert "twice" in go(*pictures, "--views", "image", "image", out="c.npz", ok=False)[0].stderr


def test_precision_and_compile_change_little(trained, pictures):
    exact = next(predict.predict(predict.Viewer(trained / "ft/best.safetensors", ["image"], "fp32"), pictures))[1]
    half = predict.Viewer(trained / "ft/best.safetensors", ["image"], "amp_bf16")
    assert next(half.nets["32"].tower.parameters()).dtype == torch.bfloat16, "cast once, not by autocast in every batch"
    got = next(predict.predict(half, pictures))[1]
    assert 0 < (1 - (got * exact).sum(1)).max() < 1e-3
    if shutil.which("g++"):
        compiled = predict.Viewer(trained / "ft/best.safetensors", ["image"], "fp32", compiled=True)
        assert np.abs(next(predict.predict(compiled, pictures))[1] - exact).max() < 1e-5


def test_out_of_memory_halves_the_batch(viewer, pictures, capsys):
    """A net that can bear three images: the result is that of batches of three, bit for bit, and nothing is lost."""
    class Small(torch.nn.Module):
        def __init__(self, inner, room):
            super().__init__()
            self.inner, self.room = inner, room
            self.device, self.meta, self.shapes = inner.device, inner.meta, inner.shapes

        def forward(self, x):
            if len(x[0]) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.inner(x)

    inner = viewer("image", "mirror")
    a = np.concatenate([y for _, y, _ in predict.predict(Small(inner, 3), pictures, 12)])
    b = np.concatenate([y for _, y, _ in predict.predict(inner, pictures, 3)])
    assert a.tobytes() == b.tobytes() and "3 images at a time" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="out of memory with one image"):
        list(predict.predict(Small(inner, 0), pictures))


# --------------------------------------------------------------------------------------------------------------- inputs

def test_the_same_pictures_from_everywhere(go, pictures, tmp_path):
    """Files, a folder (recursive), a zip, a tar, a CSV, a Parquet, in any order: the same ids and embeddings."""
    folder = tmp_path / "in"
    (folder / "deep/er").mkdir(parents=True)
    for i, p in enumerate(pictures):
        shutil.copy(p, folder / ["", "deep", "deep/er"][i % 3] / p.name)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as z, tarfile.open(tmp_path / "in.tar", "w") as t:
        for p in reversed(pictures):
            z.write(p, f"some/{p.name}")
            t.add(p, p.name)
        z.writestr("notes.txt", "not a picture")
    names = [os.path.relpath(p, tmp_path) for p in reversed(pictures)]
    pl.DataFrame({"n": range(12), "picture": names}).write_csv(tmp_path / "in.csv")
    pl.DataFrame({"filename": names}).write_parquet(tmp_path / "in.parquet")
    want = None
    places = [[folder], [tmp_path / "in.zip"], [tmp_path / "in.tar"], [tmp_path / "in.parquet"],
              [tmp_path / "in.csv", "--image-col", "picture"]]
    for n, inputs in enumerate([reversed(pictures), *places]):
        got = predicted(go(*inputs, out=f"{n}.npz")[1])
        got = dict(zip(got["ids"].tolist(), got["embeddings"]))
        want = want or got
        assert sorted(got) == sorted(p.stem for p in pictures)
        assert all(np.abs(got[i] - want[i]).max() < 1e-6 for i in want), inputs


def test_prompts_in_a_table_are_targets(go, raw):
    done, out = go(raw / "prompts.csv")
    preds = predicted(out)
    score = (preds["embeddings"] * preds["targets"]).sum(1).mean()
    assert f"\ncosine {score:.4f}" in done.stdout and len(preds["ids"]) == 200


def test_ids_that_clash_are_whole_paths(tmp_path, pictures):
    for d in "ab":
        (tmp_path / d).mkdir()
        shutil.copy(pictures[0], tmp_path / d / "same.png")
    shutil.copy(pictures[1], tmp_path / "other.png")
    ids, paths, _ = predict.list_images([str(tmp_path)])
    assert ids == [str(tmp_path / "a/same.png"), str(tmp_path / "b/same.png"), "other"]
    assert [Path(p).stem for p in paths] == ["same", "same", "other"]
    shutil.copy(pictures[1], os.fsencode(tmp_path) + b"/caf\xe9.png")  # not UTF-8
    assert "caf\ufffd" in predict.list_images([str(tmp_path)])[0]


def test_pictures_look_as_a_person_expects(tmp_path, viewer):
    """Alpha on white, palette, CMYK, animated, EXIF-rotated: the same picture, so nearly the same embedding. 8 and 16
    bit grey: the same, and not the coloured one's."""
    rgb = Image.new("RGB", (64, 64), "white")
    rgb.paste((200, 30, 30), (8, 8, 40, 24))
    rgb.save(tmp_path / "rgb.png")
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.asarray(rgb).min(-1) == 255, 0, 255).astype(np.uint8)))
    clear.save(tmp_path / "alpha.png")
    rgb.quantize(16).save(tmp_path / "palette.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    rgb.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (64, 64))])
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    rgb.transpose(Image.ROTATE_90).save(tmp_path / "rotated.png", exif=exif)
    grey = np.asarray(rgb.convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    same = ["alpha.png", "palette.png", "cmyk.tif", "animated.gif", "rotated.png"]
    names = ["rgb.png", "grey8.png", "grey16.png", *same]
    x = dict(zip(names, next(predict.predict(viewer("image"), [tmp_path / n for n in names]))[1]))
    for name in same:
        assert x["rgb.png"] @ x[name] > 0.999, name
    assert x["grey8.png"] @ x["grey16.png"] > 0.9999 and x["rgb.png"] @ x["grey8.png"] < 0.9999


def test_a_bad_picture_never_shifts_a_row(go, trained, pictures, tmp_path):
    """Truncated, no picture, empty, a bomb, missing: each keeps its row with the mean training embedding and is named;
    the others are untouched."""
    folder = tmp_path / "in"
    shutil.copytree(pictures[0].parent, folder)
    files = sorted(folder.iterdir())[:9]
    for extra in set(folder.iterdir()) - set(files):
        extra.unlink()
    good = predicted(go(folder, out="good.npz")[1])
    files[1].write_bytes(files[1].read_bytes()[:200])
    files[3].write_text("<html>")
    files[5].write_bytes(b"")
    files[6].write_bytes(b"BM" + struct.pack("<6I2H", 54, 0, 54, 40, 60000, 60000, 1, 24) + bytes(24))  # 60,000 squared
    done, out = go(folder, out="bad.npz")
    bad, broken = predicted(out), [1, 3, 5, 6]
    assert (bad["ids"] == good["ids"]).all()
    mean = np.array(predict.load_net(trained / "ft/best.safetensors")[1]["mean_target"])
    for i in range(9):
        assert (str(files[i]) in done.stderr) == (i in broken)
        want = mean / np.linalg.norm(mean) if i in broken else good["embeddings"][i]
        assert np.abs(bad["embeddings"][i] - want).max() < 1e-6
    stopped, out = go(folder, "--strict", out="strict.npz", ok=False)
    assert str(files[1]) in stopped.stderr and not out.exists()
    pl.DataFrame({"image": ["gone1.png", "gone2.png"]}).write_csv(tmp_path / "gone.csv")
    assert "none of the 2" in go(tmp_path / "gone.csv", out="gone.npz", ok=False)[0].stderr


@pytest.mark.parametrize("what", ["missing", "empty folder", "no archive", "no column", "no run", "truncated", "pickle",
                                  "negative"])
def test_bad_input_is_one_line(what, go, trained, tmp_path, pictures):
    args, run = [pictures[0]], trained / "ft"
    if what == "missing":
        args = [tmp_path / "nowhere"]
    elif what == "empty folder":
        (tmp_path / "empty").mkdir()
        args = [tmp_path / "empty"]
    elif what == "no archive":
        (tmp_path / "x.zip").write_bytes(b"PK\3\4 not really")
        args = [tmp_path / "x.zip"]
    elif what == "no column":
        (tmp_path / "x.csv").write_text("a,b\n1,2\n")
        args = [tmp_path / "x.csv"]
    elif what == "negative":
        args = [pictures[0], "--batch-size", 0]
    else:
        run = tmp_path / "run"
        run.mkdir()
        if what == "truncated":
            (run / "best.safetensors").write_bytes((trained / "ft/best.safetensors").read_bytes()[:5000])
        elif what == "pickle":
            torch.save({"evil": 1}, run / "best.safetensors")
    done, _ = go(*args, run=run, ok=False)
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "p.npz").exists(), done.stderr


def test_damaged_predictions_are_one_line(tmp_path):
    """Truncated, a pickle, an object array, ids twice, NaN, text: never loaded, never a traceback."""
    ok = {"ids": np.array(["a", "b"]), "embeddings": np.eye(2, 384, dtype=np.float32)}
    np.savez(tmp_path / "ok.npz", **ok)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "ok.npz").read_bytes()[:900])
    (tmp_path / "pickle.npz").write_bytes(b"\x80\x04\x95")
    np.savez(tmp_path / "object.npz", ids=np.array(["a", {}], dtype=object), embeddings=ok["embeddings"])
    np.savez(tmp_path / "twice.npz", **{**ok, "ids": np.array(["a", "a"])})
    np.savez(tmp_path / "nan.npz", **{**ok, "embeddings": ok["embeddings"] * np.nan})
    np.savez(tmp_path / "lacking.npz", ids=ok["ids"])
    np.savez(tmp_path / "one.npz", **{**ok, "ids": np.array("a")})
    np.savez(tmp_path / "text.npz", **{**ok, "embeddings": ok["embeddings"].astype(str)})
    np.savez(tmp_path / "targets.npz", **ok, targets=ok["embeddings"].astype(str))
    assert predict.read_preds(tmp_path / "ok.npz")["run"] == "ok"
    for name in ("cut", "pickle", "object", "twice", "nan", "lacking", "one", "text", "targets", "absent"):
        with pytest.raises(SystemExit) as e:
            predict.read_preds(tmp_path / f"{name}.npz")
        assert f"{name}.npz" in str(e.value) and "\n" not in str(e.value)


# -------------------------------------------------------------------------------------------------------------- outputs

def test_submission_round_trip(tmp_path):
    """Any ids, any order: what is read back is what was written, to better than 1e-6 of cosine; three thousand images
    go through in blocks."""
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((3000, 384)))
    ids = [f"id_{i}_{i % 7}" for i in range(2996)] + ['comma,"quote"', "ümlaut", "spa ce", "line\nbreak"]
    predict.write_submission(tmp_path / "s.csv", ids, x, order := list(rng.permutation(3000)))
    back, y = predict.read_submission(tmp_path / "s.csv")
    assert back == [ids[i] for i in order]
    assert (1 - (y * x[order]).sum(1) / np.linalg.norm(y, axis=1)).max() < 1e-6 and np.abs(y - x[order]).max() < 1e-6
    assert (tmp_path / "s.csv").read_text().startswith(f"imgId_eId,val\n{ids[order[0]]}_0,")


def test_sample_submission_orders_and_checks(go, pictures, tmp_path):
    order = [3, 0, 2, 1]
    ids = [pictures[i].stem for i in order]
    predict.write_submission(tmp_path / "sample.csv", ids, np.zeros((4, 384), np.float32), range(4))
    sub, sample = tmp_path / "s.csv", ["--sample-submission", tmp_path / "sample.csv"]
    _, out = go(*pictures[:4], *sample, "--submission", sub)
    got, x = predict.read_submission(sub)
    preds = predicted(out)
    assert got == ids and np.abs(x - preds["embeddings"][[preds["ids"].tolist().index(i) for i in ids]]).max() < 1e-6
    done, _ = go(*pictures[1:5], *sample, "--submission", tmp_path / "no.csv", out="no.npz", ok=False)
    assert pictures[0].stem in done.stderr and pictures[4].stem in done.stderr and not (tmp_path / "no.csv").exists()
    lines = (tmp_path / "sample.csv").read_text().splitlines()
    swapped = lines[:5] + [lines[6], lines[5]] + lines[7:]
    for n, broken in enumerate((lines[:1] + lines[2:], swapped, lines + lines[1:385], ["a,b", "1,2"], lines[:1], [])):
        (tmp_path / "broken.csv").write_text("\n".join(broken))
        with pytest.raises(SystemExit, match="not a Kaggle submission"):
            predict.read_submission(tmp_path / "broken.csv")
            pytest.fail(f"broken sample {n} went through")


def test_csv_table(go, pictures, tmp_path):
    _, out = go(*pictures[:3], "--csv", tmp_path / "t.csv")
    table, preds = pl.read_csv(tmp_path / "t.csv", schema_overrides={"id": pl.String}), predicted(out)
    assert table["id"].to_list() == preds["ids"].tolist()
    assert np.abs(table.drop("id").to_numpy() - preds["embeddings"]).max() < 1e-6


def test_killed_and_run_again(go, trained, pictures, tmp_path):
    """kill -9 in the middle: the same command goes on behind the finished batches, never reads their pictures again,
    and the file is the same to the byte."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(40):
        shutil.copy(pictures[i % 12], folder / f"{i:03d}.png")
    _, whole = go(folder, "--tta", 2, out="whole.npz")
    slow = tmp_path / "slow.py"  # the same command, pausing after two batches so that it can be killed there
    slow.write_text("import sys, time; sys.path.insert(0, sys.argv.pop(1)); import predict\n"
                    "old, n = predict.embed, []\n"
                    "def embed(*a):\n    n.append(1)\n    if len(n) > 2: time.sleep(60)\n    return old(*a)\n"
                    "predict.embed = embed; predict.main()")
    out = tmp_path / "killed.npz"
    args = [folder, "--tta", 2, "--run", trained / "ft", "--out", out, "--workers", 0, "--batch-size", 4]
    process = subprocess.Popen([sys.executable, slow, ROOT, *map(str, args)], stdout=subprocess.DEVNULL)
    for _ in range(300):
        partial = list(tmp_path.glob(".killed.npz.*.partial"))
        if partial and (np.fromfile(partial[0], np.float32).reshape(40, 385)[:, -1] > 0).sum() == 8:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    for i in range(8):
        (folder / f"{i:03d}.png").write_bytes(b"finished pictures are not opened again")
    done = command("predict.py", *args)
    assert "8 of 40" in done.stdout and out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))


def test_interrupt_and_full_disk(trained, raw, tmp_path):
    """Ctrl-C: one line, exit 130. A full disk: one line, and the old file stays."""
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import clean, predict\n"
            "def embed(*a): raise KeyboardInterrupt\npredict.embed = embed; clean.run(predict.main)")
    args = [str(raw / "images"), "--run", str(trained), "--out", str(tmp_path / "p.npz"), "--workers", "0"]
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), *args], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.strip().endswith("interrupted") and "Traceback" not in done.stderr
    (tmp_path / "p.npz").write_text("old")
    small = "ulimit -f 40; "  # files of at most 40 KiB
    again = f"exec {sys.executable} {ROOT}/predict.py {' '.join(args)} --overwrite"
    done = subprocess.run(["bash", "-c", small + again], capture_output=True, text=True)
    assert done.returncode != 0 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "p.npz").read_text() == "old"


def test_torchrun_gives_the_same_bytes(trained, raw, tmp_path):
    args = [raw / "images", "--run", trained, "--tta", 2, "--workers", 0, "--batch-size", 16, "--submission"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command("predict.py", *args, tmp_path / "1.csv", "--out", tmp_path / "1.npz", env=env)
    counting = tmp_path / "counting.py"  # the same command, noting every batch that a rank predicts
    counting.write_text(f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import predict; old = predict.embed\n"
                        "def embed(*a):\n"
                        f"    print('batch', file=open('{tmp_path}/rank' + os.environ['RANK'], 'a'))\n"
                        "    return old(*a)\n"
                        "predict.embed = embed; predict.main()")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", counting]
    done = subprocess.run([*torchrun, *map(str, args), tmp_path / "2.csv", "--out", tmp_path / "2.npz"],
                          capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 2, "rank 0 alone speaks"
    batches = [len((tmp_path / f"rank{r}").read_text().split()) for r in range(2)]
    assert batches == [7, 6], "200 pictures are 13 batches of 16, each predicted once"
    for kind in ("csv", "npz"):
        assert (tmp_path / f"1.{kind}").read_bytes() == (tmp_path / f"2.{kind}").read_bytes()


# ----------------------------------------------------------------------------------------------------- readable prompts

def test_nearest_prompts_against_brute_force():
    """Exact, sorted, and near-identical prompts counted once: of each cluster only the nearest member shows."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((60, 32))
    corpus = unit(np.repeat(base, 2, 0) + 0.02 * rng.standard_normal((120, 32)))
    x = unit(rng.standard_normal((7, 32)))
    cosines, rows = predict.nearest_prompts(x, corpus, 5)
    for i in range(7):
        want = []
        for j in np.argsort(-(corpus @ x[i])):
            if len(want) < 5 and all(corpus[j] @ corpus[k] < predict.SAME for k in want):
                want.append(j)
        assert rows[i].tolist() == want and np.abs(cosines[i] - corpus[want] @ x[i]).max() < 1e-6
        assert len({j // 2 for j in want}) == 5
    assert (predict.nearest_prompts(x, corpus[:6:2], 5)[1][:, 3:] == -1).all(), "a small corpus has no more"


def test_blending_is_the_formula():
    rng = np.random.default_rng(0)
    corpus, x = unit(rng.standard_normal((9, 8))), unit(rng.standard_normal((3, 8)))
    cosines, rows = predict.nearest_prompts(x, corpus, 4)
    got = predict.blend_neighbors(x, corpus, cosines, rows, 0.3)
    for i in range(3):
        d = np.linalg.norm(corpus[rows[i]] - x[i], axis=1)
        average = (corpus[rows[i]] / (d ** 6 + 1e-4)[:, None]).sum(0)
        mixed = 0.7 * x[i] + 0.3 * average / np.linalg.norm(average)
        assert np.abs(got[i] - mixed / np.linalg.norm(mixed)).max() < 1e-5
    assert np.abs(predict.blend_neighbors(x, corpus, cosines, rows, 0) - x).max() < 1e-6


def test_a_picture_prints_its_neighbours(trained, data, pictures, tmp_path):
    """One picture and a finished run: prompts of training rows, never of validation ones, and it says what they are
    not. Nothing lands in preds/."""
    done = command("predict.py", pictures[0], "--run", trained, cwd=tmp_path)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if re.match(r"  -?\d\.\d{3}  ", line)]
    train = pl.read_parquet(data / "pairs.parquet").filter(pl.col("split") == "train")["prompt"]
    assert len(lines) == predict.NEIGHBORS and "not the recovered prompt" in done.stdout
    assert {p for _, p in lines} <= set(train) and not list(tmp_path.iterdir())
    assert [float(c) for c, _ in lines] == sorted([float(c) for c, _ in lines], reverse=True)


def test_neighbours_from_a_corpus_and_blended(go, trained, data, raw, tmp_path):
    corpus = tmp_path / "corpus.csv"
    prompts = ["a red \x1b[31m star\non a hill", "blue water", "blue  water!", "seven green horses"]
    pl.DataFrame({"prompt": prompts}).write_csv(corpus)
    done, out = go(raw / "images/" / "", "--neighbors", 2, "--corpus", corpus)
    table = pl.read_parquet(tmp_path / "p.neighbors.parquet")
    assert table.columns == ["id", "rank", "cosine", "prompt"]
    assert len(table) == 2 * len(predicted(out)["ids"]) and set(table["rank"]) == {0, 1}
    picture = sorted((raw / "images").rglob("*.*"))[0]
    assert "\x1b" not in go(picture, "--corpus", corpus, out="one.npz")[0].stdout, "prompts are other people's text"
    plain, blended = go(out="plain.npz")[1], go("--blend-neighbors", 0.3, out="blended.npz")[1]
    a, b = predicted(plain), predicted(blended)
    assert b["views"] == ["image", "neighbors-0.3"] and 1e-4 < np.abs(a["embeddings"] - b["embeddings"]).max()
    assert np.abs(np.linalg.norm(b["embeddings"], axis=1) - 1).max() < 1e-5
    assert "must be in [0, 1]" in go("--blend-neighbors", 2, out="c.npz", ok=False)[0].stderr
    assert "no such file" in go("--corpus", tmp_path / "no.csv", out="c.npz", ok=False)[0].stderr


# ----------------------------------------------------------------------------------------------------------- the report

def dump(page, tmp_path):
    """The page's DOM after its scripts ran in headless Chromium, as text."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    return subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--dump-dom",
                           f"--user-data-dir={tmp_path}/chromium", f"file://{page}"],
                          capture_output=True, text=True, timeout=60).stdout


def browse(page, tmp_path, script):
    """Run `script` in the page -> what it returns. Without the page's policy, so that our script may run, and so that
    the escaping is tested alone."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    ours = f"<script>document.title = JSON.stringify((() => {{{script}}})())</script></body>"
    (tmp_path / "copy.html").write_text(text.replace("</body>", ours))
    dom = dump(tmp_path / "copy.html", tmp_path)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1]))


HOSTILE = ["<script>window.hacked = 1</script>", '"><img src=x onerror="window.hacked=2">',
           "</li></ul><svg onload=window.hacked=3>", "'; window.hacked = 4; '", "&lt;b&gt; {} ${window.hacked=5}",
           "a plain zebra"]


@pytest.fixture
def report(tmp_path, pictures):
    """A report with hostile ids, prompts and neighbours."""
    tower = {"image_size": 32, "interpolation": "bicubic"}
    thumbnails = predict.Thumbnails([*pictures[:5], tmp_path / "gone.png"], tower)
    facts = {"run</dd><script>hacked=6</script>": "<script>hacked=7</script>"}
    cosines, neighbors = np.array([0.5, 0.9, 0.1, 0.7, 0.3, 0.6]), [[(0.5, p), (0.4, "twin")] for p in HOSTILE]
    predict.write_report(tmp_path / "r.html", "<b>title</b>", HOSTILE, (thumbnails[i] for i in range(6)), facts,
                         cosines, 0.4, HOSTILE[::-1], neighbors, {5})
    return tmp_path / "r.html"


def test_report_is_one_page_and_escaped(report):
    text = report.read_text()
    assert len(re.findall("<script", text)) == 1 and "onerror=\"" not in text and "default-src 'none'" in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?:""", text), "nothing from outside"
    assert text.count("data:image/jpeg;base64,") == 5
    assert "no picture" in text and "unreadable" in text and 'lang="en"' in text
    for picture in re.findall(r"data:image/jpeg;base64,([^\"]+)", text):
        assert max(Image.open(io.BytesIO(base64.b64decode(picture))).size) <= 160


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")
def test_report_in_a_browser(report, tmp_path):
    """Nothing hostile runs, sorting and filtering work, the status is announced, every control has a label, nothing
    overflows a phone."""
    got = browse(report, tmp_path, """
        const all = what => [...document.querySelectorAll(what)], page = document.documentElement;
        const order = () => all('.card:not([hidden]) b').map(b => b.textContent);
        const set = (id, v) => { $(id).value = v; $(id).dispatchEvent(new Event('input')); return order(); };
        const out = {start: order(), ids: all('h2').map(h => h.firstChild.textContent)};
        out.worst = set('sort', 'worst');
        out.best = set('sort', 'best');
        out.back = set('sort', 'order');
        out.zebra = set('filter', 'ZEBRA');
        out.status = $('count').textContent;
        out.none = set('filter', 'no such text');
        out.all = set('filter', '').length;
        out.labels = all('input,select').every(e => e.labels.length);
        out.live = $('count').getAttribute('role');
        out.hacked = String(window.hacked);
        out.elements = all('img').length + all('svg').length + document.scripts.length;
        out.wide = page.scrollWidth <= innerWidth;
        page.style.width = '360px';
        out.phone = $('grid').scrollWidth <= 360;
        return out""")
    assert got["hacked"] == "undefined" and got["ids"] == HOSTILE and got["elements"] == 5 + 1 + 2
    assert got["start"] == got["back"] == ["0.500", "0.900", "0.100", "0.700", "0.300", "0.600"]
    assert got["worst"] == sorted(got["start"]) and got["best"] == got["worst"][::-1]
    assert got["zebra"] == ["0.500", "0.600"] and got["status"] == "2 of 6 pictures"
    assert got["none"] == [] and got["all"] == 6
    assert got["labels"] and got["live"] == "status" and got["wide"] and got["phone"]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")
def test_report_policy_runs_our_script_alone(report, tmp_path):
    """With the policy in place our script still runs (its hash is right), and a planted one would not."""
    page = tmp_path / "policy.html"
    page.write_text(report.read_text().replace("</body>", "<script>document.title = 'planted'</script></body>"))
    dom = dump(page, tmp_path)
    assert "6 of 6 pictures</output>" in dom and "<title>planted" not in dom


def test_two_thousand_pictures_in_one_page(tmp_path):
    thumbnail = "data:image/jpeg;base64," + "A" * 6000
    n = 2000
    prompts, neighbors = ["a prompt of twelve words " * 3] * n, [[(0.5, "another prompt of some words " * 3)] * 5] * n
    predict.write_report(tmp_path / "r.html", "t", list(range(n)), (thumbnail for _ in range(n)), {},
                         np.linspace(0, 1, n), 0.4, prompts, neighbors)
    assert (tmp_path / "r.html").stat().st_size < 20e6
    if CHROMIUM:
        got = browse(tmp_path / "r.html", tmp_path, """
            $('sort').value = 'best';
            $('sort').oninput();
            return [cards.length, document.querySelector('.card').dataset.n]""")
        assert got == [n, str(n - 1)]


def test_report_of_a_run(go, tmp_path, data):
    done, _ = go("--html", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert text.count('class="card"') == 40 and "true prompt" in text and text.count("<q>") == 40 * predict.NEIGHBORS


# ------------------------------------------------------------------------------------------------------ Kaggle, offline

def test_offline_kaggle_notebook(trained, raw, pictures, tmp_path):
    """A folder with the four scripts and a run, no training data, and a machine on which every connection fails:
    predictions, prompts, submission."""
    for script in ("clean", "train", "predict", "ensemble"):
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copytree(trained / "ft", tmp_path / "runs/tiny/ft")
    shutil.rmtree(tmp_path / "runs/tiny/ft/cache", ignore_errors=True)
    (tmp_path / "off").mkdir()
    (tmp_path / "off/sitecustomize.py").write_text(
        "import socket\n"
        "def no(*a, **k): raise OSError(101, 'the test has no network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = no\n")
    images = tmp_path / "images"
    images.mkdir()
    for p in pictures:
        shutil.copy(p, images)
    prompts = [f"a prompt about number {i}" for i in range(30)]
    pl.DataFrame({"prompt": prompts}).write_parquet(tmp_path / "prompts.parquet")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path / "off")}

    def offline(*words):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    base = ["predict.py", "images", "--run", "runs/tiny", "--workers", "0"]
    offline(*base, "--out", "preds/a.npz")
    offline(*base, "--out", "preds/b.npz", "--tta", "4", "--neighbors", "3", "--corpus", "prompts.parquet",
            "--blend-neighbors", "0.1")
    offline("ensemble.py", "--weights", "2,1", "--submission", "submission.csv")
    assert predict.read_submission(tmp_path / "submission.csv")[0] == sorted(p.stem for p in pictures)


def test_a_banner_costs_no_gigabytes():
    """60,000 x 10 pixels are cropped before they are enlarged; what is seen is what the plain way shows."""
    from train import to_square
    wide = Image.effect_noise((400, 40), 90).convert("RGB")
    middle = wide.crop((140, 0, 260, 40))  # 3 : 1, resized whole
    assert torch.equal(to_square(wide, 64, Image.BICUBIC), to_square(middle, 64, Image.BICUBIC))
    code = "import resource, train; from PIL import Image; b = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; " \
           "[train.to_square(Image.new('RGB', s), 224, Image.BICUBIC) for s in ((60000, 10), (10, 60000))]; " \
           "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - b < 50_000"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
