"""
The LP-FT table of the README: which of train.py's switches earn their place on real pairs, in distribution and on
sources never trained on.
$ python clean.py ../shared/data/pairs/pairs.csv --out data/pairs-ood --min-words 1 --size 160 --val-fraction 0.15 \\
      --holdout-source NAME ...
$ python tests/bench/science.py --data data/pairs-ood \\
      --pretrained ../shared/data/towers/mobilenetv2_100/mobilenetv2_100_padsame.safetensors
Every row is one train.py command (printed below the table) run with several seeds; best epoch by val, "ood" is read off
at that epoch.
"""
import argparse
import json
import shutil
import statistics
import sys
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402

LP, FT = "--phase lp --head-init ridge", "--phase ft --epochs 6 --warmup 10 --batch-size 32 --lr"
AVERAGED = f"{FT} 1e-3 --ema 0.9998 --wise 0.5"  # three kinds of weights out of one run
ROWS = {  # name: (where it starts, its flags, the weights that are scored)
    "lp, xavier": (None, "--phase lp --head-init xavier", "raw"),
    "lp, ridge": (None, LP, "raw"),
    "lp, ridge, hflip 0.5": (None, f"{LP} --hflip 0.5", "raw"),
    "cold ft, lr 1e-4": ("none", f"{FT} 1e-4", "raw"),
    "cold ft, lr 3e-4": ("none", f"{FT} 3e-4", "raw"),
    "cold ft, lr 1e-3": ("none", f"{FT} 1e-3", "raw"),
    "LP-FT, lr 1e-4": ("lp, ridge", f"{FT} 1e-4", "raw"),
    "LP-FT, lr 3e-4": ("lp, ridge", f"{FT} 3e-4", "raw"),
    "LP-FT, lr 1e-3": ("lp, ridge", AVERAGED, "raw"),
    "+ EMA 0.9998": ("lp, ridge", AVERAGED, "ema"),
    "+ WiSE-FT 0.5": ("lp, ridge", AVERAGED, "wise"),
    "+ hflip 0.5": ("lp, ridge", f"{FT} 1e-3 --hflip 0.5", "raw"),
    "+ MixGen 0.25": ("lp, ridge", f"{FT} 1e-3 --mixgen 0.25", "raw"),
    "+ layer decay 0.8": ("lp, ridge", f"{FT} 1e-3 --layer-decay 0.8", "raw"),
    "+ BatchNorm in train mode": ("lp, ridge", f"{FT} 1e-3 --no-freeze-bn", "raw"),
    "from the xavier lp": ("lp, xavier", f"{FT} 1e-3", "raw"),
}


def best(folder, kind):
    """The validation that scored best on val, for the raw, EMA or WiSE weights -> (val, ood) there."""
    val, ood = ("val_cosine", "ood_cosine") if kind == "raw" else (f"val_cosine_{kind}", f"ood_cosine_{kind}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return max((r[val], r.get(ood, float("nan"))) for r in rows if val in r)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True)
    p.add_argument("--pretrained", required=True)
    p.add_argument("--image-size", default="96")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW",
                   help="some of the table's rows")
    p.add_argument("--out", default="runs/science")
    p.add_argument("--ft", default="", help="flags added to every ft row, to try things")
    args = p.parse_args()
    tower = ["--model", "timm:mobilenetv2_100", "--model-kwargs", "pad_type=same", "--pretrained", args.pretrained,
             "--image-size", args.image_size, "--image-mean", "0.5", "0.5", "0.5", "--image-std", "0.5", "0.5", "0.5"]

    def flags_of(name):
        flags = ROWS[name][1]
        return f"{flags} {args.ft}".strip() if "--phase ft" in flags else flags

    def run(name, seed):
        """One row of the table at one seed, unless it is there already -> its folder."""
        start, flags = ROWS[name][0], flags_of(name)
        words = f"{start or ''} {flags}".replace("-", " ").split()
        out = Path(args.out) / f"{'_'.join(words)}-{seed}"  # side by side: they share cached features
        phase = flags.split()[1]
        command = [*flags.split(), "--data", args.data, "--out", str(out), "--seed", str(seed), "--workers", "2"]
        if start in (None, "none"):
            command += tower
        if start:
            command += ["--init", start if start == "none" else str(run(start, seed))]
        done = out / phase / "metrics.jsonl"
        if not (done.is_file() and '"done"' in done.read_text()):
            shutil.rmtree(out, ignore_errors=True)
            sys.argv = ["train.py", *command]
            with redirect_stdout(sys.stderr):
                train.guarded()
            for file in (out / phase).glob("last.pt"):
                file.unlink()
        return out / phase

    print(f"{'':<36} {'val':>16} {'ood':>16}")
    for name in args.rows:
        scores = [best(run(name, seed), ROWS[name][2]) for seed in range(args.seeds)]
        cells = [f"{statistics.mean(x):.4f} ± {statistics.stdev(x) if len(x) > 1 else 0:.4f}" for x in zip(*scores)]
        print(f"{name:<36} {cells[0]:>16} {cells[1]:>16}", flush=True)
    print(f"\nmean ± std over {args.seeds} seeds; commands: python train.py FLAGS --data {args.data} --seed S "
          "--out ..., where FLAGS is")
    for name in args.rows:
        start, _, kind = ROWS[name]
        init, weights = f" --init ({start})" if start else "", f" ({kind} weights)" if kind != "raw" else ""
        print(f"  {name}: {flags_of(name)}{init}{weights}")
    print(f"  and for lp and cold ft: {' '.join(tower)}")


if __name__ == "__main__":
    main()
