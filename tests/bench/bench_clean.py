"""
clean.py's keep_one against the public recipe and brute force, side by side in one run.
$ python tests/bench/bench_clean.py --rows 25000 50000
Takes the real prompts of ../shared/data where they are (encoded once), else synthetic clusters.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import clean  # noqa: E402

PROMPTS = ROOT.parent / "shared/data/prompts/prompts.parquet"


def clusters(n, seed=0):
    """Unit vectors with the near-duplicates of real prompts: about 3 rows in 10 kept at 0.85. float32 (n, 384)"""
    rng = np.random.default_rng(seed)
    sizes = rng.zipf(1.7, n).clip(max=n // 50)
    centre = np.repeat(np.arange(n), sizes)[:n]
    x = rng.standard_normal((centre.max() + 1, 384), dtype=np.float32)[centre]
    x += rng.uniform(.1, .6, (n, 1)).astype(np.float32) * rng.standard_normal((n, 384), dtype=np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)[rng.permutation(n)]


def ours(x, threshold):
    leader, _ = clean.keep_one(x, threshold)
    return np.flatnonzero(leader == np.arange(len(x)))


def public(x, threshold, k=5000):
    """The recipe that public solutions share: each row's k nearest by faiss; later rows on the list of one that is left
    are dropped. Caps clusters at k."""
    import faiss
    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    gone = np.zeros(len(x), bool)
    for start in range(0, len(x), 256):
        score, hit = index.search(x[start:start + 256], min(k, len(x)))
        for i, (s, h) in enumerate(zip(score, hit), start):
            if not gone[i]:
                gone[h[(s >= threshold) & (h > i)]] = True
    return np.flatnonzero(~gone)


def brute(x, threshold):
    """The definition: each row against the kept ones, one at a time; near the threshold in float64. -> kept rows"""
    kept, store = [], np.empty_like(x)
    for i, row in enumerate(x):
        score = store[:len(kept)] @ row
        close = np.flatnonzero(score > threshold - 1e-5)
        if not len(close) or (store[close].astype(np.float64) @ row.astype(np.float64)).max() < threshold:
            store[len(kept)] = row
            kept.append(i)
    return np.array(kept)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[25_000, 50_000, 100_000], help="how many")
    p.add_argument("--threshold", type=float, default=0.85)
    p.add_argument("--synthetic", action="store_true", help="clusters even where the real prompts are there")
    args = p.parse_args()
    if PROMPTS.is_file() and not args.synthetic:
        prompts = clean.repair(pl.read_parquet(PROMPTS)["prompt"]).unique(maintain_order=True)
        prompts = prompts.filter(prompts.str.len_chars() > 0).sample(fraction=1, shuffle=True, seed=0)
        x, what = clean.encode_cached(prompts.head(max(args.rows)).to_list(), cache="data/.cache"), "real prompts"
    else:
        x, what = clusters(max(args.rows)), "synthetic clusters"
    print(f"{what}, threshold {args.threshold}\n{'rows':>8}  {'method':<8}{'seconds':>9}{'ratio':>8}{'kept':>9}")
    ours(x[:2000], args.threshold)  # warm up
    for n in args.rows:
        kept, seconds = {}, {}
        for method in (ours, *[public] * (n <= 25_000), *[brute] * (n <= 50_000)):  # which are slow
            start = time.perf_counter()
            kept[method] = method(x[:n], args.threshold)
            seconds[method] = time.perf_counter() - start
            print(f"{n:>8}  {method.__name__:<8}{seconds[method]:>9.2f}{seconds[method] / seconds[ours]:>8.1f}"
                  f"{len(kept[method]):>9}", flush=True)
        if brute in kept:
            print(f"{n:>8}  rows kept by ours or brute force alone: {len(np.setxor1d(kept[ours], kept[brute]))}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
