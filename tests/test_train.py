"""What train.py promises. Most runs call its main() in this process, and several processes are forked from one that has
imported the libraries, because importing costs more than training the tiny CLIP."""
import contextlib
import copy as copying
import errno
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["OMP_NUM_THREADS"] = "1"  # bit-equal here and in other processes, and quick on a busy machine
torch.set_num_threads(1)
import train  # noqa: E402
from clean import encode  # noqa: E402
from conftest import ROOT, TINY, command  # noqa: E402
from train import (ImageDataset, Model, build_backbone, depths, find_checkpoint, load_model, loss_fn,  # noqa: E402
                   lr_at, mixgen, param_groups, ridge, save_model, to_square)

TIMED = {"images_per_s", "data_wait", "memory_gib", "seconds"}
LP = ["--phase", "lp", "--model", TINY, "--pretrained", "none"]
EVERYTHING = ["--lr", 1e-3, "--epochs", 3, "--accum-freq", 2, "--mixgen", 0.25, "--hflip", 0.5, "--ema", 0.9,
              "--layer-decay", 0.7, "--log-every", 3]
train.load_encoder = functools.lru_cache(train.load_encoder)


def call(*args, at=None):
    """Run train.py's main() here; at=(function, n, event): at the n-th call of that function, send a signal or raise.
    -> exit code, standard output, standard error. Anything but SystemExit comes through."""
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    sys.argv, calls, real = ["train.py", *map(str, args)], [], at and getattr(train, at[0])

    def hooked(*a, **k):
        calls.append(0)
        if len(calls) == at[1]:
            if isinstance(at[2], BaseException):
                raise at[2]
            os.kill(os.getpid(), at[2])
        return real(*a, **k)
    try:
        if at:
            setattr(train, at[0], hooked)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
        err.write("" if isinstance(e.code, int) else e.code)
    finally:
        sys.argv = argv
        if at:
            setattr(train, at[0], real)
        train.atexit.unregister(train.kill_workers)
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return code, out.getvalue(), err.getvalue()


def run(*args, **more):
    code, out, err = call(*args, **more)
    assert code == 0, err
    return out


def child(args, env, said, hook):
    os.environ |= env
    with open(said, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.argv = ["train.py", *map(str, args)]
    hook and hook()
    try:
        train.main()
    finally:
        train.kill_workers()
        Path(f"{said}.left").touch()


def start(folder, *args, world=1, hook=None):
    """train.py in processes of their own, as torchrun would start it -> processes; each writes to folder/said<rank>."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_train", "open_clip", "timm", "sentence_transformers", "matplotlib.figure"])
    with socket.socket() as s:
        s.bind(("localhost", 0))
        env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1])}
    started = [server.Process(target=child, args=(args, {**env, "RANK": str(r)}, folder / f"said{r}", hook))
               for r in range(world)]
    for process in started:
        process.start()
    return started


def run_two(folder, *args, hook=None, code=0):
    processes = start(folder, *args, world=2, hook=hook)
    for process in processes:
        process.join(120)
    assert [p.exitcode for p in processes] == [code] * 2, [(folder / f"said{r}").read_text()[-3000:] for r in (0, 1)]


@contextlib.contextmanager
def full_disk(limit):
    """No file may grow beyond so many bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture(scope="session")
def flags(data):
    return ["--data", data, "--batch-size", 16, "--workers", 0, "--precision", "fp32", "--log-every", 1, "--warmup", 3]


@pytest.fixture(scope="session")
def lp(flags, tmp_path_factory):
    """An lp run of the tiny CLIP to start ft from. Read only."""
    out = tmp_path_factory.mktemp("lp") / "run"
    run(*LP, "--epochs", 2, "--out", out, *flags)
    return out


@pytest.fixture(scope="session")
def ft(lp, flags):
    """Flags of an ft run that starts from it."""
    return ["--phase", "ft", "--init", lp / "lp", *flags]


def metrics(folder, without=TIMED):
    """The rows of metrics.jsonl but for the first, which holds the arguments."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["args"]["phase"] == folder.name
    return [{k: v for k, v in row.items() if k not in without} for row in rows[1:]]


def assert_close(a, b, tolerance):
    """Two metrics with the same rows and keys, whose numbers differ by no more than rounding."""
    assert len(a) > 5 and len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and x["step"] == y["step"]
        assert all(abs(x[k] - y[k]) < tolerance * max(1, abs(x[k])) for k in x), (x, y)


def same(a, b):
    """Bit-equal trees of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same_run(a, b):
    x, y = last(a), last(b)
    for key in x.keys() - {"args", "meta"}:
        assert same(x[key], y[key]), key
    assert metrics(a) == metrics(b)
    assert same(load_file(a / "best.safetensors"), load_file(b / "best.safetensors"))


def tiny_spec(model="tiny", **more):
    spec = {"model": model, "pretrained": "none", "kwargs": {}, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3,
            "interpolation": "bicubic", "resize_mode": "shortest", **more}
    if not model.startswith("timm:"):
        config = json.load(open(TINY))
        spec = {"config": {k: config[k] for k in ("embed_dim", "vision_cfg")}, "quick_gelu": False, **spec}
    return spec


# ------------------------------------------------------------------------------------------- steps, their order and loss

def test_golden(data, tmp_path):
    """Twenty steps of ft on a CPU: a change in data order, augmentation, loss, optimiser or schedule shows here. Images,
    targets and weights are NumPy's, so neither clean.py nor torch's initialisers can move these numbers. Every file
    holds the arguments."""
    rng = np.random.default_rng(0)
    (tmp_path / "data/images").mkdir(parents=True)
    for i in range(56):
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(tmp_path / f"data/images/{i}.png")
    targets = rng.standard_normal((56, 384)).astype(np.float32)
    np.save(tmp_path / "data/targets.npy", targets / np.linalg.norm(targets, axis=1, keepdims=True))
    pairs = {"image": [f"images/{i}.png" for i in range(56)], "prompt": [f"image number {i}" for i in range(56)],
             "split": ["train"] * 48 + ["val"] * 8}
    pl.DataFrame(pairs).write_parquet(tmp_path / "data/pairs.parquet")
    shutil.copy(data / "summary.json", tmp_path / "data")
    model = Model(build_backbone(tiny_spec()), tiny_spec())
    for p in model.parameters():
        p.data = torch.from_numpy((rng.standard_normal(p.shape) * 0.1).astype(np.float32)) + (p.ndim == 1)
    text_model = json.loads((data / "summary.json").read_text())["text_model"]
    save_model(model, {"text_model": text_model}, tmp_path / "start.safetensors")
    run("--phase", "ft", "--data", tmp_path / "data", "--init", tmp_path / "start.safetensors", "--out", tmp_path,
        *EVERYTHING, "--epochs", 7, "--batch-size", 8, "--warmup", 3, "--log-every", 1, "--workers", 0,
        "--precision", "fp32")
    losses = [r["loss"] for r in metrics(tmp_path / "ft") if "loss" in r][:20]
    assert np.allclose(losses, GOLDEN, atol=2e-4), [round(x, 5) for x in losses]
    scores = [r["val_cosine_ema"] for r in metrics(tmp_path / "ft") if "val_cosine_ema" in r]
    assert np.allclose(scores, GOLDEN_EMA, atol=2e-4), [round(x, 5) for x in scores]
    for args in (load_model(tmp_path)[1]["args"], last(tmp_path / "ft")["args"]):
        assert args["mixgen"] == 0.25 and args["layer_decay"] == 0.7 and args["precision"] == "fp32"
    assert (tmp_path / "ft/curve.png").stat().st_size > 1000


GOLDEN = [0.99033, 1.00617, 0.98919, 0.96242, 0.96849, 0.95219, 0.96364, 0.9316, 0.89951, 0.92107]
GOLDEN += [0.90796, 0.8859, 0.89919, 0.91207, 0.8941, 0.88482, 0.8987, 0.89996, 0.88425, 0.89976]
GOLDEN_EMA = [-0.00904, -0.00941, -0.01058, -0.01038, -0.00946, -0.00909, -0.00909, -0.00909]


def test_accumulation_is_the_big_batch(ft, tmp_path):
    """Two micro-batches of 8 with MixGen are one batch of 16: same pairs mixed, same losses to rounding. Without
    mirror images or MixGen the losses are others."""
    for name, size, accum, p, share in (("a", 16, 1, 0.5, 0.25), ("b", 8, 2, 0.5, 0.25), ("c", 16, 1, 0, 0.25),
                                        ("d", 16, 1, 0.5, 0)):
        run(*ft, "--lr", 1e-3, "--epochs", 1, "--batch-size", size, "--accum-freq", accum, "--mixgen", share,
            "--hflip", p, "--out", tmp_path / name)
    a, b, c, d = (metrics(tmp_path / n / "ft") for n in "abcd")
    assert_close(a, b, tolerance=2e-4)
    assert a[1]["loss"] != pytest.approx(c[1]["loss"], abs=1e-5) and a[1]["loss"] != pytest.approx(d[1]["loss"], abs=1e-4)


def test_lr_at():
    assert [lr_at(s, 100, 10) for s in (0, 9, 10, 55, 100)] == pytest.approx([0.1, 1, 1, 0.5, 0])


def test_mixgen_is_the_paper():
    """Against the loop of arXiv 2206.08358, alg. 1; the authors' code, which blends blended rows again, would fail."""
    x, y, joined = torch.rand(8, 3, 4, 4), torch.rand(8, 5), torch.rand(4, 5)
    want = x.clone()
    for i in range(4):
        want[i] = 0.5 * x[i] + 0.5 * x[i + 4]
    mixed, targets = mixgen(x, y, joined)
    assert torch.allclose(mixed, want) and torch.equal(targets, torch.cat([joined, y[4:]]))


def test_mixgen_targets_are_those_of_clean(ft, data, tmp_path, monkeypatch):
    """An encoder that puts a prompt of its own before every text does so here too, as it did when clean.py used it."""
    encoder = copying.copy(train.load_encoder()[0])
    encoder.prompts, encoder.default_prompt_name = {"query": "query: "}, "query"
    monkeypatch.setattr(train, "load_encoder", lambda *_: (encoder, {}))
    seen, real = [], train.mixgen
    monkeypatch.setattr(train, "mixgen", lambda x, y, joined: seen.append(joined) or real(x, y, joined))
    run(*ft, "--mixgen", 0.25, "--dry-run", "--out", tmp_path)
    known = train.load_data(data, 16)
    rows, _ = next(train.batch_sampler(known.train, types.SimpleNamespace(batch_size=16, accum_freq=1, epochs=1, seed=0,
                                                                          hflip=0), 0))
    joined = [f"{known.prompts[a]} {known.prompts[b]}" for a, b in zip(rows[:4], rows[4:8])]
    assert np.allclose(seen[0], encode(joined, encoder), atol=1e-6)
    encoder.default_prompt_name = None
    assert not np.allclose(seen[0], encode(joined, encoder), atol=1e-2)


def test_loss_is_float32(ft, tmp_path, monkeypatch):
    """Outside autocast: what a fork adds to loss_fn is not computed in bfloat16. What it returns is what is logged."""
    def other(predicted, targets):
        assert predicted.dtype == targets.dtype == (predicted @ targets.T).dtype == torch.float32
        return loss_fn(predicted, targets) + 7
    monkeypatch.setattr(train, "loss_fn", other)
    run(*ft, "--precision", "amp_bf16", "--epochs", 1, "--accum-freq", 2, "--out", tmp_path)
    assert all(7 < r["loss"] < 9 for r in metrics(tmp_path / "ft") if "loss" in r)
    assert loss_fn(torch.eye(4), torch.eye(4)).item() == 0 and loss_fn(torch.eye(4), -torch.eye(4)).item() == 2


# -------------------------------------------------------------------------------------------------------- exact resume

@pytest.fixture(scope="session")
def whole(lp, flags, tmp_path_factory):
    """An ft run with everything that is random, dropout included. -> its flags, its folder"""
    folder = tmp_path_factory.mktemp("whole")
    model, meta = load_model(lp)
    model.spec["config"]["vision_cfg"]["patch_dropout"] = 0.5
    save_model(model, meta, folder / "start.safetensors")
    args = ["--phase", "ft", *flags, *EVERYTHING]
    run(*args, "--init", folder / "start.safetensors", "--out", folder)
    return args, folder


@pytest.mark.parametrize("function, n, number, step", [
    ("lr_at", 1, signal.SIGINT, 1), ("lr_at", 7, signal.SIGTERM, 7), ("mixgen", 10, signal.SIGUSR1, 5),
    ("lr_at", "epoch", signal.SIGTERM, "epoch"), ("kill -9", 0, 0, 0)])
def test_resumes_exactly(function, n, number, step, whole, tmp_path):
    """Stopped at the first step, between two log lines, in the middle of accumulation, at an epoch's end, or killed:
    the resumed run ends bit for bit as the one that was never stopped, with other workers and without what it started
    from. Settings are those of last.pt, whatever the command line says."""
    args, folder = whole
    per_epoch = last(folder / "ft")["step"] // 3
    shutil.copy(folder / "start.safetensors", tmp_path)
    cut = [*args, "--init", tmp_path / "start.safetensors", "--out", tmp_path]
    if function == "kill -9":
        process, = start(tmp_path, *cut, "--save-every", 0)
        while not (tmp_path / "ft/last.pt").exists():
            assert process.is_alive(), (tmp_path / "said0").read_text()
            time.sleep(0.01)
        time.sleep(0.2)
        process.kill()
        process.join()
    else:
        code, _, err = call(*cut, at=(function, per_epoch if n == "epoch" else n, number))
        assert code == 128 + number and "--resume" in err and len(err.splitlines()) == 1
        assert last(tmp_path / "ft")["step"] == (per_epoch if step == "epoch" else step)
    (tmp_path / "start.safetensors").unlink()
    run("--phase", "ft", "--out", tmp_path, "--resume", "--workers", 2, "--lr", 5, "--epochs", 9, "--seed", 3)
    assert_same_run(tmp_path / "ft", folder / "ft")


def test_resume_refuses(whole, data, copy, tmp_path, monkeypatch):
    """Other data, another number of processes, a damaged or missing last.pt: one line each, and nothing changes. A run
    that is finished can be resumed, though its log was torn: it stays as it is."""
    folder = copy(whole[1])
    before = metrics(folder / "ft")
    with open(folder / "ft/metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')
    resume = ["--phase", "ft", "--out", folder, "--resume"]
    assert "ft done" in run(*resume) and metrics(folder / "ft") == before

    other = copy(data)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "hashes": {k: "0" for k in summary["hashes"]}}))
    files = {p: p.read_bytes() for p in (folder / "ft").iterdir()}
    for more, word in ((["--data", other], "is not the data that last.pt was trained on"),
                       (["--data", tmp_path], "no summary.json")):
        code, _, err = call(*resume, *more)
        assert code == 1 and word in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "written by 1 processes" in call(*resume)[2]
    monkeypatch.delenv("WORLD_SIZE")
    code, _, err = call(*whole[0], "--init", folder / "start.safetensors", "--out", folder)
    assert code == 1 and "--resume" in err and "--overwrite" in err
    assert {p: p.read_bytes() for p in (folder / "ft").iterdir()} == files
    file = folder / "ft/last.pt"
    for content in (file.read_bytes()[:1000], pickle.dumps(print), b""):
        file.write_bytes(content)
        code, _, err = call(*resume)
        assert code == 1 and "last.pt" in err and "--overwrite" in err
    file.unlink()
    assert "nothing to resume" in call(*resume)[2]


def stop_rank_0():
    """One process alone is told to stop, at its third step, and writing takes it a while."""
    real_lr, real_save, calls = train.lr_at, torch.save, []

    def lr_at(*args):
        calls.append(0)
        if len(calls) == 3 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return real_lr(*args)
    train.lr_at, torch.save = lr_at, lambda *args: time.sleep(1) or real_save(*args)


def small_shards():
    train.SHARD = 32


def test_two_processes(ft, flags, lp, tmp_path, monkeypatch):
    """The same global batch gives the losses of one process. Told to stop, both do, and the other waits while rank 0
    writes, or torchrun would kill it. They resume exactly, and make the features that one process makes."""
    args = [*ft, "--lr", 1e-3, "--epochs", 1, "--mixgen", 0.25, "--hflip", 0.5, "--log-every", 2, "--out"]
    run(*args, tmp_path / "one")
    run_two(tmp_path / "two", *args, tmp_path / "two", "--batch-size", 8)
    assert_close(*(metrics(tmp_path / n / "ft") for n in ("one", "two")), tolerance=1e-3)
    a, b = (load_file(tmp_path / n / "ft/best.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)

    cut = tmp_path / "cut"
    run_two(cut, *args, cut, "--batch-size", 8, hook=stop_rank_0, code=143)
    assert last(cut / "ft")["step"] == 3 and last(cut / "ft")["world"] == 2
    assert (cut / "said1.left").stat().st_mtime_ns >= (cut / "ft/last.pt").stat().st_mtime_ns
    run_two(cut, "--phase", "ft", "--out", cut, "--resume")
    assert_same_run(cut / "ft", tmp_path / "two/ft")

    run_two(tmp_path / "lp2", *LP, *flags, "--epochs", 2, "--out", tmp_path / "lp2", hook=small_shards)
    shards = sorted((tmp_path / "lp2/.features").glob("*/*.npy"))
    assert len(shards) > 4 and not list((tmp_path / "lp2").rglob("*tmp"))
    one, = (np.load(f) for f in (lp / ".features").glob("*/*.npy"))
    assert np.array_equal(np.concatenate([np.load(f) for f in shards], 1), one)
    assert same(load_file(tmp_path / "lp2/lp/best.safetensors"), load_file(lp / "lp/best.safetensors"))


# ---------------------------------------------------------------------------------------------------- what is not finite

class Lion(torch.optim.Optimizer):
    """Knows nothing of found_inf, and steps as far for a small gradient as for a large one."""

    def __init__(self, groups, **_):
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()


@pytest.mark.parametrize("optimizer", ["AdamW", "Lion"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("rhythm", [["--save-every", 0, "--log-every", 1000], ["--log-every", 3]], ids=["save", "log"])
def test_not_finite_stops(optimizer, what, rhythm, ft, lp, tmp_path, monkeypatch):
    """A loss or gradient that is NaN at step 2 stops the run in one line at the next save or log line. What is saved is
    from before."""
    calls = []

    def broken(*args):
        calls.append(0)
        loss = loss_fn(*args)
        if len(calls) != 3:
            return loss
        if what == "loss":
            return loss * math.nan
        loss.register_hook(lambda g: g * math.nan)
        return loss
    monkeypatch.setattr(train, "loss_fn", broken)
    if optimizer == "Lion":
        monkeypatch.setattr(torch.optim, "AdamW", Lion)
    code, _, err = call(*ft, "--epochs", 2, *rhythm, "--out", tmp_path)
    assert code == 1 and "step 2:" in err and "not finite" in err and len(err.splitlines()) == 1, err
    assert len(calls) == 3 or rhythm[0] == "--log-every"
    assert same(load_file(tmp_path / "ft/best.safetensors"), load_file(lp / "lp/best.safetensors"))
    assert (tmp_path / "ft/last.pt").exists() == ("--save-every" in rhythm)
    if "--save-every" in rhythm:
        state = last(tmp_path / "ft")
        assert state["step"] == 2 and all(x.isfinite().all() for k in ("raw", "ema") for x in state[k].values())


def test_float16_that_never_fits_stops(ft, tmp_path, monkeypatch):
    """GradScaler halves its scale for every step that it skips; when none is left, the run ends instead of idling."""
    def overflowing(*args):
        loss = loss_fn(*args)
        loss.register_hook(lambda g: g * math.inf)
        return loss
    monkeypatch.setattr(train, "loss_fn", overflowing)
    code, _, err = call(*ft, "--precision", "amp", "--epochs", 9, "--out", tmp_path)
    assert code == 1 and "float16" in err and not (tmp_path / "ft/last.pt").exists(), err


# --------------------------------------------------------------------------------------------------- backbones and heads

def test_to_square():
    """Short side to the size and the centre of it, or squashed; a banner is not enlarged as a whole."""
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, :32], image[:, 64:] = 255, 255  # white, black, white
    image = Image.fromarray(image)
    cut, squashed = (to_square(image, {"image_size": 32, "interpolation": "bilinear", "resize_mode": m})
                     for m in ("shortest", "squash"))
    assert cut.shape == squashed.shape == (3, 32, 32) and cut.dtype == squashed.dtype == torch.uint8
    assert not cut.any() and squashed[:, :, :8].min() == squashed[:, :, -8:].min() == 255 > squashed[:, :, 16].max()
    spec = {"image_size": 64, "interpolation": "bicubic", "resize_mode": "shortest"}
    assert to_square(Image.new("RGB", (60000, 1)), spec).shape == (3, 64, 64)


def test_each_tag_has_its_own_statistics(monkeypatch):
    """Mean, std, size and resize mode are those of the tag that was asked for. Weights trained with QuickGELU make a
    model that computes it, or are refused where it cannot. (The weights are not here: random ones.)"""
    import open_clip
    import timm
    create, asked = timm.create_model, {}
    monkeypatch.setattr(timm, "create_model", lambda name, **k: create(name, **{**k, "pretrained": False}))

    def create_clip(name, pretrained=None, **kwargs):
        asked.update(kwargs, name=name)
        return types.SimpleNamespace(visual=build_backbone(tiny_spec()))
    monkeypatch.setattr(open_clip, "create_model", create_clip)

    def spec(model, tag):
        with torch.device("meta"):
            return train.make_backbone(train.parse_args([*LP, "--model", model, "--pretrained", tag]))[1]
    for model, tag, mean, mode in (("timm:tf_efficientnet_b0", "ns_jft_in1k", 0.485, "shortest"),
                                   ("timm:tf_efficientnet_b0", "ap_in1k", 0.5, "shortest"),
                                   ("timm:vit_base_patch32_clip_quickgelu_224", "openai", 0.48145466, "shortest"),
                                   ("timm:vit_base_patch16_siglip_224", "webli", 0.5, "shortest"),
                                   ("ViT-B-16-SigLIP", "webli", 0.5, "squash"),
                                   ("ViT-L-14", "openai", 0.48145466, "shortest")):
        found = spec(model, tag)
        assert (found["mean"][0], found["resize_mode"]) == (pytest.approx(mean), mode), model
        assert found["image_size"] == 224
    assert found["quick_gelu"] and asked["force_quick_gelu"], "the name ViT-L-14 alone says GELU, the tag knows better"
    assert not spec("ViT-L-14", "laion2b_s32b_b82k")["quick_gelu"]
    with pytest.raises(SystemExit, match="timm:vit_base_patch32_clip_quickgelu_224"):
        spec("timm:vit_base_patch32_clip_224", "openai")


def test_weights_files(flags, tmp_path):
    """safetensors and state dicts load, into open_clip and timm; what is missing is named; a pickle is refused. A file
    has no tag that knows its activation, so --force-quick-gelu sets it and the checkpoint records it."""
    import open_clip
    open_clip.add_model_config(TINY)
    clip = open_clip.create_model("tiny").state_dict()
    state = build_backbone(tiny_spec("timm:test_vit", image_size=160)).state_dict()
    save_file(clip, tmp_path / "clip.safetensors")
    torch.save(clip, tmp_path / "clip.pt")
    save_file(state, tmp_path / "vit.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "vit.pt")
    found, vit = [], ["--model", "timm:test_vit", "--image-size", 160]
    for i, (name, more) in enumerate((("clip.safetensors", []), ("clip.pt", ["--force-quick-gelu"]),
                                      ("vit.safetensors", vit), ("vit.pt", vit))):
        said = run(*LP, "--pretrained", tmp_path / name, *more, *flags, "--epochs", 1, "--out", tmp_path / f"{i}")
        model, meta = load_model(tmp_path / f"{i}")
        assert ("QuickGELU" in said) == bool(meta["backbone"].get("quick_gelu")) == ("--force-quick-gelu" in more)
        wanted = state if i > 1 else {k[7:]: v for k, v in clip.items() if k.startswith("visual.")}
        assert all(torch.equal(v, wanted[k]) for k, v in model.backbone.state_dict().items())
        found.append(model.backbone(torch.ones(1, 3, model.spec["image_size"], model.spec["image_size"])))
    assert not torch.allclose(found[0], found[1], atol=1e-4) and torch.equal(found[2], found[3])
    del state["norm.weight"]
    save_file(state, tmp_path / "less.safetensors")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(print))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "vit.safetensors").read_bytes()[:500])
    for name, word in (("less.safetensors", "norm.weight"), ("evil.pt", "eights"), ("cut.safetensors", "eader"),
                       ("gone.pt", "neither a weights file nor a tag")):
        code, _, err = call(*LP, *vit, "--pretrained", tmp_path / name, *flags, "--out", tmp_path / "no")
        assert code == 1 and word in err and name in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("model, blocks", [("tiny", ["transformer.resblocks.0.", "transformer.resblocks.1."]),
                                           ("timm:test_vit", [f"blocks.{i}." for i in range(6)]),
                                           ("timm:mobilenetv2_100", ["blocks.0.0.", "blocks.1.0.", "blocks.1.1."])])
def test_layer_decay(model, blocks):
    """Every parameter is in one group; the learning rate falls by the factor from block to block; the head has all of
    it; biases and norms do not decay."""
    model = Model(build_backbone(tiny_spec(model)), tiny_spec(model))
    found = depths(model)
    starts = [next(found[n] for n in found if n.startswith(f"backbone.{b}")) for b in blocks]
    assert starts == list(range(1, len(blocks) + 1))
    stem = ("conv1.", "patch_embed", "pos_embed", "positional", "class_", "cls_", "conv_stem")
    assert all(d == 0 for n, d in found.items() if any(s in n for s in stem))
    top = found["head.weight"]
    assert top == max(found.values()) and sorted(set(found.values())) == list(range(top + 1))
    groups = param_groups(model, 1.0, 0.1, 0.5)
    peak = {id(p): g["peak"] for g in groups for p in g["params"]}
    assert len(peak) == sum(len(g["params"]) for g in groups) == len(found)
    assert all(peak[id(p)] == 0.5 ** (top - found[n]) for n, p in model.named_parameters())
    assert all((p.ndim > 1) == (g["weight_decay"] == 0.1) for g in groups for p in g["params"])


def test_unfreeze_from(lp, ft, tmp_path):
    """Depth 2 of the tiny CLIP is its second block, so stem and first block stay as they were, to the bit. Gradient
    checkpointing trains what is left just the same."""
    for name, n, more in (("a", 0, []), ("b", 0, ["--grad-checkpointing"]), ("c", 2, []),
                          ("d", 2, ["--grad-checkpointing"])):
        run(*ft, "--lr", 1e-3, "--epochs", 1, "--unfreeze-from", n, *more, "--out", tmp_path / name)
    a, b, c, d = (metrics(tmp_path / name / "ft") for name in "abcd")
    assert a == b != c == d
    before, after = load_file(lp / "lp/best.safetensors"), last(tmp_path / "d/ft")["raw"]
    found = depths(load_model(lp)[0])
    assert {n for n in found if not torch.equal(before[n], after[n])} == {n for n in found if found[n] >= 2}


def test_grad_checkpointing_does_something():
    args = types.SimpleNamespace(grad_checkpointing=True)
    model = Model(build_backbone(tiny_spec()), tiny_spec())
    train.freeze_and_checkpoint(model, args)
    assert model.backbone.transformer.grad_checkpointing
    spec = tiny_spec("timm:test_resnet")
    model = Model(build_backbone(spec), spec)
    with pytest.raises(SystemExit, match="--grad-checkpointing: not"):  # would move running statistics twice
        train.freeze_and_checkpoint(model, args)


@pytest.mark.parametrize("pretrained", [True, False])
def test_batchnorm(pretrained, flags, tmp_path):
    """A pretrained convolutional backbone keeps its running statistics, one from scratch learns them but for frozen
    layers."""
    spec = tiny_spec("timm:test_resnet")
    save_file(build_backbone(spec).state_dict(), tmp_path / "w.safetensors")
    run(*LP, "--model", "timm:test_resnet", "--image-size", 32, "--epochs", 1, "--out", tmp_path, *flags,
        "--pretrained", tmp_path / "w.safetensors" if pretrained else "none")
    before, found = load_file(tmp_path / "lp/best.safetensors"), depths(load_model(tmp_path / "lp")[0])
    for n in (0, 3):
        run("--phase", "ft", *flags, "--epochs", 1, "--out", tmp_path, "--overwrite", "--unfreeze-from", n)
        after = last(tmp_path / "ft")["raw"]
        moved = {k: not torch.equal(before[k], after[k]) for k in before}
        assert all(moved[k] == (not pretrained and found[k.replace("running_mean", "weight")] >= n)
                   for k in before if k.endswith("running_mean"))
        assert all(moved[k] == (d >= n) for k, d in found.items() if k.endswith("conv1.weight"))


# ---------------------------------------------------------------------------------------------------------- linear probe

def test_ridge():
    """The closed form equals a plain solve at its lambda, and beats the constant baseline."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((300, 20)), rng.standard_normal((20, 8))
    y = x @ w + 3 + rng.standard_normal((300, 8))
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    weight, bias, lam, score = ridge(x[:200], y[:200], x[200:], y[200:], block=64)
    c, t = (z[:200].double() - z[:200].double().mean(0) for z in (x, y))
    assert torch.allclose(weight.double(), torch.linalg.solve(c.T @ c + lam * torch.eye(20), c.T @ t).T, atol=1e-4)
    predicted = F.normalize(x[200:] @ weight.T + bias, dim=-1)
    assert 1 - loss_fn(predicted, y[200:]).item() == pytest.approx(score, abs=1e-5)
    assert score > 1 - loss_fn(F.normalize(y[:200].mean(0), dim=0).expand(100, 8), y[200:]).item()


def test_lp(lp, data, flags, tmp_path, monkeypatch):
    """Starts at the ridge score, trains the head alone, on features that are those of the backbone: in the data's order,
    before the projection, without buffer rows. ft starts at its score."""
    out = tmp_path / "run"
    said = run(*LP, *flags, "--epochs", 3, "--hflip", 0.5, "--out", out)
    rows = metrics(out / "lp")
    assert rows[0]["val_cosine"] == pytest.approx(float(said.split("by val cosine, ")[1].split()[0]), abs=2e-4)
    assert rows[-1]["best"] == max(r.get("val_cosine", -1) for r in rows)
    model, meta = load_model(out)
    first = load_file(lp / "lp/best.safetensors")
    assert all(torch.equal(first[k], v) == (not k.startswith("head.")) for k, v in model.state_dict().items())
    xavier = math.sqrt(2 / sum(first["head.weight"].shape))
    assert first["head.weight"].std().item() == pytest.approx(xavier, rel=0.3), "as large as a random head, for AdamW"
    stored, = (np.load(f) for f in (out / ".features").glob("*/*.npy"))
    pairs = pl.read_parquet(data / "pairs.parquet").filter(pl.col("split") != "guard")
    images = ImageDataset([data / p for p in pairs["image"]], model.spec)
    assert stored.shape == (2, len(pairs), 64), "64 wide: before the projection to 32"
    x = model.normalise(torch.stack([images[i] for i in (0, 7)]))
    with torch.no_grad():
        features = torch.stack([model.backbone(x), model.backbone(x.flip(-1))]).numpy()
    assert np.allclose(features, stored[:, [0, 7]], atol=1e-4) and not np.allclose(features[0], features[1], atol=1e-4)
    run("--phase", "ft", *flags, "--epochs", 1, "--out", out)
    assert metrics(out / "ft")[0]["val_cosine"] == pytest.approx(meta["val_cosine"], abs=1e-5)
    said = run(*LP, *flags, "--head", "mlp", "--epochs", 1, "--out", tmp_path / "mlp")
    assert "ridge" not in said and load_model(tmp_path / "mlp")[0].head[0].out_features == 16 * 1024


def test_features_are_computed_once(flags, tmp_path, monkeypatch):
    """Interrupted, what was written is not computed again, and the bytes are the same; no shard is ever half there; a
    second run reads all of them."""
    small_shards, opened, real = 32, [], train.open_rgb
    monkeypatch.setattr(train, "SHARD", small_shards)
    args = [*LP, *flags, "--epochs", 1, "--out"]
    run(*args, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        call(*args, tmp_path / "cut", at=("open_rgb", 100, signal.SIGINT))
    kept = sorted((tmp_path / "cut/.features").rglob("*.*"))
    assert [f.name for f in kept] == [f"{i:09d}.npy" for i in (0, 32, 64)]

    def half(f, x):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", half)
        code, _, err = call(*args, tmp_path / "cut")
    assert code == 1 and "No space left" in err and sorted((tmp_path / "cut/.features").rglob("*.*")) == kept
    monkeypatch.setattr(train, "open_rgb", lambda path: opened.append(path) or real(path))
    run(*args, tmp_path / "cut")
    shards = [sorted((tmp_path / n / ".features").glob("*/*.npy")) for n in ("whole", "cut")]
    assert len(opened) == sum(np.load(f).shape[1] for f in shards[0]) - 96
    assert [f.read_bytes() for f in shards[0]] == [f.read_bytes() for f in shards[1]]
    run(*args, tmp_path / "cut", "--overwrite")
    assert len(opened) == sum(np.load(f).shape[1] for f in shards[0]) - 96, "nothing was opened again"


# ---------------------------------------------------------------------------------------------------------- fine-tuning

def test_ema(lp, ft, tmp_path, monkeypatch):
    """From the start's weights on, the average that its formula says, step by step; buffers are copied."""
    history, real = [], train.update_ema

    def spy(ema, model, step, decay):
        real(ema, model, step, decay)
        history.append((step, *([p.detach().clone() for p in m.parameters()] for m in (model, ema))))
    monkeypatch.setattr(train, "update_ema", spy)
    run(*ft, "--lr", 1e-3, "--epochs", 1, "--ema", 0.6, "--out", tmp_path)
    mean = [p.detach() for p in load_model(lp)[0].parameters()]
    assert [step for step, *_ in history] == list(range(len(history))) and len(history) > 5
    for step, raw, ema in history:
        d = min(0.6, (1 + step) / (10 + step))
        mean = [d * m + (1 - d) * r for m, r in zip(mean, raw)]
        assert all(torch.allclose(m, e, atol=1e-6) for m, e in zip(mean, ema))
    final = [r for r in metrics(tmp_path / "ft") if "val_cosine" in r][-1]
    assert final["val_cosine"] != final["val_cosine_ema"]
    ema, model = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    model(torch.rand(8, 4))
    real(ema, model, 3, 0.9)
    assert torch.equal(ema.running_mean, model.running_mean) and ema.num_batches_tracked == 1


def test_compile_keeps_the_keys(lp, ft, tmp_path, monkeypatch):
    """In place; no _orig_mod. in any checkpoint. The compiler itself is left out here."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **k: compiled.append(self))
    run(*ft, "--epochs", 1, "--compile", "--out", tmp_path)
    assert len(compiled) == 1 and isinstance(compiled[0], Model)
    assert load_file(tmp_path / "ft/best.safetensors").keys() == load_file(lp / "lp/best.safetensors").keys()
    assert last(tmp_path / "ft")["raw"].keys() == load_file(lp / "lp/best.safetensors").keys()


def test_dry_run(ft, tmp_path):
    said = run(*ft, "--lr", 1e-3, "--layer-decay", 0.5, "--dry-run", "--out", tmp_path / "dry")
    assert all(f"lr {lr}" in said for lr in ("1.25e-04", "2.50e-04", "5.00e-04", "1.00e-03"))
    assert "images/s" in said.replace("images per s", "images/s") and "step 2 " in said and "step 3 " not in said
    assert "memory gib" in said.lower() and not (tmp_path / "dry").exists()


def test_advice_is_for_its_model(flags, copy, data, tmp_path):
    """What the data folder recommends for one model is not applied to another, in ft neither; what train.py does not
    know of it is ignored."""
    data = copy(data)
    summary = json.loads((data / "summary.json").read_text())
    summary["recommend"] = {"model": "timm:test_vit", "pretrained": "none", "image_size": 64, "out": "/nowhere",
                            "ft": {"lr": 1e-3, "epochs": 1, "resume": True}}
    (data / "summary.json").write_text(json.dumps(summary))
    for model, px, lr in ((LP[2:], "32 px", 1e-5), ([], "64 px", 1e-3)):
        more = [*flags, "--data", data, "--epochs", 1, "--out", tmp_path / px]
        run("--phase", "lp", *model, *more)
        assert px in run("--phase", "ft", *more)
        assert max(r.get("lr", 0) for r in metrics(tmp_path / px / "ft")) == pytest.approx(lr)


def test_nothing_waits_between_log_lines(ft, tmp_path, monkeypatch):
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
        run(*ft, *EVERYTHING, "--epochs", 2, "--mixgen", 0, "--log-every", 1000, "--out", tmp_path)
    per_epoch = len(at_step) // 2
    first, second = at_step[:per_epoch], at_step[per_epoch:]
    assert per_epoch > 3 and len(set(first)) == len(set(second)) == 1
    assert second[0] > first[0], "the look at the epoch's end is seen"


def test_speed_is_that_of_training(ft, tmp_path, monkeypatch):
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
    said = run(*ft, "--epochs", 1, "--log-every", 3, "--save-every", 0, "--out", tmp_path)
    rates = [r["images_per_s"] for r in metrics(tmp_path / "ft", without={}) if "images_per_s" in r]
    assert len(rates) > 2 and min(rates) >= 1, rates
    line = next(line for line in said.splitlines() if line.startswith("step 3 (") and "grad" in line)
    assert all(word in line for word in ("%", "loss", "val", "lr", "images", "ETA")), line


def test_ood_is_reported_and_never_selected_on(ft, copy, data, tmp_path, monkeypatch):
    """Split "ood" beside val, with its own n and constant baseline. Rows whose targets are those of val turned round,
    which fall as val rises, change nothing about what is saved."""
    data = copy(data)
    pairs, targets = pl.read_parquet(data / "pairs.parquet"), np.load(data / "targets.npy")
    split = pairs["split"].to_numpy().astype(object)
    rows = np.flatnonzero(split == "guard")[:9] if (split == "guard").sum() > 8 else np.flatnonzero(split == "val")[:9]
    split[rows], targets[rows] = "ood", -targets[np.flatnonzero(split == "val")[0]]
    pairs.with_columns(split=pl.Series(split, dtype=pl.String)).write_parquet(data / "pairs.parquet")
    np.save(data / "targets.npy", targets)
    said = run(*ft, "--data", data, "--epochs", 2, "--lr", 1e-3, "--ema", 0.5, "--out", tmp_path)
    assert "ood: n = 9, constant baseline -" in said
    rows = [r for r in metrics(tmp_path / "ft") if "val_cosine" in r]
    assert all("ood_cosine" in r and "ood_cosine_ema" in r for r in rows)
    _, meta = load_model(tmp_path)
    assert meta["n_val"] == (split == "val").sum()
    assert meta["val_cosine"] == max(max(r["val_cosine"], r["val_cosine_ema"]) for r in rows)
    assert meta["ood_cosine"] < max(r["ood_cosine"] for r in rows)


def test_wandb(ft, tmp_path, monkeypatch):
    rows = []
    fake = types.ModuleType("wandb")
    fake.init, fake.log = lambda **k: rows.append(k), lambda row, step: rows.append(row)
    fake.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run(*ft, "--epochs", 1, "--wandb", "--out", tmp_path / "a")
    assert rows[0]["project"] == "image2prompt" and len(rows) == 1 + len(metrics(tmp_path / "a/ft"))
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    code, _, err = call(*ft, "--epochs", 1, "--wandb", "--out", tmp_path / "b")
    assert code == 1 and "pip install wandb" in err


# ----------------------------------------------------------------------------------------------------- files and mistakes

def test_damaged_and_hostile_checkpoints(lp, tmp_path):
    """An error in one line; never a fresh head, never code or the hub, never the memory that a file claims to need."""
    good = (lp / "lp/best.safetensors").read_bytes()
    model, meta = load_model(lp)
    state, spec = model.state_dict(), meta["backbone"]
    vision = spec["config"]["vision_cfg"]

    def write(meta, state=state):
        save_file(state, tmp_path / "x.safetensors", metadata={"config": meta if isinstance(meta, str) else json.dumps(meta)})
        return (tmp_path / "x.safetensors").read_bytes()

    def backbone(**more):
        return write({**meta, "backbone": {**spec, **more}})
    for content in (good[:-100], b"\x80\x04N.", b"", write(""), write([]), write(3), write("[" * 10 ** 5),
                    write({**meta, "format": 99}), write({"format": meta["format"]}), write({**meta, "text_model": "x"}),
                    write({**meta, "head": "x"}), write({**meta, "head": ["linear"]}), write({**meta, "head": "mlp"}),
                    write({**meta, "dim": 100}), write({**meta, "dim": 10 ** 9}), write({**meta, "dim": 4096, "head": "mlp"}),
                    write(meta, {k: v for k, v in state.items() if "head" not in k}),
                    write(meta, {**state, "extra": torch.ones(1)}),
                    backbone(model=7), backbone(mean=[1]), backbone(image_size=10 ** 9), backbone(image_size=64),
                    backbone(model="timm:hf-hub:a/b"), backbone(model="timm:local-dir:/tmp"),
                    backbone(model="timm:test_vit", kwargs={"checkpoint_path": "/x"}),
                    backbone(model="timm:test_vit", kwargs={"pretrained": True}),
                    backbone(model="timm:test_vit", kwargs={"cache_dir": "/x"}),
                    backbone(config={**spec["config"], "vision_cfg": {**vision, "timm_model_name": "hf-hub:a/b"}})):
        (tmp_path / "best.safetensors").write_bytes(content)
        with pytest.raises(SystemExit) as e:
            load_model(tmp_path / "best.safetensors")
        assert "best.safetensors: " in e.value.code and "\n" not in e.value.code
        assert "readable checkpoint" in e.value.code or "does not fit" in e.value.code
    with pytest.raises(SystemExit, match="no best.safetensors"):
        load_model(tmp_path / "nothing")
    for phase in ("lp", "ft"):
        (tmp_path / "run" / phase).mkdir(parents=True)
        (tmp_path / "run" / phase / "best.safetensors").touch()
        assert find_checkpoint(tmp_path / "run").parent.name == phase, "ft before lp"


def typo(*args, **kwargs):
    return undefined_name  # noqa: F821


class TypoHead(nn.Linear):
    forward = typo


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("plant", ["transform", "head", "forward", "loss", "memory"])
def test_a_bug_shows_its_line(plant, workers, ft, lp, tmp_path, monkeypatch):
    """A forker's typo keeps its traceback, out of a loader worker too; so does running out of memory."""
    if workers and plant != "transform":
        pytest.skip("has nothing to do with workers")
    if plant in ("transform", "loss"):
        monkeypatch.setattr(train, {"transform": "to_square", "loss": "loss_fn"}[plant], typo)
    if plant in ("head", "forward"):
        monkeypatch.setitem(train.HEADS, "linear", {"head": typo, "forward": TypoHead}[plant])
        if plant == "head":
            with pytest.raises(NameError):
                load_model(lp)
    error, at = (NameError, None) if plant != "memory" else (torch.OutOfMemoryError, ("lr_at", 2, torch.OutOfMemoryError()))
    with pytest.raises(error) as e:
        call(*ft, "--epochs", 1, "--workers", workers, "--out", tmp_path, at=at)
    assert plant == "memory" or "undefined_name" in str(e.value)
    assert not workers or "in typo" in str(e.value), "the worker's traceback is in the message"


def test_unreadable_image_stops(ft, data, copy, tmp_path):
    """It is named, in the main process and out of a loader worker, which ends with it; another row never takes its
    place."""
    data = copy(data)
    row = pl.read_parquet(data / "pairs.parquet").filter(pl.col("split") == "train")["image"][0]
    (data / row).write_bytes(b"no image")
    args = [*ft, "--data", data, "--epochs", 1, "--out"]
    code, _, err = call(*args, tmp_path / "a")
    assert code == 1 and err.startswith(f"{data / row}: unreadable") and len(err.splitlines()) == 1
    said = command("train.py", *args, tmp_path / "b", "--workers", 1, ok=False, timeout=100).stderr
    assert said.startswith(f"{data / row}: unreadable") and len(said.splitlines()) == 1


def test_full_disk_keeps_the_old_checkpoint(ft, tmp_path):
    args = ["--phase", "ft", "--out", tmp_path]
    assert call(*ft, "--epochs", 1, "--save-every", 0, "--out", tmp_path, at=("lr_at", 2, signal.SIGTERM))[0] == 143
    before = {p.name: p.read_bytes() for p in (tmp_path / "ft").iterdir()}
    with full_disk(50_000):
        code, _, err = call(*args, "--resume")
    assert code == 1 and "last.pt: cannot be written (File too large)" in err and len(err.splitlines()) == 1
    after = {p.name: p.read_bytes() for p in (tmp_path / "ft").iterdir()}
    assert before.keys() == after.keys() and all(before[n] == after[n] for n in ("last.pt", "best.safetensors"))
    run(*args, "--resume")


def test_checkpoints_can_be_shared(lp, tmp_path):
    """Readable for whom the umask lets, like every file; a library's own writer would make them private."""
    old = os.umask(0o027)
    try:
        save_model(*load_model(lp), tmp_path / "best.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "best.safetensors").stat().st_mode & 0o777 == 0o640


def test_overwrite_deletes_only_when_all_is_well(lp, flags, tmp_path):
    """A mistyped flag costs nothing. Then the old run is gone, and other people's files and links stay."""
    shutil.copytree(lp / "lp", tmp_path / "real")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lp").symlink_to(tmp_path / "real")  # say, on a larger disk
    (tmp_path / "real/notes.txt").write_text("mine")
    args = [*LP, *flags, "--epochs", 1, "--out", tmp_path / "run"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "real").iterdir()}
    for wrong in (["--overwrite", "--model", "ViT-TYPO"], ["--overwrite", "--lr", 0], ["--overwrite", "--resume"],
                  ["--overwrite", "--pretrained", "nowhere"], ["--overwrite", "--batch-size", 5000], []):
        with contextlib.redirect_stderr(io.StringIO()):
            assert call(*args, *wrong)[0]
        assert {p.name: p.read_bytes() for p in (tmp_path / "real").iterdir()} == before
    run(*args, "--overwrite", "--seed", 1)
    assert (tmp_path / "run/lp").is_symlink() and (tmp_path / "real/notes.txt").read_text() == "mine"
    assert [r["epoch"] for r in metrics(tmp_path / "run/lp")[:2]] == [0, 1] and len(metrics(tmp_path / "run/lp")) == 3
    assert load_model(tmp_path / "run")[1]["args"]["seed"] == 1


def test_one_line_for_every_mistake(lp, data, flags, copy, tmp_path):
    other = copy(data)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "text_model": {"name": "another", "sha256": None}}))
    shutil.copytree(other, tmp_path / "odd")
    (tmp_path / "odd/summary.json").write_text("[]")
    shutil.copytree(data, tmp_path / "nan")
    targets = np.load(data / "targets.npy")
    targets[np.flatnonzero((pl.read_parquet(data / "pairs.parquet")["split"] == "val").to_numpy())[0]] = np.nan
    np.save(tmp_path / "nan/targets.npy", targets)
    start, tiny = ["--init", lp], LP[2:]
    for phase, args, word in (
            ("ft", [], "train.py --phase lp"),
            ("ft", ["--init", tmp_path / "nowhere"], "no best.safetensors"),
            ("ft", [*start, "--data", other], "other targets"),
            ("ft", [*start, "--data", tmp_path], "not a finished data folder"),
            ("ft", [*start, "--data", tmp_path / "odd"], "format None"),
            ("ft", [*start, "--data", tmp_path / "nan"], "not finite"),
            ("ft", [*start, "--model", "RN50", "--head", "mlp", "--image-size", 64], "--model --image-size --head: ft takes"),
            ("ft", [*start, "--image-mean", 0, 0, 0, "--model-kwargs", "depth=2"], "--model-kwargs --image-mean"),
            ("ft", [*start, "--force-quick-gelu"], "--force-quick-gelu"),
            ("ft", [*start, "--mixgen", 0.6], "--mixgen"), ("ft", [*start, "--mixgen", 0.3], "blends 4.8 of a"),
            ("ft", [*start, "--batch-size", 5000], "needs 5000"), ("ft", [*start, "--batch-size", 1], "--batch-size"),
            ("ft", [*start, "--hflip", 2], "--hflip"), ("ft", [*start, "--epochs", 0], "--epochs"),
            ("ft", [*start, "--seed", -1], "--seed"), ("ft", [*start, "--lr", "nan"], "--lr"),
            ("ft", [*start, "--wd", -5], "--wd"), ("ft", [*start, "--grad-clip-norm", "nan"], "--grad-clip-norm"),
            ("ft", [*start, "--save-every", "nan"], "--save-every"), ("ft", [*start, "--ema", 1], "--ema"),
            ("ft", [*start, "--unfreeze-from", 9], "0 (the stem) to 3 (the head)"),
            ("lp", [*tiny, "--mixgen", 0.5, "--grad-checkpointing", "--dry-run"], "--grad-checkpointing: for --phase ft"),
            ("lp", [*tiny, "--resume"], "nothing to resume"),
            ("lp", [*tiny, "--image-size", 4], "--image-size"),
            ("lp", ["--model", "ViT-X"], "not one of open_clip"), ("lp", ["--model", "timm:hf-hub:a/b"], "timm"),
            ("lp", ["--model", "timm:test_vit", "--model-kwargs", "checkpoint_path=x"], "--model-kwargs"),
            ("lp", [*tiny, "--pretrained", "nowhere"], "neither a weights file nor a tag")):
        code, _, err = call("--phase", phase, *flags, "--out", tmp_path / "r", *args)
        assert code == 1 and word in err and len(err.splitlines()) == 1, (args, err)
    assert not (tmp_path / "r").exists()


def test_importing_does_nothing():
    slow = {"open_clip", "timm", "matplotlib", "sentence_transformers", "wandb", "faiss"}
    code = f"import sys, train; assert not {slow} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr
