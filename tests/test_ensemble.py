"""ensemble.py: rows joined by id, weights equal to an independent optimiser's, honest cross-validation, the soup."""
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ensemble
import predict
from conftest import ODD_NAME, ROOT, chart_texts, unit
from test_predict import far, save
from train import Model, load_model, save_model

N, D = 600, 48


def mix(weights, xs):
    return unit(np.tensordot(weights, np.stack(xs), 1))


def names(rows):
    return np.array([f"{i:04d}" for i in rows])  # int(id) is the row


@pytest.fixture(scope="module")
def known():
    """Targets, and members of known quality: a good one, a middling one, its near-twin, and pure noise."""
    y, *noise = np.random.default_rng(0).standard_normal((5, N, D)) / D ** 0.5
    y, middling = unit(y), unit(y) + 1.2 * noise[1]
    return y, [unit(x) for x in (y + 0.7 * noise[0], middling, middling + 0.1 * noise[2], noise[3])]


@pytest.fixture
def write(known, tmp_path, monkeypatch):
    """A function that writes members, each with its rows in another order and in groups of three -> their names"""
    monkeypatch.chdir(tmp_path)

    def write(folder, rows=N, xs=known[1]):
        Path(folder).mkdir(exist_ok=True)
        for m, x in enumerate(xs):
            p = np.random.default_rng(m).permutation(rows)
            predict.write_preds(f"{folder}/m{m}.npz", ids=names(p), embeddings=x[p], targets=known[0][p], groups=p // 3,
                                run=f"runs/m{m}/ft", checkpoint=f"{m:016x}", views=np.array(["image"]))
        return [f"{folder}/m{m}.npz" for m in range(len(xs))]
    return write


@pytest.fixture
def go(monkeypatch, capsys):
    """ensemble.py's main in this process -> what it printed, its report and its predictions. fails: it must end in one
    line that has this text. Any other exception fails the test."""
    def go(*args, fails=None):
        monkeypatch.setattr(sys, "argv", ["ensemble.py", "--overwrite", *args])
        if fails:
            with pytest.raises(SystemExit, match=rf"\A.*{fails}.*\Z"):
                ensemble.main()
            return None
        capsys.readouterr()
        ensemble.main()
        report = json.loads(Path("preds/ensemble.json").read_text())
        return SimpleNamespace(**report, **predict.read_preds("preds/ensemble.npz"), printed=capsys.readouterr().out,
                               weights=[m["weight"] for m in report["members"]])
    return go


@pytest.mark.parametrize("block", [7, 4096])
def test_weights_equal_an_independent_optimiser(known, block, monkeypatch):
    """And the cosine from inner products, w.a / sqrt(w' G w), is that of the average itself, in blocks of any size."""
    optimize = pytest.importorskip("scipy.optimize")
    monkeypatch.setattr(ensemble, "BLOCK", block)
    y, xs = known[0], np.stack([*known[1], unit(known[1][0] - 0.8 * known[0])])  # the last is best left out

    def score(w):
        v = np.tensordot(w, xs.astype(float), 1)
        return (v * y).sum(1) / np.linalg.norm(v, axis=1)

    a, g = ensemble.gram([torch.from_numpy(x) for x in xs], torch.from_numpy(y))
    w, some = ensemble.fit(a, g), torch.tensor([0.5, 0.1, -0.2, 2.0, 0.3])
    assert far(ensemble.cosines(some, a, g), score(some)) < 1e-5
    best = optimize.minimize(lambda w: -score(w).mean(), np.ones(5), method="SLSQP", bounds=[(0, 9)] * 5, tol=1e-12)
    assert abs(score(w).mean() + best.fun) < 1e-4 and (w >= 0).all() and w[-1] < 1e-3 and abs(w.sum() - 1) < 1e-6


def test_cross_validation_never_sees_its_rows(monkeypatch):
    """Groups are in one fold as a whole, and no row is scored by weights that were learned on its fold."""
    groups, seen = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 9, 40)), []
    fold = ensemble.folds_of(groups)
    assert all(len(fold[groups == g].unique()) == 1 for g in range(40)) and len(fold.unique()) == 5
    rows = torch.arange(len(fold))[:, None]  # stands in for cosines and inner products
    monkeypatch.setattr(ensemble, "fit", lambda a, g, rows: seen.append(set(a[:, 0].tolist())) or len(seen) - 1)
    monkeypatch.setattr(ensemble, "cosines", lambda w, a, g: torch.tensor([1. + (int(r) in seen[w]) for r in a]))
    assert (ensemble.cross_validate(fold, rows, rows) == 1).all()
    assert [len(s) for s in seen] == [int((fold != k).sum()) for k in range(5)], "all other folds, once each"


def test_learned_weights_are_used_where_they_pay(known, write, go):
    """Of everything in preds/; the second time the first ensemble is there, and no member."""
    (y, xs), _ = known, write("preds")
    for _ in range(2):
        done = go()
        good, _, _, noise = done.members
        order = done.ids.astype(int)
        assert done.used == "learned" and "used: learned" in done.printed and done.n == N
        assert good["weight"] > 0.5 > 0.02 > noise["weight"] and far(good["cosine"], (xs[0] * y).sum(1).mean()) < 1e-5
        assert good["leave_one_out"] > 0.05 > abs(noise["leave_one_out"]) * 10
        assert far(done.embeddings, mix(done.weights, xs)[order]) < 1e-5 and far(done.targets, y[order]) < 1e-6
        assert abs(done.learned[0] - (done.embeddings * done.targets).sum(1).mean()) < 3e-3, "4 weights cannot overfit"
        assert Path("preds/ensemble.png").read_bytes().startswith(b"\x89PNG")


def test_chart():
    """Every score with its error, on an axis that does not make noise look like a difference; else weights from 0."""
    members = [{"name": name, "weight": w, "score": 0.7 + w / 1000, "se": 1e-4}
               for name, w in (("a", -0.25), (ODD_NAME, 0.75))]
    report = {"members": members, "used": "uniform", "n": 1234, "measure": "both", "uniform": [0.701, 2e-4], "learned": [0.702, 3e-4]}
    for spread in (0, 0.5):
        report["learned"][0] += spread
        said = chart_texts(figure := ensemble.draw(io.BytesIO(), report))
        low, high = figure.axes[0].get_xlim()
        assert high - low > 0.0499 and low < 0.699 < report["learned"][0] + 0.001 < high
        assert {"0.6997 ± 0.0001", "0.7010 ± 0.0002", f"{0.702 + spread:.4f} ± 0.0003", "plain average",
                "mean cosine (both) ± standard error, n = 1,234", "a  (weight -0.250)"} < set(said)
    said = chart_texts(figure := ensemble.draw(io.BytesIO(), {"members": members, "used": "fixed"}))
    assert [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches] == [(0, -0.25), (0, 0.75)]
    assert {"weight", "used: fixed weights", "0.750"} < set(said)


def test_learned_weights_are_not_used_where_they_do_not(known, write, go):
    """Of equal members, where learning is noise, and on less than 100 rows, where it may be."""
    noise = np.random.default_rng(1).standard_normal((6, N, D)) / D ** 0.5
    done = go(*write("equal", xs=[unit(known[0] + 1.5 * e) for e in noise]))
    assert done.used == "uniform" and "do not beat" in done.printed and done.weights == pytest.approx([1 / 6] * 6)
    for rows, used in ((99, "uniform"), (100, "learned")):
        done = go(*write("few", rows))
        assert done.used == used and done.gain[0] > 2 * done.gain[1], "they would pay"


def test_weights_flag_and_user_errors(known, write, go):
    (a, b), xs = write("m")[:2], known[1]
    done = go(a, b, "--weights", "3,1")
    assert done.weights == [0.75, 0.25] and done.used == "fixed" and go(a, b, "--weights", "uniform").used == "uniform"
    assert far(done.embeddings, mix([0.75, 0.25], xs[:2])[done.ids.astype(int)]) < 1e-5
    for bad in ("1,2,3", "a,b", "0,0", "nan,1", "inf,1", "1e308,1e308"):
        go(a, b, "--weights", bad, fails=f"--weights {bad}: must be")
    before = Path("preds/ensemble.npz").read_bytes()
    go(a, a, "--weights", "1,-1", "--submission", "s.csv", fails="--weights 1,-1: 600 of 600 embeddings are not finite")
    go(a, b, "--out", a, fails=f"{a}: is another output or an input")
    go(a, b, "--out", "e.json", fails="e.json: is another output")
    go(a, b, "--sample-submission", "s.csv", "--submission", "s.csv", fails="s.csv: is another output or an input")
    assert Path("preds/ensemble.npz").read_bytes() == before and not Path("s.csv").exists()
    for odd in (odds := ["m/$\\x$.npz", "m/a\x1b[31m\n.npz"]):
        shutil.copy(a, odd)
    go(*odds)
    assert not re.search(r"[^\x20-\x7e\n]", Path("preds/ensemble.json").read_text())
    for said, change in {"1 missing.*'0000'.*1 extra.*'0600'": {"ids": names(range(1, N + 1))}, "width 3": {
            "embeddings": xs[0][:, :3]}, "targets differ": {"targets": known[0][::-1]}}.items():
        np.savez("other.npz", **{"ids": names(range(N)), "embeddings": xs[0], **change})
        go(a, "other.npz", fails=f"other.npz: .*{said}")


def test_fit_is_matched_by_run(known, write, go):
    """Weights learned on validation predictions go to the test predictions of the same run, whatever the order of the
    arguments; Kaggle CSVs are matched by name."""
    val, test, ids = write("val"), [unit(x[::-1]) for x in known[1]], [f"t{i}" for i in range(N)]
    for m in range(3):
        predict.write_preds(f"test{m}.npz", ids=np.array(ids), embeddings=test[m], run="other", checkpoint=f"{m:016x}")
    save("theirs.csv", predict.write_submission, ids, test[3] * 5, range(N))  # of another length: normalised first
    save("val/theirs.csv", predict.write_submission, names(range(N)), known[1][3], range(N))
    files, fit = ["test2.npz", "theirs.csv", "test0.npz"], ["--fit", val[0], "val/theirs.csv", *val[1:3]]
    done = go(*files, *fit, "--submission", "s.csv")
    want, (back, x) = mix(done.weights, [test[2], test[3], test[0]]), predict.read_submission("s.csv")
    assert done.used == "learned" and done.weights[2] > done.weights[0] > done.weights[1] + 0.02
    assert done.ids.tolist() == ids and done.targets is None and far(done.embeddings, want) < 1e-5
    assert back == sorted(ids) and far(x, want[[ids.index(i) for i in back]]) < 1e-6
    go(*files, *fit[:3], fails="--fit: 0 files .* test2.npz")
    go("theirs.csv", "--fit", "val/theirs.csv", fails="no targets there")
    assert "no targets known" in go(*files).printed


def test_scores_name_their_rows(known, write, go):
    """With --fit the members' scores are those of the --fit files, and the average is scored on its own rows."""
    val, (y, xs), ids = write("val"), known, np.array([f"t{i}" for i in range(N)])
    for m in range(2):
        predict.write_preds(f"test{m}.npz", ids=ids, embeddings=xs[m + 1], targets=y, run="other",
                            checkpoint=f"{m:016x}", groups=np.arange(N) // 2)
    done = go("test0.npz", "test1.npz", "--fit", *val[:2])
    assert f"mean cosine over the {N} rows of {val[0]}, {val[1]}:\nm0  0." in done.printed
    assert done.scored_on == val[:2] and far(done.members[0]["cosine"], (xs[0] * y).sum(1).mean()) < 1e-5
    own = predict.mean_and_error((done.embeddings * y).sum(1), np.arange(N) // 2)
    assert f"average on the {N} rows of test0.npz, test1.npz: cosine {own[0]:.4f} ± {own[1]:.4f}" in done.printed
    assert far([done.output["cosine"], done.output["se"]], own) < 1e-5
    new = np.arange(N) % 3 > 0  # the others were trained on
    predict.write_preds("test0.npz", ids=ids, embeddings=xs[1], targets=y, run="other", trained=~new,
                        checkpoint=f"{0:016x}", groups=np.arange(N) // 2)
    some = go("test0.npz", "test1.npz", "--fit", *val[:2])
    own = predict.mean_and_error((some.embeddings * y).sum(1)[new], (np.arange(N) // 2)[new])
    assert far([some.output["cosine"], some.output["se"]], own) < 1e-5 and some.output["n"] == new.sum()
    alone = go("test0.npz", "test1.npz")
    want = predict.mean_and_error((xs[1] * y).sum(1)[new], (np.arange(N) // 2)[new])
    assert far([alone.members[0]["score"], alone.members[0]["se"]], want) < 1e-5
    assert "(the rows that its weights" in go(*val, "--fit", *val).printed
    alone = go(*val)  # there the weights have seen the rows
    assert alone.used == "learned" and "(the rows that its weights were learned on): cosine 0." in alone.printed


def test_rows_count_by_their_weight(known, write, go):
    """Where validation rows carry weights, the mean by --select-by learns; what has no weights uses the plain mean."""
    y, xs = known
    half = np.arange(N) < N // 2  # the first member is good on one half, the second on the other
    xs = [np.where(half[:, None], xs[0], xs[3]), np.where(half[:, None], xs[3], xs[0])]
    heavy = np.where(half, 100.0, 1.0)
    for m, x in enumerate(xs):
        predict.write_preds(f"w{m}.npz", ids=np.array(names(range(N))), embeddings=x, targets=y, run=f"r{m}",
                            groups=np.arange(N), weight=heavy, source=np.array(["a", *["b"] * (N - 1)]))
    even, uneven = go("w0.npz", "w1.npz", "--select-by", "cosine"), go("w0.npz", "w1.npz", "--select-by", "balanced")
    assert uneven.used == "learned" and uneven.weights[0] > 0.9 and abs(even.weights[0] - 0.5) < 0.1
    assert far(uneven.members[0]["score"], np.average((xs[0] * y).sum(1), weights=heavy)) < 1e-5
    assert far(uneven.members[0]["cosine"], (xs[0] * y).sum(1).mean()) < 1e-5
    a, g = ensemble.gram([torch.from_numpy(x) for x in xs], torch.from_numpy(y))
    lost = ensemble.cosines(torch.tensor(uneven.weights), a, g) - a[:, 1]
    assert far(uneven.members[0]["leave_one_out"], np.average(lost, weights=heavy)) < 1e-5
    assert "mean cosine (balanced) over" in uneven.printed and (uneven.measure, even.measure) == ("balanced", "cosine")
    assert go("w0.npz", "w1.npz").measure == "both" and go("w0.npz", "--select-by", "sources").measure == "sources"
    assert far(uneven.weight, heavy) == 0 and go(*write("plain")).measure == "cosine"


def test_preds_are_grouped_by_ids(known, write, go):
    """Without arguments, weights come from validation and serve the other images; what fits neither is named. Rows that
    were trained on teach nothing."""
    val, test, fit = write("preds"), [unit(x[::-1]) for x in known[1]], known[1][:3]
    for m in (0, 1, 2, 7):  # nobody knows what run 7 is worth
        predict.write_preds(f"preds/test{m}.npz", ids=names(range(N)) + np.array("t"), embeddings=test[m % 4],
                            run=f"runs/m{m}/ft", checkpoint=f"{m:016x}")
    predict.write_preds("preds/seen.npz", ids=names(range(9)), embeddings=known[0][:9], targets=known[0][:9], run="m0")
    done, want = go("--submission", "s.csv"), go(*(f"preds/test{m}.npz" for m in range(3)), "--fit", *val[:3])
    assert far(done.embeddings, want.embeddings) == 0 and len(done.members) == 3 and done.used == "learned"
    assert "no targets for its run: preds/seen.npz, preds/test7.npz\n" in done.printed
    Path("preds/junk.npz").write_text("x")  # the views of a member may differ; none has targets; other files do no harm
    for m in range(3):
        again = predict.read_npz(val[m]) | {"views": np.array(["image", "mirror"])}
        predict.write_preds(f"preds/n{m}.npz", **again | {"embeddings": again["embeddings"][::-1]})  # of no worth
    done = go("--submission", "s.csv")
    assert "left out: preds/junk.npz" in done.printed and far(done.embeddings, want.embeddings) == 0
    Path("preds/junk.npz").unlink()
    for m in range(3):
        Path(f"preds/test{m}.npz").unlink()
    done = go("--submission", "s.csv")  # images to predict come first, even if nothing tells what their run is worth
    assert done.ids[0].endswith("t") and done.used == "uniform" and "nothing to average with preds/test7" in done.printed
    for path in Path("preds").glob("*t*.npz"):
        path.unlink()
    wrong = known[0] * np.where(np.arange(N) < 300, -1, 1)[:, None]  # rows of which the scores are worthless
    for m, x in enumerate(fit):
        predict.write_preds(val[m], ids=names(range(N)), embeddings=x, targets=wrong, run=f"runs/m{m}/ft",
                            trained=np.arange(N) < 300)
    Path("runs/m0/ft").mkdir(parents=True)
    done = go(*val[:3])
    assert "300 rows whose prompts were trained on" in done.printed and done.n == 300
    assert done.uniform[0] == pytest.approx((mix(np.ones(3), fit) * known[0]).sum(1)[300:].mean(), abs=1e-5)
    assert "next: python predict.py path/to/images --run runs/m0/ft --tta 2" in done.printed


def test_memory_stays_bounded(tmp_path):
    """Peak memory is that of the members and little else, not a second copy of them."""
    y, noise = (unit(x) for x in np.random.default_rng(0).standard_normal((2, 22_000, 384), dtype=np.float32))
    for m in range(12):  # arrays above 32 MiB: of smaller ones malloc keeps some
        x = unit(y + np.roll(noise, m, 0))
        np.savez(tmp_path / f"{m:02d}.npz", ids=names(range(len(y))), embeddings=x, targets=y, run=f"r{m}")
    code = ("import resource, ensemble\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "before = peak()\nensemble.main()\nprint('bytes', peak() - before)")
    args = [sys.executable, "-c", code, *sorted(tmp_path.glob("*.npz")), "--out", tmp_path / "e.npz"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout.split("bytes")[1]) < 1.5 * 12 * y.nbytes, done


def test_soup(trained, tmp_path, monkeypatch):
    """Greedy by validation: a spoiled run stays out. What is written is the average of those that joined, a run that
    scores as it says. Of lp and ft it is WiSE-FT (arXiv 2109.01903). A run with another head is refused."""
    monkeypatch.chdir(tmp_path)

    def make(*runs):
        monkeypatch.setattr(sys, "argv", ["ensemble.py", "--out", "soup", "--overwrite", "--soup", *runs])
        ensemble.main()
    model, meta = load_model(trained / "ft")
    good = {k: v.clone() for k, v in model.state_dict().items()}
    for name, noise in (("a", 0), ("b", 0.002), ("bad", 3)):
        model.load_state_dict({k: v + noise * torch.randn(v.shape) for k, v in good.items()})
        save_model(model, meta, Path(f"{name}/ft/best.safetensors"))
    for runs in (["bad/ft", "b/ft", "a/ft"], [str(trained / "lp"), str(trained / "ft")]):
        make(*runs)
        soup, about = load_model("soup")
        states = [load_model(r)[0].state_dict() for r in about["soup"]]
        assert "bad/ft" not in about["soup"] and about["val_cosine"] > meta["val_cosine"] - 1e-3
        assert all(far(v, sum(s[k] for s in states) / len(states)) < 1e-6 for k, v in soup.state_dict().items())
        _, paths, y, _ = predict.read_validation(about)
        scorer = predict.TTAModel(Path("soup/ft/best.safetensors"), "auto", torch.device("cpu"))
        x, _ = predict.predict(scorer, paths, ["image"], SimpleNamespace(batch_size=64, workers=0))
        assert abs((x * y).sum(1).mean() - about["val_cosine"]) < 1e-4
    save_model(Model(model.backbone, model.spec, "mlp"), meta, Path("odd/ft/best.safetensors"))
    with pytest.raises(SystemExit, match="^odd/ft/best.safetensors: another head .*$"):
        make("a", "odd")


KILLED = """
import importlib, os, sys
import matplotlib.figure, open_clip  # once, and not in every child
from pathlib import Path
root, script, outputs, *args = sys.argv[1:]
sys.path.insert(0, root)
module, outputs, before = importlib.import_module(script), [Path(p) for p in outputs.split(",")], {*Path().rglob("*")}

def run(kill):  # at once after the rename of that number -> exit status
    child, replace, n = os.fork(), os.replace, 0
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def killing(source, target):
        nonlocal n
        kill or os.kill(os.getpid(), 9)
        replace(source, target)
        n += not str(target).endswith(".tmp")
        n != kill or os.kill(os.getpid(), 9)
    os.replace, sys.argv = killing, [script, *args]
    try:
        module.main()
    except SystemExit as e:
        print(e, file=sys.stderr)
        os._exit(1)
    os._exit(0)

for kill in range(len(outputs) + 1):
    assert run(kill) == -9 and sum(p.exists() for p in outputs) == kill
    if 0 < kill < len(outputs):  # at the second attempt, too
        assert run(kill) == -9
    assert run(99) == 0 and all(p.stat().st_size for p in outputs)
    left = {*Path().rglob("*")} - before - {*outputs, *(p.parent for p in outputs), *outputs[0].parents}
    assert not left, left
    assert run(99) == 1, "finished files are refused again"
    for p in outputs:
        p.unlink()
assert run(1) == -9
made = next(p for p in outputs if p.exists())
made.unlink()
made.write_text("of the user")
assert run(99) == 1 and made.read_text() == "of the user"
"""


@pytest.mark.parametrize("script, outputs, line", [
    ("predict", "p.npz,s.csv,r.html,p.neighbors.parquet", "IMAGES --run RUN --out p.npz --submission s.csv "
     "--html r.html --neighbors 2 --workers 0"),
    ("predict", "in/a.txt,in/b.txt,p.npz,p.neighbors.parquet", "in --run RUN --out p.npz --txt --workers 0"),
    ("ensemble", "e/e.npz,e/e.json,e/e.png,s.csv", "m/m0.npz m/m1.npz --out e/e.npz --submission s.csv"),
    ("ensemble", "soup/ft/best.safetensors,soup/ft/metrics.jsonl", "--soup RUN/lp RUN/ft --out soup")])
def test_a_killed_command_can_be_given_again(script, outputs, line, write, trained, raw):
    """After a kill between any two of its outputs, which are finished then; but a file of the user is not replaced."""
    write("m")
    Path("in").mkdir()
    for name, image in zip("ab", sorted((raw / "images").rglob("*.*"))):
        shutil.copy(image, f"in/{name}{image.suffix}")
    line = line.replace("IMAGES", f"{raw}/images").replace("RUN", str(trained)).split()
    done = subprocess.run([sys.executable, "-c", KILLED, ROOT, script, outputs, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
