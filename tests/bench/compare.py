"""
Two checkouts of this project against each other, in turns, so that whatever else the machine does meets both.
$ git worktree add ../old COMMIT && python tests/bench/compare.py ../old . --rounds 3
Each job runs as a command of its own in each checkout, on the same data: dedup (keep_one on synthetic clusters), lp and
ft (demo images; ViT-B-32 with random weights for predict), reading metadata.parquet (2,000,000 rows of DiffusionDB) and
png (a folder of 100,000). Prints seconds, the ratio old / new (above 1: the new one is faster) and peak memory.
"""
import argparse
import base64
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl

RUN = """
import json, resource, runpy, sys, time
sys.path.insert(0, ".")
bench, code, start = sys.argv.pop(1), sys.argv.pop(1), time.perf_counter()
{body}
print(json.dumps({{"seconds": time.perf_counter() - start,
                  "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}}))
"""
DEDUP = """
import clean  # of the checkout
sys.path.append(bench)
from bench_clean import clusters
x = clusters(int(code))
clean.keep_one(x[:2000], .85)
start = time.perf_counter()
clean.keep_one(x, .85)
"""
READ = """
import clean
from pathlib import Path
start = time.perf_counter()
clean.read_source(Path(code))
"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
SCRIPT = """
sys.argv = code.split()
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    assert not e.code, e.code
"""


def run(checkout, job):
    """-> {"seconds", "gib"} of one job in one checkout."""
    kind, _, code = job.partition(" ")
    body, code = (DEDUP, code) if kind == "dedup" else (READ, code) if kind == "read" else (SCRIPT, job)
    command = [sys.executable, "-c", RUN.format(body=body.strip()), str(Path(__file__).resolve().parent), code]
    done = subprocess.run(command, cwd=checkout, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{checkout}: {job}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def draw_inputs(folder):
    (folder / "png").mkdir(parents=True)
    for i in range(100_000):
        (folder / f"png/{i}.png").write_bytes(base64.b64decode(PNG))
    table = pl.select(part_id=pl.int_range(2_000_000) // 1000)
    table = table.with_row_index("image_name").with_columns(prompt=pl.format("castle number {}", "image_name"))
    table.cast({"image_name": pl.String}).write_parquet(folder / "metadata.parquet")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--jobs", nargs="+", default=["dedup", "lp", "ft", "predict"])
    args = p.parse_args()
    vit = "--model ViT-B-32 --pretrained none --out runs/bench-vit --overwrite"
    jobs = {"dedup": "dedup 50000",
            "lp": "train.py --phase lp --out runs/bench-lp --overwrite",
            "ft": "train.py --phase ft --init runs/bench-lp --out runs/bench-ft --overwrite --epochs 2",
            "predict": "predict.py --run runs/bench-vit --tta 2 --out preds/bench.npz --overwrite"}
    inputs = Path(tempfile.gettempdir()) / "image2prompt-bench"
    jobs |= {kind: f"read {inputs / kind}" for kind in ("metadata.parquet", "png")}
    if not inputs.exists() and {"metadata.parquet", "png"}.intersection(args.jobs):
        draw_inputs(inputs)
    for checkout in (args.old, args.new) if {"lp", "ft", "predict"}.intersection(args.jobs) else ():
        if not (checkout / "data/demo/summary.json").is_file():
            run(checkout, "clean.py")
        if "predict" in args.jobs and not (checkout / "runs/bench-vit/lp/best.safetensors").is_file():
            run(checkout, f"train.py --phase lp {vit} --epochs 1")
    print(f"{'job':<16} {'old s':>8} {'new s':>8} {'old / new':>20} {'old GiB':>8} {'new GiB':>8}")
    for name in args.jobs:
        pairs = []
        for _ in range(args.rounds):
            for checkout in (args.old, args.new) if name == "lp" else ():  # features are computed, not found
                subprocess.run(["rm", "-rf", "runs/.features", "runs/bench-lp/.features"], cwd=checkout, check=True)
            pairs.append([run(checkout, jobs[name]) for checkout in (args.old, args.new)])
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        cells = [statistics.median(r[i]["seconds"] for r in pairs) for i in (0, 1)]
        peaks = [max(r[i]["gib"] for r in pairs) for i in (0, 1)]
        print(f"{name:<16} {cells[0]:>8.1f} {cells[1]:>8.1f} {statistics.median(ratios):>6.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f}) {peaks[0]:>8.2f} {peaks[1]:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
