"""
What a short visit to a GPU can tell: speed, memory, a profile, correctness against the CPU. No weights, no data.
$ python tests/bench/gpu.py --out gpu.json                  # at most 8 minutes
$ python tests/bench/gpu.py --out gpu.json --parts ft search --minutes 4
$ python tests/bench/gpu.py --out cpu.json --parts plain --model ViT-B-32 --sizes 224 --batch-size 32 --rounds 3
$ python tests/bench/gpu.py --out tiny.json --tiny          # every part at toy size, on a CPU
Needs torch, torchvision, timm, transformers, open_clip_torch, ftfy, wcwidth, polars, safetensors, numpy, pillow and
tqdm. Weights and images are random: speed does not depend on what they are. ft is train.finetune() itself, on
images that are on the device already, without validation and files; `plain` is a loop of the public kind. share_of_peak
counts 3 x forward, with --grad-checkpointing, too, over the rate of a large bfloat16 product. --out is rewritten after
each row, so a kill loses little; an error, or a part that takes too long, ends that part alone.
"""
import argparse
import copy
import functools
import gc
import io
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests/tiny.json")
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import clean  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
from bench_clean import clusters  # noqa: E402

GROUPS = {  # kernels by name, the first that fits
    "attention": r"flash|fmha|sdpa|softmax|AttentionKernel|cudnn_generated|scaled_dot",
    "layer norm": r"layer_?norm|LayerNorm|GammaBeta", "optimizer": r"Adam",
    "matmul": r"gemm|nvjet|xmma|cutlass|addmm|::mm",
    "EMA and clipping": r"multi_tensor_apply|foreach", "copies and casts": r"[Cc]opy|Memcpy|Memset",
    "elementwise bf16": r"BFloat16|bfloat16", "elementwise fp32": r"elementwise|reduce|float"}
CHILD = f"""import os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import clean, train
torch.use_deterministic_algorithms(True, warn_only=True)
train.report, log = lambda *_: None, train.log  # without matplotlib
def killed(run, step, **row):
    log(run, step, **row)
    if step == 5: os.kill(os.getpid(), signal.SIGKILL)
def full(model, images):
    if images.device.type == "cpu": raise torch.OutOfMemoryError("as on a GPU")
    return torch.empty(2 ** 50, device=images.device)
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


def set_tf32(on):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


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


def steady(b, job):
    """Images/s of job(n images, in batches of b.batch // 2), without what it takes to start. The shorter run has a
    batch for every worker, else it would decode for as long as the longer one"""
    free()
    jpegs(b, 1)  # drawn before the clock starts
    few = b.workers * (b.batch // 2)
    first, whole = (seconds(lambda: job(n))[0] for n in (few, 4 * few))
    return 3 * few / max(1e-3, whole - first)


@functools.cache
def make_model(name, size, device, *more):
    """A Model with random weights, drawn on the device, which takes a second instead of ten, and kept on the CPU"""
    flags = ["--phase", "lp", "--model", name, "--pretrained", "none", "--image-size", str(size), *more]
    torch.manual_seed(0)
    with device:
        return train.Model(*train.make_backbone(train.parse_args(flags))).cpu()


def big(b, size):  # QuickGELU, as of openai's weights
    return make_model(b.model, size, b.device, "--force-quick-gelu")


def noise(n, size, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator).to(device)


def unit_rows(n):
    return F.normalize(torch.randn(n, 384, generator=torch.Generator().manual_seed(0)), dim=1).numpy()


def jpegs(b, n):
    """n paths of 336-px JPEGs with the detail of real ones; of no more than 500 files, which changes nothing"""
    rng = np.random.default_rng(0)
    for _ in range(0 if (b.tmp / "data").exists() else b.images):
        rough = Image.fromarray(rng.integers(0, 256, (42, 42, 3), dtype=np.uint8)).resize((336, 336), Image.BICUBIC)
        grain = np.asarray(rough, np.int16) + rng.integers(-12, 13, (336, 336, 1))
        clean.store_image(Image.fromarray(grain.clip(0, 255).astype(np.uint8)), b.tmp / "data", 336)
    paths = sorted(map(str, b.tmp.glob("data/images/*/*.jpg")))
    return [paths[i % len(paths)] for i in range(n)]


@functools.cache
def forward_flops(model, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # on a CPU it does not count attention
        copy.deepcopy(model).to("meta").train()(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


@functools.cache
def matmul_flops(n, device):
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    seconds(lambda: x @ x, 100)
    return 2 * n**3 / seconds(lambda: x @ x, 20)[0]


def share(b, size, forwards):
    return forwards * forward_flops(big(b, size), size) / matmul_flops(b.matmul, b.device)


def make_run(model, device, flags, n, held=0, **more):
    """What finetune and linear_probe want: n drawn rows, the last `held` of them for validation. more: arguments"""
    args = train.parse_args(flags.split())
    known = train.DEFAULTS[args.phase] | {"precision": train.pick_precision(args.precision, device, model)} | more
    vars(args).update({k: v for k, v in known.items() if getattr(args, k) in (None, "auto")})
    val = np.arange(n) >= n - held
    data = SimpleNamespace(paths=["x"] * n, prompts=["x"] * n, targets=unit_rows(n), train=np.flatnonzero(~val),
                           weights=np.ones(n, np.float32), held={"val": np.flatnonzero(val)}, chosen="val_cosine",
                           measures={"val_cosine": val / max(1, held)}, baseline={"val_cosine": 0.0},
                           summary={"text_model": {"name": "", "sha256": ""}, "hashes": "x"})
    return SimpleNamespace(args=args, data=data, device=device, rank=0, world=1, images=None, phase=None, meta={})


def finetune(model, device, flags, load, watch, batch, rows=64):
    """train.finetune(), with no validation and no files: its images are load(batches of row numbers), watch(step, row)
    sees what it logs and may raise Done. rows: training rows in batches. -> {"raw": model, "ema": model}"""
    flags, models = f"--phase ft --batch-size {batch} --save-every 1e6 --epochs 1000 {flags}", {}
    run = make_run(model, device, flags, rows * batch)

    def log(run, step, **row):
        if "images_per_s" in row:
            watch(step, row)

    def validate(found, *_):
        models.update(found)
        return 0.0, 0.0
    with quiet(), suppress(Done), patch.multiple(train, make_loader=lambda _, batches, *more: load(batches), log=log,
                                                 validate=validate, start_log=lambda *_: None, SIGNALS=()):
        train.finetune(copy.deepcopy(model), run)
    return models


# ------------------------------------------------------- rows of several parts

def attempt(job, b, size, *args, batch=None, **kwargs):
    """job(b, size, ..., batch), whose batch is halved until memory suffices, unless one is named -> its row"""
    free()
    set_tf32(True)
    try:
        return job(b, size, *args, batch=batch or b.batch, **kwargs) | {"batch": batch or b.batch}
    except RuntimeError as e:  # the next row runs
        failed, full = {"failed": f"batch {batch or b.batch}: {e!r}"[:200]}, train.out_of_memory(e)
    smaller = SimpleNamespace(**vars(b) | {"batch": b.batch // 2})
    return (attempt(job, smaller, size, *args, **kwargs) if full and not batch and b.batch > 16 else {}) | failed


def ft_row(b, size, flags="", batch=None, load=None, model=None):
    """The median rate of finetune between log lines, the first one aside"""
    seen, x, start = [], noise(batch, size, b.device), time.perf_counter()

    def watch(step, row):
        seen.append(row | {"s": time.perf_counter() - start})
        if len(seen) == 3:
            raise Done
    load = load or (lambda batches: (x for _ in batches))
    finetune(model or big(b, size), b.device, f"--log-every {b.every} {flags}", load, watch, batch)
    rate = statistics.median(r["images_per_s"] for r in seen[1:])
    return {"images_per_s": rate, "share_of_peak": share(b, size, 3 * rate), "memory_gib": seen[-1]["memory_gib"],
            "first_log_s": round(seen[0]["s"], 1), "loss": seen[-1]["loss"]}


def plain_row(b, size, tf32, training=True, batch=None):
    """float32 weights, no autocast, default AdamW, float images on the device, open_clip's own QuickGELU"""
    set_tf32(tf32)
    net = copy.deepcopy(big(b, size)).to(b.device).train(training)
    for module in net.modules():
        if isinstance(module, train.QuickMLP):
            module.__class__ = torch.nn.Sequential
    x, y = net.normalise(noise(batch, size, b.device)), torch.from_numpy(unit_rows(batch)).to(b.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def step():
        with torch.set_grad_enabled(training):
            loss = train.loss_fn(net(x), y)
        if training:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds(step)
    return {"images_per_s": batch / seconds(step, 2)[0], "memory_gib": peak_gib()}


def inference_model(b, size):
    with patch.object(predict, "load_model", lambda _: (copy.deepcopy(big(b, size)), {})):
        return predict.TTAModel(None, "auto", b.device)


def frozen_row(b, size, batch, compiled=False):
    model, x = inference_model(b, size), noise(batch, size, b.device)[:, None]  # one view
    if compiled:
        model.model.backbone.compile(dynamic=False)
    with torch.inference_mode():
        seconds(lambda: model(x), 3)
        rate = batch / seconds(lambda: model(x), b.every)[0]
    return {"images_per_s": rate, "share_of_peak": share(b, size, rate), "memory_gib": peak_gib()}


# ----------------------------------------------------------------- parts: generators of rows

def machine(b):
    cuda, driver = b.device.type == "cuda", ""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    yield {"what": "machine", "gpu": torch.cuda.get_device_name() if cuda else "none", "torch": torch.__version__,
           "gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0, "cores": os.cpu_count(),
           "driver, clock, power": driver}
    yield {"what": "bf16", "tflops": matmul_flops(b.matmul, b.device) / 1e12}
    x = torch.zeros(b.matmul, 2 * b.matmul, device=b.device)
    yield {"what": "copy", "tb_per_s": 2 * x.nbytes / seconds(x.clone, 20)[0] / 1e12}


def ft(b):
    for flags in ("", "--grad-checkpointing"):
        for size in b.sizes:
            yield {"what": f"{size} {flags}".strip(), **attempt(ft_row, b, size, flags)}
    size = b.sizes[0]
    yield {"what": f"{size} GELU", **attempt(ft_row, b, size, model=make_model(b.model, size, b.device))}
    yield from compiled(b, [size])
    brief = SimpleNamespace(**vars(b) | {"every": 2})
    for size in b.sizes:  # the largest batch that fits
        for batch in (2 * b.batch, 4 * b.batch):
            row = attempt(ft_row, brief, size, batch=batch)
            yield {"what": f"{size} batch {batch}", **row}
            if "failed" in row:
                break


def compiled(b, sizes=()):
    """As a part of its own what can best be missed: it compiles for minutes"""
    for size in sizes or b.sizes[1:]:
        torch._dynamo.reset()
        yield {"what": f"{size} --compile", **attempt(ft_row, b, size, "--compile")}
    for size in () if sizes else b.sizes[:1]:
        torch._dynamo.reset()
        yield {"what": f"{size} frozen --compile", **attempt(frozen_row, b, size, compiled=True, batch=2 * b.batch)}


def plain(b):
    """Beside ours a loop of the public kind, in turns; the ratio is ours over it"""
    for size, training in itertools.product(b.sizes, (True, False)):
        found = defaultdict(list)
        for _ in range(b.rounds):
            found["ours"].append(attempt(ft_row if training else frozen_row, b, size))
            for tf32 in (True, False) if b.device.type == "cuda" else (False,):
                found["TF32" if tf32 else "float32"].append(attempt(plain_row, b, size, tf32, training=training))
        for name, rows in found.items():
            pairs = [(x["images_per_s"], y["images_per_s"]) for x, y in zip(found["ours"], rows) if len(x) > 1 < len(y)]
            row = {"what": f"{size} {'ft' if training else 'frozen'}, {name}", **rows[0]}
            if ratios := sorted(x / y for x, y in pairs):  # a row that failed has nothing else
                row |= {"images_per_s": statistics.median(y for _, y in pairs), "ratio": statistics.median(ratios),
                        "lowest": ratios[0], "highest": ratios[-1]}
            yield row


def profile(b):
    """Five steps of ft -> time on the device, by group and by kernel, and how often the host waits for it"""
    size, x, spans = b.sizes[0], noise(b.batch, b.sizes[0], b.device), []
    cuda, kinds = b.device.type == "cuda", torch.profiler.ProfilerActivity
    prof = torch.profiler.profile(activities=[kinds.CPU, *[kinds.CUDA] * cuda])

    def watch(step, row):  # at steps 5 and 10, where the device has been waited for
        if not spans:
            prof.start()
        spans.append(time.perf_counter())
        if len(spans) > 1:
            prof.stop()
            raise Done
    free()
    finetune(big(b, size), b.device, "--log-every 5", lambda batches: (x for _ in batches), watch, b.batch)
    prof.export_chrome_trace(str(b.tmp / "trace.json"))
    events = json.loads((b.tmp / "trace.json").read_text(errors="replace"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)
    kernels = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in kinds and "dur" in e)
    busy, end, times, counts, groups = 0, 0, Counter(), Counter(), Counter()
    for ts, took, name in kernels:
        busy, end = busy + max(0, ts + took - max(ts, end)), max(end, ts + took)
        groups[next((g for g, names in GROUPS.items() if re.search(names, name)), "other")] += took
        times[name] += took
        counts[name] += 1
    wall, total = spans[1] - spans[0], times.total()
    yield {"what": "step", "wall_ms": wall / 5 * 1e3, "kernels_ms": total / 5e3, "idle_share": 1 - busy / 1e6 / wall,
           "launches": len(kernels) / 5}
    yield {"what": "shares", **{g: t / total for g, t in groups.most_common()}}
    waits = Counter(e["name"] for e in events if re.search("(Stream|Event)Synchronize|Pageable", e.get("name", "")))
    yield {"what": "waits for the device per step, a log line in five", **{n: c / 5 for n, c in waits.items()}}
    for name, took in times.most_common(10):
        short = re.sub(r"void |at::native::|\(anonymous namespace\)::", "", name)[:150]
        yield {"what": "kernel", "share": took / total, "ms": took / 5e3, "count": counts[name] / 5, "name": short}


def ft_losses(model, device, flags, batch=32):
    """8 steps of finetune on one set of images -> their losses, and the EMA's weights as one vector"""
    images, found = noise(8 * 32, model.spec["image_size"]), []

    def watch(step, row):
        found.append(row["loss"])
        if step == 8:
            raise Done
    models = finetune(model, device, f"--log-every 1 --lr 1e-3 --warmup 1 {flags}",
                      lambda batches: (images[r] for r in batches), watch, batch, 8 * 32 // batch)
    return np.array(found), flat(models["ema"])


def flat(model):
    return torch.cat([p.detach().flatten().cpu().double() for p in model.parameters()]).numpy()


def lp_scores(b, model, device, precision, head):
    """The losses and validation cosines of linear_probe, by epoch; a linear head has no more than epoch 0"""
    torch.manual_seed(0)
    model = train.Model(copy.deepcopy(model.backbone), model.spec, head)
    flags = f"--phase lp --precision {precision} --batch-size 32 --head {head} --epochs {3 * (head == 'mlp')}"
    run = make_run(model, device, flags, 256, 64, out=tempfile.mkdtemp(dir=b.tmp))
    run.phase = b.tmp
    images, found = noise(256, model.spec["image_size"]), []
    nothing = dict.fromkeys(("start_log", "report", "save_model"), lambda *_: None)
    with quiet(), patch.multiple(train, make_loader=lambda _, batches, *more: (images[r] for r in batches),
                                 log=lambda run, step, **row: found.append(row), **nothing):
        train.linear_probe(model, run)
    return np.array([row[k] for row in found for k in ("loss", "val_cosine") if k in row])


def compare(what, found, wanted, tolerance):
    difference = float(np.abs(found - wanted).max()) if len(found) == len(wanted) else -1.0
    return {"what": what, "difference": difference, "ok": 0 <= difference <= tolerance}


def correct(b):
    cpu, gpu = torch.device("cpu"), b.device
    for name, size in (("timm:resnet10t", 32 if b.tiny else 64), (TINY, 32)):
        model = make_model(name, size, gpu, *["--force-quick-gelu"] * (name == TINY))
        wanted, ema = ft_losses(model, cpu, "--precision fp32")
        lp = {head: lp_scores(b, model, cpu, "fp32", head) for head in [*train.HEADS][:1 + (name == TINY)]}
        for precision, tf32, tolerance in (("fp32", False, 1e-3), ("amp_bf16", True, 2e-2), ("fp32", True, 2e-2),
                                           ("amp", True, 2e-2))[:2 if gpu == cpu else 4]:
            set_tf32(tf32)
            case = f"{Path(name).stem} {precision}{' (TF32)' * (precision == 'fp32' and tf32)}"
            found, averaged = ft_losses(model, gpu, f"--precision {precision}")
            yield compare(f"ft {case}", found, wanted, tolerance)
            if name == TINY and case.endswith("fp32"):  # noise moves weights of no gradient, as before a BatchNorm
                moved = np.linalg.norm(ema - flat(model))
                yield compare("EMA, of its way", np.linalg.norm(averaged - ema)[None] / moved, np.zeros(1), 1e-2)
            # features of noise images are nearly the same, and bfloat16 moves them by a tenth of what tells them apart
            for head in [*lp][:2 if precision == "fp32" else 1]:
                found = lp_scores(b, model, gpu, precision, head)
                yield compare(f"lp {head} {case}", found, lp[head], tolerance)
    set_tf32(False)
    for flags in ("--hflip 0.5", "--mixgen 0.25", "--layer-decay 0.7", "--grad-checkpointing"):
        with patch.multiple(train, load_encoder=lambda *_: (None, {}), encode=lambda joined, _: unit_rows(len(joined))):
            both = [ft_losses(model, device, f"--precision fp32 {flags}")[0] for device in (cpu, gpu)]
        yield compare(f"ft tiny {flags}", both[1], both[0], 1e-3)
    one = ft_losses(model, gpu, "--precision fp32")[0]  # a ViT: without BatchNorm
    for flags, batch in (("--accum-freq 2", 16), ("--compile", 32)):
        found = ft_losses(model, gpu, f"--precision fp32 {flags}", batch)[0]
        yield compare(f"ft tiny {flags}, from without", found, one, 1e-3)
    yield from commands(b)


def commands(b):
    """train.py as a command, deterministic: killed and resumed; a loss that is not a number; memory that is full"""
    data, rows = b.tmp / "data", 72
    images = [str(Path(p).relative_to(data)) for p in jpegs(b, rows)]
    np.save(data / "targets.npy", unit_rows(rows))
    pairs = {"image": images, "prompt": images, "split": ["train"] * 64 + ["val"] * 8, "group": range(rows),
             "weight": 1.0, "source": "noise", "origin": images}
    pl.DataFrame(pairs, clean.PAIRS).write_parquet(data / "pairs.parquet")
    (data / "summary.json").write_text(json.dumps({
        "format": clean.FORMAT, "text_model": {"name": "none", "sha256": ""}, "hashes": {"rows": rows},
        "recommend": {"model": "none"}, "args": {"split_threshold": 0.7}}))
    jobs = {"whole": "", "killed": "train.log = killed", "resumed": "",
            "nan": "train.loss_fn = lambda *_: (_[0] * float('nan')).sum()", "full": "train.Model.forward = full"}

    def start(name):
        flags = ["--phase", "ft", "--data", data, "--out", b.tmp / name.replace("resumed", "killed"), "--workers", "0"]
        flags += ["--resume"] if name == "resumed" else [
            "--init", "none", "--model", "timm:test_vit", "--image-size", "32", "--pretrained", "none",
            "--batch-size", "8", "--log-every", "1", "--epochs", "1", "--save-every", "0"]
        done = subprocess.run([sys.executable, "-c", f"{CHILD}{jobs[name]}\nclean.run(train.main, '')",
                               *map(str, flags)], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1",
                                                "PYTHONWARNINGS": "ignore"})
        return done.returncode, done.stderr.strip().splitlines()
    first = [name for name in jobs if name != "resumed"]
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(first, pool.map(start, first)))
    found["resumed"] = start("resumed")
    for name, wanted in (("nan", "not finite"), ("full", "memory")):
        code, lines = found[name]
        yield {"what": f"train.py, {name}", "exit": code, "stderr_lines": len(lines), "says": lines[-1:],
               "ok": code == 1 and len(lines) == 1 and wanted in lines[0]}  # no traceback
    states = [torch.load(b.tmp / n / "ft/last.pt", map_location="cpu", weights_only=True) for n in ("whole", "killed")]
    differs = [key for key in ("step", "raw", "ema", "optimizer") if not same(*(state[key] for state in states))]
    yield {"what": "train.py, killed and resumed", "exits": [found[n][0] for n in ("whole", "killed", "resumed")],
           "differs": differs, "ok": not differs and found["killed"][0] == -signal.SIGKILL}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def frozen(b):
    for size in b.sizes:
        yield {"what": str(size), **attempt(frozen_row, b, size, batch=2 * b.batch)}
    for size in b.sizes:
        def extract(n):
            flags = f"--phase lp --batch-size {b.batch // 2} --workers {b.workers}"
            run = make_run(big(b, size), b.device, flags, n, out=tempfile.mkdtemp(dir=b.tmp))
            run.images = train.ImageDataset(jpegs(b, n), big(b, size).spec)
            with quiet():
                train.extract_features(copy.deepcopy(big(b, size)), run)
        yield {"what": f"{size} from JPEGs", "images_per_s": steady(b, extract), "memory_gib": peak_gib()}


def predictions(b):
    """predict.py's part after loading, from JPEGs, and of the slower of what feeds it"""
    args = SimpleNamespace(batch_size=b.batch // 2, workers=b.workers)
    for size in b.sizes:
        model = inference_model(b, size)

        def decode(n):
            images = predict.ViewDataset(jpegs(b, n), model.spec, [*predict.VIEWS][:2])
            return [len(x) for x, _ in DataLoader(images, args.batch_size, num_workers=b.workers)]

        def ours(n):
            with quiet():
                return predict.predict(model, jpegs(b, n), [*predict.VIEWS][:2], args)
        row = {"decode": steady(b, decode), "bare": frozen_row(b, size, b.batch // 2)["images_per_s"] / 2}
        rate = steady(b, ours)
        yield {"what": f"{size}, 2 views", "images_per_s": rate, "of_the_slower": rate / min(row.values()), **row,
               "memory_gib": peak_gib()}


def loader(b):
    """60 steps of ft, of which the first two batches of each worker do not count: they are decoded ahead"""
    size, waited, times = b.sizes[0], [], []
    images = train.ImageDataset(jpegs(b, 64 * b.batch), big(b, size).spec)

    def load(batches, make_loader=train.make_loader):
        batches = iter(make_loader(images, batches, SimpleNamespace(workers=b.workers), b.device))
        while True:
            start = time.perf_counter()
            x = next(batches)
            times.append(time.perf_counter())
            waited.append(times[-1] - start)
            yield x
    row = ft_row(SimpleNamespace(**vars(b) | {"every": 4 * b.every}), size, batch=b.batch, load=load)
    later = times[-1] - times[2 * b.workers]
    yield {"what": str(size), **row, "images_per_s": (len(times) - 2 * b.workers - 1) * b.batch / later,
           "first_batch_s": waited[0], "share_waiting": sum(waited[2 * b.workers + 1:]) / later}


def search(b):
    set_tf32(False)  # as in clean.py, whose exactness needs float32
    x = clusters(b.rows[0])
    few, ones = x[:b.rows[0] // 5], np.ones(len(x), int)
    checks = {"keep_one": lambda: clean.keep_one(x, 0.85)[0],
              "count_near": lambda: clean.count_near(few, ones[:len(few)], 0.5),
              "top_k": lambda: clean.top_k(few[:1000], few, 5)[1]}
    for name, job in checks.items():
        with quiet():
            found = job()
            with patch("torch.cuda.is_available", lambda: False):
                wanted = job()
        yield {"what": f"{name}: as on the CPU", "rows": len(found), "ok": bool((found == wanted).all())}
    index = clean.faiss_index(few, b.device.type == "cuda")
    if index is not None:  # faiss-gpu on a GPU
        near = index.search(few[:1000], 5)[1]
        with patch.object(clean, "faiss_index", lambda *_: None):
            differ = (near != clean.top_k(few[:1000], few, 5)[1]).mean()  # which orders equal cosines by their rows
        yield {"what": f"{type(index).__name__} of faiss beside torch", "rows_that_differ": float(differ)}
    from transformers import BertConfig, BertModel
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    bert = BertModel(config).to(b.device, torch.float16 if b.device.type == "cuda" else torch.float32).eval()
    ids = torch.randint(0, 30_000, (8 if b.tiny else 2048, 32), device=b.device)
    with torch.inference_mode():
        seconds(lambda: bert(ids), 3)
        yield {"what": "encode", "prompts_per_s": len(ids) / seconds(lambda: bert(ids), 10)[0]}
    for n in b.rows:
        x = clusters(n)
        for name, job in (("keep_one", lambda: clean.keep_one(x, 0.85)[0] == np.arange(n)),
                          ("count_near", lambda: clean.count_near(x, np.ones(n, int), 0.5))):
            free()
            with quiet():
                took, found = seconds(job)
            yield {"what": f"{name} {n}", "s": took, "memory_gib": peak_gib(), "mean": float(found.mean())}


def project(b):
    """Hours of the recipe on 380,000 pairs: features, then 3 epochs of ft, without validation"""
    rates = {f"{part} {row['what']}": row.get("images_per_s") for part, result in b.results.items()
             for row in result["rows"]}
    for size in b.sizes:
        lp = rates.get(f"frozen {size} from JPEGs")
        for flags, part in ((f"{size}", "ft"), (f"{size} --compile", "ft" if size == b.sizes[0] else "compile")):
            if lp and (rate := rates.get(f"{part} {flags}")):
                rate = min(rate, lp)  # which the loader may limit
                yield {"what": flags, "hours": 380_000 * (1 / lp + 3 / rate) / 3600, "lp_min": 380_000 / lp / 60,
                       "ft_epoch_min": 380_000 / rate / 60}


PARTS = {  # name: function, seconds it may take; the most wanted first
    "machine": (machine, 30), "ft": (ft, 180), "profile": (profile, 40), "correct": (correct, 120),
    "frozen": (frozen, 70), "predict": (predictions, 80), "loader": (loader, 40), "compile": (compiled, 130),
    "project": (project, 5), "search": (search, 90), "plain": (plain, 110)}


def add_row(b, part, row):
    """Into the file and onto the screen, at once"""
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    b.results[part]["rows"].append(row)
    print(f"{part} · " + " · ".join(f"{k} {v}" if k != "what" else v for k, v in row.items()), flush=True)
    with clean.atomic(b.out, "w") as f:
        json.dump(b.results, f, indent=1, default=str)


def out_of_time(*_):
    signal.alarm(5)  # again, because a compiler may take the error for its own
    raise TimeoutError("took longer than it may")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="JSON file, replaced")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--minutes", type=float, default=8, help="for all parts together")
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    p.add_argument("--model", default="ViT-L-14")
    p.add_argument("--sizes", type=int, nargs="+", default=[224, 336], help="image sizes")
    p.add_argument("--batch-size", type=int, default=128, help="of ft; twice as many without gradients")
    p.add_argument("--rounds", type=int, default=1, help="of the part plain")
    p.add_argument("--rows", type=int, nargs="+", default=[100_000, 500_000], help="of search; 2000000 take minutes")
    args, begin = p.parse_args(), time.perf_counter()
    b = SimpleNamespace(device=train.pick_device(), tiny=args.tiny, model=args.model, sizes=args.sizes, out=args.out,
                        batch=args.batch_size, rounds=args.rounds, matmul=8192, images=500, every=5,
                        rows=args.rows, workers=min(16, os.cpu_count()), results={})
    if b.device.type == "cpu":
        vars(b).update(matmul=1024, every=2)
    if args.tiny:
        vars(b).update(model=TINY, sizes=(32, 48), batch=8, matmul=256, images=24, rows=(1000, 2000), workers=1)
        torch.set_num_threads(1)
        torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")  # in a second
    signal.signal(signal.SIGALRM, out_of_time)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        b.tmp = Path(tmp)
        for part in args.parts:
            job, may_take = PARTS[part]
            start, left = time.perf_counter(), args.minutes * 60 - time.perf_counter() + begin
            b.results[part] = {"rows": []}
            set_tf32(True)  # a part that was cut off may have left it off
            signal.alarm(max(1, int(min(may_take, left) if args.parts == list(PARTS) and not args.tiny else left)))
            try:
                for row in job(b):
                    add_row(b, part, row)
            except (Exception, SystemExit):  # the next part runs
                signal.alarm(0)
                b.results[part]["error"] = traceback.format_exc().strip().splitlines()[-12:]
                print("\n".join([f"{part} · failed", *b.results[part]["error"]]), flush=True)
            signal.alarm(0)
            b.results[part]["seconds"] = took = round(time.perf_counter() - start, 1)
            add_row(b, part, {"what": f"took {took} s"})
    sys.stdout.flush()
    os._exit(0)  # compile workers could hold up the exit, and the machine


if __name__ == "__main__":
    main()
