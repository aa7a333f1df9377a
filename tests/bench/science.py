"""
The accuracy tables of docs/results.md: lp, cold ft and LP-FT x --balance x --select-by, with what needs no training
beside them, in distribution and on sources never trained on (clean.py --holdout-source).
$ python tests/bench/science.py --drawn                   # the demo with two of its styles as ood; anybody can run it
$ python tests/bench/science.py --data data/pairs-ood --model timm:mobilenetv2_100 --pretrained WEIGHTS --image-size 96
Every row is train.py at several seeds. The learning rate is the best at seed 0 by the first of --select-by; the epoch,
and raw or EMA weights, are the best by each row's own. "ood" is only read off there.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LITE = "--model timm:tf_efficientnet_lite0 --pretrained pypi --image-size 64"
FT = "--phase ft --warmup 10 --batch-size"
MEASURES = "val_cosine", "val_balanced", "val_sources", "ood_cosine"


def draw_data(out):
    """The demo with its styles as sources, two of them held out -> data folder"""
    from demo import STYLES, draw_demo
    raw = draw_demo(Path("data/demo-raw"))
    style = pl.col("prompt").str.to_lowercase().str.extract(f"({'|'.join(STYLES)})").fill_null("no style")
    table = pl.read_csv(raw).with_columns(image="demo-raw/" + pl.col("image"), source=style)
    table.drop("rule").write_csv("data/demo-styles.csv")
    subprocess.run([sys.executable, "clean.py", "data/demo-styles.csv", "--out", out, "--size", "64", "--val-fraction",
                    "0.1", "--holdout-source", "pixel art", "tile mosaic"], check=True)
    return out


def read_log(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in open(file)] if file.is_file() else []


def train(args, flags, name, seed=0, init=None):
    """train.py with these flags, unless it is done -> its phase folder"""
    out, phase = Path(args.out) / f"{name}-{seed}".replace(" ", "_"), flags.split()[1]
    if not any(row.get("done") for row in read_log(out / phase)):
        shutil.rmtree(out, ignore_errors=True)
        start = [*(["--init", str(init)] if init else []), *(args.model if init in (None, "none") else [])]
        command = [sys.executable, "train.py", *flags.split(), "--data", args.data, "--out", str(out), *start]
        command += ["--seed", str(seed), "--workers", "1", "--precision", "fp32"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out / phase


def best(folder, select_by, kinds=("", "_ema")):
    """What the validation that is best by `select_by` scored: {measure: cosine}"""
    rows = [(r, kind) for r in read_log(folder) for kind in kinds if f"val_cosine{kind}" in r]
    row, kind = max(rows, key=lambda r: r[0][f"val_{select_by}{r[1]}"])
    return {m: row.get(m + kind, float("nan")) for m in (f"val_{select_by}", *MEASURES)}


def print_row(name, scores):
    cells = [[s[m] for s in scores] for m in MEASURES]
    cells = [f"{statistics.mean(c):.4f} ± {statistics.stdev(c) if len(c) > 1 else 0:.4f}" for c in cells]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_untrained(args):
    """The constant baseline, and the average of the 10 nearest training images' targets"""
    import train as t
    data = t.load_data(args.data)
    print_row("constant baseline", [{"val_sources": float("nan"), "ood_cosine": float("nan"), **data.baseline}])
    model = t.load_model(Path(args.out) / f"lp_{args.balance[0]}_{args.select_by[0]}-0")[0]
    run = argparse.Namespace(args=argparse.Namespace(precision="fp32", hflip=0, out=args.out, batch_size=128, workers=1,
                             compile=False), data=data, rank=0, world=1, images=t.ImageDataset(data.paths, model.spec),
                             device=t.pick_device())
    x, y = t.extract_features(model, run)[0], t.torch.from_numpy(data.targets)
    held = {s: t.knn(x[data.train], y[data.train], x[rows], y[rows]) for s, rows in data.held.items()}
    print_row("10 nearest", [{m: held.get(m[:3], float("nan")) if "cosine" in m else float("nan") for m in MEASURES}])


def print_views(args, runs):
    """--tta and --blend-neighbors of predict.py, on val and ood, of the runs in these folders"""
    import numpy as np
    import predict as p
    import train as t
    gains = {}
    for folder in runs:
        model, data = p.TTAModel(folder / "best.safetensors", "fp32", p.pick_device()), t.load_data(args.data)
        corpus = data.targets[data.train]
        for split, rows in data.held.items():
            paths, y = [data.paths[i] for i in rows], data.targets[rows]
            views = [p.predict(model, paths, [v], argparse.Namespace(batch_size=64, workers=1))[0] for v in p.VIEWS]
            near = p.nearest_prompts(views[0], corpus, p.BLEND_K)
            made = {f"--tta {n}": np.mean(views[:n], 0) for n in range(1, 5)}
            made |= {f"--blend-neighbors {w}": p.blend_neighbors(views[0], corpus, *near, w) for w in (.05, .1, .2, .5)}
            for name, x in made.items():
                cosine = (x / np.linalg.norm(x, axis=1, keepdims=True) * y).sum(1).mean()
                gains.setdefault(name, {}).setdefault(split, []).append(cosine)
    for name, scores in gains.items():
        cells = [f"{statistics.mean(c):.4f} | {statistics.mean(d):+.4f} ± {statistics.stdev(d):.4f}" for c, d in
                 ((c, [a - b for a, b in zip(c, gains["--tta 1"][s])]) for s, c in scores.items())]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--drawn", action="store_true", help="draw the demo, with EfficientNet-Lite0 from PyPI at 64 px")
    p.add_argument("--data")
    p.add_argument("--balance", nargs="+", default=["0", "0.25", "0.5", "1"])
    p.add_argument("--select-by", nargs="+", default=["cosine", "balanced", "sources"])
    p.add_argument("--lr", nargs="+", default=["3e-4", "1e-3", "3e-3"])
    p.add_argument("--epochs", default="6")
    p.add_argument("--batch-size", default="32")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--jobs", type=int, default=1, help="at a time")
    p.add_argument("--views", action="store_true", help="--tta and --blend-neighbors of the first LP-FT row, too")
    p.add_argument("--out", default="runs/science")
    args, args.model = p.parse_known_args()  # what it does not know describes the model, such as --image-size
    if args.drawn:
        args.data, args.model = args.data or "data/demo-ood", LITE.split()
        if not Path(args.data).exists():
            draw_data(args.data)
    pool, starts, first = ThreadPoolExecutor(args.jobs), ["none", *args.select_by], args.select_by[0]
    jobs = {(b, s): pool.submit(train, args, f"--phase lp --balance {b} --select-by {s}", f"lp_{b}_{s}")
            for b in args.balance for s in args.select_by}
    lps = {key: job.result() for key, job in jobs.items()}
    lps |= {(b, "none"): "none" for b in args.balance}

    def ft(b, start, lr, seed=0):
        by = first if start == "none" else start
        flags = f"{FT} {args.batch_size} --epochs {args.epochs} --balance {b} --select-by {by} --lr {lr}"
        return pool.submit(train, args, flags, f"ft_{b}_{start}_{lr}", seed, lps[b, start])

    tried = {(b, s, lr): ft(b, s, lr) for b in args.balance for s in ("none", first) for lr in args.lr}
    tried = {key: best(job.result(), first)[f"val_{first}"] for key, job in tried.items()}
    lrs = {(b, s): max(args.lr, key=lambda lr: tried[b, s if s == "none" else first, lr])
           for b in args.balance for s in starts}
    fts = {key: [ft(*key, lr, seed) for seed in range(args.seeds)] for key, lr in lrs.items()}
    print(f"mean ± std over {args.seeds} seeds; lp has none\n| | {' | '.join(MEASURES)} |\n|---|---|---|---|---|")
    print_untrained(args)
    for b, s in jobs:
        print_row(f"lp, balance {b}, by {s}", [best(lps[b, s], s, ("",))])
    for (b, s), runs in fts.items():
        for by in args.select_by if s == "none" else [s]:
            name = f"{'cold ft' if s == 'none' else 'LP-FT'} {lrs[b, s]}, balance {b}, by {by}"
            print_row(name, [best(run.result(), by) for run in runs])
            if s != "none":
                print_row(f"{name}, raw weights only", [best(run.result(), by, ("",)) for run in runs])
    if args.views:
        print_views(args, [run.result() for run in fts[args.balance[0], first]])


if __name__ == "__main__":
    main()
