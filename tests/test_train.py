"""What train.py promises. Most runs call its main() in this process: importing torch and the libraries costs more than
the tiny CLIP trains."""
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# bit-equal here and in subprocesses; and two threads that wait for each other crawl on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
import train  # noqa: E402
from conftest import ROOT, TINY, command  # noqa: E402
from train import (Net, build_tower, cosine, depths, load_net, lr_at, mixgen, param_groups,  # noqa: E402
                   resize_positions, ridge, save_net)

TIMED = {"images_per_s", "data_wait", "memory_gib", "seconds"}
LP = ["--phase", "lp", "--model", TINY, "--pretrained", "none"]
EVERYTHING = ["--accum-freq", 2, "--mixgen", 0.25, "--hflip", 0.5, "--ema", 0.9, "--patch-dropout", 0.5,
              "--layer-decay", 0.7, "--wise", 0.5]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "train.py"]


@pytest.fixture(scope="session", autouse=True)
def one_encoder():
    train.load_encoder = functools.lru_cache(train.load_encoder)


@pytest.fixture
def main(capsys, monkeypatch):
    """main(flags..., at=(function, n, signal or exception)): runs train.py here; at: sends a signal when a function is
    called the n-th time. -> exit code, standard output, standard error."""
    def run(*args, at=None):
        kept = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        with monkeypatch.context() as patch:
            if at:
                name, n, event = at
                real, calls = getattr(train, name), []

                def hooked(*a, **k):
                    calls.append(0)
                    if len(calls) == n:
                        if isinstance(event, Exception):
                            raise event
                        os.kill(os.getpid(), event)
                    return real(*a, **k)
                patch.setattr(train, name, hooked)
            try:
                train.guarded()
                code = 0
            except SystemExit as e:
                code = e.code
        for s, handler in kept:
            signal.signal(s, handler)
        said = capsys.readouterr()
        return (code, said.out, said.err) if isinstance(code, int) else (1, said.out, said.err + code)
    return run


@pytest.fixture(scope="session")
def flags(data):
    return ["--data", data, "--batch-size", 16, "--workers", 0, "--precision", "fp32", "--log-every", 1, "--warmup", 3]


@pytest.fixture(scope="session")
def lp(data, flags, tmp_path_factory):
    """An lp run of the tiny CLIP to start ft from. Read only."""
    out = tmp_path_factory.mktemp("lp") / "run"
    command("train.py", *LP, "--epochs", 2, "--out", out, *flags)
    return out


@pytest.fixture(scope="session")
def ft(lp, flags):
    """Flags of an ft run that starts from it."""
    return ["--phase", "ft", "--init", lp / "lp", *flags]


def torchrun(*args):
    """train.py on two processes -> CompletedProcess."""
    return subprocess.run(list(map(str, [*TORCHRUN, *args])), capture_output=True, text=True, timeout=600)


def metrics(folder, without=TIMED):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in without} for row in rows]


def assert_close(a, b, tolerance):
    """Two metrics with the same rows and keys, whose numbers differ by no more than rounding."""
    assert len(a) > 5 and len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and x["step"] == y["step"]
        assert all(abs(x[k] - y[k]) < tolerance * max(1, abs(x[k])) for k in x if not isinstance(x[k], bool)), (x, y)


def same(a, b):
    """Bit-equal trees of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    x, y = (torch.load(p / "last.pt", weights_only=True) for p in (a, b))
    for key in ("net", "ema", "optimizer", "scaler", "best", "best_head", "step"):
        assert same(x[key], y[key]), key
    assert metrics(a) == metrics(b)
    assert same(load_file(a / "best.safetensors"), load_file(b / "best.safetensors"))


# ------------------------------------------------------------------------------------------------------- exact resume

@pytest.mark.parametrize("at", [("lr_at", 1, signal.SIGINT), ("lr_at", 7, signal.SIGTERM),
                                ("mixgen", 10, signal.SIGTERM), ("epoch end", 0, signal.SIGTERM)],
                         ids=["first step", "mid-epoch", "mid-accumulation", "epoch end"])
def test_ft_resumes_exactly(at, main, ft, tmp_path, whole_ft):
    """Stopped anywhere and resumed with other workers: weights, EMA, optimiser and metrics bit for bit those of the run
    that was never stopped."""
    out = [*ft, "--lr", 1e-3, "--epochs", 3, *EVERYTHING, "--out", tmp_path / "cut"]
    steps = torch.load(whole_ft / "last.pt", weights_only=True)["step"]
    per_epoch = steps // 3
    at = ("lr_at", per_epoch, signal.SIGTERM) if at[0] == "epoch end" else at
    code, _, err = main(*out, at=at)
    assert code == 128 + at[2] and "--resume" in err
    state = torch.load(tmp_path / "cut/ft/last.pt", weights_only=True)
    assert state["step"] == (5 if at[0] == "mixgen" else at[1]) < steps
    code, _, err = main(*out, "--resume", "--workers", 2)
    assert code == 0, err
    assert_same_run(tmp_path / "cut/ft", whole_ft)


@pytest.fixture(scope="session")
def whole_ft(ft, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    command("train.py", *ft, "--lr", 1e-3, "--epochs", 3, *EVERYTHING, "--out", out)
    assert (out / "ft/best-ema.safetensors").exists() and (out / "ft/best-wise.safetensors").exists()
    return out / "ft"


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_lp_resumes_exactly(head, main, flags, tmp_path):
    args = [*LP, "--head", head, "--head-width", 1, "--hflip", 0.5, "--epochs", 3, *flags, "--out"]
    runs = [[*args, tmp_path / n] for n in "ab"]
    assert main(*runs[0])[0] == 0
    for step in (2, 12):
        assert main(*runs[1], *(["--resume"] if step > 2 else []), at=("lr_at", step, signal.SIGTERM))[0] == 143
    assert main(*runs[1], "--resume")[0] == 0
    assert_same_run(tmp_path / "a/lp", tmp_path / "b/lp")


def test_kill_9(main, ft, tmp_path, whole_ft):
    """kill -9 at no chosen moment: the last checkpoint holds, and the resumed run is the run."""
    out = [*ft, "--lr", 1e-3, "--epochs", 3, *EVERYTHING, "--out", tmp_path / "cut"]
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, out), "--save-every", "0"],
                               stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut/ft/last.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert main(*out, "--resume")[0] == 0
    assert_same_run(tmp_path / "cut/ft", whole_ft)


def test_ft_resumes_without_its_start(main, lp, flags, tmp_path):
    """last.pt is enough: what --init named may have changed or be gone, for --wise too."""
    shutil.copytree(lp / "lp", tmp_path / "lp")
    out = ["--phase", "ft", *flags, "--init", tmp_path / "lp", "--lr", 1e-3, "--epochs", 2, "--wise", 0.5, "--out"]
    assert main(*out, tmp_path / "whole")[0] == 0
    assert main(*out, tmp_path / "cut", at=("lr_at", 5, signal.SIGTERM))[0] == 143
    shutil.rmtree(tmp_path / "lp")
    code, _, err = main(*out, tmp_path / "cut", "--resume")
    assert code == 0, err
    assert_same_run(tmp_path / "cut/ft", tmp_path / "whole/ft")


def test_resume_between_log_lines(main, ft, tmp_path):
    """What the next line averages over, and the val cosine it shows, come through a stop."""
    out = [*ft, "--lr", 1e-3, "--epochs", 2, "--log-every", 4, "--out"]
    assert main(*out, tmp_path / "whole")[0] == 0
    assert main(*out, tmp_path / "cut", at=("lr_at", 6, signal.SIGTERM))[0] == 143
    code, said, err = main(*out, tmp_path / "cut", "--resume")
    assert code == 0 and "nan" not in said, (said, err)
    assert_same_run(tmp_path / "cut/ft", tmp_path / "whole/ft")


def test_resume_of_a_finished_run(main, ft, tmp_path):
    """Says so again and changes nothing; a line that a power cut tore off is forgotten."""
    out = [*ft, "--epochs", 1, "--out", tmp_path]
    assert main(*out)[0] == 0
    before, log = metrics(tmp_path / "ft"), tmp_path / "ft/metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "tra')
    code, said, err = main(*out, "--resume")
    assert code == 0 and "ft done" in said, err
    assert metrics(tmp_path / "ft") == before


DRIVER = """
import atexit, os, signal, sys, time
sys.path.insert(0, {root!r})
import torch, train
from clean import run
real_lr, real_save, calls = train.lr_at, torch.save, []

def lr_at(*args):  # rank 0 alone is told to stop, at its third step
    calls.append(0)
    if len(calls) == 3 and os.environ["RANK"] == "0" and "--resume" not in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    return real_lr(*args)

def slow(*args, **more):
    time.sleep(2)
    real_save(*args, **more)
    open(out + "/saved", "w").close()
out = sys.argv[sys.argv.index("--out") + 1]
if os.environ["RANK"] == "1":
    atexit.register(lambda: os.path.exists(out + "/saved") or open(out + "/left early", "w"))
train.lr_at, torch.save = lr_at, slow
run(train.guarded)
"""


def test_two_processes_stop_and_resume_exactly(ft, tmp_path):
    """One process is told to stop: both do, and the other waits while rank 0 writes, or torchrun would kill it. The
    sums for the next log line are each process's own."""
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    args = [*ft, "--lr", 1e-3, "--epochs", 1, "--batch-size", 8, "--log-every", 5, "--out"]
    assert torchrun(*args, tmp_path / "whole").returncode == 0
    script = [*TORCHRUN[:-1], tmp_path / "driver.py"]
    for more in ([], ["--resume"]):
        done = subprocess.run(list(map(str, [*script, *args, tmp_path / "cut", *more])), capture_output=True, text=True,
                              timeout=600)
        assert (done.returncode == 0) == bool(more), done.stderr[-3000:]
        if not more:
            assert "stopped at step 3; go on with: the same torchrun command and" in done.stderr
            assert torch.load(tmp_path / "cut/ft/last.pt", weights_only=True)["step"] == 3
            assert (tmp_path / "cut/saved").exists() and not (tmp_path / "cut/left early").exists()
    assert_same_run(tmp_path / "cut/ft", tmp_path / "whole/ft")


def test_resume_refuses_other_settings(main, ft, tmp_path):
    out = [*ft, "--epochs", 2, "--out", tmp_path / "r"]
    assert main(*out, at=("lr_at", 2, signal.SIGINT))[0] == 130
    code, _, err = main(*out, "--resume", "--lr", 5)
    assert code == 1 and "--lr 1e-05" in err
    code, _, err = main(*out)
    assert code == 1 and "--resume" in err and "--overwrite" in err
    assert "one of them" in main(*out, "--resume", "--dry-run")[2]
    last = tmp_path / "r/ft/last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    assert "not a readable checkpoint" in main(*out, "--resume")[2]
    last.unlink()
    assert "nothing to resume" in main(*out, "--resume")[2]


def test_overwrite_deletes_only_when_all_is_well(main, lp, flags, tmp_path):
    """A mistyped flag costs nothing; the checkpoint that ft starts from is not deleted; then the old run is gone."""
    shutil.copytree(lp / "lp", tmp_path / "real")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lp").symlink_to(tmp_path / "real")  # say, on a larger disk
    (tmp_path / "real/notes").mkdir()
    args = [*LP, *flags, "--epochs", 1, "--out", tmp_path / "run", "--overwrite"]
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "real").iterdir()}
    for wrong in (["--model", "ViT-TYPO"], ["--lr", 0], ["--pretrained", "nowhere"], ["--image-size", 3]):
        assert main(*args, *wrong)[0] == 1
    ft = ["--phase", "ft", *flags, "--out", tmp_path / "run"]
    assert main(*ft, "--epochs", 1)[0] == 0
    inside = tmp_path / "run/ft/best.safetensors"
    code, _, err = main(*ft, "--init", inside, "--overwrite")
    assert code == 1 and "another --out" in err and inside.is_file()
    assert main(*ft, "--overwrite", "--unfreeze-from", 99)[0] == 1 and inside.is_file()
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "real").iterdir()} == before
    assert main(*args)[0] == 0
    assert (tmp_path / "run/lp").is_symlink() and not (tmp_path / "real/notes").exists()
    assert [r["step"] for r in metrics(tmp_path / "real")][:2] == [0, 1], "a new log, not the old one with more rows"


def test_full_disk_keeps_the_old_checkpoint(ft, tmp_path):
    """Files may not grow beyond 100 kB: the message names the disk, nothing half-written stays."""
    line = " ".join(map(str, [sys.executable, ROOT / "train.py", *ft, "--epochs", 1, "--out", tmp_path / "r"]))
    done = subprocess.run(["bash", "-c", f"ulimit -f 100; exec {line}"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "too large" in done.stderr or "could not be written" in done.stderr
    assert not list((tmp_path / "r/ft").glob(".*tmp")) and not (tmp_path / "r/ft/last.pt").exists()


def test_full_disk_while_features_are_written(flags, tmp_path):
    line = " ".join(map(str, [sys.executable, ROOT / "train.py", *LP, *flags, "--out", tmp_path / "r"]))
    done = subprocess.run(["bash", "-c", f"ulimit -f 20; exec {line}"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "too large" in done.stderr, done.stderr


# --------------------------------------------------------------------------------------------------------------- steps

def test_golden(main, lp, ft, data, tmp_path):
    """Twenty steps of ft on a CPU: a change in data order, augmentation, loss, optimiser or schedule shows here.
    Pictures, targets and weights are numpy's, whose streams never change, so neither clean.py nor torch's initialisers
    can move these numbers."""
    from PIL import Image
    rng = np.random.default_rng(0)
    (tmp_path / "data/images").mkdir(parents=True)
    for i in range(56):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"data/images/{i}.png")
    targets = rng.standard_normal((56, 384)).astype(np.float32)
    np.save(tmp_path / "data/targets.npy", targets / np.linalg.norm(targets, axis=1, keepdims=True))
    pairs = {"image": [f"images/{i}.png" for i in range(56)], "prompt": [f"picture number {i}" for i in range(56)],
             "split": ["train"] * 48 + ["val"] * 8}
    pl.DataFrame(pairs).write_parquet(tmp_path / "data/pairs.parquet")
    (tmp_path / "data/summary.json").write_text((data / "summary.json").read_text())
    net, meta = load_net(lp)
    for p in net.parameters():
        p.data = torch.from_numpy((rng.standard_normal(p.shape) * 0.1).astype(np.float32)) + (p.ndim == 1)
    save_net(net, meta, tmp_path / "start.safetensors")
    code, _, err = main(*ft, "--data", tmp_path / "data", "--init", tmp_path / "start.safetensors", "--lr", 1e-3,
                        "--epochs", 7, "--mixgen", 0.25, "--hflip", 0.5, "--out", tmp_path / "g")
    assert code == 0, err
    losses = [1 - r["train_cosine"] for r in metrics(tmp_path / "g/ft") if "train_cosine" in r][:20]
    assert np.allclose(losses, GOLDEN, atol=1e-3), str([round(x, 4) for x in losses])


GOLDEN = [1.0287, 0.9977, 1.0104, 0.9734, 0.9748, 0.9557, 0.9322, 0.9314, 0.9497, 0.9183,
          0.9127, 0.9313, 0.8984, 0.9057, 0.9101, 0.9028, 0.8931, 0.8851, 0.8973, 0.8911]


def test_accumulation_is_the_big_batch(main, ft, tmp_path):
    """Two micro-batches of 8 with MixGen are one batch of 16: same pairs mixed, same losses to rounding."""
    for name, size, accum in (("a", 16, 1), ("b", 8, 2)):
        assert main(*ft, "--lr", 1e-3, "--epochs", 1, "--batch-size", size, "--accum-freq", accum,
                    "--mixgen", 0.25, "--hflip", 0.5, "--out", tmp_path / name)[0] == 0
    assert_close(*(metrics(tmp_path / n / "ft") for n in "ab"), tolerance=2e-4)


def test_two_processes_are_one(main, flags, tmp_path):
    """torchrun on gloo: the same global batch gives the same losses, with MixGen and a BatchNorm head; lp gives the
    same bytes; odd shards count right."""
    lp_flags = [*LP, "--head", "mlp", "--head-width", 1, "--epochs", 2, *flags]
    ft_flags = ["--phase", "ft", "--lr", 1e-3, "--epochs", 1, *flags, "--mixgen", 0.25, "--hflip", 0.5]
    for phase, n in ((lp_flags, 16), (ft_flags, 8)):
        done = torchrun(*phase, "--batch-size", n, "--out", tmp_path / "two")
        assert done.returncode == 0, done.stderr[-3000:]
        assert main(*phase, "--batch-size", 16, "--out", tmp_path / "one")[0] == 0
        if phase is lp_flags:
            (tmp_path / ".features").rename(tmp_path / "features-lp")
    assert_same_run(tmp_path / "one/lp", tmp_path / "two/lp")
    assert_close(*(metrics(tmp_path / n / "ft") for n in ("one", "two")), tolerance=1e-3)
    a, b = (load_file(tmp_path / n / "ft/best.safetensors") for n in ("one", "two"))  # the running statistics too
    off = {k: (a[k].float() - b[k].float()).abs().max().item() for k in a}
    del off["head.0.bias"]  # is cancelled by the BatchNorm: its gradient is noise
    assert max(off.values()) <= 1e-3, {k: d for k, d in off.items() if d > 1e-3}
    assert not list(tmp_path.rglob("*.part"))


def test_two_processes_with_batchnorm(data, flags, tmp_path):
    """Each has running statistics of its own while it trains; what is scored is what rank 0 saves."""
    from clean import read_data
    out = ["--phase", "ft", "--init", "none", "--model", "timm:test_resnet", "--pretrained", "none", *flags]
    done = torchrun(*out, "--lr", 1e-2, "--batch-size", 8, "--image-size", 32, "--epochs", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    pairs, targets, _ = read_data(data)
    rows = np.flatnonzero(pairs["split"].to_numpy() == "val")
    for kind in ("raw", "ema"):
        net, meta = load_net(tmp_path / f"ft/best-{kind}.safetensors")
        pictures = train.Pictures([data / p for p in pairs["image"].gather(rows)], meta["tower"])
        with torch.no_grad():
            predicted = net(torch.stack([pictures[i] for i in range(len(rows))]))
        score = cosine(predicted, torch.from_numpy(targets[rows])).mean().item()
        assert score == pytest.approx(meta["val_cosine"], abs=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_not_finite_stops_before_the_update(processes, main, ft, data, copy, tmp_path):
    """A NaN target: one line with step and picture, on every process; nothing NaN is saved; the step before it can be
    resumed."""
    data = copy(data)
    targets, split = np.load(data / "targets.npy"), pl.read_parquet(data / "pairs.parquet")
    row = split.with_row_index().filter(pl.col("split") == "train")["index"][3]
    targets[row] = np.nan
    np.save(data / "targets.npy", targets)
    args = [*ft, "--data", data, "--epochs", 1, "--save-every", 0, "--log-every", 3, "--out", tmp_path / "nan"]
    if processes == 1:
        code, _, err = main(*args)
    else:
        done = torchrun(*args, "--batch-size", 8)
        code, err = done.returncode, done.stderr
    assert code and "is not finite" in err and split["image"][row] in err and "step" in err and "--overwrite" in err
    if (tmp_path / "nan/ft/last.pt").exists():
        state = torch.load(tmp_path / "nan/ft/last.pt", weights_only=True)
        assert all(torch.isfinite(t).all() for t in state["net"].values())


def test_half_precision_that_never_fits_stops(main, ft, tmp_path, monkeypatch):
    """GradScaler halves its scale for every step that it skips; when none is left, the run ends instead of idling."""
    def overflowing(*a):
        cos = cosine(*a)
        if cos.requires_grad:
            cos.register_hook(lambda g: g * math.inf)
        return cos
    monkeypatch.setattr(train, "cosine", overflowing)
    code, _, err = main(*ft, "--precision", "amp", "--epochs", 9, "--out", tmp_path)
    assert code == 1 and "overflows float16" in err and not (tmp_path / "ft/last.pt").exists(), err


def test_a_bad_step_is_skipped_on_the_device():
    """The fused AdamW holds weights and moments still when found_inf is set: so the loop may look only now and then."""
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=1.0, fused=True)
    for grad, bad in ((1.0, 0.0), (float("nan"), 1.0)):
        p.grad = torch.full((3,), grad)
        optimizer.found_inf = torch.tensor(bad)
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(before, p.detach()) == bool(bad)
    assert torch.isfinite(optimizer.state[p]["exp_avg"]).all() and optimizer.state[p]["step"] == 1


def test_lr_at():
    assert [lr_at(s, 100, 10) for s in (0, 9, 10, 55, 100)] == pytest.approx([0.1, 1, 1, 0.5, 0])


def test_mixgen_is_the_paper():
    """Against the loop of arXiv 2206.08358, alg. 1; the shipped one that mixes mixed rows again would fail."""
    x, y, joined = torch.rand(8, 3, 4, 4), torch.rand(8, 5), torch.rand(4, 5)
    want = x.clone()
    for i in range(4):
        want[i] = 0.5 * x[i] + 0.5 * x[i + 4]
    mixed, targets = mixgen(x, y, joined)
    assert torch.allclose(mixed, want) and torch.equal(targets, torch.cat([joined, y[4:]]))


# ---------------------------------------------------------------------------------------------------- towers and heads

def tiny_spec(model, **more):
    spec = {"model": model, "pretrained": "none", "kwargs": {}, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3,
            "interpolation": "bicubic", **more}
    if not model.startswith("timm:"):
        config = json.load(open(TINY))
        spec = {"config": {k: config[k] for k in ("embed_dim", "vision_cfg")}, "quick_gelu": False, **spec}
    return spec


@pytest.mark.parametrize("model", ["tiny", "timm:test_vit", "timm:test_vit2", "timm:test_convnext"])
def test_another_image_size(model, tmp_path):
    """The position grid is interpolated, the class token is not, a convnet needs nothing; asking for the trained size
    changes nothing."""
    spec = tiny_spec(model)
    net = Net(build_tower(spec), spec)
    for p in net.parameters():
        nn.init.normal_(p)
    meta = {"format": 1, "tower": spec, "head": {"head": "linear", "width": 16, "dim": 384}}
    save_net(net.eval(), meta, tmp_path / "best.safetensors")
    same, _ = load_net(tmp_path)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(same(x), net(x))
    big, meta = load_net(tmp_path, image_size=64)
    assert meta["tower"]["image_size"] == 64 and big(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 384)
    changed = [k for k, v in big.state_dict().items() if v.shape != net.state_dict()[k].shape]
    assert len(changed) == (0 if "conv" in model else 1)
    for k in changed:
        old, new = net.state_dict()[k], big.state_dict()[k]
        assert new.shape[-2] in (1 + 64, 64, 1 + 16, 16)
        prefix = old.shape[-2] % 2
        assert torch.equal(old[..., :prefix, :], new[..., :prefix, :]), "the class token stays"
        back = resize_positions({k: new.clone()}, net)[k]
        alike = torch.corrcoef(torch.stack([old.flatten(), back.flatten()]))[0, 1]
        assert alike > 0.9, "there and back is nearly the same grid, not a shuffled one"


def test_positions_as_open_clip_resizes_them():
    from open_clip.model import resize_pos_embed
    small, big = (build_tower(tiny_spec("tiny", image_size=s)) for s in (32, 56))
    state = small.state_dict()
    theirs = {"visual.positional_embedding": state["positional_embedding"].clone()}
    resize_pos_embed(theirs, types.SimpleNamespace(visual=big))
    ours = resize_positions(dict(state), big)["positional_embedding"]
    assert torch.allclose(ours, theirs["visual.positional_embedding"], atol=1e-6)


def test_timm_tags_have_their_own_statistics(monkeypatch):
    """Mean, std and size are those of the tag that was asked for, not of the model's default one; a tag trained with
    QuickGELU is refused where the model would compute plain GELU. (Weights are not here: random ones.)"""
    import timm
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **k: real(name, **k))

    def spec(model, tag):
        return train.make_tower(train.parse_args(["--phase", "lp", "--model", model, "--pretrained", tag]))[1]
    assert spec("timm:tf_efficientnet_b0", "ns_jft_in1k")["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert spec("timm:tf_efficientnet_b0", "ap_in1k")["mean"] == [0.5] * 3
    with pytest.raises(SystemExit, match="timm:vit_base_patch32_clip_quickgelu_224"):
        spec("timm:vit_base_patch32_clip_224", "openai")
    assert spec("timm:vit_base_patch32_clip_quickgelu_224", "openai")["mean"][0] == pytest.approx(0.48145466)


def test_proj_is_near_the_head():
    """The projection comes after the last block, so it learns as fast as that, though its name comes first."""
    spec = tiny_spec("tiny", proj=True)
    found = depths(Net(build_tower(spec), spec))
    assert found["tower.proj"] == found["head.weight"] - 1 == max(d for n, d in found.items() if "resblocks" in n)


@pytest.mark.parametrize("model, blocks", [("tiny", ["transformer.resblocks.0.", "transformer.resblocks.1."]),
                                           ("timm:test_vit", [f"blocks.{i}." for i in range(6)]),
                                           ("timm:mobilenetv2_100", ["blocks.0.0.", "blocks.1.0.", "blocks.1.1."])])
def test_layer_decay(model, blocks):
    """Every parameter is in one group; the lr falls by the factor from block to block, whatever digits its name holds;
    the head has all of it."""
    spec = tiny_spec(model)
    net = Net(build_tower(spec), spec)
    found = depths(net)
    starts = [next(found[n] for n in found if n.startswith(f"tower.{b}")) for b in blocks]
    assert starts == list(range(1, len(blocks) + 1))
    stem = ("conv1.", "patch_embed", "pos_embed", "positional", "class_", "cls_", "conv_stem")
    assert all(d == 0 for n, d in found.items() if any(s in n for s in stem))
    top = found["head.weight"]
    assert top == max(found.values()) and sorted(set(found.values())) == list(range(top + 1))
    groups = param_groups(net, 1.0, 0.1, 0.5)
    peak = {id(p): g["peak"] for g in groups for p in g["params"]}
    assert len(peak) == sum(len(g["params"]) for g in groups) == len(found)
    assert all(peak[id(p)] == 0.5 ** (top - found[n]) for n, p in net.named_parameters())
    assert all(p.ndim > 1 for g in groups for p in g["params"] if g["weight_decay"])


def test_unfreeze_from(main, lp, ft, tmp_path):
    """By index: depth 2 of the tiny CLIP is its second block, so stem and first block stay as they were, to the bit."""
    assert main(*ft, "--lr", 1e-3, "--epochs", 1, "--unfreeze-from", 2, "--out", tmp_path)[0] == 0
    before, after = load_file(lp / "lp/best.safetensors"), torch.load(tmp_path / "ft/last.pt", weights_only=True)["net"]
    found = depths(load_net(lp)[0])
    assert {n for n in found if not torch.equal(before[n], after[n])} == {n for n in found if found[n] >= 2}
    code, _, err = main(*ft, "--unfreeze-from", 9, "--out", tmp_path / "x")
    assert code == 1 and "0 (the stem) to 3 (the head)" in err


def test_ridge():
    """The closed form equals a plain solve at its lambda, and no lambda of the grid does better on validation."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((300, 20)), rng.standard_normal((20, 8))
    y = x @ w + 3 + rng.standard_normal((300, 8))
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    x, y = x.astype(np.float32), y.astype(np.float32)
    weight, bias, lam, score = ridge([x[:200]], y[:200], x[200:], y[200:], block=64)
    c, t = x[:200] - x[:200].mean(0), y[:200] - y[:200].mean(0)
    want = np.linalg.solve(c.T @ c + lam * np.eye(20), c.T @ t).T
    assert np.allclose(weight, want, atol=1e-4)
    predicted = F.normalize(torch.from_numpy(x[200:]) @ weight.T + bias, dim=-1)
    assert cosine(predicted, torch.from_numpy(y[200:])).mean().item() == pytest.approx(score, abs=1e-5)
    mean = F.normalize(torch.from_numpy(y[:200].mean(0)), dim=0)
    assert score > cosine(mean, torch.from_numpy(y[200:])).mean()


def test_head_init_ridge(main, flags, tmp_path):
    args = [*LP, "--epochs", 1, *flags, "--out"]
    code, said, err = main(*args, tmp_path / "a", "--head-init", "ridge")
    assert code == 0, err
    score = float(said.split("by val cosine, ")[1].split()[0])
    start = metrics(tmp_path / "a/lp")[0]["val_cosine"]
    assert start == pytest.approx(score, abs=2e-4), "training starts at the closed form's score"
    weight = load_file(tmp_path / "a/lp/best.safetensors")["head.weight"]
    xavier = math.sqrt(2 / sum(weight.shape))
    assert weight.std().item() == pytest.approx(xavier, rel=0.3), "as large as a random head, for Adam's steps"
    code, _, err = main(*args, tmp_path / "c", "--epochs", 4, "--warmup", 1000, "--lr", 0.01)
    assert code == 0, err
    peak = max(r.get("lr", 0) for r in metrics(tmp_path / "c/lp"))
    assert peak == pytest.approx(0.01), "warm-up is a fifth of a short run, not all of it"
    assert "linear" in main(*args, tmp_path / "b", "--head-init", "ridge", "--head", "mlp")[2]


def test_lp_moves_only_the_head_and_caches(main, lp, flags, tmp_path):
    first = load_file(lp / "lp/best.safetensors")
    args = [*LP, *flags, "--out", lp.parent / "again"]
    assert main(*args, "--epochs", 5, "--head-init", "xavier")[0] == 0
    second = load_file(lp.parent / "again/lp/best.safetensors")
    assert all(torch.equal(first[k], second[k]) == (not k.startswith("head.")) for k in first)
    cache = lp.parent / ".features"
    assert len(list(cache.glob("*.npy"))) == 1, "the second run read the first one's features"
    assert not list(cache.glob("*.part"))
    assert main(*args, "--epochs", 1, "--hflip", 0.5, "--overwrite")[0] == 0
    one, two = (np.load(f) for f in sorted(cache.glob("*.npy"), key=lambda p: p.stat().st_mtime))
    assert two.shape == (2, *one.shape[1:])
    assert np.array_equal(two[0], one[0]) and not np.allclose(two[1], one[0])


def test_features_are_the_towers(main, lp, data, flags):
    """Row i of the cache is the pooled feature of row i before the projection, guard rows left out."""
    net, meta = load_net(lp)
    pairs = pl.read_parquet(data / "pairs.parquet").filter(pl.col("split") != "guard")
    pictures = train.Pictures([data / p for p in pairs["image"]], meta["tower"])
    stored = np.load(next((lp.parent / ".features").glob("*.npy")), mmap_mode="r")
    assert stored.shape[1:] == (len(pairs), 64), "64 wide: before the projection to 32"
    with torch.no_grad():
        features = net.tower(net.pixels(torch.stack([pictures[i] for i in (0, 7)])))
    assert np.allclose(features, stored[0, [0, 7]], atol=1e-4)


def test_features_go_on_where_they_were(main, flags, tmp_path, monkeypatch):
    """Killed in the middle, the pictures that were done are not done again, and the bytes are the same; a second run
    with the same tower and data meanwhile makes its own; a damaged cache is made anew."""
    def clock():  # every look is ten seconds later, so every batch is synced
        clock.now += 11
        return clock.now
    clock.now = 0
    monkeypatch.setattr(train, "time", types.SimpleNamespace(time=clock, perf_counter=time.perf_counter))
    args = [*LP, *flags, "--hflip", 0.5, "--epochs", 1, "--out"]
    assert main(*args, tmp_path / "one", at=("open_rgb", 100, signal.SIGTERM))[0] == 143
    assert main(*args, tmp_path / "two")[0] == 0
    cache = next((tmp_path / ".features").glob("*.npy"))
    whole, read = cache.read_bytes(), []
    cache.unlink()
    real = train.open_rgb
    monkeypatch.setattr(train, "open_rgb", lambda path: read.append(path) or real(path))
    assert main(*args, tmp_path / "one", "--overwrite")[0] == 0
    n = np.load(cache, mmap_mode="r").shape[1]
    assert len(read) == n - 96, "six batches of 16 were done"
    assert cache.read_bytes() == whole and len(list(cache.parent.iterdir())) == 1
    cache.write_bytes(whole[:-1000])
    assert main(*args, tmp_path / "one", "--overwrite")[0] == 0
    assert cache.read_bytes() == whole


def test_proj(main, flags, tmp_path):
    assert main(*LP, "--proj", "--epochs", 1, *flags, "--out", tmp_path)[0] == 0
    net, meta = load_net(tmp_path)
    assert net.head.in_features == 32 and net.tower.proj is not None and meta["tower"]["proj"]


def test_quick_gelu(main, flags, tmp_path):
    """A weights file has no tag: the log says which activation was built, the flag sets it, the checkpoint knows it."""
    state = build_tower(tiny_spec("tiny", proj=True)).state_dict()
    save_file({f"visual.{k}": v for k, v in state.items()}, tmp_path / "clip.safetensors")
    outputs = []
    for flag in ([], ["--force-quick-gelu"]):
        code, said, err = main(*LP, "--pretrained", tmp_path / "clip.safetensors", "--epochs", 1, *flags,
                               "--out", tmp_path / f"r{len(flag)}", *flag)
        assert code == 0 and (", QuickGELU" if flag else ", GELU") in said, err
        net, meta = load_net(tmp_path / f"r{len(flag)}")
        assert meta["tower"]["quick_gelu"] == bool(flag)
        outputs.append(net.tower(torch.ones(1, 3, 32, 32)))
    assert not torch.allclose(*outputs, atol=1e-4)


def test_openai_tag_means_quick_gelu(monkeypatch):
    """ViT-L-14 + openai: the tag knows. The weights are not here, so they are what the factory would have returned."""
    import open_clip
    asked = {}

    def create_model(name, **kwargs):
        asked.update(kwargs, name=name)
        return types.SimpleNamespace(visual=build_tower({**tiny_spec("x"), "proj": True}))
    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.load(open(TINY)))
    args = train.parse_args(["--phase", "lp", "--model", "ViT-L-14", "--pretrained", "openai"])
    _, spec = train.make_tower(args)
    assert spec["quick_gelu"] and asked["force_quick_gelu"] and spec["mean"][0] == pytest.approx(0.48145466)


def test_weights_files(main, flags, tmp_path):
    """safetensors and state dicts load; what is missing is named; a pickle is refused; a tag that does not exist lists
    those that do."""
    import pickle
    args = ["--phase", "lp", "--model", "timm:test_vit", "--image-size", 32, "--epochs", 1, *flags]
    state = build_tower(tiny_spec("timm:test_vit", image_size=160)).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    results = []
    for name in ("w.safetensors", "w.pt"):
        code, _, err = main(*args, "--pretrained", tmp_path / name, "--out", tmp_path / name[2:])
        assert code == 0, err
        results.append(load_file(tmp_path / name[2:] / "lp/best.safetensors"))
    assert same(*results)
    del state["norm.weight"]
    save_file(state, tmp_path / "less.safetensors")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(print))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:500])
    for name, word in (("less.safetensors", "norm.weight"), ("evil.pt", "not a safetensors"),
                       ("cut.safetensors", "not a safetensors"), ("gone.pt", "neither a file nor a tag")):
        code, _, err = main(*args, "--pretrained", tmp_path / name, "--out", tmp_path / "no")
        assert code == 1 and word in err, err
    assert "not an open_clip model" in main(*args, "--model", "ViT-X", "--out", tmp_path / "no")[2]


@pytest.mark.parametrize("pretrained", [True, False])
def test_batchnorm_in_ft(pretrained, main, flags, tmp_path):
    """A pretrained convolutional tower keeps its running statistics, one from scratch learns; the flag overrules."""
    save_file(build_tower(tiny_spec("timm:test_resnet")).state_dict(), tmp_path / "w.safetensors")
    weights = tmp_path / "w.safetensors" if pretrained else "none"
    assert main("--phase", "lp", "--model", "timm:test_resnet", "--image-size", 32, "--pretrained", weights,
                "--epochs", 1, *flags, "--out", tmp_path)[0] == 0
    before = load_file(tmp_path / "lp/best.safetensors")
    conv = next(k for k in before if k.startswith("tower.conv1.") and before[k].ndim == 4)
    for flag, frozen in (([], pretrained), (["--no-freeze-bn"], False), (["--freeze-bn"], True)):
        assert main("--phase", "ft", *flags, "--epochs", 1, "--out", tmp_path, "--overwrite", *flag)[0] == 0
        after = torch.load(tmp_path / "ft/last.pt", weights_only=True)["net"]
        assert all(torch.equal(before[k], after[k]) == frozen for k in before if k.endswith("running_mean"))
        assert not torch.equal(before[conv], after[conv])
    found = depths(load_net(tmp_path / "lp")[0])
    assert main("--phase", "ft", *flags, "--epochs", 1, "--out", tmp_path, "--overwrite", "--no-freeze-bn",
                "--unfreeze-from", 3)[0] == 0
    after = torch.load(tmp_path / "ft/last.pt", weights_only=True)["net"]
    means = [k for k in before if k.endswith("running_mean")]
    assert ([not torch.equal(before[k], after[k]) for k in means]
            == [found[k.replace("running_mean", "weight")] >= 3 for k in means]), "frozen layers keep theirs"


# -------------------------------------------------------------------------------------------------- ft switches

def test_ema_and_wise(main, ft, tmp_path):
    """--wise 0 is the start and --wise 1 the trained net, exactly; the EMA is the average its formula says; both are
    scored beside the raw weights."""
    args = [*ft, "--lr", 1e-3, "--epochs", 1, "--ema", 0.5, "--save-every", 0, "--out"]
    assert main(*args, tmp_path / "a", "--wise", 0)[0] == 0 and main(*args, tmp_path / "b", "--wise", 1)[0] == 0
    a, b = (metrics(tmp_path / n / "ft") for n in "ab")
    (start, *_, last), (*_, last_b) = ([r for r in m if "val_cosine" in r] for m in (a, b))
    assert last["val_cosine_wise"] == start["val_cosine"] != last["val_cosine"] == last_b["val_cosine_wise"]
    assert last["val_cosine_ema"] != last["val_cosine"]
    steps = [[r for r in m if "train_cosine" in r] for m in (a, b)]
    assert steps[0] == steps[1], "validating other weights leaves the training alone"
    best = {n: load_net(tmp_path / f"a/ft/{n}.safetensors")[1] for n in ("best", "best-raw", "best-ema", "best-wise")}
    assert best["best"]["val_cosine"] == max(m["val_cosine"] for m in best.values())
    assert best["best-ema"]["weights"] == "ema"


def test_ema_formula(main, lp, ft, tmp_path, monkeypatch):
    """From the start's weights on, step by step; and no counter of it goes to the device."""
    history, real = [], train.update_ema

    def spy(ema, net, step, decay):
        real(ema, net, step, decay)
        history.append((step, *([p.detach().clone() for p in m.parameters()] for m in (net, ema))))
    monkeypatch.setattr(train, "update_ema", spy)
    assert main(*ft, "--lr", 1e-3, "--epochs", 1, "--ema", 0.6, "--out", tmp_path)[0] == 0
    mean = [p.detach() for p in load_net(lp)[0].parameters()]
    assert [step for step, *_ in history] == list(range(len(history))) and len(history) > 5
    for step, raw, ema in history:
        d = min(0.6, (1 + step) / (10 + step))
        mean = [d * m + (1 - d) * r for m, r in zip(mean, raw)]
        assert all(torch.allclose(m, e, atol=1e-6) for m, e in zip(mean, ema))


def test_ema_copies_buffers():
    ema, net = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    net(torch.rand(8, 4))
    train.update_ema(ema, net, 3, 0.9)
    assert torch.equal(ema.running_mean, net.running_mean) and ema.num_batches_tracked == 1


def test_grad_checkpointing_changes_no_loss(main, lp, ft, tmp_path):
    """Nor where the stem is frozen, so that nothing that goes into the blocks has a gradient."""
    for n in (0, 1):
        for name, flag in (("a", []), ("b", ["--grad-checkpointing"])):
            assert main(*ft, "--epochs", 1, "--unfreeze-from", n, "--out", tmp_path / f"{name}{n}", *flag)[0] == 0
        assert metrics(tmp_path / f"a{n}/ft") == metrics(tmp_path / f"b{n}/ft")
    net, _ = load_net(lp)
    train.checkpoint_gradients(net.tower, trained_bn=False)
    assert net.tower.transformer.grad_checkpointing, "the switch does something"
    with pytest.raises(SystemExit, match="--freeze-bn"):  # its second forward pass would move running statistics again
        train.checkpoint_gradients(net.tower, trained_bn=True)
    for without in (build_tower(tiny_spec("timm:vgg11")), type("ModifiedResNet", (nn.Module,), {})()):
        with pytest.raises(SystemExit, match="this tower has none"):
            train.checkpoint_gradients(without, trained_bn=False)


def test_compile_keeps_the_keys(main, lp, ft, tmp_path, monkeypatch):
    """In place; no _orig_mod. in any checkpoint. The compiler itself is left out here."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **k: compiled.append(self))
    assert main(*ft, "--epochs", 1, "--compile", "--out", tmp_path)[0] == 0
    assert len(compiled) == 1 and isinstance(compiled[0], Net)
    assert load_file(tmp_path / "ft/best.safetensors").keys() == load_file(lp / "lp/best.safetensors").keys()


COMPILER = shutil.which(os.environ.get("CXX", "g++")) and Path(sysconfig.get_path("include"), "Python.h").is_file()


@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler and Python.h, which are not here")
def test_compile(main, ft, tmp_path):
    """The compiler itself, from an empty cache: keys and, to rounding, numbers of a run without it."""
    args = [*ft, "--lr", 1e-3, "--epochs", 1, "--batch-size", 48, "--out"]
    assert main(*args, tmp_path / "eager")[0] == 0
    command("train.py", *args, tmp_path / "fast", "--compile",
            env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert list((tmp_path / "cache").rglob("*.so")), "something was compiled"
    eager, fast = (tmp_path / n / "ft" for n in ("eager", "fast"))
    assert_close(metrics(eager), metrics(fast), tolerance=1e-4)
    assert load_file(eager / "best.safetensors").keys() == load_file(fast / "best.safetensors").keys()
    a, b = (torch.load(p / "last.pt", weights_only=True)["net"] for p in (eager, fast))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_deterministic(main, ft, tmp_path, monkeypatch, whole_ft):
    """Set before the first step, CUDA's variable only where it was unset; on a CPU, bit-exact anyway, it changes no
    bit of a run; --resume asks for it; an operation that has no such kernel ends in one line."""
    args = [*ft, "--lr", 1e-3, "--epochs", 3, *EVERYTHING, "--out", tmp_path / "d"]
    variable, states, real = "CUBLAS_WORKSPACE_CONFIG", [], train.lr_at

    def spy(*a):
        states.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                       os.environ.get(variable)))
        return real(*a)
    monkeypatch.setattr(train, "lr_at", spy)
    monkeypatch.setenv(variable, ":16:8")
    torch.backends.cudnn.benchmark = True
    try:
        assert main(*args, "--deterministic", at=("mixgen", 5, signal.SIGTERM))[0] == 143
        assert set(states) == {(True, False, ":16:8")}
        monkeypatch.delenv(variable)
        torch.use_deterministic_algorithms(False)
        assert "--deterministic True" in main(*args, "--resume")[2]
        assert main(*args, "--resume", "--deterministic")[0] == 0
        assert states[-1] == (True, False, ":4096:8")
        assert_same_run(tmp_path / "d/ft", whole_ft)
        error = RuntimeError("adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but ...")
        code, _, err = main(*args, "--overwrite", "--deterministic", at=("lr_at", 2, error))
        assert code == 1 and err.startswith("--deterministic: adaptive_avg_pool2d_backward_cuda does not have"), err
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_patch_dropout(lp):
    net, _ = load_net(lp)
    seen = []
    net.tower.transformer.register_forward_pre_hook(lambda m, x: seen.append(x[0].shape))
    train.drop_patches(net.tower, 0.5)
    for training in (True, False):
        net.train(training)(torch.zeros(2, 3, 32, 32))
    kept, all_of_them = (shape.numel() for shape in seen)
    assert kept == all_of_them * 9 // 17, "in training 8 of 16 patches and the class token"
    for name, size in (("eva02_tiny_patch14_224", 56), ("naflexvit_base_patch16_map", 64)):  # know which ones stayed
        tower = build_tower(tiny_spec(f"timm:{name}", image_size=size, kwargs={"depth": 1}))
        train.drop_patches(tower, 0.5)
        seen.clear()
        tower.blocks[0].register_forward_pre_hook(lambda m, x: seen.append(x[0].shape[1]))
        tower.train()(torch.zeros(2, 3, size, size))
        assert seen == [8 + tower.num_prefix_tokens], "8 of 16 patches and the class token"
    for name, size in (("test_resnet", 32), ("samvit_base_patch16_224", 224)):
        tower = build_tower(tiny_spec(f"timm:{name}", image_size=size, kwargs={"depth": 1} if "vit" in name else {}))
        with pytest.raises(SystemExit, match="no patches"):
            train.drop_patches(tower, 0.5)


def test_advice_is_for_its_model(main, flags, copy, data, tmp_path):
    """What the data folder recommends for one model is not applied to another, in ft neither."""
    data = copy(data)
    summary = json.loads((data / "summary.json").read_text())
    summary["recommend"] = {"model": "timm:test_vit", "pretrained": "none", "image_size": 64, "ft": {"lr": 1e-3}}
    (data / "summary.json").write_text(json.dumps(summary))
    lrs = []
    for model in (["--model", TINY, "--pretrained", "none"], []):
        more = [*flags, "--data", data, "--epochs", 1, "--out", tmp_path / f"r{len(model)}"]
        assert main("--phase", "lp", *model, *more)[0] == 0
        code, said, err = main("--phase", "ft", *more)
        assert code == 0 and ("32 px" if model else "64 px") in said, (said, err)
        lrs.append(max(r.get("lr", 0) for r in metrics(tmp_path / f"r{len(model)}/ft")))
    assert lrs == pytest.approx([1e-5, 1e-3])


def test_ft_at_another_size(main, ft, tmp_path):
    """lp at 32 px, ft at 48: positions resized, and the checkpoint says 48."""
    code, said, err = main(*ft, "--epochs", 1, "--image-size", 48, "--out", tmp_path)
    assert code == 0 and "48 px" in said, err
    net, meta = load_net(tmp_path)
    assert meta["tower"]["image_size"] == 48 and net.tower.positional_embedding.shape[0] == 37


def test_dry_run(main, ft, flags, tmp_path):
    code, said, err = main(*ft, "--lr", 1e-3, "--layer-decay", 0.5, "--dry-run", "--out", tmp_path / "dry")
    assert code == 0, err
    for lr in ("1.25e-04", "2.50e-04", "5.00e-04", "1.00e-03"):
        assert f"lr {lr}" in said
    assert "GFLOP per image" in said and "GiB" in said and "step 1 " in said and "step 2 " not in said
    assert not (tmp_path / "dry").exists()
    code, said, err = main(*LP, *flags, "--dry-run", "--out", tmp_path / "dry2/run")
    assert code == 0 and "24,960 parameters trained" in said, (said, err)
    assert not (tmp_path / "dry2").exists()


def test_flops_are_right(capsys, lp):
    """Against the count by hand for the tiny ViT: 2 blocks of width 64 on 17 tokens."""
    net, meta = load_net(lp)
    args = types.SimpleNamespace(batch_size=4, ema=0, grad_checkpointing=False)
    train.describe(net, [], meta["tower"], args, torch.device("cpu"), train.nullcontext)
    t, w = 17, 64
    hand = 2 * (16 * 3 * 8 * 8 * w + 2 * (t * 12 * w * w + 2 * t * t * w) + w * 384)
    assert f"  {hand / 1e9:.4g} GFLOP" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ watching

def test_report_to(main, ft, tmp_path, monkeypatch):
    rows = []
    fake = types.SimpleNamespace(init=lambda **k: rows.append(k), log=lambda row, step: rows.append(row))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert main(*ft, "--epochs", 1, "--report-to", "wandb", "--out", tmp_path / "a")[0] == 0
    assert rows[0]["project"] == "image2prompt" and len(rows) == 1 + len(metrics(tmp_path / "a/ft"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = main(*ft, "--epochs", 1, "--report-to", "wandb", "--out", tmp_path / "b")
    assert code == 1 and "pip install wandb" in err


def test_tensorboard(main, ft, tmp_path):
    """Every number of metrics.jsonl is in the event file under its name and step, as float32, and nothing else."""
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(*ft, "--epochs", 1, "--ema", 0.5, "--report-to", "tensorboard", "--out", tmp_path)[0] == 0
    events = tensorboard.EventAccumulator(str(tmp_path / "ft"), size_guidance={"scalars": 0}).Reload()
    found = [(key, e.step, e.value) for key in events.Tags()["scalars"] for e in events.Scalars(key)]
    rows = metrics(tmp_path / "ft", without={"step"})
    steps = [row["step"] for row in metrics(tmp_path / "ft")]
    wanted = [(key, step, float(np.float32(value))) for step, row in zip(steps, rows) for key, value in row.items()]
    assert len(found) > 30 and sorted(found) == sorted(wanted)


def test_tensorboard_after_resume(main, ft, tmp_path):
    """Killed after the last save, steps are done again: they are there once."""
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = [*ft, "--epochs", 1, "--report-to", "tensorboard", "--out", tmp_path]
    assert main(*args, at=("lr_at", 4, signal.SIGTERM))[0] == 143
    shutil.copy(tmp_path / "ft/last.pt", tmp_path / "last.pt")
    assert main(*args, "--resume")[0] == 0
    shutil.copy(tmp_path / "last.pt", tmp_path / "ft/last.pt")
    assert main(*args, "--resume")[0] == 0
    events = tensorboard.EventAccumulator(str(tmp_path / "ft"), size_guidance={"scalars": 0}).Reload()
    steps = [e.step for e in events.Scalars("train_cosine")]
    assert steps == list(range(1, max(steps) + 1))


def test_log_line(main, ft, tmp_path):
    code, said, _ = main(*ft, "--epochs", 1, "--out", tmp_path)
    line = next(line for line in said.splitlines() if line.startswith("step 2 "))
    assert all(word in line for word in ("%", "loss", "val", "lr", "grad", "images/s", "data wait", "GiB", "ETA"))
    assert (tmp_path / "ft/curve.png").stat().st_size > 1000


def test_nothing_waits_between_log_lines(main, ft, tmp_path, monkeypatch):
    """A tensor that is asked for its value makes the host wait for the GPU: not in the hot loop. (With --mixgen the text
    encoder does, once per micro-batch: transformers looks whether its mask is all ones.)"""
    asked, at_step, real = [], [], train.lr_at

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                asked.append(op)
            return op(*args, **(kwargs or {}))
    monkeypatch.setattr(train, "lr_at", lambda *a: at_step.append(len(asked)) or real(*a))
    with Asked():
        assert main(*ft, "--epochs", 2, *EVERYTHING, "--mixgen", 0, "--log-every", 1000, "--out", tmp_path)[0] == 0
    per_epoch = len(at_step) // 2
    first, second = at_step[:per_epoch], at_step[per_epoch:]
    assert per_epoch > 3 and len(set(first)) == len(set(second)) == 1
    assert second[0] > first[0], "the look at the epoch's end is seen"


def test_speed_is_that_of_training(main, ft, tmp_path, monkeypatch):
    """By a clock that ticks a second a look and a million while a checkpoint is written: no line counts those."""
    clock, real = [0.0], torch.save

    def tick():
        clock[0] += 1
        return clock[0]

    def slow(*args):
        clock[0] += 1e6
        real(*args)
    monkeypatch.setattr(train.time, "perf_counter", tick)
    monkeypatch.setattr(torch, "save", slow)
    assert main(*ft, "--epochs", 1, "--log-every", 3, "--save-every", 0, "--out", tmp_path)[0] == 0
    rates = [r["images_per_s"] for r in metrics(tmp_path / "ft", without={}) if "images_per_s" in r]
    assert len(rates) > 2 and min(rates) >= 1, rates


def test_ood_is_reported_and_never_selected_on(main, ft, copy, data, tmp_path):
    """Split "ood" beside val: own n and mean-vector level; the best step is the one it is without it."""
    data = copy(data)
    pairs = pl.read_parquet(data / "pairs.parquet")
    val = np.flatnonzero((pairs["split"] == "val").to_numpy())
    split = pairs["split"].to_numpy().astype(object)
    split[val[:9]] = "ood"
    pairs.with_columns(split=pl.Series(split, dtype=pl.String)).write_parquet(data / "pairs.parquet")
    code, said, err = main(*ft, "--data", data, "--epochs", 2, "--lr", 1e-3, "--out", tmp_path / "r")
    assert code == 0 and "ood: n = 9, mean vector" in said, err
    rows = [r for r in metrics(tmp_path / "r/ft") if "val_cosine" in r]
    assert all("ood_cosine" in r for r in rows)
    _, meta = load_net(tmp_path / "r")
    assert meta["step"] == max(rows, key=lambda r: r["val_cosine"])["step"] and meta["n_val"] == len(val) - 9


# ----------------------------------------------------------------------------------------------------------- bad input

def test_checkpoints_that_are_none(lp, tmp_path):
    """Truncated, a pickle, another format, a missing or foreign head: an error in one line, never a fresh head."""
    good = (lp / "lp/best.safetensors").read_bytes()
    net, meta = load_net(lp)

    def write(meta, state):
        save_file(state, tmp_path / "x.safetensors", metadata={"config": json.dumps(meta)})
        return (tmp_path / "x.safetensors").read_bytes()
    state = net.state_dict()
    headless = {k: v for k, v in state.items() if "head" not in k}
    cases = [(good[:-100], "not a readable"), (b"\x80\x04N.", "not a readable"), (b"", "not a readable"),
             (write({**meta, "format": 99}, state), "format 99"), (write(meta, headless), "head.weight"),
             (write({**meta, "head": {**meta["head"], "dim": 100}}, state), "another shape"),
             (write({"format": 1}, state), "tower"), (write([], state), "format None"),
             (write(3, state), "format None"),
             (write({**meta, "tower": {**meta["tower"], "model": 7}}, state), "not a checkpoint"),
             (write({**meta, "text_model": "x"}, state), "not a checkpoint"),
             (write({**meta, "head": {"head": "mlp", "width": "x"}}, state), "describes no model"),
             (write({**meta, "tower": {**meta["tower"], "config": {"embed_dim": 1, "vision_cfg": {"patch_size": 0}}}},
                    state), "describes no model"),
             (write({**meta, "head": {"head": "mlp", "width": 10 ** 9}}, state), "does not fit"),
             (write({**meta, "tower": {**meta["tower"], "model": "timm:hf-hub:a/b"}}, state), "the hub"),
             (write({**meta, "tower": {**meta["tower"], "model": "timm:vit", "kwargs": {"checkpoint_path": "/x"}}},
                    state), "open files"),
             (write({**meta, "tower": {**meta["tower"], "model": "timm:no_such"}}, state), "no_such")]
    for content, word in cases:
        (tmp_path / "best.safetensors").write_bytes(content)
        with pytest.raises(SystemExit, match=word) as e:
            load_net(tmp_path / "best.safetensors")
        assert "\n" not in str(e.value)
    with pytest.raises(SystemExit, match="no checkpoint"):
        load_net(tmp_path / "nothing")


def test_libraries_are_not_imported_under_meta(lp):
    """Where load_net looks whether a checkpoint fits, without memory: what they make on import must be real."""
    code = """if True:
        import sys, torch, train
        class Spy:
            def find_spec(name, *_):
                if name == "open_clip":
                    print(torch.get_default_device())
        sys.meta_path.insert(0, Spy)
        train.load_net(sys.argv[1])"""
    done = subprocess.run([sys.executable, "-c", code, lp], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.stdout.split() == ["cpu"], done.stderr


def test_one_line_for_every_mistake(main, lp, data, flags, copy, tmp_path):
    ft = ["--phase", "ft", *flags, "--out", tmp_path / "r"]
    other = copy(data)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "text_model": {"name": "another", "sha256": None}}))
    shutil.copytree(other, tmp_path / "odd")
    (tmp_path / "odd/summary.json").write_text("[]")
    for args, word in (([], "no lp phase to start from"),
                       (["--init", lp, "--data", other], "was trained for all-MiniLM-L6-v2 targets"),
                       (["--init", lp, "--model", "RN50"], "leave --model"),
                       (["--init", lp, "--head", "mlp"], "linear head"),
                       (["--init", lp, "--mixgen", 0.6], "--mixgen"),
                       (["--init", lp, "--hflip", 2], "--hflip"),
                       (["--init", lp, "--epochs", 0], "--epochs"),
                       (["--init", lp, "--batch-size", 5000], "training"),
                       (["--init", lp, "--seed", -1], "--seed"),
                       (["--init", lp, "--lr", "nan"], "--lr"),
                       (["--init", tmp_path / "nowhere"], "no checkpoint"),
                       (["--data", tmp_path], "not a finished data folder"),
                       (["--data", tmp_path / "odd"], "format None"),
                       (["--init", lp, "--patch-dropout", 1], "--patch-dropout"),
                       (["--init", lp, "--wise", -0.1], "--wise"),
                       (["--phase", "lp", "--wise", 0, "--mixgen", 0.5, "--grad-checkpointing"],
                        "--mixgen --grad-checkpointing: for --phase ft"),
                       (["--init", lp, "--wd", -5], "--wd"),
                       (["--init", lp, "--grad-clip-norm", -1], "--grad-clip-norm"),
                       (["--init", lp, "--grad-clip-norm", "nan"], "--grad-clip-norm"),
                       (["--init", lp, "--save-every", "nan"], "--save-every"),
                       (["--init", lp, "--mixgen", 0.3], "blends 4.8 of a --batch-size of 16"),
                       (["--init", lp, "--batch-size", 2, "--mixgen", 0.25], "must be whole"),
                       (["--init", lp, "--proj", "--pretrained", "x"], "leave --pretrained --proj out"),
                       (["--init", lp, "--image-mean", 0, 0, 0], "leave --image-mean"),
                       (["--init", lp, "--head-width", 2], "leave --head-width"),
                       (["--init", lp, "--force-quick-gelu"], "leave --force-quick-gelu"),
                       (["--init", lp, "--model-kwargs", "depth=2"], "leave --model-kwargs"),
                       (["--phase", "lp", "--model", TINY, "--pretrained", "none", "--image-size", 4], "at 4 px"),
                       (["--phase", "lp", "--model", "timm:test_vit", "--pretrained", "none", "--model-kwargs",
                         "embed_dim=7"], "timm:test_vit"),
                       (["--phase", "lp", "--model", "timm:hf-hub:a/b", "--pretrained", "none"], "the hub")):
        code, _, err = main(*ft, *args)
        assert code == 1 and word in err and "Traceback" not in err, (args, err)
    assert not (tmp_path / "r").exists()


def test_the_start_may_name_its_own_model(main, lp, ft, tmp_path):
    """Only what contradicts the start is an error."""
    same = ["--model", TINY, "--pretrained", "none", "--head", "linear"]
    assert main(*ft, *same, "--epochs", 1, "--out", tmp_path)[0] == 0


def test_targets_that_are_not_finite(main, ft, data, copy, tmp_path):
    """In a validation row: said at once, not after the training."""
    data = copy(data)
    targets = np.load(data / "targets.npy")
    targets[np.flatnonzero((pl.read_parquet(data / "pairs.parquet")["split"] == "val").to_numpy())[0]] = np.nan
    np.save(data / "targets.npy", targets)
    code, said, err = main(*ft, "--data", data, "--out", tmp_path)
    assert code == 1 and "not finite" in err and not said


def test_mixgen_wants_the_encoder_of_the_targets(main, lp, ft, data, copy, monkeypatch, tmp_path):
    real = train.load_encoder
    monkeypatch.setattr(train, "load_encoder", lambda *a: (real(*a)[0], {"name": "all-MiniLM-L6-v2", "sha256": "0"}))
    code, _, err = main(*ft, "--mixgen", 0.25, "--out", tmp_path)
    assert code == 1 and "is not the encoder" in err


def test_checkpoints_can_be_shared(main, lp):
    """Readable for whom the umask lets, like every file; a library's own writer would make them private."""
    mask = os.umask(0)
    os.umask(mask)
    assert (lp / "lp/best.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_resume_command_can_be_pasted(main, ft, tmp_path):
    code, _, err = main(*ft, "--epochs", 1, "--out", tmp_path / "my run", at=("lr_at", 2, signal.SIGTERM))
    line = err.split("go on with: ")[1].strip()
    assert code == 143 and f"'{tmp_path}/my run'" in line and line.startswith("python ") and line.endswith("--resume")


def test_unreadable_picture_stops(main, ft, data, copy, tmp_path):
    """It is named, in the main process and out of a loader worker; the next row never takes its place."""
    data = copy(data)
    row = pl.read_parquet(data / "pairs.parquet").filter(pl.col("split") == "train")["image"][0]
    (data / row).write_bytes(b"no picture")
    args = [*ft, "--data", data, "--epochs", 1, "--out"]
    assert main(*args, tmp_path / "a")[2].startswith(str(data / row))
    said = command("train.py", *args, tmp_path / "b", "--workers", 1, ok=False).stderr  # and its workers end with it
    assert said.strip().splitlines()[-1].startswith(f"{data / row}: unreadable")
    done = torchrun(*args, tmp_path / "c", "--batch-size", 8)  # one process of two meets it: both end
    assert done.returncode and f"{data / row}: unreadable" in done.stderr
    assert "train.py\", line" not in done.stderr, "the other says a line of its own"


def test_out_of_memory(main, ft, tmp_path):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        code, _, err = main(*ft, "--overwrite", "--out", tmp_path, at=("lr_at", 2, error))
        assert code == 1 and all(flag in err for flag in ("--batch-size", "--accum-freq", "--grad-checkpointing"))


def test_a_lost_worker(main, ft, tmp_path):
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")
    code, _, err = main(*ft, "--out", tmp_path, at=("lr_at", 2, error))
    assert code == 1 and "--workers" in err and "shared memory" in err


def test_importing_does_nothing():
    slow = {"open_clip", "timm", "matplotlib", "sentence_transformers", "wandb", "tensorboard", "faiss"}
    code = f"import sys, train; assert not {slow} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr
