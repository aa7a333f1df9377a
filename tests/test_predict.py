"""predict.py: views, inputs, rows that never shift, files, readable prompts, the report in a real browser, Kaggle."""
import base64
import http.client
import io
import json
import os
import re
import resource
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image, ImageFilter

import clean
import predict
from conftest import ROOT, unit
from train import to_square

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")


def far(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


def save(path, write, *args):
    with open(path, "wb") as f:
        write(f, *args)


def put(files):  # {path: bytes, text, or a file to copy}
    for path, content in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = content.read_bytes() if isinstance(content, Path) else content
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="module")
def images(raw):
    return sorted((raw / "images").rglob("*.*"))[:12]


@pytest.fixture(scope="module")
def model(trained):
    return predict.TTAModel(trained / "ft/best.safetensors", "fp32", torch.device("cpu"))


def embed(model, images, views=("image",), size=64):
    return predict.predict(model, list(map(str, images)), list(views), SimpleNamespace(batch_size=size, workers=0))[0]


@pytest.fixture
def go(trained, data, tmp_path, monkeypatch, capsys):
    """predict.py's main in this process (a start takes seconds), in tmp_path -> what it printed, and its npz. fails: it
    must end in one line that has this text, and write nothing. Any other exception fails the test."""
    monkeypatch.chdir(tmp_path)
    cache = data.parent / ".cache"
    monkeypatch.setattr(predict, "encode_cached", lambda *a, **k: clean.encode_cached(*a, **k, cache=cache))

    def go(*args, out="p.npz", fails=None):
        args = ["--run", trained, "--batch-size", 4, "--workers", 0, "--precision", "fp32", "--overwrite", *args]
        args += ["--out", "none.npz" if fails else out] if out else []
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit, match=rf"\A.*{fails}.*\Z") if fails else nullcontext():
            clean.run(predict.main, "nothing was written")
        assert not Path("none.npz").exists()
        preds = {} if fails or not out else predict.read_preds(out)
        return SimpleNamespace(**capsys.readouterr()._asdict(), **preds)
    return go


def test_every_view_is_what_its_name_says(model, images, go, monkeypatch):
    """No two have the same embedding, several give their average, from one decode; one of your own is one line."""
    monkeypatch.setitem(predict.VIEWS, "mine", lambda image: image.rotate(90))
    image, mirror, opened = Image.open(images[0]).convert("RGB").resize((80, 80)), Image.FLIP_LEFT_RIGHT, []
    image.save("image.png")
    centre = image.crop((8, 8, 72, 72))
    said = {"image": image, "mirror": image.transpose(mirror), "zoom": centre, "zoom-mirror": centre.transpose(mirror),
            "mine": image.transpose(Image.ROTATE_90)}
    assert list(said) == list(predict.VIEWS)
    for view, x in zip(said, predict.ViewDataset(["image.png"], model.spec, list(said))[0][0]):
        assert torch.equal(x, to_square(said[view], model.spec)), view
    alone = {v: embed(model, images, [v]) for v in said}
    assert all(far(alone[a], alone[b]) > 1e-3 for a in said for b in said if a != b), "two views see the same"
    monkeypatch.setattr(predict, "open_rgb", lambda p: opened.append(p) or clean.open_rgb(p))
    assert far(embed(model, images, said), unit(sum(alone.values()))) < 1e-5 and opened == list(map(str, images))
    three = go(*images, "--tta", 3)
    assert three.views == list(said)[:3] and far(three.embeddings, unit(sum(alone[v] for v in three.views))) < 1e-5


def test_a_mistake_in_the_code_shows_its_line(go, images, trained):
    """What people edit is no bad image. With loader workers, too, a real process ends, and with that line."""
    for place, name in ((predict.VIEWS, "image"), (vars(predict), "to_square"), (vars(predict), "embed")):
        for error, typo in ((NameError, lambda *_: tpyo), (OSError, lambda *_: open("gone.png"))):  # noqa: F821
            with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
                patch.setitem(place, name, typo)
                go(*images)
    put({"fork.py": f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport predict\ndef view(image):\n"
                    "    return tpyo(image)\npredict.VIEWS['image'] = view\npredict.main()"})
    args = ["fork.py", *images, "--run", trained, "--workers", "2", "--batch-size", "2", "--out", "p.npz"]
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=60)
    assert "    return tpyo(image)" in done.stderr and "NameError" in done.stderr and not Path("p.npz").exists()


def test_precision_changes_little(trained, model, images):
    half = predict.TTAModel(trained / "ft/best.safetensors", "amp_bf16", torch.device("cpu"))
    assert next(half.model.backbone.parameters()).dtype == torch.bfloat16, "cast once, not by autocast at every batch"
    assert 0 < (1 - (embed(half, images) * embed(model, images)).sum(1)).max() < 1e-3


@pytest.mark.parametrize("error, room, sizes", [
    (torch.OutOfMemoryError("CUDA out of memory"), 3, [6, 3, 3, 3, 3]),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, [6, 3, 3, 3, 3]),
    (torch.OutOfMemoryError("CUDA out of memory"), 0, [6, 3, 2, 1]), (RuntimeError("device-side assert"), 3, [6])])
def test_out_of_memory_halves_the_batch(model, images, error, room, sizes):
    """What comes out is that of smaller batches, bit for bit; where one image is too many, and other errors, pass."""
    def small(x):
        tried.append(len(x))
        if len(x) > room:
            raise error
        return model(x)
    small.device, small.spec, tried, done = model.device, model.spec, [], len(sizes) == 5
    with nullcontext() if done else pytest.raises(type(error)):
        assert embed(small, images, size=6).tobytes() == embed(model, images, size=3).tobytes() and done
    assert tried == sizes


def test_the_same_images_from_everywhere(go, images):
    put({f"in/{['', 'deep/', 'deep/er/'][i % 3]}{p.name}": p for i, p in enumerate(images)} | {"in/notes.md": "text"})
    names = [os.path.relpath(p) for p in reversed(images)]
    pl.DataFrame({"n": range(12), "photo": names}).write_csv("in.csv")
    pl.DataFrame({"filename": names}).write_parquet("in.parquet")
    want, archives = go(*images), [[shutil.make_archive("in", kind, "in")] for kind in ("zip", "tar")]
    assert want.ids.tolist() == [p.stem for p in images]
    for args in (images[::-1], ["in"], *archives, ["in.parquet"], ["in.csv", "--image-col", "photo"]):
        got = go(*args)
        order = np.argsort(got.ids)
        assert (got.ids[order] == want.ids).all() and far(got.embeddings[order], want.embeddings) < 1e-6, args


def test_ids_that_clash(go, tmp_path, images):
    """They are whole paths. Two names that are not UTF-8 can have one text."""
    put(dict.fromkeys(["in/a/same.png", "in/b/same.png", "in/other.png"], images[0]))
    assert go(tmp_path / "in").ids.tolist() == [f"{tmp_path}/in/a/same.png", f"{tmp_path}/in/b/same.png", "other"]
    put(odd := {os.fsdecode(b"odd/caf\xe9.png"): images[0], os.fsdecode(b"odd/caf\xe8.png"): images[0]})
    assert predict.list_images([*odd][:1])[0] == ["caf\ufffd"]
    go(*odd, fails="two images have this id")
    go(shutil.make_archive("odd", "tar", "odd"), fails="two images have this id")
    put(dict.fromkeys(["x.png", "x.png.png", "more/x.png"], images[0]))
    go("x.png", "x.png.png", "more/x.png", fails="x.png: two images have this id")
    put({"new\nline/a\x1b,\".png": images[0], "new\nline/b\n.png": images[0]})
    assert go("new\nline", "--submission", "s.csv").ids.tolist() == predict.read_submission("s.csv")[0]


def test_known_prompts_are_targets(go, raw, data, images, monkeypatch):
    """Of a table or of sidecars; not where one is unknown. Those that were trained on are told apart."""
    table, prompts = go(raw / "prompts.csv", "--html", "r.html"), pl.read_csv(raw / "prompts.csv")
    train = np.load(data / "targets.npy")[(pl.read_parquet(data / "pairs.parquet")["split"] == "train").to_numpy()]
    trained, cosines = (table.targets @ train.T).max(1) >= 0.7, (table.embeddings * table.targets).sum(1)
    assert (table.trained == trained).all() and 100 < trained.sum() < 190 and len(table.ids) == 200
    leader = np.arange(200)  # greedily, by cosine 0.7: the groups of the standard errors
    for i in range(200):
        near = [j for j in range(i) if leader[j] == j and table.targets[i] @ table.targets[j] >= 0.7]
        leader[i] = max(near, key=lambda j: table.targets[i] @ table.targets[j], default=i)
    assert (table.groups == leader).all() and table.weight is None
    for name, rows in ("trained-on", trained), ("other", ~trained):
        assert f"\n{name} prompts: cosine {predict.describe(cosines[rows], table.groups[rows])} (n" in table.out
        assert f"(n = {rows.sum()});" in table.out
        assert f"{name} prompts: mean cosine</dt><dd>{cosines[rows].mean():.4f} ± " in Path("r.html").read_text()
    assert Path("r.html").read_text().count(">trained on this prompt<") == trained.sum()
    for name, prompt in prompts.select(pl.col("image").str.extract(r"(\w+)\.\w+$"), "prompt").head(2).rows():
        put({f"in/{name}.png": images[0], f"in/{name}.txt": prompt})
    got, row = go(shutil.make_archive("in", "zip", "in")), {i: n for n, i in enumerate(table.ids)}
    assert far(got.targets, table.targets[[row[i] for i in got.ids]]) < 1e-5
    Path(f"in/{name}.txt").unlink()
    assert go(shutil.make_archive("fewer", "zip", "in")).targets is None
    monkeypatch.setattr(predict, "has_data", lambda _: False)
    assert "may have been trained on" in (gone := go(raw / "prompts.csv")).err and gone.trained is None


def test_standard_errors_are_clustered():
    """By groups: rows three times over tell no more than once. A row of weight 2 counts as two rows of its group."""
    rng = np.random.default_rng(0)
    c, groups = rng.standard_normal(50), rng.integers(0, 20, 50)
    assert far(predict.mean_and_error(c), [c.mean(), c.std(ddof=1) / 50 ** 0.5]) < 1e-12
    assert predict.mean_and_error([0.5]) == [0.5, 0]
    assert far(predict.mean_and_error(c.repeat(3), np.arange(150) // 3), predict.mean_and_error(c)) < 1e-12
    assert predict.describe([.5, .7], [3, 3]) == "0.6000 (one group of prompts, so no standard error)"
    w = rng.integers(1, 4, 50)
    assert far(predict.mean_and_error(c, groups, w), predict.mean_and_error(c.repeat(w), groups.repeat(w))) < 1e-12
    spread = [predict.mean_and_error(rng.standard_normal(20)[groups], groups) for _ in range(2000)]  # of known truth
    means, errors = np.transpose(spread)
    assert 0.9 < errors.mean() / means.std() < 1.05, "a standard error is the spread of the mean"


def test_which_weights(tmp_path):
    for meta, log, said in (({"weights": "ema", "step": 1200}, "", "EMA weights of step 1,200"),
                            ({"weights": "raw", "step": 7, "args": {"phase": "lp"}}, "", "raw weights of step 7"),
                            ({"step": 0}, '{"done": true}', "the start of ft, which no epoch beat"),
                            ({"step": 0}, "{}", "the start of ft, which is not finished"),
                            ({"soup": ["a", "b"]}, "", "an average of 2 runs")):
        put({tmp_path / "best.safetensors": "", tmp_path / "metrics.jsonl": log})
        assert predict.name_weights({"args": {"phase": "ft"}} | meta, tmp_path / "metrics.jsonl") == said


def test_a_bad_image_never_shifts_a_row(go, model, images):
    """It keeps its row, with the mean training embedding, and is named; the other rows are untouched."""
    put({f"in/{i}.png": p for i, p in enumerate(images)})
    good, mean = go("in"), unit(np.array(model.meta["mean_target"]))
    put(bad := {"in/1.png": images[1].read_bytes()[:200], "in/3.png": "<html>", "in/5.png": ""})
    done = go("in")
    for i, name in enumerate(good.ids):
        broken = f"in/{name}.png" in bad
        assert done.ids[i] == name and broken == (f"in/{name}.png: image unreadable" in done.err)
        assert far(done.embeddings[i], mean if broken else good.embeddings[i]) < 1e-6
    put({"gone.csv": "image\ngone1.png\ngone2.png"})
    go("gone.csv", fails="none of the 2")


def test_user_errors_are_one_line(go, trained, copy, data, images):
    put({"x.zip": "PK not really", "x.csv": "a,b\n1,2\n", "hole.csv": "image,b\nx.png,1\n,2\n", "empty/notes.md": "",
         "cut/best.safetensors": (trained / "ft/best.safetensors").read_bytes()[:5000]})
    put({"hole.txt": "", "null.jsonl": '{"prompt": null}'})
    os.mkfifo("pipe.csv")
    torch.save({"evil": 1}, "pickle.safetensors")
    summary = copy(data) / "summary.json"
    summary.write_text(summary.read_text().replace('"text_model": {', '"text_model": {"other": 1, '))
    for line, said in {
            "gone": "no such file", "empty": "no images there", "x.zip": "not a readable archive", "x.csv": "no column",
            "hole.csv": "1 of its 2 rows name no image", "hole.csv --prompt-col c": "no column c",
            "1.png --tta 9": r"--tta 9: must be in \[1, 4\]", "1.png --batch-size 0": "--batch-size 0",
            "1.png --blend-neighbors 2": r"in \[0, 1\]", "1.png --blend-neighbors nan": r"in \[0, 1\]",
            "1.png --neighbors 1000000000": "--neighbors 1000000000: must be in", "1.png --workers 9999": "--workers",
            f"1.png --limit 1{'0' * 30}": "--limit 10", "1.png --corpus pipe.csv": "not a regular file",
            "pipe.csv": "not a regular file",
            "1.png --sample-submission pipe.csv": "no such file", "1.png --corpus hole.txt": "no kind of table",
            "1.png --corpus null.jsonl": "no prompts there", "1.png --corpus no.csv": "--corpus no.csv: no such file",
            "1.png --corpus x.csv": "no column", f"1.png --corpus {summary.parent}": "prompts are embedded by",
            "1.png --run empty": "train one with", "1.png --run cut": "does not fit",
            "1.png --run pickle.safetensors": "does not fit",
            "1.png --sample-submission x.csv": "not a Kaggle submission"}.items():
        go(*line.replace("1.png", str(images[0])).split(), fails=said)


def test_damaged_predictions_are_one_line(tmp_path, monkeypatch):
    """npz and Kaggle CSVs are not loaded then, and do not end in a traceback."""
    monkeypatch.chdir(tmp_path)
    x, ids = np.eye(2, 384, dtype=np.float32), np.array(["a", "b"])
    for key, values in {"ids": (["a", {}], ["a", "a"], "a", [1, 2], [b"a", b"b"]), "targets": (x.astype(str), x[:, :3]),
                        "embeddings": (
            np.full_like(x, np.nan), x.astype(str), x[:1], x[0], x * 0, x * [[1], [0]],
            x.astype(float) * 1e300, x[:, :0], np.ones((2, 5000))),
            "groups": ([1], [[1], [2]], [{}, 1]), "weight": ([1.], [0., 1], [np.nan, 1]), "run": (["a"] * 2000, 1, "a" * 5000)}.items():
        for i, value in enumerate(values):
            np.savez(f"{key}{i}.npz", **{"ids": ids, "embeddings": x, key: np.array(value)})
    for i, odd in enumerate((["a" * 5000, "b"], ["\ud800", "b"])):
        np.savez(f"id{i}.npz", ids=np.array(odd), embeddings=x)
    np.savez("ok.npz", ids=ids, embeddings=x * 9, more=np.array([{}]))  # which would be unpickled if it were read
    assert far(predict.read_preds("ok.npz")["embeddings"], x) == 0
    np.savez_compressed("bomb.npz", ids=np.arange(90_000).astype(str), embeddings=np.ones((90_000, 384), np.float16))
    with zipfile.ZipFile("lie.npz", "w") as archive:
        for name, shape in (("ids", (1 << 40,)), ("embeddings", (1 << 40, 384))):
            np.lib.format.write_array_header_1_0(header := io.BytesIO(), {
                "descr": "<U1" if name == "ids" else "<f4", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", header.getvalue())
    for name in ("pipe.npz", "pipe.csv"):
        os.mkfifo(name)
    Path("zero.npz").symlink_to("/dev/zero")
    Path("folder.npz").mkdir()
    save("ok.csv", predict.write_submission, ids, x, [0, 1])
    assert predict.read_preds("ok.npz")["run"] == predict.read_preds("ok.csv")["run"] == "ok"
    head, *rows = Path("ok.csv").read_text().splitlines()
    for i, lines in enumerate((rows[:-1], [rows[1], rows[0], *rows[2:]], rows + rows[:384], [], ["a_0,word"], ["a,1"],
                               ["a_0,", *rows[1:]], ["a_0,nan", *rows[1:]], [*rows[:-1], "b_383,inf"])):
        put({f"rows{i}.csv": "\n".join([head, *lines])})
    put({"no.npz": Path("ok.npz").read_bytes()[:900], "pickle.npz": b"\x80\x04\x95", "no.csv": "a,b\n1,2", "0.csv": ""})
    for path in sorted({*map(str, Path().iterdir()), "absent.npz"} - {"ok.npz", "ok.csv"}):
        with pytest.raises(SystemExit, match=f"^{path}: .*$"):
            predict.read_preds(path)
            pytest.fail(f"{path} was loaded")


def test_submission_round_trip(go, images):
    """Any ids in any order, in blocks, exact to 1e-6; a sample decides the order and must name the same images."""
    rng = np.random.default_rng(0)
    x, order = unit(rng.standard_normal((3000, 384))), rng.permutation(3000).tolist()
    ids = [f"id_{i}_{i % 7}" for i in range(2996)] + ['comma,"quote"', "ümlaut", "spa ce", "line\nbreak"]
    save("s.csv", predict.write_submission, ids, x, order)
    back, y = predict.read_submission("s.csv")
    assert back == [ids[i] for i in order] and far(y, x[order]) < 1e-6
    assert Path("s.csv").read_text().startswith(f"imgId_eId,val\n{back[0]}_0,")
    stems, sample = [p.stem for p in images[:4]], ["--sample-submission", "sample.csv"]
    save("sample.csv", predict.write_submission, stems, x[:4], (3, 0, 2, 1))
    for flags, order in ((sample, (3, 0, 2, 1)), ([], range(4))):
        done = go(*images[3::-1], "--submission", "s.csv", *flags)
        back, y = predict.read_submission("s.csv")
        assert back == [stems[i] for i in order] and far(y, [done.embeddings[done.ids == i][0] for i in back]) < 1e-6
    go(*images[1:5], *sample, "--submission", "no.csv", fails=f"{stems[0]}.*{images[4].stem}")


def test_the_newest_finished_run_and_its_validation_split(go, model, data, trained, monkeypatch):
    """Without flags. Ids are row numbers of pairs.parquet; the report shows the names of the user's own files."""
    for name, last, when in (("old", '{"done": true}', 1), ("new", '{"done": true}', 2), ("unfinished", "{}", 3)):
        put({f"runs/{name}/ft/metrics.jsonl": last, f"runs/{name}/ft/best.safetensors": "not read here"})
        os.utime(f"runs/{name}/ft/metrics.jsonl", (when, when))
    for i, odd in enumerate((b"\xff\xfe\0", "[1]", "", '{"done": false}',
                             '{"step": "\\"done\\": true"}', '{"done": true}\n{"step',
                             "[" * 9999)):
        put({f"runs/odd{i}/ft/metrics.jsonl": odd, f"runs/odd{i}/ft/best.safetensors": ""})  # are newer, and skipped
    put(dict.fromkeys(["runs/pipe/ft/best.safetensors", "runs/folder/ft/metrics.jsonl/x"], ""))
    os.mkfifo("runs/pipe/ft/metrics.jsonl")
    assert predict.newest_run() == Path("runs/new/ft") and "changed" not in go("--html", "r.html", out=None).err
    preds, (pairs, targets, summary) = predict.read_preds("preds/tiny-ft-tta1.npz"), clean.read_data(data)
    val = pairs.with_row_index().filter(pl.col("split") == "val")
    assert preds["ids"].tolist() == [f"{i:07d}" for i in val["index"]] and len(val) == 40
    assert far(preds["targets"], targets[val["index"]]) < 1e-6
    assert far(preds["embeddings"], embed(model, [data / p for p in val["image"]])) < 1e-5
    worst = np.argsort((preds["embeddings"] * preds["targets"]).sum(1), kind="stable")
    assert re.findall("<h2>(.*?)<", Path("r.html").read_text()) == [Path(val["origin"][int(i)]).name for i in worst]
    monkeypatch.setattr(predict, "read_data", lambda _: (pairs, targets, summary | {"hashes": {}}))
    assert "has changed" in go().err


def test_only_our_files_are_replaced(go, images, tmp_path):
    """--overwrite names what it replaces. Everything else stays: other files, inputs, folders, links; two outputs need
    two names, and a process that writes keeps others away."""
    outputs = {"--submission": "s.csv", "--html": "r.html", "--out": "q.npz"}
    args = images[0], "--neighbors", 2, *(a for pair in outputs.items() for a in pair)
    files = {*outputs.values(), "q.neighbors.parquet"}
    for replaced in (0, 4):
        assert go(*args, out=None).out.count("will be replaced") == replaced and {*os.listdir()} == files
    np.savez("their.npz", ids=["a"], x=[1])
    pl.DataFrame({"id": [1], "prompt": ["a"]}).write_parquet("t.neighbors.parquet")
    put({"their.csv": "id,val\n", "their.html": "<!doctype html>mine", "in.png": images[0], "t.npz": Path("q.npz")})
    Path("pipe").symlink_to("gone")
    Path("folder").mkdir()
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.iterdir()}
    for line, said in {
            "--out their.npz": "their.npz: not made by", "--submission their.csv": "their.csv: not made by",
            "--html their.html": "their.html: not made", "--out t.npz --neighbors 2": "t.neighbors.parquet: not made",
            "--html in.png": "in.png: is another", "--out a.npz --html ./a.npz": "a.npz: is another",
            "--submission s.csv --sample-submission s.csv": "s.csv: is another", "--html .": ".: not the name",
            "--html folder/../folder": "not the name", "--html pipe": "not the name", "--out in.png/a": "not the name",
            "--html none/..": "not the name", "--out . --neighbors 2": "not the name"}.items():
        go("in.png", *line.split(), out=None, fails=said)
    assert before == {p: p.is_file() and p.read_bytes() for p in tmp_path.iterdir()}
    with predict.claim(["new.npz"], False):
        child = os.fork()
        if not child:  # where pytest must not go on
            try:
                with predict.claim(["new.npz"], True):
                    os._exit(0)
            except SystemExit as e:
                os._exit(7 * ("new.npz: another process" in str(e)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert before.keys() == {*tmp_path.iterdir()}


def test_what_is_not_finite_is_not_written(go, images, monkeypatch):
    """One line, before any file; such as after an overflow of 16 bits."""
    for value in (np.nan, np.inf, 0.5):
        monkeypatch.setattr(predict, "embed", lambda model, x, size: (torch.full((len(x), 384), value), size))
        go(*images, "--submission", "s.csv", fails="--precision fp32.* 12 of 12 embeddings are not finite rows")
    assert not list(Path().iterdir())


def test_full_disk_and_interrupt(go, trained, images, monkeypatch):
    """One line, and the old file stays."""
    x, ids = np.ones((99, 384), np.float32), [f"{i ** 9}" for i in range(99)]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (lambda f: predict.write_preds(f, ids=np.array(ids), embeddings=x),
                  lambda f: predict.write_submission(f, ids, x, range(99)),
                  lambda f: predict.write_neighbors(f, ids, [[(0.5, i)] for i in ids]),
                  lambda f: predict.write_report(f, "t", {}, ids, [""] * 99)):
        put({"out": "old"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            with pytest.raises(SystemExit, match=r"^out: cannot be written \(.*$"):
                predict.write_all({}, {"other": lambda f: f.write(b"short"), "out": write})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert Path("out").read_text() == "old" and list(Path().iterdir()) == [Path("out")]
    monkeypatch.setattr(clean, "open_rgb", lambda _: os.kill(os.getpid(), 2))  # Ctrl-C
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, images), "--run", str(trained), "--workers", "0"])
    with pytest.raises(SystemExit, match="^\ninterrupted; nothing was written$"):
        runpy.run_path(str(ROOT / "predict.py"), run_name="__main__")
    assert not list(Path("preds").glob("*"))


def test_neighbours_are_exact(go, monkeypatch):
    """Of near-identical prompts the nearest alone, the same without faiss (as on Kaggle); blending is the formula."""
    rng = np.random.default_rng(0)
    corpus = unit(np.repeat(rng.standard_normal((60, 32)), 2, 0) + 0.02 * rng.standard_normal((120, 32)))
    x = unit(rng.standard_normal((7, 32)))
    for _ in range(2):
        cosines, rows = predict.nearest_prompts(x, corpus, 5)
        for i in range(7):
            want = []
            for j in np.argsort(-(corpus @ x[i])):
                if len(want) < 5 and all(corpus[j] @ corpus[k] < 0.95 for k in want):
                    want.append(j)
            assert rows[i].tolist() == want and far(cosines[i], corpus[want] @ x[i]) < 1e-6
            assert len({j // 2 for j in want}) == 5
        assert (predict.nearest_prompts(x, corpus[:6:2], 5)[1][:, 3:] == -1).all(), "a small corpus has no more"
        monkeypatch.setitem(sys.modules, "faiss", None)
    for y, v, near in zip(predict.blend_neighbors(x, corpus, cosines, rows, 0.3), x, corpus[rows]):
        weights = 1 / (np.linalg.norm(near - v, axis=1) ** 6 + 1e-4)
        assert far(y, unit(0.7 * v + 0.3 * unit(weights @ near))) < 1e-5
    plain, blended = go(), go("--blend-neighbors", 0.3)
    assert blended.views == ["image", "neighbors-0.3"] and far(plain.embeddings, blended.embeddings) > 1e-4


def test_readable_prompts(go, data, images):
    """Of training rows alone: printed for a few images, where no file is written; a table for many. No control
    characters of other people's prompts or file names reach the terminal."""
    done, train = go(images[0], out=None), pl.read_parquet(data / "pairs.parquet").filter(pl.col("split") == "train")
    found = re.findall(r"^  (-?\d\.\d{3})  (.*)$", done.out, re.M)
    assert len(found) == 5 and {p for _, p in found} <= set(train["prompt"]) and not list(Path().iterdir())
    assert found == sorted(found, key=lambda f: -float(f[0])) and "not the recovered prompt" in done.out
    ids, table = go("--neighbors", 200).ids, pl.read_parquet("p.neighbors.parquet")  # more than there are
    assert set(table["prompt"]) == set(train["prompt"]) and set(table["id"]) == set(ids) and table["rank"].max() > 99
    put({"a\x1b[31mgood.png": images[0], "a\x1b[31mbad.png": "no image", "c.csv": "prompt\na red \x1b[31m star\x9b\n"})
    done = go(*Path().glob("a*.png"), "--corpus", "c.csv")
    assert "star" in done.out and "bad.png" in done.err and not re.search("[\x1b\x9b]", done.out + done.err)


def test_no_control_character_in_the_report():
    odd = "a\x1b[31m\0b\x9b\u202e\ud800 \rz\x08"
    predict.write_report(page := io.BytesIO(), odd, {odd: odd}, [odd], [""], [0.5], 0.4, [odd], [[(0.5, odd)]], [odd])
    assert not clean.CONTROL.search(text := page.getvalue().decode()) and text.count("[31m") == 6 and "[<b>31m" in text


@contextmanager
def browse(page):
    """A page (URL or HTML) in headless Chromium -> a function that runs JavaScript there, and gives what it returns.
    It speaks the DevTools protocol over two pipes."""
    if "<" in page:
        put({"page.html": page})
        page = Path("page.html").absolute().as_uri()
    (their_in, to), (back, their_out) = os.pipe(), os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={Path('chromium').absolute()}"]
    pipes = f'exec "$0" "$@" --remote-debugging-pipe 3<&{their_in} 4>&{their_out}'
    chromium = subprocess.Popen(["bash", "-c", pipes, CHROMIUM, *flags], pass_fds=[their_in, their_out],
                                stderr=subprocess.DEVNULL)
    os.close(their_in)
    os.close(their_out)

    def read_messages():
        rest = b""
        while chunk := os.read(back, 1 << 16):
            *whole, rest = (rest + chunk).split(b"\0")
            yield from map(json.loads, whole)

    def call(method, session=None, **params):
        message = {"id": 1, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(to, json.dumps(message).encode() + b"\0")
        return next(m for m in messages if "id" in m)["result"]

    def run(script):
        script = f"(async () => {{{script}}})()"
        done = call("Runtime.evaluate", session, expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    messages, deadline = read_messages(), threading.Timer(120, chromium.kill)
    deadline.start()
    target = call("Target.createTarget", url=page)["targetId"]
    session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    while not run("return location.href != 'about:blank' && document.readyState == 'complete'"):
        pass
    yield run
    deadline.cancel()
    chromium.kill()
    chromium.wait()
    os.close(to)
    os.close(back)


@needs_chromium
def test_report_in_a_browser(images, tmp_path, monkeypatch):
    """Nothing hostile runs in our one page, even without its policy, which lets our script alone run; the worst come
    first, sorting and filtering work, an image is enlarged by the keyboard, too, and it fits a phone."""
    monkeypatch.chdir(tmp_path)
    hostile = ["<script>window.hacked = 1</script>", '"><img src=x onerror="window.hacked=2">', "a plain zebra",
               "</li></ul><svg onload=window.hacked=3>", "'; window.hacked = 4; '", "&lt;b&gt; {} ${window.hacked=5}"]
    thumbnails = [predict.thumbnail(p) for p in [*images[:5], Path("gone.png")]]
    near, cosines = [[(0.5, p), (0.4, "twin")] for p in hostile], [0.5, 0.9, 0.1, 0.7, 0.3, 0.6]
    save("r.html", predict.write_report, hostile[1], {hostile[0]: hostile[1]}, hostile, thumbnails, cosines, 0.4,
         ["A Zebra, plainly", *hostile[4::-1]], near, ["", "", "", "", "", hostile[0]], [True] + [False] * 5, 6,
         {"run": hostile[0]})
    text = Path("r.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?:""", text), "nothing from outside"
    assert text.count("no image<") == text.count("unreadable:") == text.count(">trained on this prompt<") == 1
    with browse(re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)) as run:
        got = run("""
            const all = what => [...document.querySelectorAll(what)], page = document.documentElement;
            const order = () => all('span b').map(b => +b.textContent);
            const set = (id, v) => { $(id).value = v; $(id).dispatchEvent(new Event('input')); return order(); };
            const out = {start: order(), best: set('sort', 'best'), worst: set('sort', 'worst'),
              back: set('sort', 'order'), zebra: set('filter', 'ZEBRA'), status: $('count').textContent,
              role: $('count').getAttribute('role'), none: set('filter', 'no such text'), all: set('filter', ''),
              hacked: String(window.hacked), names: all('h2').map(h => h.textContent), title: all('h1')[0].textContent,
              labels: all('input,select').every(e => e.labels.length), wide: page.scrollWidth <= innerWidth,
              elements: ['.card img', 'svg', 'script'].map(e => all(e).length), footer: all('footer')[0].textContent,
              words: all('.card p span').map(s => s.textContent.slice(6))};
            all('.card button')[1].focus();
            document.activeElement.click();
            out.large = [$('large').open, $('large').querySelector('img').src == all('.card img')[1].src,
                         $('large').querySelector('img').width >= 2 * all('.card img')[1].width];
            document.activeElement.click();
            out.closed = [$('large').open, document.activeElement == all('.card button')[1]];
            page.style.width = '360px';
            return {...out, phone: all('main *').every(e => e.getBoundingClientRect().right <= 360)}""")
    assert got == {"start": sorted(cosines), "back": cosines, "all": cosines, "worst": sorted(cosines), "none": [],
                   "best": sorted(cosines)[::-1], "zebra": [0.5, 0.1, 0.7], "status": "3 of 6 images",
                   "role": "status", "hacked": "undefined", "names": hostile, "title": hostile[1], "labels": True,
                   "wide": True, "phone": True, "elements": [5, 1, 1], "footer": f"run {hostile[0]}",
                   "words": ["to the true prompt"] * 6, "large": [True] * 3, "closed": [False, True]}
    planted = "<script>document.title = 'planted'</script><svg onload=\"document.title = 'planted'\"></svg></body>"
    with browse(text.replace("</body>", planted)) as run:
        page = run("return document.documentElement.outerHTML")
    assert "6 of 6 images</output>" in page and "planted" in page and "<title>planted" not in page


def test_what_a_card_says(go, images):
    """Shared words are bold, whatever their case; a thumbnail is large, and 12 KB suffice; the footer names the run."""
    assert predict.embolden("A RED fox & <b>, reddish", "the red <b> of a Fox") == (
        "A <b>RED fox</b> &amp; &lt;<b>b</b>&gt;, reddish")
    Image.effect_noise((900, 600), 30).convert("RGB").filter(ImageFilter.BoxBlur(3)).save("photo.png")
    assert 6000 < len(predict.thumbnail("photo.png")) < 10_600
    go("photo.png", "--html", "r.html", "--tta", 2, "--neighbors", 1)
    text = Path("r.html").read_text()
    footer = "run .*/ft · checkpoint [0-9a-f]{16} · views image, mirror · corpus .*/tiny · made by predict.py 20..-"
    assert re.search(footer, text) and "<h2>photo.png</h2>" in text and "selected" not in text


@needs_chromium
def test_two_thousand_cards(images, tmp_path, monkeypatch):
    """12 KB each; sorting and filtering put cards into the page in one piece, and change nothing card by card."""
    monkeypatch.chdir(tmp_path)
    n, near = 2000, [(0.5, "another prompt of some words " * 3)] * 5
    save("r.html", predict.write_report, "t", {}, [f"image {i}" for i in range(n)], [predict.thumbnail(images[0])] * n,
         np.linspace(0, 1, n), 0.4, ["a prompt of twelve words " * 3] * n, [near] * n)
    assert Path("r.html").stat().st_size < n * 12_000
    with browse(Path("r.html").read_text()) as run:
        got = run("""
            const observer = new MutationObserver(() => 0);
            observer.observe($('grid'), {childList: true, attributes: true, characterData: true, subtree: true});
            return [['sort', 'best'], ['filter', 'image 19'], ['filter', '']].map(([id, value]) => {
              $(id).value = value;
              $(id).oninput();
              const records = observer.takeRecords(), count = test => records.filter(test).length;
              return [$('grid').children.length, document.querySelector('.card').dataset.n,
                      count(r => r.addedNodes.length), count(r => r.type != 'childList')];
            })""")
    assert got == [[n, "1999", 1, 0], [111, "1999", 1, 0], [n, "1999", 1, 0]]


def test_texts_beside_images(go, images):
    """--txt: the nearest prompts, line by line; nothing is lost, and nothing is begun that cannot be finished."""
    put({"in/a.png": images[0], "in/b.png": images[1], "in/bad.png": "no image"})
    put({"t.csv": "image\nin/b.png\nin/a.png\n"})
    zipped, want = shutil.make_archive("z", "zip", "in"), go("in", "--neighbors", 3)
    lines = pl.read_parquet("p.neighbors.parquet").filter(id="b")["prompt"].to_list()
    assert go("in", "--txt").out.count("wrote 2 texts") and not Path("in/bad.txt").exists() and len(want.ids) == 3
    assert Path("in/b.txt").read_text() == lines[0] + "\n"
    assert "2 texts will be replaced" in go("t.csv", "--txt", "--neighbors", 3).out
    assert Path("in/b.txt").read_text().splitlines() == lines
    put({"no/a.png": images[0], "no/a.txt/x": "", f"long/{'a' * 245}.png": images[0]})
    put({"in/b.txt": "mine", "twice/a.jpg": images[0], "twice/a.png": images[0]})
    with pytest.raises(SystemExit, match="in/a.txt: 2 texts of --txt are already there"):
        predict.place_texts(["in/a.png", "in/b.png", "in/bad.png"], {}, overwrite=False)
    for line, said in {f"{zipped} --txt": "inside another file", "twice --txt": "twice/a.txt: --txt of two images",
                       "no --txt": "a.txt: --txt cannot write there", "long --txt": "--txt cannot write there",
                       "in --txt --submission in/bad.txt": "another output", "--txt": "name some",
                       "in --txt --neighbors 0": r"must be in \[1, "}.items():
        go(*line.split(), fails=said)
    assert Path("in/b.txt").read_text() == "mine" and len(os.listdir("in")) == 5


@pytest.fixture
def server(trained, tmp_path, monkeypatch):
    """predict.py --serve -> its port. Ctrl-C must end it quietly, whatever it was sent."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    args = [ROOT / "predict.py", "--serve", port, "--run", trained, "--neighbors", 2]
    process = subprocess.Popen([sys.executable, "-u", *map(str, args)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert f"http://127.0.0.1:{port} " in process.stdout.readline() + process.stdout.readline()
    idle = socket.create_connection(("127.0.0.1", port))  # as browsers open some
    yield port
    process.send_signal(2)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 0
    idle.close()


def test_wrong_requests(server, go, images):
    """Each has its status, reads nothing, and leaves the server alive. Other sites and names get 403."""
    image, home = images[0].read_bytes(), {"Origin": f"http://127.0.0.1:{server}"}

    def ask(method, path="/", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server, timeout=30)
        with suppress(BrokenPipeError):  # it may be refused before all of it is sent
            connection.request(method, path, body, headers)
        answer = connection.getresponse()
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        return answer.status, answer.read().decode()

    for status, args, headers in (
            (403, ("POST", "/", image), {}), (403, ("POST", "/", image), {"Origin": "http://evil.example"}),
            (403, ("POST", "/", image), home | {"Host": "evil.example"}), (403, ("GET",), {"Host": f"evil:{server}"}),
            (403, ("POST", "/", image), {"Origin": "null"}), (404, ("GET", "/etc/passwd"), {}),
            (404, ("GET", "//../../etc/passwd"), {}), (404, ("POST", "/etc/passwd", image), home), (501, ("PUT",), {}),
            (413, ("POST",), home | {"Content-Length": "99999999"}),
            (413, ("POST",), home | {"Content-Length": "9" * 5000}),
            (411, ("POST", "/", iter([image])), home), (411, ("POST",), home | {"Content-Length": "-1"}),
            (422, ("POST", "/", b"<svg onload=alert(1)>"), home), (422, ("POST", "/", image[:300]), home),
            (422, ("POST", "/", b""), home)):
        assert (got := ask(*args, **headers))[0] == status and "root:" not in got[1] and "0x" not in got[1], got
    with socket.create_connection(("127.0.0.1", server)) as gone:
        gone.sendall(b"POST / HTTP/1.1\r\nHost: \xff\r\n")
    status, found = ask("POST", "/", image, **home | {"Host": f"localhost:{server}"})
    assert status == 200 and found.count("<li><i>") == 2 and "data:image/jpeg" in found
    assert "script-src 'sha256-" in (page := ask("GET"))[1] and "connect-src 'self'" in page[1]
    for args, said in ((["--serve", server], "Address already in use"), (["--serve", "--txt"], "leave out images"),
                       ([images[0], "--serve"], "leave out images")):
        go(*args, out=None, fails=said)


def test_a_slow_client_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(predict.Handler, "timeout", 0.3)
    with predict.Server(0, "t", None) as server:
        threading.Thread(target=server.serve_forever).start()
        with socket.create_connection(server.server_address, timeout=9) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\n")
            assert client.recv(9) == b""
        server.shutdown()


@needs_chromium
def test_the_page_takes_images(server, images):
    """Dropped, pasted and chosen in Chromium. A name is text, and a file that is none says why."""
    code = base64.b64encode(images[0].read_bytes()).decode()
    with browse(f"http://127.0.0.1:{server}/") as run:
        got = run(f"""
            const bytes = Uint8Array.from(atob('{code}'), c => c.charCodeAt(0)), found = [];
            const send = async (name, content, act) => {{
              const transfer = new DataTransfer(), n = $('grid').children.length;
              transfer.items.add(new File([content], name));
              act(transfer);
              while (!$('status').textContent.startsWith(n + 1)) await new Promise(done => setTimeout(done, 20));
              const card = $('grid').firstChild;
              found.push([card.querySelector('h2').textContent, card.querySelectorAll('q').length,
                          card.querySelector('p')?.textContent]);
            }};
            const drop = t => document.body.dispatchEvent(new DragEvent('drop', {{dataTransfer: t, bubbles: true}}));
            await send('<img src=x onerror=window.hacked=1>', bytes, drop);
            await send('b.png', bytes, t => document.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: t}})));
            await send('c.png', bytes, t => {{ $('files').files = t.files; $('files').onchange(); }});
            await send('d.png', 'no image', drop);
            await send('e.png', new Uint8Array(33 << 20), drop);
            document.querySelector('.card button').click();
            return [...found, $('large').open, String(window.hacked), $('grid').querySelectorAll('img').length];""")
    assert got == [["<img src=x onerror=window.hacked=1>", 2, None], ["b.png", 2, None], ["c.png", 2, None],
                   ["d.png", 0, "image unreadable (cannot identify image file)"], ["e.png", 0, "too large"], True,
                   "undefined", 3]


def test_offline_kaggle_notebook(trained, images, tmp_path, monkeypatch):
    """A folder with the four scripts and a run: no training data, no faiss, and every connection fails."""
    monkeypatch.chdir(tmp_path)
    put({f"{s}.py": ROOT / f"{s}.py" for s in ("clean", "train", "predict", "ensemble")})
    put({f"images/{p.name}": p for p in images} | {"run/best.safetensors": trained / "ft/best.safetensors"})
    put({"c.csv": "prompt\n" + "\n".join(f"number {i}" for i in range(30)),
         "off/sitecustomize.py": "import socket, sys\nsys.modules['faiss'] = None\ndef no(*a, **k): raise OSError(9)\n"
                                 "socket.socket.connect = socket.getaddrinfo = socket.create_connection = no\n"})
    for line in ("predict.py images --run run --workers 0 --out preds/a.npz", "predict.py images --run run --workers 0 "
                 "--out preds/b.npz --tta 4 --neighbors 3 --corpus c.csv --blend-neighbors 0.1",
                 "ensemble.py --weights 2,1 --submission s.csv"):
        done = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": "off"})
        assert done.returncode == 0, done.stderr
    assert predict.read_submission("s.csv")[0] == [p.stem for p in images]


def test_a_banner_costs_no_gigabytes(model, monkeypatch):
    """60,000 x 10 pixels are cropped before they are enlarged; what is seen is what the plain way shows."""
    wide, sizes, resize = Image.effect_noise((400, 40), 90).convert("RGB"), [], Image.Image.resize
    assert torch.equal(to_square(wide, model.spec), to_square(wide.crop((140, 0, 260, 40)), model.spec))  # 3 : 1
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *a: sizes.append(size) or resize(image, size, *a))
    for size in ((60000, 10), (10, 60000)):
        to_square(Image.new("RGB", size), model.spec | {"image_size": 224})
    assert len(sizes) == 2 and max(w * h for w, h in sizes) < 1e6
