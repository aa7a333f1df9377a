"""
Speed of train.py's ft and frozen features against a plain loop of the public kind, on the same drawn images, in turns.
$ python tests/bench/bench_train.py --models ViT-B-32 --batch-size 32                           # two CPU cores
$ python tests/bench/bench_train.py --models ViT-L-14 ViT-L-14-336 --batch-size 128 --rows 12800 --tf32    # one GPU
Weights are random: speed does not depend on what they are. Plain: float32 images over the bus, float32 backbone (TF32
with --tf32), default AdamW. The first step or log line of every run warms up and does not count.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import clean  # noqa: E402
import train  # noqa: E402
from bench_predict import Plain  # noqa: E402


def draw_data(rows, out):
    """A data folder of noise: `rows` to train on and 8 for validation, over 1,000 distinct images. There is nothing to
    learn, but the loader and the backbone have as much to do as on real images."""
    files = []
    for i in range(min(rows + 8, 1000)):
        coarse = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)  # about 41 KB as a JPEG
        files.append(clean.store_image(Image.fromarray(coarse).resize((512, 512), Image.BICUBIC), out, 336)["file"])
    files = [files[i % len(files)] for i in range(rows + 8)]
    targets = np.random.default_rng(0).standard_normal((rows + 8, 384)).astype(np.float32)
    np.save(out / "targets.npy", targets / np.linalg.norm(targets, axis=1, keepdims=True))
    pl.DataFrame({"image": files, "prompt": files, "split": ["train"] * rows + ["val"] * 8, "group": range(rows + 8),
                  "weight": 1.0, "source": "noise", "origin": files}, clean.PAIRS).write_parquet(out / "pairs.parquet")
    (out / "summary.json").write_text(json.dumps({"format": clean.FORMAT, "text_model": {"name": "none", "sha256": ""},
                                                  "hashes": {"rows": rows}, "recommend": {"model": "none"},
                                                  "args": {"split_threshold": 0.7}}))


def in_turns(name, rounds, plain, ours):
    """Both, one after the other, so that whatever else the machine does meets both; prints medians and the ratio."""
    pairs = [(plain(), ours()) for _ in range(rounds)]
    ratios, (a, b) = [b / a for a, b in pairs], map(statistics.median, zip(*pairs))
    print(f"{name}: plain {a:.1f} images/s · ours {b:.1f} · {statistics.median(ratios):.2f} x "
          f"(rounds {min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["ViT-B-32"], help="open_clip names or timm:NAME")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--rows", type=int, default=256, help="training images to draw")
    p.add_argument("--steps", type=int, default=6, help="that the plain loop is measured over")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--tf32", action="store_true")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without train.pick_device's help
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    with tempfile.TemporaryDirectory() as tmp:
        data = Path(tmp) / "data"
        draw_data(args.rows, data)
        paths = [str(data / f) for f in pl.read_parquet(data / "pairs.parquet")["image"]]
        targets = torch.from_numpy(np.load(data / "targets.npy"))
        for model in args.models:
            flags = ["--model", model, "--pretrained", "none", "--data", str(data), "--workers", str(args.workers)]
            backbone, spec = train.make_backbone(train.parse_args(["--phase", "lp", *flags]))

            def plain(training):
                net = train.Model(backbone.cpu(), spec).to(device).train(training)
                optimizer, times = torch.optim.AdamW(net.parameters(), lr=1e-5), []
                loader = DataLoader(Plain(paths, spec), args.batch_size, num_workers=args.workers, drop_last=True)
                for i, x in enumerate(loader):
                    with torch.set_grad_enabled(training):
                        y = net(x.to(device))
                    if training:
                        loss = train.loss_fn(y, targets[i * args.batch_size:][:args.batch_size].to(device))
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                    y[0, 0].item()  # waits for the device
                    times.append(time.perf_counter())
                    if len(times) > args.steps:
                        break
                return args.batch_size * (len(times) - 1) / (times[-1] - times[0])

            def ours(*more):
                torch.cuda.empty_cache()  # what the plain loop held: ours is another process
                command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", f"{tmp}/run", "--overwrite", *more,
                           "--batch-size", str(args.batch_size)]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                return [json.loads(x) for x in open(f"{tmp}/run/{more[1]}/metrics.jsonl")]

            def seconds_frozen(paths):
                data = SimpleNamespace(paths=paths, summary={"hashes": len(paths)})
                precision = train.pick_precision("auto", device, backbone)
                settings = SimpleNamespace(out=tempfile.mkdtemp(dir=tmp), hflip=0, compile=False, workers=args.workers,
                                           precision=precision, batch_size=args.batch_size)
                run = SimpleNamespace(rank=0, world=1, device=device, data=data, args=settings,
                                      images=train.ImageDataset(paths, spec))
                start = time.perf_counter()
                train.extract_features(train.Model(backbone.cpu(), spec), run)
                return time.perf_counter() - start

            def our_frozen():  # the difference to a run of one batch, which has the same start-up
                more = len(paths) - args.batch_size
                return more / (seconds_frozen(paths) - seconds_frozen(paths[:args.batch_size]))

            def our_ft():
                rows = ours("--phase", "ft", "--init", "none", "--epochs", "1", "--ema", "0", "--log-every",
                            "10" if device.type == "cuda" else "1")
                rows = [r for r in rows if "images_per_s" in r][1:]
                print(f"ours, ft: peak memory {rows[-1]['memory_gib']} GiB", flush=True)
                return statistics.median(r["images_per_s"] for r in rows)

            in_turns(f"frozen, {model}", args.rounds, lambda: plain(False), our_frozen)
            in_turns(f"ft, {model}, batch {args.batch_size}", args.rounds, lambda: plain(True), our_ft)


if __name__ == "__main__":
    main()
