"""ensemble.py: rows joined by id, weights equal to an independent optimiser's, honest cross-validation, matching by
run, Kaggle CSVs, the soup."""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ensemble
import predict
from conftest import ROOT, command
from train import load_net, save_net

N, D = 600, 48


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def names(rows):
    """Ids that are row numbers: int(id) is the row."""
    return np.array([f"{i:04d}" for i in rows])


def far(a, b):
    return np.abs(a - b).max()


@pytest.fixture(scope="module")
def world():
    """Targets, and four members of known quality: a good one, a middling one, its near-twin, and pure noise."""
    rng = np.random.default_rng(0)
    y = unit(rng.standard_normal((N, D)))
    noise = lambda s: s * rng.standard_normal((N, D)) / D ** 0.5  # noqa: E731
    middling = y + noise(1.2)
    return y, [unit(v) for v in (y + noise(0.7), middling, middling + noise(0.1), noise(1))]


@pytest.fixture
def files(world, tmp_path):
    """The members as npz files, each with its rows in another order, groups of three rows. -> paths"""
    y, xs = world
    for m, x in enumerate(xs):
        p = np.random.default_rng(m).permutation(N)
        predict.write_preds(tmp_path / f"m{m}.npz", ids=names(p), embeddings=x[p], targets=y[p], groups=p // 3,
                            run=f"runs/m{m}/ft", checkpoint=f"{m:016x}", views=np.array(["image"]))
    return [tmp_path / f"m{m}.npz" for m in range(4)]


@pytest.fixture
def go(tmp_path, monkeypatch, capsys):
    """ensemble.py's main in this process -> stdout, report dict, predictions; with ok=False its one line. An exception
    is a traceback and fails the test."""
    def go(*args, out="e.npz", ok=True):
        code, out = 0, tmp_path / out
        monkeypatch.setattr(sys, "argv", ["ensemble.py", *map(str, args), "--out", str(out)])
        capsys.readouterr()
        try:
            ensemble.run(ensemble.main)
        except SystemExit as e:
            code = e.code
        std = capsys.readouterr()
        assert bool(code) != ok, (std, code)
        if not ok:
            assert len(str(code).splitlines()) == 1
            return str(code)
        report = json.loads(out.with_suffix(".json").read_text())
        return SimpleNamespace(stdout=std.out, report=report, preds=predict.read_preds(out))
    return go


def mean_cosine(w, xs, y):
    return (unit(np.tensordot(w, np.stack(xs), 1)) * y).sum(1).mean()


# ---------------------------------------------------------------------------------------------------------- the weights

@pytest.mark.parametrize("kind", ["nonneg", "free"])
def test_weights_equal_an_independent_optimiser(world, kind):
    optimize = pytest.importorskip("scipy.optimize")
    y, xs = world
    xs = [*xs, unit(xs[0] - 0.8 * y)]  # a member whose best weight is negative
    x64 = np.stack(xs).astype(np.float64)

    def loss(w):
        v = np.tensordot(w, x64, 1)
        return -((v * y).sum(1) / np.linalg.norm(v, axis=1)).mean()

    bounds = [(0 if kind == "nonneg" else None, None)] * len(xs)
    other = optimize.minimize(loss, np.ones(len(xs)), method="SLSQP", bounds=bounds,
                              options={"ftol": 1e-12, "maxiter": 500})
    x, t = [torch.from_numpy(v) for v in xs], torch.from_numpy(y)
    w = ensemble.fit(*ensemble.gram(x, t), kind)
    assert abs(mean_cosine(w.numpy(), xs, y) + other.fun) < 1e-4
    assert kind == "free" or (w >= 0).all()
    assert kind == "nonneg" or w[-1] < -0.01, "free weights may be negative"
    assert (ensemble.fit(*ensemble.gram(x, t), kind) == w).all(), "deterministic"


def test_gram_is_the_weighted_average(world, monkeypatch):
    """The cosine from inner products alone is that of the recipe's module, whatever the block size."""
    y, xs = world
    x, t = [torch.from_numpy(v) for v in xs], torch.from_numpy(y)
    net = ensemble.WeightedAverage(4)
    assert (net.weight == 1).all()
    net.weight.data = torch.tensor([[0.5], [0.1], [-0.2], [2.0]])
    want = (net(x) * t).sum(-1)
    for block in (7, 600):
        monkeypatch.setattr(ensemble, "BLOCK", block)
        assert (ensemble.cosines(net.weight[:, 0], *ensemble.gram(x, t)) - want).abs().max() < 1e-5
        assert (ensemble.average(x, net.weight.detach()) - net(x)).abs().max() < 1e-6


def test_correlation_of_errors(world):
    y, xs = world
    got = ensemble.error_correlation(*ensemble.gram([torch.from_numpy(v) for v in xs], torch.from_numpy(y)))
    e = np.stack([(x - y).ravel().astype(np.float64) for x in xs])
    want = e @ e.T / np.sqrt(np.outer((e ** 2).sum(1), (e ** 2).sum(1)))
    assert np.abs(got.numpy() - want).max() < 1e-4 and want[1, 2] > 0.9 > want[0, 1]


def test_folds_keep_groups_together():
    groups = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 9, 40))
    fold = ensemble.folds_of(groups, 5).numpy()
    assert all(len(set(fold[groups == g])) == 1 for g in range(40)) and set(fold) == set(range(5))
    assert set(ensemble.folds_of(np.array([3, 3, 4]), 5).tolist()) == {0, 1}


def test_cross_validation_never_sees_its_rows():
    fold, seen = torch.tensor([0, 1, 2, 0, 1]), []

    def learn(rows):
        seen.append(set(rows.tolist()))
        return seen[-1]

    def apply(learned, rows):
        return torch.tensor([float(row in learned) for row in rows.tolist()])

    assert not ensemble.cross_validate(fold, learn, apply).any()
    assert seen == [{1, 2, 4}, {0, 2, 3}, {0, 1, 3, 4}]


# -------------------------------------------------------------------------------------------------------------- the job

def test_learned_weights_are_used_where_they_pay(world, files, go):
    y, xs = world
    done = go(*files)
    members = {m["name"]: m for m in done.report["members"]}
    assert done.report["used"] == "nonneg" and "used: nonneg" in done.stdout and done.report["n"] == N
    assert members["m0"]["weight"] > 0.5 and members["m3"]["weight"] < 0.02
    assert abs(members["m1"]["cosine"] - (xs[1] * y).sum(1).mean()) < 1e-5
    assert members["m0"]["leave_one_out"] > 0.05 > abs(members["m3"]["leave_one_out"]) * 10
    weights = np.array([m["weight"] for m in done.report["members"]])
    order = [int(i) for i in done.preds["ids"]]
    want = unit(np.tensordot(weights, np.stack(xs), 1))[order]
    assert far(done.preds["embeddings"], want) < 1e-5 and far(done.preds["targets"], y[order]) < 1e-6
    in_sample = (want * done.preds["targets"]).sum(1).mean()
    assert abs(done.report["learned"][0] - in_sample) < 0.003, "cross-validated and in-sample agree on four weights"
    assert Image.open(files[0].parent / "e.png").size[0] > 600
    for m in members:
        assert m in done.stdout


def test_learned_weights_are_not_used_where_they_do_not(tmp_path, go):
    """Equal members, few rows: learning is noise, uniform is kept, and the output says so."""
    rng = np.random.default_rng(1)
    y = unit(rng.standard_normal((24, D)))
    for m in range(6):
        x = unit(y + 1.5 * rng.standard_normal((24, D)) / D ** 0.5)
        np.savez(tmp_path / f"n{m}.npz", ids=names(range(24)), embeddings=x, targets=y)
    done = go(*(tmp_path / f"n{m}.npz" for m in range(6)), "--weights", "free")
    assert done.report["learned"][0] < done.report["uniform"][0], "this world must be one where learning does not pay"
    assert done.report["used"] == "uniform" and "do not beat" in done.stdout
    assert all(abs(m["weight"] - 1 / 6) < 1e-6 for m in done.report["members"])


def test_weights_flag(world, files, go):
    y, xs = world
    assert go(*files, "--weights", "uniform", out="u.npz").report["used"] == "uniform"
    fixed = go(*files[:2], "--weights", "3,1", out="f.npz")
    assert [m["weight"] for m in fixed.report["members"]] == [0.75, 0.25] and fixed.report["used"] == "fixed"
    order = [int(i) for i in fixed.preds["ids"]]
    assert far(fixed.preds["embeddings"], unit(0.75 * xs[0] + 0.25 * xs[1])[order]) < 1e-5
    for bad in ("1,2,3", "a,b", "0,0", "nan,1"):
        assert "--weights" in go(*files[:2], "--weights", bad, out="b.npz", ok=False)


def test_weights_per_dimension(tmp_path, go):
    """Two members, each blind in the other's half: one weight each cannot tell, a weight per dimension can."""
    rng = np.random.default_rng(2)
    y = unit(rng.standard_normal((N, D)))
    for m in range(2):
        blind = np.where((np.arange(D) < D // 2) == (m == 0), 0.05, 2.0)
        x = unit(y + blind * rng.standard_normal((N, D)) / D ** 0.5)
        np.savez(tmp_path / f"d{m}.npz", ids=names(range(N)), embeddings=x, targets=y)
    both = tmp_path / "d0.npz", tmp_path / "d1.npz"
    one, each = go(*both), go(*both, "--per-dim", out="p.npz")
    assert each.report["used"] == "nonneg per dimension" and each.report["learned"][0] > one.report["learned"][0] + 0.05
    w = np.array([m["weight_per_dim"] for m in each.report["members"]])
    assert w.shape == (2, D) and (w[0, :D // 2] > 0.8).all() and (w[1, D // 2:] > 0.8).all()
    worth = [[m["leave_one_out"] for m in e.report["members"]] for e in (one, each)]
    assert worth[0] == worth[1], "what a member is worth is told by one weight per model in both"
    assert "--per-dim" in go(*both, "--per-dim", "--weights", "uniform", out="u.npz", ok=False)


# ---------------------------------------------------------------------------------------------------------- the members

def test_ids_that_differ(world, files, go, tmp_path):
    y, xs = world

    def beside(name, **arrays):
        """A second member for files[0]."""
        np.savez(tmp_path / name, **{"ids": names(range(N)), "embeddings": xs[0], **arrays})
        return files[0], tmp_path / name

    short = beside("short.npz", ids=names(range(5, N + 5)))
    message = go(*short, ok=False)
    assert "short.npz" in message and "'0000'" in message and f"'{N:04d}'" in message and "--intersect" in message
    done = go(*short, "--intersect", "--weights", "1,0", out="i.npz")
    ids = done.preds["ids"].tolist()
    assert sorted(ids) == names(range(5, N)).tolist()
    assert far(done.preds["embeddings"], xs[0][[int(i) for i in ids]]) < 1e-5
    other = beside("other.npz", ids=np.array(["x"]), embeddings=xs[0][:1])
    assert "in common" in go(*other, "--intersect", ok=False)
    assert "width 3" in go(*beside("wide.npz", embeddings=np.ones((N, 3), np.float32)), ok=False)
    assert "targets differ" in go(*beside("wrong.npz", targets=np.roll(y, 1, 0)), ok=False)
    (tmp_path / "junk.npz").write_bytes(b"\x80\x04junk")
    assert "junk.npz" in go(files[0], tmp_path / "junk.npz", ok=False)
    assert "already there" in go(files[0], out="i.npz", ok=False)


def test_fit_is_matched_by_run(world, files, go, tmp_path):
    """Weights learned on validation predictions reach the test predictions of the same runs, whatever the order of the
    arguments; Kaggle CSVs by name."""
    y, xs = world
    test = [unit(x[::-1] + 0.0) for x in xs]
    ids = [f"t{i}" for i in range(N)]
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
    assert list(weights) == ["test2", "theirs", "test0"]
    assert weights["test0"] > weights["test2"] > weights["theirs"] + 0.02
    want = unit(sum(w * v for w, v in zip(weights.values(), (test[2], test[3], test[0]))))
    assert done.preds["ids"].tolist() == ids and done.preds["targets"] is None
    assert far(done.preds["embeddings"], want) < 1e-5
    back, x = predict.read_submission(tmp_path / "s.csv")
    assert back == sorted(ids) and far(x, want[[ids.index(i) for i in back]]) < 1e-6
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
    (tmp_path / "preds/m0.npz").write_bytes(b"")
    assert "m0.npz" in command("ensemble.py", "--overwrite", cwd=tmp_path, ok=False).stderr


def test_many_members_stay_within_memory(tmp_path):
    """Peak memory is the members and a little, not a second copy of them."""
    rng = np.random.default_rng(0)
    rows, dims, members = 24_000, 384, 16  # arrays above 32 MiB: smaller ones would measure malloc's free lists
    y = unit(rng.standard_normal((rows, dims), dtype=np.float32))
    for m in range(members):
        x = unit(y + rng.standard_normal((rows, dims), dtype=np.float32) / 20)
        np.savez(tmp_path / f"m{m:02d}.npz", ids=names(range(rows)), embeddings=x, targets=y, run=f"r{m}")
    code = ("import sys, resource; sys.path.insert(0, sys.argv.pop(1)); import ensemble\n"
            "sys.argv[0] = 'e'\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak()\n"
            "ensemble.main()\n"
            "print('KiB', peak() - before)")
    args = [ROOT, *sorted(tmp_path.glob("m*.npz")), "--out", tmp_path / "e.npz", "--folds", "2"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, size = int(done.stdout.split("KiB")[1]) / 2 ** 10, members * rows * dims * 4 / 2 ** 20
    assert peak < 1.5 * size, f"{peak:.0f} MiB for {size:.0f} MiB of members"


# ------------------------------------------------------------------------------------------------------------- the soup

def test_soup(trained, tmp_path):
    """Greedy by validation: a spoiled run stays out, the result is a run that predict.py finds, and scores at least
    what the best one does."""
    net, meta = load_net(trained / "ft")
    good = {k: v.clone() for k, v in net.state_dict().items()}
    for name, noise in (("a", 0.0), ("b", 0.002), ("bad", 3.0)):
        torch.manual_seed(0)
        noisy = {k: v + noise * torch.randn_like(v) if v.is_floating_point() else v for k, v in good.items()}
        net.load_state_dict(noisy)
        save_net(net, meta, tmp_path / f"runs/{name}/ft/best.safetensors")
    runs = [tmp_path / f"runs/{n}/ft" for n in ("bad", "b", "a")]
    done = command("ensemble.py", "--soup", *runs, "--out", tmp_path / "runs/soup", "--workers", 0)
    soup, about = load_net(tmp_path / "runs/soup")
    assert str(runs[0]) not in about["soup"] and len(about["soup"]) >= 1
    states = [load_net(r)[0].state_dict() for r in about["soup"]]
    for k, v in soup.state_dict().items():
        assert torch.allclose(v, sum(s[k] for s in states) / len(states), atol=1e-6)
    assert "greedy soup" in done.stdout
    command("predict.py", "--run", tmp_path / "runs/soup", "--out", tmp_path / "s.npz", "--workers", 0)
    s = predict.read_preds(tmp_path / "s.npz")
    assert abs((s["embeddings"] * s["targets"]).sum(1).mean() - about["val_cosine"]) < 1e-4
    assert about["val_cosine"] > meta["val_cosine"] - 1e-3, "run a is the trained one"
    assert "already there" in command("ensemble.py", "--soup", *runs, "--out", tmp_path / "runs/soup", ok=False).stderr
    save_net(net, {**meta, "head": {**meta["head"], "width": 3}}, tmp_path / "runs/odd/ft/best.safetensors")
    done = command("ensemble.py", "--soup", runs[1], tmp_path / "runs/odd", "--out", tmp_path / "runs/x", ok=False)
    assert "another head" in done.stderr
