"""predict.py: every kind of input, rows that never shift, views that differ, submissions, readable prompts, the report
in a real browser."""
import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image, ImageOps

import predict
from conftest import ROOT, command

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ARGS = SimpleNamespace(batch_size=5, workers=0)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def images(raw):
    """12 images of the drawn set, sorted."""
    return sorted((raw / "images").rglob("*.*"))[:12]


@pytest.fixture
def go(trained, tmp_path, monkeypatch, capsys):
    """predict.py's main on the trained run with small batches, in this process; an exception is a traceback and fails
    the test. -> (stdout, stderr), path of the npz."""
    def go(*args, out="p.npz", run=trained / "ft", ok=True):
        out, code = tmp_path / out, 0
        first = ["--batch-size", 4, "--workers", 0, "--run", run, "--out", out]  # the test's own flags overrule these
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, [*first, *args])])
        capsys.readouterr()
        try:
            predict.main()
        except SystemExit as e:
            code = e.code
        done = SimpleNamespace(**capsys.readouterr()._asdict())
        done.err += code if isinstance(code, str) else ""
        assert bool(code) != ok, done
        return SimpleNamespace(stdout=done.out, stderr=done.err), out
    return go


@pytest.fixture(scope="module")
def model(trained):
    return predict.TTAModel(trained / "ft/best.safetensors", "fp32", torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------- views

def test_every_view_is_another_view(model, images):
    """Mistake 4 of others: the same view twice. Here no two views have the same embedding, and several views give their
    normalised average."""
    each = {v: predict.predict(model, images, [v], ARGS)[0] for v in predict.VIEWS}
    for a in each:
        for b in each:
            assert a == b or np.abs(each[a] - each[b]).max() > 1e-3, f"{a} and {b} see the same"
    together = predict.predict(model, images, ["image", "zoom-mirror"], ARGS)[0]
    assert np.abs(together - unit(each["image"] + each["zoom-mirror"])).max() < 1e-5


def test_a_view_is_what_its_name_says(model, images, tmp_path, monkeypatch):
    image = Image.open(images[0]).convert("RGB").resize((80, 80))
    monkeypatch.setitem(predict.VIEWS, "corner", lambda image: image.crop((0, 0, 50, 50)))  # a view of one's own: a line
    variants = {"mirror": ImageOps.mirror(image), "zoom": image.crop((8, 8, 72, 72)), "corner": image.crop((0, 0, 50, 50))}
    image.save(tmp_path / "image.png")
    for view, variant in variants.items():
        variant.save(tmp_path / "variant.png")
        a = predict.predict(model, [tmp_path / "image.png"], [view], ARGS)[0]
        b = predict.predict(model, [tmp_path / "variant.png"], ["image"], ARGS)[0]
        assert np.abs(a - b).max() < 1e-5, view


def test_one_decode_for_all_views(model, images, monkeypatch):
    opened = []
    monkeypatch.setattr(predict, "open_rgb", lambda p: opened.append(p) or Image.open(p).convert("RGB"))
    predict.predict(model, images, list(predict.VIEWS), ARGS)
    assert opened == list(images)


def test_a_typo_in_a_view_shows_its_line(go, images, monkeypatch):
    """Never swallowed: else every row would become the mean training embedding."""
    monkeypatch.setitem(predict.VIEWS, "image", lambda image: undefined_name(image))  # noqa: F821
    for workers in (0, 1):
        with pytest.raises(NameError, match="undefined_name"):
            go(*images, "--workers", workers)


def test_precision_changes_little(trained, model, images):
    half = predict.TTAModel(trained / "ft/best.safetensors", "amp_bf16", torch.device("cpu"))
    assert next(half.model.backbone.parameters()).dtype == torch.bfloat16, "cast once, not by autocast in every batch"
    a, b = (predict.predict(m, images, ["image"], ARGS)[0] for m in (model, half))
    assert 0 < (1 - (a * b).sum(1)).max() < 1e-3


def test_out_of_memory_halves_the_batch(model, images, monkeypatch, capsys):
    """A model that can bear three images gives what batches of three give; another error passes through."""
    real, room = predict.TTAModel.forward, [3]

    def small(self, x):
        if len(x) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, x)
    monkeypatch.setattr(predict.TTAModel, "forward", small)
    a = predict.predict(model, images, ["image", "mirror"], SimpleNamespace(batch_size=12, workers=0))[0]
    b = predict.predict(model, images, ["image", "mirror"], SimpleNamespace(batch_size=3, workers=0))[0]
    assert np.abs(a - b).max() < 1e-6 and "3 images at a time" in capsys.readouterr().err
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        predict.predict(model, images, ["image"], ARGS)
    monkeypatch.setattr(predict.TTAModel, "forward", lambda self, x: x.float() @ torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match="shape|size"):
        predict.predict(model, images, ["image"], ARGS)


# --------------------------------------------------------------------------------------------------------------- inputs

def test_the_same_images_from_everywhere(go, images, tmp_path):
    """Files, a folder (recursive), a zip, a tar, a CSV, a Parquet, in any order: the same ids and embeddings."""
    folder = tmp_path / "in"
    (folder / "deep/er").mkdir(parents=True)
    for i, p in enumerate(images):
        shutil.copy(p, folder / ["", "deep", "deep/er"][i % 3] / p.name)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as z, tarfile.open(tmp_path / "in.tar", "w") as t:
        for p in reversed(images):
            z.write(p, f"some/{p.name}")
            t.add(p, p.name)
        z.writestr("notes.md", "not an image")
    names = [os.path.relpath(p, tmp_path) for p in reversed(images)]
    pl.DataFrame({"n": range(12), "picture": names}).write_csv(tmp_path / "in.csv")
    pl.DataFrame({"filename": names}).write_parquet(tmp_path / "in.parquet")
    want = None
    places = [[folder], [tmp_path / "in.zip"], [tmp_path / "in.tar"], [tmp_path / "in.parquet"],
              [tmp_path / "in.csv", "--image-col", "picture"]]
    for n, inputs in enumerate([reversed(images), *places]):
        got = predict.read_preds(go(*inputs, out=f"{n}.npz")[1])
        got = dict(zip(got["ids"].tolist(), got["embeddings"]))
        want = want or got
        assert sorted(got) == sorted(p.stem for p in images)
        assert all(np.abs(got[i] - want[i]).max() < 1e-6 for i in want), inputs


def test_prompts_in_a_table_are_targets(go, raw):
    done, out = go(raw / "prompts.csv")
    preds = predict.read_preds(out)
    score = (preds["embeddings"] * preds["targets"]).sum(1).mean()
    assert f"\ncosine {score:.4f}" in done.stdout and len(preds["ids"]) == 200


def test_ids(tmp_path, images):
    """Whole paths where names clash; names on a disk need not be UTF-8; two images of one id are an error."""
    for d in "ab":
        (tmp_path / d).mkdir()
        shutil.copy(images[0], tmp_path / d / "same.png")
    shutil.copy(images[1], tmp_path / "other.png")
    shutil.copy(images[1], os.fsencode(tmp_path) + b"/caf\xe9.png")
    ids, paths, _ = predict.list_images([str(tmp_path)])
    assert sorted(ids) == sorted([str(tmp_path / "a/same.png"), str(tmp_path / "b/same.png"), "other", "caf\ufffd"])
    shutil.copy(images[1], os.fsencode(tmp_path) + b"/caf\xe8.png")
    with pytest.raises(SystemExit, match="two images"):
        predict.list_images([str(tmp_path)])


def test_a_bad_image_never_shifts_a_row(go, trained, images, tmp_path):
    """Truncated, no image, empty: each keeps its row with the mean training embedding and is named; the others are
    untouched."""
    folder = tmp_path / "in"
    folder.mkdir()
    files = [Path(shutil.copy(p, folder)) for p in images[:9]]
    good = predict.read_preds(go(folder, out="good.npz")[1])
    files[1].write_bytes(files[1].read_bytes()[:200])
    files[3].write_text("<html>")
    files[5].write_bytes(b"")
    done, out = go(folder, out="bad.npz")
    bad, mean = predict.read_preds(out), np.array(predict.load_model(trained / "ft")[1]["mean_target"])
    assert (bad["ids"] == good["ids"]).all()
    for i, file in enumerate(files):
        assert (str(file) in done.stderr) == (i in (1, 3, 5))
        want = mean / np.linalg.norm(mean) if i in (1, 3, 5) else good["embeddings"][i]
        assert np.abs(bad["embeddings"][i] - want).max() < 1e-6
    pl.DataFrame({"image": ["gone1.png", "gone2.png"]}).write_csv(tmp_path / "gone.csv")
    assert "none of the 2" in go(tmp_path / "gone.csv", out="gone.npz", ok=False)[0].stderr


def test_user_mistakes_are_one_line(go, trained, tmp_path, images):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.zip").write_bytes(b"PK\3\4 not really")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    for name, content in (("cut", (trained / "ft/best.safetensors").read_bytes()[:5000]), ("pickle", b"\x80\x04\x95")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.safetensors").write_bytes(content)
    for args, word in (([tmp_path / "nowhere"], "nowhere"), ([tmp_path / "empty"], "no images"),
                       ([tmp_path / "x.zip"], "x.zip"), ([tmp_path / "x.csv"], "image"),
                       ([images[0], "--batch-size", 0], "--batch-size"), ([images[0], "--tta", 99], "--tta"),
                       ([images[0], "--blend-neighbors", 2], "--blend-neighbors"),
                       ([images[0], "--corpus", tmp_path / "no.csv"], "no.csv"),
                       ([images[0], "--run", tmp_path / "none"], "none"), ([images[0], "--run", tmp_path / "cut"], "cut"),
                       ([images[0], "--run", tmp_path / "pickle"], "pickle")):
        done, out = go(*args, ok=False)
        assert len(done.stderr.strip().splitlines()) == 1 and word in done.stderr and not out.exists(), (args, done)


def test_damaged_predictions_are_one_line(tmp_path):
    ok = {"ids": np.array(["a", "b"]), "embeddings": np.eye(2, 384, dtype=np.float32)}
    np.savez(tmp_path / "ok.npz", **ok)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "ok.npz").read_bytes()[:900])
    (tmp_path / "pickle.npz").write_bytes(b"\x80\x04\x95")
    for name, change in (("object", {"ids": np.array(["a", {}], dtype=object)}), ("twice", {"ids": np.array(["a", "a"])}),
                         ("nan", {"embeddings": ok["embeddings"] * np.nan}), ("one", {"ids": np.array("a")}),
                         ("text", {"embeddings": ok["embeddings"].astype(str)}),
                         ("targets", {"targets": ok["embeddings"].astype(str)}),
                         ("shape", {"targets": ok["embeddings"][:1]})):
        np.savez(tmp_path / f"{name}.npz", **{**ok, **change})
    np.savez(tmp_path / "lacking.npz", ids=ok["ids"])
    for name, text in (("order", "imgId_eId,val\na_0,1\na_2,1\n"), ("again", "imgId_eId,val\na_0,1\nb_0,1\na_0,1\n"),
                       ("words", "imgId_eId,val\na_0,x\n"), ("columns", "a,b\n1,2\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    assert predict.read_preds(tmp_path / "ok.npz")["run"] == "ok"
    for path in {*tmp_path.iterdir(), tmp_path / "absent.npz"} - {tmp_path / "ok.npz"}:
        with pytest.raises(SystemExit) as e:
            predict.read_preds(path)
        assert path.name in str(e.value) and "\n" not in str(e.value)


# -------------------------------------------------------------------------------------------------------------- outputs

def test_submission_round_trip(tmp_path, go, images):
    """Any ids, any order: what is read back is what was written, to better than 1e-6; blocks of 1,024 go through."""
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((1500, 384)))
    ids = [f"id_{i}_{i % 7}" for i in range(1496)] + ['comma,"quote"', "ümlaut", "spa ce", "line\nbreak"]
    predict.write_submission(tmp_path / "s.csv", ids, x, order := list(rng.permutation(1500)))
    back, y = predict.read_submission(tmp_path / "s.csv")
    assert back == [ids[i] for i in order] and np.abs(y - x[order]).max() < 1e-6
    assert [ids[i] for i in predict.order_for(None, ids)] == sorted(ids)
    go(*images, "--submission", tmp_path / "t.csv", "--sample-submission", tmp_path / "s.csv", ok=False)
    stems = [p.stem for p in images][::-1]
    predict.write_submission(tmp_path / "sample.csv", stems, x[:12], range(12))
    _, out = go(*images, "--submission", tmp_path / "t.csv", "--sample-submission", tmp_path / "sample.csv")
    preds = predict.read_preds(out)
    back, y = predict.read_submission(tmp_path / "t.csv")
    assert back == stems and np.abs(y - preds["embeddings"][[preds["ids"].tolist().index(i) for i in stems]]).max() < 1e-6


def test_full_disk_keeps_the_old_file(trained, raw, tmp_path):
    (tmp_path / "p.npz").write_text("old")
    line = f"{sys.executable} {ROOT}/predict.py {raw}/images --run {trained} --out {tmp_path}/p.npz --workers 0 --overwrite"
    done = subprocess.run(["bash", "-c", f"ulimit -f 40; exec {line}"], capture_output=True, text=True)
    assert done.returncode != 0 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "p.npz").read_text() == "old" and not list(tmp_path.glob(".*tmp"))


# ----------------------------------------------------------------------------------------------------- readable prompts

@pytest.mark.parametrize("faiss", [True, False])
def test_nearest_prompts_against_brute_force(faiss, monkeypatch):
    """Exact, sorted, with faiss and without, and near-identical prompts counted once: of each cluster the nearest."""
    if not faiss:
        monkeypatch.setitem(sys.modules, "faiss", None)
    rng = np.random.default_rng(0)
    corpus = unit(np.repeat(rng.standard_normal((60, 32)), 2, 0) + 0.02 * rng.standard_normal((120, 32)))
    x = unit(rng.standard_normal((7, 32)))
    cosines, rows = predict.nearest_prompts(x, corpus, 5)
    for i in range(7):
        want = []
        for j in np.argsort(-(corpus @ x[i])):
            if len(want) < 5 and all(corpus[j] @ corpus[k] < predict.SAME for k in want):
                want.append(j)
        assert rows[i].tolist() == want and np.abs(cosines[i] - corpus[want] @ x[i]).max() < 1e-6
    assert (predict.nearest_prompts(x, corpus[:6:2], 5)[1][:, 3:] == -1).all(), "a small corpus has no more"
    got = predict.blend_neighbors(x, corpus, cosines, rows, 0.3)
    for i in range(7):
        d = np.linalg.norm(corpus[rows[i]] - x[i], axis=1)
        average = (corpus[rows[i]] / (d ** 6 + 1e-4)[:, None]).sum(0)
        mixed = 0.7 * x[i] + 0.3 * average / np.linalg.norm(average)
        assert np.abs(got[i] - mixed / np.linalg.norm(mixed)).max() < 1e-5


def test_an_image_prints_its_neighbours(trained, data, images, tmp_path):
    """Prompts of training rows, never of validation ones, and it says what they are not. Nothing lands in preds/."""
    done = command("predict.py", images[0], "--run", trained, cwd=tmp_path)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if re.match(r"  -?\d\.\d{3}  ", line)]
    train = pl.read_parquet(data / "pairs.parquet").filter(pl.col("split") == "train")["prompt"]
    assert len(lines) == 5 and "not the recovered prompt" in done.stdout
    assert {p for _, p in lines} <= set(train) and not list(tmp_path.iterdir())


def test_neighbours_from_a_corpus_and_blended(go, images, tmp_path):
    corpus = tmp_path / "corpus.csv"
    pl.DataFrame({"prompt": ["a red \x1b[31m star\non a hill", "blue water", "seven green horses"]}).write_csv(corpus)
    done, out = go(*images[:8], "--neighbors", 2, "--corpus", corpus)
    assert "\x1b" not in done.stdout, "prompts are other people's text"
    table = pl.read_parquet(tmp_path / "p.neighbors.parquet")
    assert table.columns == ["id", "rank", "cosine", "prompt"] and len(table) == 16 and set(table["rank"]) == {0, 1}
    a, b = (predict.read_preds(go(*flags, out=f"{len(flags)}.npz")[1]) for flags in ([], ["--blend-neighbors", 0.3]))
    assert b["views"] == ["image", "neighbors-0.3"] and np.abs(a["embeddings"] - b["embeddings"]).max() > 1e-4
    assert np.abs(np.linalg.norm(b["embeddings"], axis=1) - 1).max() < 1e-5


# ----------------------------------------------------------------------------------------------------------- the report

def browse(page, tmp_path, script, keep_policy=False):
    """Run `script` in the page in headless Chromium -> what it returns, or with the page's policy kept its DOM."""
    text, ours = page.read_text(), f"<script>document.title = JSON.stringify((() => {{{script}}})())</script></body>"
    if not keep_policy:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (tmp_path / "copy.html").write_text(text.replace("</body>", ours))
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    dom = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--dump-dom",
                          f"--user-data-dir={tmp_path}/chromium", f"file://{tmp_path}/copy.html"],
                         capture_output=True, text=True, timeout=60).stdout
    return dom if keep_policy else json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1]))


HOSTILE = ["<script>window.hacked = 1</script>", '"><img src=x onerror="window.hacked=2">',
           "</li></ul><svg onload=window.hacked=3>", "'; window.hacked = 4; '", "&lt;b&gt; {} ${window.hacked=5}",
           "a plain zebra"]


@pytest.fixture
def report(tmp_path, images):
    """A report with hostile names, prompts and neighbours."""
    facts = {"run</dd><script>hacked=6</script>": "<script>hacked=7</script>"}
    near = [[(0.5, p), (0.4, "twin")] for p in HOSTILE]
    predict.write_report(tmp_path / "r.html", "<b>title</b>", facts, HOSTILE,
                         [predict.thumbnail(p) for p in [*images[:5], tmp_path / "gone.png"]],
                         [0.5, 0.9, 0.1, 0.7, 0.3, 0.6], 0.4, HOSTILE[::-1], near, [""] * 5 + ["gone"], 6)
    return tmp_path / "r.html"


def test_report_is_one_page_and_escaped(report):
    text = report.read_text()
    assert len(re.findall("<script", text)) == 1 and "onerror=\"" not in text and "default-src 'none'" in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|https?:""", text), "nothing from outside"
    assert text.count("data:image/jpeg;base64,") == 5 and "no image" in text and "unreadable" in text
    for image in re.findall(r"data:image/jpeg;base64,([^\"]+)", text):
        assert max(Image.open(io.BytesIO(base64.b64decode(image))).size) <= 160


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")
def test_report_in_a_browser(report, tmp_path):
    """Nothing hostile runs, sorting and filtering work in one call each (a record per card), every control has a label,
    nothing overflows a phone; with the page's policy kept, our script alone runs."""
    got = browse(report, tmp_path, """
        const all = what => [...document.querySelectorAll(what)], page = document.documentElement;
        const order = () => all('.card b').map(b => b.textContent);
        const watch = new MutationObserver(() => 0);
        watch.observe(grid, {childList: true});
        const set = (id, v) => { $(id).value = v; $(id).dispatchEvent(new Event('input')); return order(); };
        const out = {start: order(), ids: all('h2').map(h => h.firstChild.textContent)};
        out.worst = set('sort', 'worst');
        out.changes = watch.takeRecords().length;
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
        page.style.width = '360px';
        out.phone = $('grid').scrollWidth <= 360;
        return out""")
    assert got["hacked"] == "undefined" and got["ids"] == HOSTILE and got["elements"] == 5 + 1 + 2
    assert got["start"] == got["back"] == ["0.500", "0.900", "0.100", "0.700", "0.300", "0.600"]
    assert got["worst"] == sorted(got["start"]) and got["best"] == got["worst"][::-1] and got["changes"] <= 7
    assert got["zebra"] == ["0.500", "0.600"] and got["status"] == "2 of 6 images"
    assert got["none"] == [] and got["all"] == 6 and got["labels"] and got["live"] == "status" and got["phone"]
    dom = browse(report, tmp_path, "return 'planted'", keep_policy=True)
    assert "6 of 6 images</output>" in dom and "planted" not in re.search(r"<title>(.*?)</title>", dom, re.S)[1]


def test_report_of_a_run(go, tmp_path):
    """One card per validation row, under the name of the user's file."""
    go("--html", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert text.count('class="card"') == 40 and text.count("<q>") == 40 * 5
    assert re.search(r"<h2>\d{5}\.(png|jpg)<b>", text) and (tmp_path / "r.html").stat().st_size < 40 * 10_000


# ------------------------------------------------------------------------------------------------------ Kaggle, offline

def test_offline_kaggle_notebook(trained, images, tmp_path):
    """A folder with the four scripts and a run, no training data, no faiss, and a machine on which every connection
    fails: predictions, prompts, submission."""
    for script in ("clean", "train", "predict", "ensemble"):
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    shutil.copytree(trained / "ft", tmp_path / "runs/tiny/ft")
    (tmp_path / "off").mkdir()
    (tmp_path / "off/sitecustomize.py").write_text(
        "import socket, sys\nsys.modules['faiss'] = None\n"
        "def no(*a, **k): raise OSError(101, 'the test has no network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = no\n")
    (tmp_path / "images").mkdir()
    for p in images:
        shutil.copy(p, tmp_path / "images")
    pl.DataFrame({"prompt": [f"a prompt about number {i}" for i in range(30)]}).write_parquet(tmp_path / "prompts.parquet")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path / "off")}
    base = "predict.py images --run runs/tiny --workers 0"
    for line in (f"{base} --out preds/a.npz", f"{base} --out preds/b.npz --tta 4 --neighbors 3 --corpus prompts.parquet",
                 "ensemble.py --weights 2,1 --submission submission.csv"):
        done = subprocess.run([sys.executable, *line.split()], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert predict.read_submission(tmp_path / "submission.csv")[0] == sorted(p.stem for p in images)


def test_a_banner_costs_no_gigabytes():
    """60,000 x 10 pixels are cropped before they are enlarged; what is seen is what the plain way shows."""
    from train import to_square
    spec = {"image_size": 64, "interpolation": "bicubic", "resize_mode": "shortest"}
    wide = Image.effect_noise((400, 40), 90).convert("RGB")
    assert torch.equal(to_square(wide, spec), to_square(wide.crop((140, 0, 260, 40)), spec))
    code = ("import resource, train; from PIL import Image; b = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "spec = {'image_size': 224, 'interpolation': 'bicubic', 'resize_mode': 'shortest'}\n"
            "[train.to_square(Image.new('RGB', s), spec) for s in ((60000, 10), (10, 60000))]\n"
            "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - b < 50_000")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
