"""
What clean.py costs, measured side by side in one run.
$ python tests/bench/bench_clean.py dedup              # the public recipe (a) and float32 blocks (b) against keep_one
$ python tests/bench/bench_clean.py metadata           # text rules and exact duplicates of a made-up 2M-row metadata
$ python tests/bench/bench_clean.py images encode      # stored JPEG against WebP and PNG; prompts a second by precision
Goals of dedup: >= 25 x faster than (a), >= 3 x than (b), 0 differences from brute force, peak memory at most
3 x (N x 384 x 4) bytes + 1 GiB.
"""
import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parent.parent.parent
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


def public(x, threshold, k=5000):
    """(a) The recipe that public solutions share: each row's k nearest by faiss; later rows on the list of one that is
    left go. Caps clusters at k."""
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


def triangular(x, threshold, block=2048):
    """(b) Every pair by float32 blocks of torch matmul, upper triangle only, then keep-one."""
    import torch
    x, gone = torch.from_numpy(x), np.zeros(len(x), bool)
    for a in range(0, len(x), block):
        for b in range(a, len(x), block):
            near = (x[a:a + block] @ x[b:b + block].T >= threshold).numpy()
            for i in np.flatnonzero(near.any(1)):
                if not gone[a + i]:
                    row = near[i].copy()
                    row[:max(0, a + i - b + 1)] = False
                    gone[b:b + block] |= row[:len(gone[b:b + block])]
    return np.flatnonzero(~gone)


def ours(x, threshold):
    leader, _ = clean.keep_one(x, threshold)
    return np.flatnonzero(leader == np.arange(len(x)))


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


def one(method, n, path, threshold):
    """Run in a process of its own, so that peak memory is the method's: prints JSON."""
    import faiss, torch  # noqa: E401, F401, loaded before the memory is read

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    x = np.load(path, mmap_mode="r")[:n].copy()
    globals()[method](x[:2000], threshold)
    before, start = peak(), time.perf_counter()
    kept = globals()[method](x, threshold)
    seconds = time.perf_counter() - start
    np.save(f"{path}.{method}.{n}.npy", kept)
    print(json.dumps({"seconds": seconds, "kept": len(kept), "gib": (peak() - before + x.nbytes) / 2**30}))


def dedup(args):
    args.work.mkdir(parents=True, exist_ok=True)
    path, real = args.work / "x.npy", PROMPTS.is_file() and args.real
    if real:
        prompts = clean.repair(pl.read_parquet(PROMPTS)["prompt"])
        prompts = prompts.filter(prompts.str.len_chars() > 0).unique(maintain_order=True).head(max(args.rows))
        prompts = prompts.sample(fraction=1, shuffle=True, seed=0)  # the table goes from collection to collection
        precision = "bf16" if clean.has_bf16("cpu") else "fp32"  # what is measured is the search
        np.save(path, clean.encode_cached(prompts, device="cpu", precision=precision, cache=args.work / "cache"))
    else:
        np.save(path, clusters(max(args.rows)))

    def measure(method, n):
        command = [sys.executable, __file__, "one", "--method", method, "--rows", str(n), "--path", path]
        done = subprocess.run([*command, "--threshold", str(args.threshold)], check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout.splitlines()[-1])

    what = "real prompts" if real else "synthetic clusters"
    print(f"{what}, threshold {args.threshold}, {os.cpu_count()} cores")
    print(f"{'rows':>8}  {'method':<12}{'seconds':>9}{'ratio':>8}{'kept':>9}{'different':>11}{'GiB':>7}")
    times = {}
    for n in args.rows:
        if n <= args.brute:
            measure("brute", n)
        for method in ("ours", "triangular", *["public"] * (n <= args.public)):
            r = measure(method, n)
            times.setdefault(method, []).append((n, r["seconds"]))
            wrong, ratio = "-", r["seconds"] / times["ours"][-1][1]
            if n <= args.brute:
                kept = [np.load(f"{path}.{m}.{n}.npy") for m in (method, "brute")]
                wrong = len(np.setxor1d(*kept))
            print(f"{n:>8}  {method:<12}{r['seconds']:>9.2f}{ratio:>8.1f}{r['kept']:>9}{wrong:>11}{r['gib']:>7.2f}",
                  flush=True)
    if len(times["ours"]) > 1:
        n, t = np.log(np.array(times["ours"])).T
        slope, base = np.polyfit(n, t, 1)
        hours = np.exp(base + slope * np.log(2e6)) / 3600
        print(f"ours grows as rows^{slope:.2f}; 2M rows: about {hours:.1f} h on these cores")


def some_prompts(n, ending=""):
    """The real prompts where they are, else n invented ones. -> Series"""
    if PROMPTS.is_file():
        return pl.read_parquet(PROMPTS)["prompt"]
    return pl.Series([f"a painting of thing {i} by artist {i % 977}{ending}" for i in range(n)])


def metadata(args):
    """A DiffusionDB metadata.parquet of the true schema, 1.5M distinct prompts in 2M rows, up to the encoder."""
    args.work.mkdir(parents=True, exist_ok=True)
    n, rng = args.metadata_rows, np.random.default_rng(0)
    source = some_prompts(150_000, ", trending on artstation")
    pick = rng.integers(0, n * 3 // 4, n)
    prompt = pl.DataFrame({"a": source.gather(pick % len(source)), "b": pick // len(source)})
    pl.DataFrame({
        "image_name": pl.Series(np.arange(n)).cast(pl.String) + ".png",
        "prompt": prompt.select(pl.concat_str("a", pl.lit(", study "), "b")).to_series(),
        "part_id": pl.Series(np.arange(n) // 1000 + 1, dtype=pl.UInt16),
        "seed": pl.Series(rng.integers(0, 2**32, n), dtype=pl.UInt32),
        "step": pl.Series(np.full(n, 50), dtype=pl.UInt16),
        "cfg": pl.Series(np.full(n, 7), dtype=pl.Float32),
        "sampler": pl.Series(np.full(n, 8), dtype=pl.UInt8),
        "width": pl.Series(rng.choice([512, 704, 1024], n), dtype=pl.UInt16),
        "height": pl.Series(np.full(n, 512), dtype=pl.UInt16),
        "user_name": pl.Series(["deleted_account"] * n),
        "timestamp": pl.Series([None] * n, dtype=pl.Datetime("us", "UTC")),
        "image_nsfw": pl.Series(rng.choice([.1, 2.0], n, p=[.95, .05]), dtype=pl.Float32),
        "prompt_nsfw": pl.Series(rng.random(n), dtype=pl.Float32),
    }).write_parquet(args.work / "metadata.parquet")
    code = """import sys, time, resource; sys.path.insert(0, sys.argv[1]); import clean
def stop(*_, **__):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.1f} s, peak {peak:.2f} GiB"); sys.exit()
clean.encode_cached = stop; start = time.perf_counter()
sys.argv = ["clean.py", sys.argv[2], "--text-only", "--out", sys.argv[3]]; clean.main()"""
    paths = map(str, (ROOT, args.work / "metadata.parquet", args.work / "out"))
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    result = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    print(f"{n:,} metadata rows to the list of distinct prompts:", result)


def images(args):
    """What the stored form costs: time to write and to read, size, and error against the shrunk picture. Real pictures,
    or smooth noise, 512 x 512 to 336."""
    from PIL import Image, ImageFilter
    rng, rows = np.random.default_rng(0), []
    pairs = ROOT.parent / "shared/data/pairs/images"
    files = sorted(pairs.iterdir())[::150][:24] if pairs.is_dir() else []
    pictures = [clean.open_rgb(f).resize((512, 512), Image.BICUBIC) for f in files] or [
        Image.fromarray(rng.integers(0, 255, (512, 512, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(3))
        for _ in range(24)]
    small = [p.resize((336, 336), Image.BICUBIC) for p in pictures]
    for name, source, kwargs in (("512 PNG", pictures, {"format": "PNG"}),
                                 ("336 JPEG 95", small, {"format": "JPEG", "quality": 95}),
                                 ("336 JPEG 90", small, {"format": "JPEG", "quality": 90}),
                                 ("336 WebP 95", small, {"format": "WEBP", "quality": 95}),
                                 ("336 WebP lossless", small, {"format": "WEBP", "lossless": True})):
        stored = [io.BytesIO() for _ in source]
        start = time.perf_counter()
        for p, f in zip(source, stored):
            p.save(f, **kwargs)
        write, start, reads = time.perf_counter() - start, time.perf_counter(), 5
        for _ in range(reads):
            back = [clean.open_rgb(io.BytesIO(f.getvalue())) for f in stored]
        read = (time.perf_counter() - start) / reads
        error = np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(source, back)])
        rows.append({"stored as": name, "KB": np.mean([len(f.getvalue()) for f in stored]) / 1000,
                     "write ms": write * 1000 / len(source), "read ms": read * 1000 / len(source),
                     "mean error of 255": error})
    print(f"{len(pictures)} {'pictures' if files else 'synthetic pictures'}, one process")
    with pl.Config(float_precision=2, tbl_hide_column_data_types=True, tbl_hide_dataframe_shape=True):
        print(pl.DataFrame(rows).with_columns(speed=rows[0]["read ms"] / pl.col("read ms")))


def encode(args):
    import torch
    prompts, reference = some_prompts(args.encode_rows).head(args.encode_rows), None
    encoder, _ = clean.load_encoder()
    half = [("fp16", encoder.half)] if torch.cuda.is_available() else []
    for precision, cast in (("fp32", encoder.float), ("bf16", encoder.bfloat16), *half):
        cast()
        clean.encode(prompts[:256], encoder)
        start = time.perf_counter()
        x = clean.encode(prompts, encoder, 512 if torch.cuda.is_available() else 128)
        seconds, reference = time.perf_counter() - start, x if reference is None else reference
        error = (1 - (x * reference).sum(1)).max()
        print(f"encode {precision}: {len(prompts) / seconds:,.0f} prompts/s, largest cosine error {error:.1e}")
        if precision == "bf16":
            encoder, _ = clean.load_encoder()


def main():
    p = argparse.ArgumentParser(description="Measure clean.py.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("what", nargs="+", choices=["dedup", "metadata", "images", "encode", "one"])
    p.add_argument("--rows", type=int, nargs="+", default=[25_000, 50_000, 100_000], help="sizes for dedup")
    p.add_argument("--threshold", type=float, default=0.85)
    p.add_argument("--real", action=argparse.BooleanOptionalAction, default=True,
                   help="real prompts where ../shared/data is there, encoded once; off = synthetic clusters")
    p.add_argument("--public", type=int, default=25_000, help="most rows for the public recipe, which is slow")
    p.add_argument("--brute", type=int, default=50_000, help="most rows for brute force, which is slower")
    p.add_argument("--metadata-rows", type=int, default=2_000_000)
    p.add_argument("--encode-rows", type=int, default=2048)
    p.add_argument("--work", type=Path, default=Path("data/bench"), help="folder for what is made on the way")
    p.add_argument("--method", help=argparse.SUPPRESS)
    p.add_argument("--path", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.what == ["one"]:
        return one(args.method, args.rows[0], args.path, args.threshold)
    for what in args.what:
        {"dedup": dedup, "metadata": metadata, "images": images, "encode": encode}[what](args)


if __name__ == "__main__":
    main()
