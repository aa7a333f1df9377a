"""
Speed of train.py against the plain loop of the public kind, on the same data folder and machine: ratios, not absolute
numbers, are the result.
$ python tests/bench/bench_train.py --data data/pairs --rows 256 --models ViT-B-32 --batch-size 32      # two CPU cores
$ python tests/bench/bench_train.py --data data/pairs --rows 32 --models ViT-L-14 --batch-size 8 --frozen-batch 8
$ python tests/bench/bench_train.py --data data/mine --rows 20000 --models ViT-L-14 ViT-L-14-336 --batch-size 128 \\
      --peak-tflops 790                                                                                 # one GPU
$ python tests/bench/bench_train.py --data data/pairs --lp --models timm:mobilenetv2_100 --pretrained WEIGHTS \\
      --image-size 96 --epochs 10                                           # lp; --rows and --epochs make it shorter
$ python tests/bench/bench_train.py --hold-memory --models timm:mobilenetv2_100 --image-size 224        # no data needed
Weights are random without --pretrained: speed does not know. Plain: float32 pictures over the bus, float32 (TF32 with
--tf32) tower, no cache, text encoder in every epoch, default AdamW. Progress goes to stderr.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402
from clean import encode, load_encoder, read_data  # noqa: E402


class Plain(Dataset):
    """Pictures as float32, normalised in the worker, as public loops do it."""

    def __init__(self, pictures, spec):
        self.pictures = pictures
        self.mean, self.std = (torch.tensor(spec[k]).view(3, 1, 1) for k in ("mean", "std"))

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return (self.pictures[i].float() / 255 - self.mean) / self.std, i


def subset(data, rows, out):
    """The first `rows` training rows of a data folder and an eighth as many for validation, pictures linked."""
    pairs, targets, summary = read_data(data)
    split = pairs["split"].to_numpy()
    keep = [np.flatnonzero(split == "train")[:rows], np.flatnonzero(split == "val")[:max(8, rows // 8)]]
    keep = np.sort(np.concatenate(keep))
    out.mkdir(parents=True)
    os.symlink(Path(data).resolve() / "images", out / "images")
    pairs[keep].write_parquet(out / "pairs.parquet")
    np.save(out / "targets.npy", targets[keep])
    summary["hashes"]["pairs"] += f"-{rows}"
    (out / "summary.json").write_text(json.dumps(summary))
    return out


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(*flags):
    """train.py itself -> seconds, its metrics."""
    sys.argv = ["train.py", *map(str, flags)]
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        train.guarded()
    seconds, out = time.perf_counter() - started, Path(flags[flags.index("--out") + 1])
    log = out / flags[flags.index("--phase") + 1] / "metrics.jsonl"
    return seconds, [json.loads(line) for line in log.read_text().splitlines()]


def tower_flags(model, args):
    flags = ["--model", model, "--pretrained", args.pretrained]
    flags += ["--image-size", args.image_size] if args.image_size else []
    if model.startswith("timm:mobilenetv2"):
        flags += ["--model-kwargs", "pad_type=same", "--image-mean", .5, .5, .5, "--image-std", .5, .5, .5]
    return flags


def lp_speed(model, tower, spec, plain, targets, prompts, rows, val, args, flags, device):
    """The frozen tower and the text encoder in every epoch, against one pass over the pictures and a cache."""
    def loader(sampler=None):
        return DataLoader(plain, 64, sampler=sampler, num_workers=args.workers, pin_memory=device.type == "cuda")

    encoder = load_encoder(device=device)[0]
    net = train.Net(tower, spec).to(device)
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
    fast, log = ours("--phase", "lp", *flags, "--epochs", args.epochs, "--batch-size", 64)
    print(f"lp, {model} at {spec['image_size']} px, {args.epochs} epochs of {len(rows)}: plain {slow:.1f} s, "
          f"val {best:.4f} · ours {fast:.1f} s, val {log[-1]['best']:.4f} · {slow / fast:.1f} x · "
          f"ours / one bare forward pass with its loader ({bare:.1f} s): {fast / bare:.2f}", flush=True)


def ft_speed(model, tower, spec, plain, targets, rows, work, args, flags, device):
    """The frozen forward pass and ft, images/s."""
    # frozen forward: our features, cached to disk, against the float32 tower
    loader_args = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    net = train.Net(tower, spec).to(device).eval()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    with torch.no_grad():
        started = now(device)
        for x, _ in DataLoader(plain, args.frozen_batch, **loader_args):
            net.tower(x.to(device))
        slow = len(plain) / (now(device) - started)
    precision = train.pick_precision("auto", device, tower)[2]
    started = now(device)
    settings = argparse.Namespace(out=str(work / "frozen"), batch_size=args.frozen_batch, workers=args.workers,
                                  compile=args.compile)
    train.extract_features(net, spec, model, plain.pictures.paths, 1, settings, device, train.DTYPES[precision], 0, 1)
    fast = len(plain) / (now(device) - started)
    print(f"frozen, {model} at {spec['image_size']} px, {precision}: plain {slow:.1f} images/s · ours {fast:.1f} · "
          f"{fast / slow:.2f} x", flush=True)

    # ft: train.py itself (median of its log lines) against a plain loop
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-5)
    times = [now(device)]
    for x, i in DataLoader(plain, args.batch_size, sampler=rows.tolist(), drop_last=True, **loader_args):
        loss = 1 - train.cosine(net(x.to(device)), torch.from_numpy(targets[i.numpy()]).to(device)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        times.append(now(device))
    slow = args.batch_size / np.median(np.diff(times)[1:])
    del net, optimizer
    flags += ["--compile"] if args.compile else []
    flags += ["--ema", 0]  # the plain loop keeps no average either
    _, log = ours("--phase", "ft", "--init", "none", *flags, "--epochs", 1, "--batch-size", args.batch_size)
    found = [r for r in log if "images_per_s" in r]
    fast = np.median([r["images_per_s"] for r in found[1:] or found])
    line = (f"ft, {model} at {spec['image_size']} px, batch {args.batch_size}, {precision}: plain {slow:.1f} images/s "
            f"· ours {fast:.1f} · {fast / slow:.2f} x · data wait {found[-1]['data_wait']:.0%} · "
            f"{found[-1]['memory_gib']:.1f} GiB")
    if args.peak_tflops:
        from torch.utils.flop_counter import FlopCounterMode
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            train.Net(train.build_tower(spec), spec)(torch.zeros(1, 3, spec["image_size"], spec["image_size"]))
        share = 3 * flops.get_total_flops() * fast / args.peak_tflops / 1e12
        line += f" · {share:.0%} of {args.peak_tflops:g} TFLOP/s"
    print(line, flush=True)


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
    p.add_argument("--data")
    p.add_argument("--rows", type=int, help="training rows; unset = 256, with --lp all")
    p.add_argument("--models", nargs="+", default=["ViT-B-32"])
    p.add_argument("--pretrained", default="none")
    p.add_argument("--image-size", type=int)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--frozen-batch", type=int, default=64)
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()))
    p.add_argument("--peak-tflops", type=float, help="of the device in bf16, for the utilisation")
    p.add_argument("--tf32", action="store_true", help="let the plain loop use TF32")
    p.add_argument("--compile", action="store_true", help="ours with --compile")
    p.add_argument("--lp", action="store_true", help="whole lp runs instead")
    p.add_argument("--epochs", type=int, default=10, help="of --lp")
    p.add_argument("--hold-memory", action="store_true", help="a CPU with and without train.hold_memory instead")
    p.add_argument("--rounds", type=int, default=5, help="of --hold-memory, after one that warms up")
    p.add_argument("--steps", type=int, default=5, help="of --hold-memory, per round and task")
    args = p.parse_args()
    if args.hold_memory:
        for model in args.models:
            hold_speed(model, args)
        return
    if not args.data:
        p.error("--data is needed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Path(tempfile.mkdtemp())
    rows = args.rows or (None if args.lp else 256)
    data = subset(args.data, rows, work / "data") if rows else Path(args.data)
    pairs, targets, _ = read_data(data)
    used = (pairs["split"] != "guard").to_numpy()
    pairs, targets = pairs.filter(pl.col("split") != "guard"), np.array(targets)[used]
    split = pairs["split"].to_numpy()
    rows, val = np.flatnonzero(split == "train"), np.flatnonzero(split == "val")
    for model in args.models:
        flags = [*tower_flags(model, args), "--data", data, "--out", work / model.replace(":", "_"),
                 "--workers", args.workers, "--log-every", 4]
        tower, spec = train.make_tower(train.parse_args(["--phase", "lp", *map(str, flags)]))
        plain = Plain(train.Pictures([str(data / p) for p in pairs["image"]], spec), spec)
        if args.lp:
            lp_speed(model, tower, spec, plain, targets, pairs["prompt"].to_list(), rows, val, args, flags, device)
        else:
            ft_speed(model, tower, spec, plain, targets, rows, work, args, flags, device)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
