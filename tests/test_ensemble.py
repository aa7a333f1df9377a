"""ensemble.py: rows joined by id, weights equal to an independent optimiser's, honest cross-validation, matching by
run, Kaggle CSVs, the soup."""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ensemble
import predict
from conftest import ROOT, command
from train import load_model, save_model

N, D = 600, 48


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def names(rows):
    return np.array([f"{i:04d}" for i in rows])


def tensors(xs, y):
    return [torch.from_numpy(v) for v in xs], torch.from_numpy(y)


@pytest.fixture(scope="module")
def members():
    """Targets, and four members of known quality: a good one, a middling one, its near-twin, and pure noise."""
    rng = np.random.default_rng(0)
    y = unit(rng.standard_normal((N, D)))
    noise = lambda s: s * rng.standard_normal((N, D)) / D ** 0.5  # noqa: E731
    middling = y + noise(1.2)
    return y, [unit(v) for v in (y + noise(0.7), middling, middling + noise(0.1), noise(1))]


@pytest.fixture
def files(members, tmp_path):
    """The members as npz files, each with its rows in another order, groups of three rows. -> paths"""
    y, xs = members
    for m, x in enumerate(xs):
        p = np.random.default_rng(m).permutation(N)
        predict.write_preds(tmp_path / f"m{m}.npz", ids=names(p), embeddings=x[p], targets=y[p], groups=p // 3,
                            run=f"runs/m{m}/ft", checkpoint=f"{m:016x}", views=np.array(["image"]))
    return [tmp_path / f"m{m}.npz" for m in range(4)]


@pytest.fixture
def go(tmp_path, monkeypatch, capsys):
    """ensemble.py's main in this process -> stdout, report, predictions; with ok=False its one line."""
    def go(*args, out="e.npz", ok=True):
        out = tmp_path / out
        monkeypatch.setattr(sys, "argv", ["ensemble.py", *map(str, args), "--out", str(out)])
        if not ok:
            with pytest.raises(SystemExit) as e:
                ensemble.main()
            assert len(str(e.value.code).splitlines()) == 1
            return str(e.value.code)
        ensemble.main()
        report = json.loads(out.with_suffix(".json").read_text())
        return SimpleNamespace(stdout=capsys.readouterr().out, report=report, preds=predict.read_preds(out))
    return go


def test_weights_equal_an_independent_optimiser(members):
    optimize = pytest.importorskip("scipy.optimize")
    y, xs = members
    x64 = np.stack(xs).astype(np.float64)

    def loss(w):
        v = np.tensordot(w, x64, 1)
        return -((v * y).sum(1) / np.linalg.norm(v, axis=1)).mean()

    other = optimize.minimize(loss, np.ones(4), method="SLSQP", bounds=[(0, None)] * 4,
                              options={"ftol": 1e-12, "maxiter": 500})
    w = ensemble.fit(*ensemble.gram(*tensors(xs, y)))
    assert abs(loss(w.numpy()) - other.fun) < 1e-4 and (w >= 0).all() and w.sum() == pytest.approx(1)
    assert (ensemble.fit(*ensemble.gram(*tensors(xs, y))) == w).all(), "deterministic"


def test_gram_is_the_weighted_average(members, monkeypatch):
    """The cosine from inner products alone is that of the average itself, whatever the block size."""
    y, xs = members
    w = torch.tensor([0.5, 0.1, -0.2, 2.0])
    want = (unit(np.tensordot(w.numpy(), np.stack(xs), 1)) * y).sum(1)
    for block in (7, 600):
        monkeypatch.setattr(ensemble, "BLOCK", block)
        x, t = tensors(xs, y)
        assert np.abs(ensemble.cosines(w, *ensemble.gram(x, t)).numpy() - want).max() < 1e-5
        assert np.abs((ensemble.average(x, w) * t).sum(1).numpy() - want).max() < 1e-5


def test_cross_validation_never_sees_its_rows(members, monkeypatch):
    """Groups stay in one fold, and the weights of a fold are learned without it."""
    groups = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 9, 40))
    fold = ensemble.folds_of(groups)
    assert all(len(set(fold[groups == g].tolist())) == 1 for g in range(40)) and len(set(fold.tolist())) == 5
    n, seen = len(groups), []
    a = torch.arange(n, dtype=torch.float32)[:, None]
    monkeypatch.setattr(ensemble, "fit", lambda a, g: seen.append(set(a[:, 0].long().tolist())) or torch.ones(1))
    monkeypatch.setattr(ensemble, "cosines", lambda w, a, g: torch.tensor([float(int(i) in seen[-1]) for i in a[:, 0]]))
    assert not ensemble.cross_validate(fold, a, a).any() and len(seen) == 5 and set.union(*seen) == set(range(n))


def test_learned_weights_are_used_where_they_pay(members, files, go):
    y, xs = members
    done = go(*files)
    found = {m["name"]: m for m in done.report["members"]}
    assert done.report["used"] == "learned" and "used: learned" in done.stdout and done.report["n"] == N
    assert found["m0"]["weight"] > 0.5 and found["m3"]["weight"] < 0.02
    assert abs(found["m1"]["cosine"] - (xs[1] * y).sum(1).mean()) < 1e-5
    assert found["m0"]["leave_one_out"] > 0.05 > abs(found["m3"]["leave_one_out"]) * 10
    order = [int(i) for i in done.preds["ids"]]
    want = unit(np.tensordot([m["weight"] for m in done.report["members"]], np.stack(xs), 1))[order]
    assert np.abs(done.preds["embeddings"] - want).max() < 1e-5
    assert np.abs(done.preds["targets"] - y[order]).max() < 1e-6


@pytest.mark.parametrize("rows, quality", [(24, 1.5), (99, None), (400, 1.5)])
def test_learned_weights_are_not_used_where_they_do_not(tmp_path, go, rows, quality):
    """Equal members, where learning is noise; and too few rows, even where the gain is clear."""
    rng = np.random.default_rng(1)
    y = unit(rng.standard_normal((rows, D)))
    for m in range(4):
        x = unit(y + (quality or 0.5 + m) * rng.standard_normal((rows, D)) / D ** 0.5)
        np.savez(tmp_path / f"n{m}.npz", ids=names(range(rows)), embeddings=x, targets=y)
    done = go(*(tmp_path / f"n{m}.npz" for m in range(4)))
    gain, error = done.report["gain"]
    assert (gain > 2 * error) == (quality is None), "what each of these inputs is for"
    assert done.report["used"] == "uniform" and "do not beat" in done.stdout
    assert all(abs(m["weight"] - 1 / 4) < 1e-6 for m in done.report["members"])


def test_weights_flag(members, files, go):
    y, xs = members
    assert go(*files, "--weights", "uniform", out="u.npz").report["used"] == "uniform"
    fixed = go(*files[:2], "--weights", "3,1", out="f.npz")
    assert [m["weight"] for m in fixed.report["members"]] == [0.75, 0.25] and fixed.report["used"] == "fixed"
    order = [int(i) for i in fixed.preds["ids"]]
    assert np.abs(fixed.preds["embeddings"] - unit(0.75 * xs[0] + 0.25 * xs[1])[order]).max() < 1e-5
    for bad in ("1,2,3", "a,b", "0,0", "nan,1"):
        assert "--weights" in go(*files[:2], "--weights", bad, out="b.npz", ok=False)


def test_members_that_do_not_fit(members, files, go, tmp_path):
    y, xs = members
    for name, word, arrays in (("short", "'0000'", {"ids": names(range(5, N + 5))}),
                               ("wide", "width 3", {"embeddings": np.ones((N, 3), np.float32)}),
                               ("wrong", "targets differ", {"targets": np.roll(y, 1, 0)})):
        np.savez(tmp_path / f"{name}.npz", **{"ids": names(range(N)), "embeddings": xs[0], **arrays})
        message = go(files[0], tmp_path / f"{name}.npz", ok=False)
        assert word in message and name in message, message
    (tmp_path / "junk.npz").write_bytes(b"\x80\x04junk")
    assert "junk.npz" in go(files[0], tmp_path / "junk.npz", ok=False)


def test_fit_is_matched_by_run(members, files, go, tmp_path):
    """Weights learned on validation predictions reach the test predictions of the same runs, whatever the order of the
    arguments; Kaggle CSVs by name."""
    y, xs = members
    test, ids = [unit(x[::-1] + 0.0) for x in xs], [f"t{i}" for i in range(N)]
    for m in range(3):
        predict.write_preds(tmp_path / f"test{m}.npz", ids=np.array(ids), embeddings=test[m], run=f"/elsewhere/m{m}",
                            checkpoint=f"{m:016x}", views=np.array(["image"]))
    (tmp_path / "val").mkdir()
    predict.write_submission(tmp_path / "theirs.csv", ids, test[3] * 5, range(N))  # of another length: normalised first
    theirs = tmp_path / "val/theirs.csv"
    predict.write_submission(theirs, names(range(N)), xs[3], range(N))
    inputs = [tmp_path / "test2.npz", tmp_path / "theirs.csv", tmp_path / "test0.npz"]
    done = go(*inputs, "--fit", files[0], theirs, *files[1:3], "--submission", tmp_path / "s.csv", out="a.npz")
    weights = {m["name"]: m["weight"] for m in done.report["members"]}
    assert list(weights) == ["test2", "theirs", "test0"] and weights["test0"] > weights["test2"] > weights["theirs"] + 0.02
    want = unit(sum(w * v for w, v in zip(weights.values(), (test[2], test[3], test[0]))))
    assert done.preds["ids"].tolist() == ids and np.abs(done.preds["embeddings"] - want).max() < 1e-5
    back, x = predict.read_submission(tmp_path / "s.csv")
    assert back == sorted(ids) and np.abs(x - want[[ids.index(i) for i in back]]).max() < 1e-6
    assert "test2.npz" in go(*inputs, "--fit", files[0], theirs, out="b.npz", ok=False)
    assert "no targets" in go(tmp_path / "theirs.csv", "--fit", theirs, out="b.npz", ok=False)
    assert "no targets known" in go(*inputs, out="c.npz").stdout


def test_everything_in_preds_but_ensembles(files, tmp_path):
    (tmp_path / "preds").mkdir()
    for f in files[:2]:
        f.rename(tmp_path / "preds" / f.name)
    for _ in range(2):  # the second time the first ensemble is there, and no member
        command("ensemble.py", "--overwrite", cwd=tmp_path)
        report = json.loads((tmp_path / "preds/ensemble.json").read_text())
        assert [m["name"] for m in report["members"]] == ["m0", "m1"]
    assert "--overwrite" in command("ensemble.py", cwd=tmp_path, ok=False).stderr


def test_many_members_stay_within_memory(tmp_path):
    """Peak memory is the members and a little, not a second copy of them."""
    rng = np.random.default_rng(0)
    rows, dims, members = 24_000, 384, 12  # arrays above 32 MiB: smaller ones would measure malloc's free lists
    y = unit(rng.standard_normal((rows, dims), dtype=np.float32))
    for m in range(members):
        x = unit(y + rng.standard_normal((rows, dims), dtype=np.float32) / 20)
        np.savez(tmp_path / f"m{m:02d}.npz", ids=names(range(rows)), embeddings=x, targets=y, run=f"r{m}")
    code = ("import sys, resource; sys.path.insert(0, sys.argv.pop(1)); import ensemble\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); ensemble.main(); print('KiB', peak() - before)")
    args = [ROOT, *sorted(tmp_path.glob("m*.npz")), "--out", tmp_path / "e.npz"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, size = int(done.stdout.split("KiB")[1]) / 2 ** 10, members * rows * dims * 4 / 2 ** 20
    assert peak < 1.6 * size, f"{peak:.0f} MiB for {size:.0f} MiB of members"


def test_soup(trained, tmp_path):
    """Greedy by validation: a spoiled run stays out, and the result is a run that predict.py finds and that scores what
    the soup says."""
    net, meta = load_model(trained / "ft")
    good = {k: v.clone() for k, v in net.state_dict().items()}
    for name, noise in (("a", 0.0), ("b", 0.002), ("bad", 3.0)):
        torch.manual_seed(0)
        net.load_state_dict({k: v + noise * torch.randn_like(v) if v.is_floating_point() else v for k, v in good.items()})
        save_model(net, meta, tmp_path / f"runs/{name}/ft/best.safetensors")
    runs = [tmp_path / f"runs/{n}/ft" for n in ("bad", "b", "a")]
    out = command("ensemble.py", "--soup", *runs, "--out", tmp_path / "runs/soup").stdout
    soup, about = load_model(tmp_path / "runs/soup")
    assert str(runs[0]) not in about["soup"] and len(about["soup"]) >= 1 and "greedy soup" in out
    states = [load_model(r)[0].state_dict() for r in about["soup"]]
    for k, v in soup.state_dict().items():
        assert torch.allclose(v, sum(s[k] for s in states) / len(states), atol=1e-6)
    command("predict.py", "--run", tmp_path / "runs/soup", "--out", tmp_path / "s.npz", "--workers", 0)
    s = predict.read_preds(tmp_path / "s.npz")
    assert abs((s["embeddings"] * s["targets"]).sum(1).mean() - about["val_cosine"]) < 1e-4
    assert "greedy soup" in command("ensemble.py", "--soup", trained / "lp", trained / "ft", "--out",
                                    tmp_path / "runs/wise").stdout, "WiSE-FT: lp and ft of one run"
    net.meta_dim = None
    odd = tmp_path / "runs/odd/ft/best.safetensors"
    net.meta["backbone"] = {**net.spec, "interpolation": "nearest"}
    save_model(net, meta, odd)
    done = command("ensemble.py", "--soup", runs[1], tmp_path / "runs/odd", "--out", tmp_path / "runs/x", ok=False)
    assert "another backbone" in done.stderr
