"""
Speed of train.py against the plain loop of the public kind, on the same data folder, in one process: ratios, not absolute numbers, are the result.
$ python tests/bench/bench_train.py --data data/pairs --rows 256 --models ViT-B-32 --batch-size 32             # two CPU cores
$ python tests/bench/bench_train.py --data data/pairs --rows 32 --models ViT-L-14 --batch-size 8 --frozen-batch 8
$ python tests/bench/bench_train.py --data data/mine --rows 20000 --models ViT-L-14 ViT-L-14-336 --batch-size 128 --peak-tflops 790   # one GPU
$ python tests/bench/bench_train.py --data data/pairs --lp --models timm:mobilenetv2_100 --pretrained WEIGHTS --image-size 96   # ten epochs of lp
Weights are random without --pretrained: speed does not know. Plain: float32 pictures over the bus, float32 (TF32 with --tf32) tower, no cache,
text encoder in every epoch, default AdamW.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
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
        self.pictures, self.mean, self.std = pictures, torch.tensor(spec["mean"]).view(3, 1, 1), torch.tensor(spec["std"]).view(3, 1, 1)

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        return (self.pictures[i].float() / 255 - self.mean) / self.std, i


def subset(data, rows, out):
    """The first `rows` training rows of a data folder and up to an eighth as many for validation, pictures linked."""
    pairs, targets, summary = read_data(data)
    split = pairs["split"].to_numpy()
    keep = np.sort(np.concatenate([np.flatnonzero(split == "train")[:rows], np.flatnonzero(split == "val")[:max(8, rows // 8)]]))
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
    return seconds, [json.loads(line) for line in (out / flags[flags.index("--phase") + 1] / "metrics.jsonl").read_text().splitlines()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--rows", type=int, default=256)
    p.add_argument("--models", nargs="+", default=["ViT-B-32"])
    p.add_argument("--pretrained", default="none")
    p.add_argument("--image-size", type=int)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--frozen-batch", type=int, default=64)
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count()))
    p.add_argument("--peak-tflops", type=float, help="of the device in bf16, for the utilisation")
    p.add_argument("--tf32", action="store_true", help="let the plain loop use TF32")
    p.add_argument("--compile", action="store_true", help="ours with --compile")
    p.add_argument("--lp", action="store_true", help="ten epochs of lp instead")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = Path(tempfile.mkdtemp())
    data = subset(args.data, args.rows, work / "data") if not args.lp else Path(args.data)
    pairs, targets, _ = read_data(data)
    pairs, targets = pairs.filter(pl.col("split") != "guard"), np.array(targets)[(pairs["split"] != "guard").to_numpy()]
    split = pairs["split"].to_numpy()
    rows, val = np.flatnonzero(split == "train"), np.flatnonzero(split == "val")
    loader_args = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    for model in args.models:
        flags = ["--model", model, "--pretrained", args.pretrained, "--data", data, "--out", work / model.replace(":", "_"), "--workers", args.workers, "--log-every", 4]
        flags += ["--image-size", args.image_size] if args.image_size else []
        if model.startswith("timm:mobilenetv2"):
            flags += ["--model-kwargs", "pad_type=same", "--image-mean", .5, .5, .5, "--image-std", .5, .5, .5]
        tower, spec = train.make_tower(train.parse_args(["--phase", "lp", *map(str, flags)]))
        plain = Plain(train.Pictures([str(data / p) for p in pairs["image"]], spec), spec)

        if args.lp:  # the frozen tower and the text encoder in every epoch, against one pass and a cache
            encoder, prompts = load_encoder(device=device)[0], pairs["prompt"].to_list()
            net = train.Net(tower, spec).to(device)
            optimizer = torch.optim.AdamW(net.head.parameters(), lr=1e-3)
            started, best, forward = now(device), -1.0, 0.0
            for epoch in range(10):
                order = np.random.default_rng(epoch).permutation(rows).tolist()
                for x, i in DataLoader(plain, 64, sampler=order, **loader_args):
                    y = torch.from_numpy(encode([prompts[j] for j in i.tolist()], encoder)).to(device)
                    before = now(device)
                    with torch.no_grad():
                        features = net.tower(x.to(device))
                    forward += (now(device) - before) * (epoch == 0)
                    loss = 1 - train.cosine(net.embed(features), y).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                with torch.no_grad():
                    score = torch.cat([train.cosine(net(x.to(device)), torch.from_numpy(targets[i.numpy()]).to(device)) for x, i in DataLoader(plain, 64, sampler=val.tolist(), **loader_args)])
                best = max(best, score.mean().item())
            slow = now(device) - started
            started = now(device)
            with torch.no_grad():
                for x, i in DataLoader(plain, 64, **loader_args):
                    net.tower(x.to(device))
            bare = now(device) - started
            fast, rows_ = ours("--phase", "lp", *flags, "--epochs", 10, "--batch-size", 64)
            print(f"lp, {model}, 10 epochs of {len(rows)}: plain {slow:.1f} s, val {best:.4f} · ours {fast:.1f} s, val {rows_[-1]['best']:.4f} · {slow / fast:.1f} x "
                  f"· ours / one bare forward pass with its loader ({bare:.1f} s): {fast / bare:.2f}", flush=True)
            continue

        # frozen forward: our features, cached to disk, against the float32 tower
        net = train.Net(tower, spec).to(device).eval()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
        with torch.no_grad():
            started = now(device)
            for x, _ in DataLoader(plain, args.frozen_batch, **loader_args):
                net.tower(x.to(device))
            slow = len(plain) / (now(device) - started)
        precision = train.pick_precision("auto", device, tower)[2]
        started = now(device)
        settings = argparse.Namespace(out=str(work / "frozen"), batch_size=args.frozen_batch, workers=args.workers, compile=args.compile)
        train.extract_features(net, spec, model, plain.pictures.paths, 1, settings, device, train.DTYPES[precision], 0, 1)
        fast = len(plain) / (now(device) - started)
        print(f"frozen, {model} at {spec['image_size']} px, {precision}: plain {slow:.1f} images/s · ours {fast:.1f} · {fast / slow:.2f} x", flush=True)

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
        _, rows_ = ours("--phase", "ft", "--init", "none", *flags, "--epochs", 1, "--batch-size", args.batch_size, *(["--compile"] if args.compile else []))
        found = [r for r in rows_ if "images_per_s" in r]
        fast = np.median([r["images_per_s"] for r in found[1:] or found])
        line = f"ft, {model} at {spec['image_size']} px, batch {args.batch_size}, {precision}: plain {slow:.1f} images/s · ours {fast:.1f} · {fast / slow:.2f} x · data wait {found[-1]['data_wait']:.0%} · {found[-1]['memory_gib']:.1f} GiB"
        if args.peak_tflops:
            from torch.utils.flop_counter import FlopCounterMode
            with torch.no_grad(), FlopCounterMode(display=False) as flops:
                train.Net(train.build_tower(spec), spec)(torch.zeros(1, 3, spec["image_size"], spec["image_size"]))
            line += f" · {3 * flops.get_total_flops() * fast / args.peak_tflops / 1e12:.0%} of {args.peak_tflops:g} TFLOP/s"
        print(line, flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
