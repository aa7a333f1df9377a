"""
The LP-FT table of docs/results.md: which of train.py's switches earn their place on real pairs, in distribution and on
sources never trained on (clean.py --holdout-source).
$ python tests/bench/science.py --data data/pairs-ood --model timm:mobilenetv2_100 --pretrained WEIGHTS
Every row is one train.py command run with several seeds; best epoch by val, "ood" is read off at that epoch.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FT = "--phase ft --epochs 6 --warmup 10 --batch-size 32 --lr"
ROWS = {  # name: (where it starts, its flags, the weights that are scored)
    "lp": (None, "--phase lp", "raw"),
    "lp, hflip 0.5": (None, "--phase lp --hflip 0.5", "raw"),
    "cold ft, lr 1e-4": ("none", f"{FT} 1e-4", "raw"),
    "cold ft, lr 1e-3": ("none", f"{FT} 1e-3", "raw"),
    "LP-FT, lr 1e-4": ("lp", f"{FT} 1e-4", "raw"),
    "LP-FT, lr 1e-3": ("lp", f"{FT} 1e-3", "raw"),
    "+ EMA 0.9998": ("lp", f"{FT} 1e-3", "ema"),
    "+ hflip 0.5": ("lp", f"{FT} 1e-3 --hflip 0.5", "raw"),
    "+ MixGen 0.25": ("lp", f"{FT} 1e-3 --mixgen 0.25", "raw"),
    "+ layer decay 0.8": ("lp", f"{FT} 1e-3 --layer-decay 0.8", "raw"),
}


def run(name, seed, args, model):
    """One row of the table at one seed, unless it is there already -> its phase folder."""
    start, flags, _ = ROWS[name]
    out, phase = Path(args.out) / f"{start or ''}{flags.replace(' ', '')}-{seed}", flags.split()[1]
    if not (out / phase / "metrics.jsonl").is_file() or '"done"' not in (out / phase / "metrics.jsonl").read_text():
        shutil.rmtree(out, ignore_errors=True)
        init = ["--init", start if start == "none" else str(run(start, seed, args, model))] if start else []
        command = ["train.py", *flags.split(), "--data", args.data, "--out", str(out), "--seed", str(seed), *init]
        command = [sys.executable, *command, *(model if start in (None, "none") else [])]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out / phase


def best(folder, kind):
    """The validation that scored best on val -> (val, ood) there."""
    val, ood = (f"{split}_cosine{'_ema' * (kind == 'ema')}" for split in ("val", "ood"))
    rows = map(json.loads, open(folder / "metrics.jsonl"))
    return max((r[val], r.get(ood, float("nan"))) for r in rows if val in r)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--model", required=True)
    p.add_argument("--pretrained", required=True)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--out", default="runs/science")
    args, more = p.parse_known_args()  # what it does not know describes the model, such as --image-size
    model = ["--model", args.model, "--pretrained", args.pretrained, *more]
    print(f"{'':<24} {'val':>16} {'ood':>16}   mean ± std over {args.seeds} seeds")
    for name, (_, _, kind) in ROWS.items():
        scores = zip(*(best(run(name, seed, args, model), kind) for seed in range(args.seeds)))
        cells = [f"{statistics.mean(x):.4f} ± {statistics.stdev(x) if len(x) > 1 else 0:.4f}" for x in scores]
        print(f"{name:<24} {cells[0]:>16} {cells[1]:>16}", flush=True)


if __name__ == "__main__":
    main()
