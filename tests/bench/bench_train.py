"""
Speed of train.py against a plain loop of the public kind, on the same pictures and machine, in turns: the ratios are
the result. Without --data the pictures are drawn: --rows JPEGs of 336 px and 41 KB, as clean.py writes them.
$ python tests/bench/bench_train.py --models ViT-B-32 --batch-size 32                              # two CPU cores
$ python tests/bench/bench_train.py --models ViT-L-14 --batch-size 8 --rows 32 --frozen-batch 8 --rounds 2
$ python tests/bench/bench_train.py --models ViT-L-14 ViT-L-14-336 --batch-size 128 --rows 12800 --frozen-batch 256 \\
      --steps 20 --rounds 1 --peak-tflops 790 --tf32 --pairs 380000                                # one GPU
$ python tests/bench/bench_train.py --data data/pairs --lp --models timm:mobilenetv2_100 --pretrained WEIGHTS \\
      --image-size 96 --epochs 10                                          # lp; --rows and --epochs make it shorter
$ python tests/bench/bench_train.py --hold-memory --models timm:mobilenetv2_100 --image-size 224
Weights are random without --pretrained: speed does not know. Plain: float32 pictures over the bus, float32 (TF32 with
--tf32) tower, no cache, text encoder in every epoch, default AdamW. The first step, or log line, of every run warms up
and does not count. Progress goes to stderr.
"""
import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from clean import encode, load_encoder, read_data, store_image  # noqa: E402


class Plain(Dataset):
    """Pictures as float32, normalised in the worker, as public loops do it."""

    def __init__(self, pictures, spec):
        self.pictures = pictures
        self.mean, self.std = (torch.tensor(spec[k]).view(3, 1, 1) for k in ("mean", "std"))

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return (self.pictures[i].float() / 255 - self.mean) / self.std, i


def write_data(out, pairs, targets, summary):
    pairs.write_parquet(out / "pairs.parquet")
    np.save(out / "targets.npy", targets)
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def subset(data, rows, out):
    """The first `rows` training rows of a data folder and an eighth as many for validation, pictures linked."""
    pairs, targets, summary = read_data(data)
    split = pairs["split"].to_numpy()
    keep = [np.flatnonzero(split == "train")[:rows], np.flatnonzero(split == "val")[:max(8, rows // 8)]]
    keep = np.sort(np.concatenate(keep))
    out.mkdir(parents=True)
    os.symlink(Path(data).resolve() / "images", out / "images")
    summary["hashes"]["pairs"] += f"-{rows}"
    return write_data(out, pairs[keep], targets[keep], summary)


def draw(job):
    seed, path = job
    coarse = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)  # once enlarged, about 41 KB as a JPEG
    store_image(Image.fromarray(coarse).resize((512, 512), Image.BICUBIC), path, 336)


def drawn(rows, out):
    """A data folder of noise: `rows` to train on and 8 for validation. There is nothing to learn, but the loader and
    the tower have as much to do as on real pictures."""
    names = [f"images/{i // 1000:04d}/{i:07d}.jpg" for i in range(rows + 8)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, enumerate(str(out / n) for n in names), chunksize=64))
    targets = np.random.default_rng(0).standard_normal((rows + 8, 384)).astype(np.float32)
    pairs = pl.DataFrame({"image": names, "prompt": names, "split": ["train"] * rows + ["val"] * 8})
    return write_data(out, pairs, targets / np.linalg.norm(targets, axis=1, keepdims=True),
                      {"format": 1, "text_model": {"name": "none"}, "hashes": {"rows": rows},
                       "recommend": {"model": "none"}})


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(*flags, here=False):
    """train.py as a command, or in this process, where imports cost nothing -> seconds, its metrics."""
    command, started = [str(ROOT / "train.py"), *map(str, flags)], time.perf_counter()
    if here:
        sys.argv = command
        with redirect_stdout(sys.stderr):
            train.guarded()
    else:
        gc.collect()  # gigabytes that the plain loop freed and the allocators kept
        torch.cuda.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)
        subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    seconds, out = time.perf_counter() - started, Path(flags[flags.index("--out") + 1])
    log = out / flags[flags.index("--phase") + 1] / "metrics.jsonl"
    return seconds, [json.loads(line) for line in log.read_text().splitlines()]


def tower_flags(model, args):
    flags = ["--model", model, "--pretrained", args.pretrained]
    flags += ["--image-size", args.image_size] if args.image_size else []
    if model.startswith("timm:mobilenetv2"):
        flags += ["--model-kwargs", "pad_type=same", "--image-mean", .5, .5, .5, "--image-std", .5, .5, .5]
    return flags


def in_turns(rounds, plain, fast):
    """Both, one after the other, `rounds` times, so that whatever else the machine does meets both -> medians of their
    images/s and of the ratio, and its range."""
    pairs = []
    for turn in range(rounds):
        pairs.append((plain(), fast()))
        print(f"round {turn + 1} of {rounds}: plain {pairs[-1][0]:.1f}, ours {pairs[-1][1]:.1f} images/s",
              file=sys.stderr, flush=True)
    ratios = [b / a for a, b in pairs]
    a, b = map(statistics.median, zip(*pairs))
    return a, b, (f"plain {a:.1f} images/s · ours {b:.1f} · {statistics.median(ratios):.2f} x "
                  f"(rounds {min(ratios):.2f} to {max(ratios):.2f})")


def lp_speed(model, spec, plain, targets, prompts, rows, val, args, flags, device):
    """The frozen tower and the text encoder in every epoch, against one pass over the pictures and a cache."""
    def loader(sampler=None):
        return DataLoader(plain, 64, sampler=sampler, num_workers=args.workers, pin_memory=device.type == "cuda")

    encoder = load_encoder(device=device)[0]
    net = train.Net(train.make_tower(train.parse_args(["--phase", "lp", *map(str, flags)]))[0], spec).to(device)
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=1e-3)
    started, best = now(device), -1.0
    for epoch in range(args.epochs):
        order = np.random.default_rng(epoch).permutation(rows).tolist()
        for x, i in loader(order):
            y = torch.from_numpy(encode([prompts[j] for j in i.tolist()], encoder)).to(device)
            with torch.no_grad():
                features = net.tower(x.to(device))
            loss = 1 - train.cosine(net.embed(features), y).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            scores = [train.cosine(net(x.to(device)), torch.from_numpy(targets[i.numpy()]).to(device))
                      for x, i in loader(val.tolist())]
        best = max(best, torch.cat(scores).mean().item())
        slow = now(device) - started
        print(f"plain: epoch {epoch + 1} of {args.epochs}, {slow:.0f} s so far, about "
              f"{slow / (epoch + 1) * (args.epochs - epoch - 1):.0f} s to go, best val {best:.4f}",
              file=sys.stderr, flush=True)
    started = now(device)
    with torch.no_grad():
        for x, _ in loader():
            net.tower(x.to(device))
    bare = now(device) - started
    print(f"one bare pass: {bare:.0f} s; now ours", file=sys.stderr, flush=True)
    fast, log = ours("--phase", "lp", *flags, "--epochs", args.epochs, "--batch-size", 64, here=True)
    print(f"lp, {model} at {spec['image_size']} px, {args.epochs} epochs of {len(rows)}: plain {slow:.1f} s, "
          f"val {best:.4f} · ours {fast:.1f} s, val {log[-1]['best']:.4f} · {slow / fast:.1f} x · "
          f"ours / one bare forward pass with its loader ({bare:.1f} s): {fast / bare:.2f}", flush=True)


def ft_speed(model, spec, plain, targets, rows, work, args, flags, device):
    """The frozen forward pass and ft, images/s."""
    loader_args = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    net = train.Net(train.build_tower(spec), spec).to(device).eval()
    precision = train.pick_precision("auto", device, net.tower)[2]
    settings = argparse.Namespace(out=str(work / "frozen"), batch_size=args.frozen_batch, workers=args.workers,
                                  compile=args.compile, precision=precision)

    def plain_frozen():
        times = []
        with torch.no_grad():
            for x, _ in DataLoader(plain, args.frozen_batch, drop_last=True, **loader_args):
                net.tower(x.to(device))
                times.append(now(device))
                if len(times) > args.steps:
                    break
        return args.frozen_batch * (len(times) - 1) / (times[-1] - times[0])

    def our_frozen():
        """As train.py does it, the file on disk included. The first batch, and the last, which may be short, do not
        count."""
        shutil.rmtree(work / ".features", ignore_errors=True)
        file, times = train.features_file(net, model, len(plain), 1, settings), []
        net.pixels = lambda x: times.append(now(device)) or train.Net.pixels(net, x)
        train.extract_features(net, file, plain.pictures.paths, 1, settings, device)
        return args.frozen_batch * (len(times) - 2) / (times[-1] - times[1])

    def plain_ft():
        net = train.Net(train.build_tower(spec), spec).to(device)
        optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-5)
        times = [now(device)]
        for x, i in DataLoader(plain, args.batch_size, sampler=rows.tolist(), drop_last=True, **loader_args):
            loss = 1 - train.cosine(net(x.to(device)), torch.from_numpy(targets[i.numpy()]).to(device)).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            times.append(now(device))
            if len(times) > args.steps + 1:
                break
        return args.batch_size / statistics.median(np.diff(times)[1:])

    def our_ft():
        """train.py itself, without an average of the weights, which the plain loop does not keep either."""
        _, log = ours("--phase", "ft", "--init", "none", *flags, "--epochs", 1, "--batch-size", args.batch_size,
                      "--ema", 0, "--overwrite", *(["--compile"] if args.compile else []),
                      "--log-every", 10 if device.type == "cuda" else 1)  # a log line waits for the GPU
        found.extend([r for r in log if "images_per_s" in r][1:])
        shutil.rmtree(work / model.replace(":", "_"))
        return statistics.median(r["images_per_s"] for r in found)

    if len(plain) < 3 * args.frozen_batch:
        sys.exit(f"--rows {len(rows)}: the first and the last batch do not count; need 3 times --frozen-batch pictures")
    found = []
    _, frozen, line = in_turns(args.rounds, plain_frozen, our_frozen)
    print(f"frozen, {model} at {spec['image_size']} px, {precision}: {line}", flush=True)
    net.cpu()
    _, trained, line = in_turns(args.rounds, plain_ft, our_ft)
    print(f"ft, {model} at {spec['image_size']} px, batch {args.batch_size}, {precision}: {line} · data wait "
          f"{found[-1]['data_wait']:.0%} · peak {found[-1]['memory_gib']:.1f} GiB", flush=True)
    if args.peak_tflops:
        flops = train.count_flops(net, torch.zeros(1, 3, spec["image_size"], spec["image_size"]))
        share = flops / args.peak_tflops / 1e12
        print(f"of {args.peak_tflops:g} TFLOP/s, {flops / 1e9:.4g} GFLOP an image: frozen {share * frozen:.0%}, "
              f"ft {3 * share * trained:.0%}", flush=True)
    if args.pairs:
        hours = args.pairs * (1 / frozen + 3 / trained) / 3600
        print(f"{args.pairs:,} pairs, lp and 3 epochs of ft, at these speeds: {hours:.1f} hours", flush=True)


def hold_worker(pipe, hold, flags, batch, steps):
    """In a process of its own: answers "forward" and "training" with images/s, and at the end its peak memory."""
    device = torch.device("cpu")
    if hold:
        train.hold_memory(device)
    tower, spec = train.make_tower(train.parse_args(["--phase", "lp", *map(str, flags)]))
    net = train.Net(tower, spec).to(memory_format=torch.channels_last)
    autocast, _, precision = train.pick_precision("auto", device, tower)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    x = torch.randint(0, 256, (batch, 3, spec["image_size"], spec["image_size"]), dtype=torch.uint8)
    pipe.send((spec["image_size"], precision))
    for task in iter(pipe.recv, "end"):
        training = task == "training"
        net.train(training)
        started = time.perf_counter()
        for _ in range(steps):
            with nullcontext() if training else torch.inference_mode(), autocast():
                y = net(x)
            if training:
                optimizer.zero_grad(set_to_none=True)
                (1 - y[:, 0].mean()).backward()
                optimizer.step()
        pipe.send(batch * steps / (time.perf_counter() - started))
    pipe.send(train.memory(device))


def hold_speed(model, args):
    """hold_memory's gain: two processes, one with it and one without, alive at once and measured in turn, so that
    whatever else the machine does meets both."""
    context, workers = multiprocessing.get_context("spawn"), {}
    for hold in (False, True):
        pipe, end = context.Pipe()
        worker = context.Process(target=hold_worker, daemon=True,
                                 args=(end, hold, tower_flags(model, args), args.batch_size, args.steps))
        worker.start()
        workers[hold] = pipe
    size, precision = [pipe.recv() for pipe in workers.values()][0]

    def ask(hold, task):
        workers[hold].send(task)
        return workers[hold].recv()

    rates = {(hold, task): [] for task in ("forward", "training") for hold in workers}
    for turn in range(args.rounds + 1):
        for hold, task in rates:
            rate = ask(hold, task)
            if turn:  # the first round warms up
                rates[hold, task].append(rate)
        print(f"round {turn} of {args.rounds} done", file=sys.stderr, flush=True)
    parts = []
    for task in ("forward", "training"):
        off, on = rates[False, task], rates[True, task]
        ratios = [b / a for a, b in zip(off, on)]
        parts.append(f"{task} {statistics.median(off):.1f} -> {statistics.median(on):.1f} images/s, "
                     f"{statistics.median(ratios):.2f} x (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    peaks = [ask(hold, "end") for hold in workers]
    threads = torch.get_num_threads()
    print(f"hold_memory, {model} at {size} px, batch {args.batch_size}, {precision}, {threads} threads: "
          f"{' · '.join(parts)} · peak {peaks[0]:.1f} -> {peaks[1]:.1f} GiB", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="a folder of clean.py; unset = drawn pictures")
    p.add_argument("--rows", type=int, help="training rows; unset = 256, with --lp all")
    p.add_argument("--models", nargs="+", default=["ViT-B-32"])
    p.add_argument("--pretrained", default="none")
    p.add_argument("--image-size", type=int)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--frozen-batch", type=int, default=64)
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()))
    p.add_argument("--peak-tflops", type=float, help="of the device in bf16, for the utilisation")
    p.add_argument("--pairs", type=int, help="say how long the whole recipe would take on so many")
    p.add_argument("--tf32", action="store_true", help="let the plain loop use TF32")
    p.add_argument("--compile", action="store_true", help="ours with --compile")
    p.add_argument("--lp", action="store_true", help="whole lp runs instead")
    p.add_argument("--epochs", type=int, default=10, help="of --lp")
    p.add_argument("--hold-memory", action="store_true", help="a CPU with and without train.hold_memory instead")
    p.add_argument("--rounds", type=int, default=3, help="in which both sides are measured in turn")
    p.add_argument("--steps", type=int, default=5, help="of the plain loop and of --hold-memory, a round")
    args = p.parse_args()
    if args.hold_memory:
        for model in args.models:
            hold_speed(model, args)
        return
    if args.lp and not args.data:
        p.error("--lp needs --data")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    work = Path(tempfile.mkdtemp())
    data = Path(args.data or drawn(args.rows or 256, work / "data"))
    if args.data and (args.rows or not args.lp):
        data = subset(args.data, args.rows or 256, work / "data")
    pairs, targets, _ = read_data(data)
    used = (pairs["split"] != "guard").to_numpy()
    pairs, targets = pairs.filter(pl.col("split") != "guard"), np.array(targets)[used]
    split = pairs["split"].to_numpy()
    rows, val = np.flatnonzero(split == "train"), np.flatnonzero(split == "val")
    for model in args.models:
        flags = [*tower_flags(model, args), "--data", data, "--out", work / model.replace(":", "_"),
                 "--workers", args.workers]
        spec = train.make_tower(train.parse_args(["--phase", "lp", *map(str, flags)]))[1]
        plain = Plain(train.Pictures([str(data / p) for p in pairs["image"]], spec), spec)
        if args.lp:
            lp_speed(model, spec, plain, targets, pairs["prompt"].to_list(), rows, val, args, flags, device)
        else:
            ft_speed(model, spec, plain, targets, rows, work, args, flags, device)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
