"""
What a short visit to a GPU can tell: speed, memory, a profile, correctness against the CPU. No weights, no data.
$ python tests/bench/gpu.py --out gpu.json                  # about 6 minutes on an H200 with 16 CPU cores
$ python tests/bench/gpu.py --out gpu.json --parts ft search
$ python tests/bench/gpu.py --out tiny.json --tiny          # every part at toy size, on a CPU
Weights and images are random: speed does not depend on what they are. ft is train.finetune() itself, on images that are
on the device already, without validation and files; `plain` is a loop of the public kind. --out is rewritten after each
row, so a kill loses little; an error ends its part alone.
"""
import argparse
import copy
import functools
import gc
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "tests/tiny.json")
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import clean  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
from bench_clean import clusters  # noqa: E402
from bench_predict import draw  # noqa: E402

GROUPS = {  # kernels by name, the first that fits
    "attention": r"flash|fmha|sdpa|softmax|AttentionKernel|cudnn_generated|scaled_dot",
    "layer norm": r"layer_?norm|LayerNorm|GammaBeta", "optimizer": r"Adam",
    "matmul": r"gemm|nvjet|xmma|cutlass|addmm|::mm",
    "EMA and clipping": r"multi_tensor_apply|foreach", "copies and casts": r"[Cc]opy|Memcpy|Memset",
    "elementwise bf16": r"BFloat16|bfloat16", "elementwise fp32": r"elementwise|reduce|float"}


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


def unit_rows(n):
    return F.normalize(torch.randn(n, 384, generator=torch.Generator().manual_seed(0)), dim=1).numpy()


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
    sees what it logs and may raise Done. rows: training rows in batches"""
    flags = f"--phase ft --batch-size {batch} --save-every 1e6 --epochs 1000 {flags}"
    run = make_run(model, device, flags, rows * batch)

    def log(run, step, **row):
        if "images_per_s" in row:
            watch(step, row)
    with quiet(), suppress(Done), patch.multiple(
            train, make_loader=lambda images, batches, *_: load(batches), log=log, validate=lambda *_: (0.0, 0.0),
            start_log=lambda *_: None, SIGNALS=()):
        train.finetune(copy.deepcopy(model), run)


def attempt(job, *args, **kwargs):
    """A row, or why it failed: memory may not suffice, and the next row runs"""
    free()
    try:
        return job(*args, **kwargs)
    except RuntimeError as e:
        return {"failed": repr(e)[:200]}


def ft_row(b, size, flags="", batch=None, load=None, model=None):
    """The median rate of finetune between log lines, the first one aside"""
    batch, seen = batch or b.batch, []
    x, start = noise(batch, size, b.device), time.perf_counter()

    def watch(step, row):
        seen.append(row | {"s": time.perf_counter() - start})
        if len(seen) == 3:
            raise Done
    load = load or (lambda batches: (x for _ in batches))
    finetune(model or big(b, size), b.device, f"--log-every {b.every} {flags}", load, watch, batch)
    rate = statistics.median(r["images_per_s"] for r in seen[1:])
    return {"images_per_s": rate, "memory_gib": seen[-1]["memory_gib"],
            "first_log_s": round(seen[0]["s"], 1), "loss": seen[-1]["loss"], "batch": batch}


def plain_row(b, size, batch, tf32):
    """float32 weights, no autocast, default AdamW, float images on the device"""
    set_tf32(tf32)
    net = copy.deepcopy(big(b, size)).to(b.device).train()
    x, y = net.normalise(noise(batch, size, b.device)), torch.from_numpy(unit_rows(batch)).to(b.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def step():
        loss = train.loss_fn(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds(step)
    rate = batch / seconds(step, 2)[0]
    set_tf32(True)
    return {"images_per_s": rate, "memory_gib": peak_gib(), "batch": batch}


def jpegs(b, n):
    """n paths of 336-px JPEGs; of no more than 500 different files, which changes nothing about decoding"""
    if not (b.tmp / "images").exists():
        draw(b.tmp / "images", min(b.images, 500))
    paths = sorted(map(str, (b.tmp / "images").iterdir()))
    return [paths[i % len(paths)] for i in range(n)]


# ----------------------------------------------------------------- parts: generators of rows

def machine(b):
    cuda = b.device.type == "cuda"
    yield {"what": "machine", "gpu": torch.cuda.get_device_name() if cuda else "none", "torch": torch.__version__,
           "gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0, "cores": os.cpu_count()}
    x = torch.randn(b.matmul, b.matmul, device=b.device, dtype=torch.bfloat16)
    seconds(lambda: x @ x, 100)
    yield {"what": "bf16", "tflops": 2 * b.matmul**3 / seconds(lambda: x @ x, 20)[0] / 1e12}
    x = torch.zeros(b.matmul, 2 * b.matmul, device=b.device)
    yield {"what": "copy", "tb_per_s": 2 * x.nbytes / seconds(x.clone, 20)[0] / 1e12}


def ft(b):
    small, large = b.sizes
    for flags in ("", "--grad-checkpointing"):
        for size in b.sizes:
            yield {"what": f"{size} {flags}".strip(), **attempt(ft_row, b, size, flags)}
    gelu = big(b, small, "--image-mean", "0.5", "0.5", "0.5")
    yield {"what": f"{small} GELU", **attempt(ft_row, b, small, model=gelu)}
    for tf32 in (True, False):
        for size, batch in ((small, b.batch), (large, b.batch // 2)):  # at 336 px 128 images are more than 140 GiB
            row = attempt(plain_row, b, size, batch, tf32)
            yield {"what": f"{size} plain {'TF32' if tf32 else 'float32'}", **row}
    yield {"what": f"{small} batch {2 * b.batch}", **attempt(ft_row, b, small, batch=2 * b.batch)}
    yield from compiled(b, small)


def compiled(b, size=None):
    """The last part, at 336 px, is what can best be missed: it compiles for a minute"""
    size = size or b.sizes[1]
    yield {"what": f"{size} --compile", **attempt(ft_row, b, size, "--compile")}
    torch._dynamo.reset()


def profile(b):
    """Five steps of ft -> shares of the time on the device by group"""
    x, start, wall, cuda = noise(b.batch, b.sizes[0], b.device), 0.0, 0.0, b.device.type == "cuda"
    kinds, groups, launches = torch.profiler.ProfilerActivity, Counter(), 0
    prof = torch.profiler.profile(activities=[kinds.CPU, *[kinds.CUDA] * cuda])

    def watch(step, row):  # at steps 5 and 10, where the device has been waited for
        nonlocal start, wall
        if step == 5:
            prof.start()
            start = time.perf_counter()
        else:
            wall = time.perf_counter() - start
            prof.stop()
            raise Done
    free()
    finetune(big(b, b.sizes[0]), b.device, "--log-every 5", lambda batches: (x for _ in batches), watch, b.batch)
    prof.export_chrome_trace(str(b.tmp / "trace.json"))
    for e in json.loads((b.tmp / "trace.json").read_text(errors="replace"))["traceEvents"]:
        if e.get("cat") in (("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)) and "dur" in e:
            launches += 1
            groups[next((g for g, names in GROUPS.items() if re.search(names, e["name"])), "other")] += e["dur"]
    total = groups.total()
    yield {"what": "step", "wall_ms": wall / 5 * 1e3, "kernels_ms": total / 5e3, "launches": launches / 5}
    yield {"what": "shares", **{g: t / total for g, t in groups.most_common()}}


def ft_losses(model, device, flags, batch=32):
    """8 steps of finetune on one set of images -> their losses"""
    images, found = noise(8 * 32, model.spec["image_size"]), []

    def watch(step, row):
        found.append(row["loss"])
        if step == 8:
            raise Done
    finetune(model, device, f"--log-every 1 --lr 1e-3 --warmup 1 {flags}",
             lambda batches: (images[r] for r in batches), watch, batch, 8 * 32 // batch)
    return np.array(found)


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
    for name, size in (("timm:resnet10t", 64), (TINY, 32)):
        model = make_model(name, size, gpu)
        wanted = ft_losses(model, cpu, "--precision fp32")
        lp = {head: lp_scores(b, model, cpu, "fp32", head) for head in train.HEADS}
        for precision, tf32, tolerance in (("fp32", False, 1e-3), ("fp32", True, 2e-2), ("amp_bf16", True, 2e-2),
                                           ("amp", True, 2e-2))[:3 if gpu == cpu else 4]:
            set_tf32(tf32)
            case = f"{Path(name).stem} {precision}{' (TF32)' * (precision == 'fp32' and tf32)}"
            yield compare(f"ft {case}", ft_losses(model, gpu, f"--precision {precision}"), wanted, tolerance)
            # features of noise images are nearly the same, and bfloat16 moves them by a tenth of what tells them apart
            for head in [*train.HEADS][:2 if precision == "fp32" else 1]:
                found = lp_scores(b, model, gpu, precision, head)
                yield compare(f"lp {head} {case}", found, lp[head], tolerance)
    set_tf32(False)
    for flags in ("--hflip 0.5", "--mixgen 0.25", "--layer-decay 0.7", "--grad-checkpointing"):
        with patch.multiple(train, load_encoder=lambda *_: (None, {}), encode=lambda joined, _: unit_rows(len(joined))):
            both = [ft_losses(model, device, f"--precision fp32 {flags}") for device in (cpu, gpu)]
        yield compare(f"ft tiny {flags}", both[1], both[0], 1e-3)
    one = ft_losses(model, gpu, "--precision fp32")  # a ViT: without BatchNorm
    yield compare("ft tiny 32 x 1, 16 x 2", ft_losses(model, gpu, "--precision fp32 --accum-freq 2", 16), one, 1e-3)
    yield compare("ft tiny --compile, from eager", ft_losses(model, gpu, "--precision fp32 --compile"), one, 1e-3)
    set_tf32(True)


def inference_model(b, size):
    with patch.object(predict, "load_model", lambda _: (copy.deepcopy(big(b, size)), {})):
        return predict.TTAModel(None, "auto", b.device)


def frozen_row(b, size):
    model, x = inference_model(b, size), noise(2 * b.batch, size, b.device)[:, None]  # one view
    with torch.inference_mode():
        seconds(lambda: model(x), 3)
        return {"images_per_s": len(x) / seconds(lambda: model(x), 10)[0], "memory_gib": peak_gib()}


def frozen(b):
    for size in b.sizes:
        yield {"what": str(size), **attempt(frozen_row, b, size)}
    for size in b.sizes:
        free()
        took = {}
        for n in (2 * b.batch, b.images * 2):  # the difference has no start of the loader and no hashing
            run = make_run(big(b, size), b.device, f"--phase lp --batch-size {2 * b.batch} --workers {b.workers}", n,
                           out=tempfile.mkdtemp(dir=b.tmp))
            run.data.paths = jpegs(b, n)
            run.images = train.ImageDataset(run.data.paths, big(b, size).spec)
            with quiet():
                took[n] = seconds(lambda: train.extract_features(copy.deepcopy(big(b, size)), run))[0]
        (n, first), (more, whole) = took.items()
        yield {"what": f"{size} from JPEGs", "images_per_s": (more - n) / max(1e-3, whole - first), "images": more,
               "s": whole, "one_batch_s": first, "memory_gib": peak_gib()}


def predictions(b):
    args = SimpleNamespace(batch_size=2 * b.batch, workers=b.workers)
    for size in b.sizes:
        free()
        model, paths = inference_model(b, size), jpegs(b, b.images)
        loader = DataLoader(predict.ViewDataset(paths, model.spec, ["image"]), args.batch_size, num_workers=b.workers)
        row = {"decode_images_per_s": b.images / seconds(lambda: [len(x) for x, _ in loader])[0]}
        for views in (1, 2):
            with quiet():
                took, (found, _) = seconds(lambda: predict.predict(model, paths, [*predict.VIEWS][:views], args))
            row |= {"images_per_s": len(found) / took, "memory_gib": peak_gib()}
            yield {"what": f"{size}, {views} view{'s' * (views > 1)}", **row}


def loader(b):
    size = b.sizes[0]
    images = train.ImageDataset(jpegs(b, 64 * b.batch), big(b, size).spec)
    real = functools.partial(train.make_loader, images, args=SimpleNamespace(workers=b.workers), device=b.device)
    yield {"what": str(size), **attempt(ft_row, b, size, load=real)}


def search(b):
    set_tf32(False)  # as in clean.py, whose exactness needs float32
    from transformers import BertConfig, BertModel
    x = clusters(b.rows[0])
    part = x[:b.rows[0] // 5]
    found = clean.keep_one(part, 0.85)[0], clean.count_near(part, np.ones(len(part), int), 0.5)
    with patch("torch.cuda.is_available", lambda: False):
        wanted = clean.keep_one(part, 0.85)[0], clean.count_near(part, np.ones(len(part), int), 0.5)
    for name, a, c in zip(("keep_one", "count_near"), found, wanted):
        yield {"what": f"{name}: as on the CPU, of {len(part)}", "ok": bool((a == c).all())}
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    bert = BertModel(config).to(b.device, torch.float16 if b.device.type == "cuda" else torch.float32).eval()
    ids = torch.randint(0, 30_000, (8 if b.tiny else 2048, 32), device=b.device)
    with torch.inference_mode():
        seconds(lambda: bert(ids), 3)
        yield {"what": "encode", "prompts_per_s": len(ids) / seconds(lambda: bert(ids), 10)[0]}
    for n in b.rows:
        x = clusters(n)
        free()
        with quiet():
            took, (leader, _) = seconds(lambda: clean.keep_one(x, 0.85))
        kept = int((leader == np.arange(n)).sum())
        yield {"what": f"keep_one {n}", "s": took, "memory_gib": peak_gib(), "kept": kept}
        free()
        with quiet():
            took, near = seconds(lambda: clean.count_near(x, np.ones(n, int), 0.5))
        yield {"what": f"count_near {n}", "s": took, "memory_gib": peak_gib(), "mean": float(near.mean())}
    set_tf32(True)


PARTS = {"machine": machine, "ft": ft, "profile": profile, "correct": correct, "frozen": frozen,
         "predict": predictions, "loader": loader, "search": search, "compile": compiled}  # the most wanted first


def add_row(b, part, row):
    """Into the file and onto the screen, at once"""
    row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    b.results[part]["rows"].append(row)
    print(f"{part} · " + " · ".join(f"{k} {v}" if k != "what" else v for k, v in row.items()), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="JSON file, replaced")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    args, device = p.parse_args(), train.pick_device()
    b = SimpleNamespace(device=device, tiny=args.tiny, sizes=(224, 336), batch=128, matmul=8192, images=2000, every=5,
                        rows=(100_000, 500_000), workers=min(16, os.cpu_count()), results={})
    if args.tiny:
        vars(b).update(sizes=(32, 48), batch=8, matmul=256, images=24, every=2, rows=(1000, 2000), workers=1)
        torch.set_num_threads(1)
        torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")  # in a second

    def save():
        with clean.atomic(args.out, "w") as f:
            json.dump(b.results, f, indent=1, default=str)
    with tempfile.TemporaryDirectory() as tmp:
        b.tmp = Path(tmp)
        for part in args.parts:
            start, b.results[part] = time.perf_counter(), {"rows": []}
            try:
                for row in PARTS[part](b):
                    add_row(b, part, row)
                    save()
            except (Exception, SystemExit):  # the next part runs
                b.results[part]["error"] = traceback.format_exc().strip().splitlines()[-12:]
                print("\n".join([f"{part} · failed", *b.results[part]["error"]]), flush=True)
            b.results[part]["seconds"] = round(time.perf_counter() - start, 1)
            save()
            print(f"{part} · took {b.results[part]['seconds']} s", flush=True)
    sys.stdout.flush()
    os._exit(0)  # compile workers could hold up the exit, and the machine


if __name__ == "__main__":
    main()
