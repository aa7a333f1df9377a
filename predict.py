"""
Predict the prompt embeddings of images with a trained run: nearest known prompts, a Kaggle submission, a report page.
Reads runs/NAME/<phase>/best.safetensors and images; writes preds/NAME.npz and what is asked for beside it.

$ python predict.py                             # the validation split of the newest finished run, with its cosine
$ python predict.py image.png                   # prints the nearest known prompts
$ python predict.py images/ --txt               # writes them beside each image, as NAME.txt
$ python predict.py --serve                     # a page at http://127.0.0.1:8000 to drop images on
$ python predict.py images/ more.zip --run runs/demo/ft --tta 4 --html report.html
$ python predict.py test/ --sample-submission sample_submission.csv --submission submission.csv
"""
import atexit
import base64
import glob
import hashlib
import html
import io
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import nn
from tqdm import tqdm

from clean import (CONTROL, MAX_RATIO, BadImage, atomic, check_ranges, check_rows, encode_cached, find_encoder,
                   find_images, hold, is_archive, is_image, is_table, keep_one, list_counts, make_parser, open_archive,
                   open_rgb, print_next, read_data, read_source, read_table, reason, run, sha256, sweep, top_k, walk,
                   warn_few, writing)
from train import (DTYPES, ImageDataset, cast_backbone, centre_crop, find_checkpoint, kill_workers, load_meta,
                   load_model, make_loader, measures_of, out_of_memory, pick_device, pick_precision, split_batches,
                   to_square)


def zoom(image, share=0.8):
    side = max(1, round(min(image.size) * share))
    return centre_crop(image, side, side)


VIEWS = {  # name: function from RGB image to RGB image; add your own here
    "image": lambda image: image,
    "mirror": ImageOps.mirror,
    "zoom": zoom,
    "zoom-mirror": lambda image: ImageOps.mirror(zoom(image)),
}
SAME = 0.95  # neighbours this close to a nearer one are the same prompt
FEW = 8  # images or fewer: print their neighbours
BLEND_K = 100  # neighbours of --blend-neighbors
REPORT_MAX = 2000  # cards, 12 KB each at most on average
THUMBNAIL = 7800  # bytes of a JPEG; its data URI has a third more
STOP = {*"a an and at by for from in of on the to with".split()}  # never bold
MAX_UPLOAD = 32 << 20  # bytes of an image for --serve
KINDS = {"ids": "U", "embeddings": "f", "targets": "f", "groups": "iufU", "weight": "f", "source": "U", "trained": "b",
         "run": "U", "checkpoint": "U", "views": "U"}
OF_ROWS = "groups", "weight", "source", "trained"  # of each image, where known
GROUP = 0.7  # cosine of prompts that count as one for a standard error
MAX_TEXT = 4096  # characters of an id
# how files of predict.py and ensemble.py begin and go on: --overwrite replaces no others
OURS = re.compile(rb"imgId_eId,val\n|PK\x03\x04.{26}ids\.npy.*embeddings\.npy|PAR1.*id.*rank.*cosine.*prompt|"
                  rb"<!doctype html>.{99,140}img-src data:; style-src 'unsafe-inline'; script-src 'sha256-|"
                  rb'\{\n "members": \[|\x89PNG.{1,99}Software\x00ensemble\.py|'
                  rb'.{8}\{"__metadata__".*\\"soup\\": \[|\{"step": 0, "val_cosine": ', re.S)


# ----------------- the formats

def read_npz(path):
    """The arrays of a predictions file; others are not read. Raises anything: numpy, zipfile and zlib are decoders."""
    if not os.path.isfile(path):  # a pipe waits for ever
        raise ValueError("no such file")
    with ZipFile(path) as archive:
        known = {k: archive.NameToInfo[f"{k}.npy"] for k in KINDS if f"{k}.npy" in archive.NameToInfo}
        for info in known.values():  # no more than it says is ever unpacked
            if info.file_size > max(1 << 26, MAX_RATIO * info.compress_size):
                raise ValueError(f"{info.filename} unpacks to too much")
        return {k: np.lib.format.read_array(archive.open(info), allow_pickle=False) for k, info in known.items()}


def read_preds(path):
    """npz or Kaggle CSV -> dict: ids (N,), embeddings and targets, unit rows float32 (N, D), and OF_ROWS (N,), of which
    trained says whose prompts were trained on; targets and OF_ROWS or None; run, checkpoint, views"""
    try:
        csv = str(path).lower().endswith(".csv")
        preds = dict(zip(("ids", "embeddings"), map(np.array, read_submission(path)))) if csv else read_npz(path)
        ids, x = preds["ids"], preds["embeddings"]
        y, rows = preds.get("targets", x), [preds.get(k, ids).shape for k in ("ids", *OF_ROWS)]
        shapes = x.ndim == 2 and rows == [x.shape[:1]] * len(rows) and y.shape == x.shape
        types = all(v.dtype.kind in KINDS[k] and v.dtype.itemsize <= 4 * MAX_TEXT
                    and (v.size <= 1000 or v.shape[:1] == ids.shape) for k, v in preds.items())
        unique = shapes and types and 0 < len({i.encode() for i in ids.tolist()}) == len(ids)
        if not (unique and 0 < x.shape[1] <= 4096):
            raise ValueError(f"needs unique text as ids {ids.shape} of embeddings {x.shape} and targets {y.shape}")
        if not all(1e-9 <= w <= 1e9 for w in preds.get("weight", ())):
            raise ValueError("not every weight is in [1e-9, 1e9]")
        preds |= {k: preds[k].astype(np.float64) for k in preds.keys() & {"weight"}}
    except Exception as e:  # a decoder
        sys.exit(f"{path}: not a predictions file ({reason(e)}); make one with: python predict.py --out {path}")
    for k in preds.keys() & {"embeddings", "targets"}:
        with np.errstate(all="ignore"):
            x = np.asarray(preds[k], np.float32)
            preds[k] = x / np.linalg.norm(x, axis=1, keepdims=True)  # those of others have any length
        check_rows(preds[k], f"{path}: {k}")
    return {**dict.fromkeys(("targets", *OF_ROWS)), **preds, "run": str(preds.get("run", Path(path).stem)),
            "checkpoint": str(preds.get("checkpoint", "")), "views": np.atleast_1d(preds.get("views", [])).tolist()}


def write_preds(file, **arrays):
    np.savez(file, **{k: v for k, v in arrays.items() if v is not None})


def row_keys(ids, width):
    """The keys of a Kaggle CSV: each id (Series) with the suffixes _0 to _{width - 1}"""
    rows, dims = np.divmod(np.arange(len(ids) * width), width)
    return pl.select(pl.format("{}_{}", ids.gather(rows), pl.Series(dims))).to_series()


def read_submission(path):
    """A Kaggle CSV `imgId_eId,val`, the D rows of each image together and in order -> ids, values float32 (N, D)"""
    try:
        if not os.path.isfile(path):  # a pipe waits for ever
            raise ValueError("no such file")
        types = {"imgId_eId": pl.String, "val": pl.Float32}
        table = pl.read_csv(path, columns=list(types), schema_overrides=types)
        keys = table["imgId_eId"]
        ids = keys.filter(keys.str.ends_with("_0")).str.strip_suffix("_0")
        if not len(ids) or ids.n_unique() < len(ids) or not keys.equals(row_keys(ids, len(keys) // len(ids))):
            raise ValueError("rows are not imgId_0, imgId_1, ... image by image")
        values = table["val"].to_numpy(writable=True).reshape(len(ids), -1)
        if not np.isfinite(values).all():
            raise ValueError("not all of val is finite")
        return ids.to_list(), values
    except (pl.exceptions.PolarsError, OSError, ValueError, TypeError) as e:
        sys.exit(f"{path}: not a Kaggle submission imgId_eId,val ({reason(e)})")


def write_submission(file, ids, embeddings, order):
    """A Kaggle CSV in `order`, streamed. Seven decimals cost < 1e-12 of cosine."""
    ids, width = pl.Series(ids, dtype=pl.String), embeddings.shape[1]
    file.write(b"imgId_eId,val\n")
    for rows in split_batches(np.array(order), 1024):
        table = pl.DataFrame({"key": row_keys(ids.gather(rows), width), "val": embeddings[rows].ravel()})
        file.write(table.write_csv(include_header=False, float_precision=7).encode())


def order_for(sample, ids):
    """Rows of `ids` in the order of the sample submission, else sorted"""
    return find_rows(read_submission(sample)[0] if sample else sorted(ids), ids, f"--sample-submission {sample}")


def find_rows(wanted, ids, what):
    """The row in `ids` of each wanted id; both must be the same ids"""
    row = {i: n for n, i in enumerate(ids)}
    missing, extra = [i for i in wanted if i not in row], sorted(set(ids) - set(wanted))
    if missing or extra:
        sys.exit(f"{what}: ids must be the same: {len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}")
    return [row[i] for i in wanted]


# ----------------- the output

def identify(file):
    """What tells a file from another one that has its name later"""
    return f"{os.stat(file).st_ino}-{os.stat(file).st_mtime_ns}"


def record(lock, file):
    """An open file that is about to get its name"""
    lock.write(identify(file.name) + "\n")
    lock.flush()


def read_lock(lock):
    """What a killed run has recorded"""
    return os.pread(lock.fileno(), 1 << 24, 0).decode(errors="replace").split()


def is_ours(path):
    with open(path, "rb") as f:
        start, end = f.read(1 << 16), max(0, os.path.getsize(path) - (1 << 16))
        f.seek(end)
        return OURS.match(start + f.read(1 << 16))


@contextmanager
def claim(paths, overwrite, inputs=()):
    """Lock the files that a command will write, or exit if another file could be lost -> {path: lock}, for write_all"""
    paths, locks = [str(p) for p in paths if p], {}
    places, taken = ([os.path.realpath(p) for p in some if p] for some in (paths, inputs))
    try:
        for path, place in zip(paths, places):
            folders = map(os.path.isdir, filter(os.path.exists, Path(place).parents))
            if places.count(place) > 1 or place in taken:
                sys.exit(f"{path}: is another output or an input of this command, too; choose another name")
            if os.path.lexists(path) != os.path.isfile(path) or os.path.isdir(place) or not all(folders):
                sys.exit(f"{path}: not the name of a file, or not in a folder; choose another name")
            lock = hold(path)
            if not os.fstat(lock.fileno()).st_nlink:  # removed by its last holder, who was just done
                sys.exit(f"{path}: another process has just written there; choose another name")
            locks[path] = lock
            sweep(Path(path).parent, glob.escape(Path(path).name))
            if os.path.isfile(path) and identify(path) not in read_lock(lock):  # else a killed run's, written again
                if not overwrite:
                    sys.exit(f"{path}: already there; choose another name, or --overwrite it")
                if not is_ours(path):
                    sys.exit(f"{path}: not made by predict.py or ensemble.py; move it away, or choose another name")
                print(f"{path}: will be replaced")
        yield locks
    finally:
        for lock in locks.values():
            if not os.fstat(lock.fileno()).st_size:
                os.unlink(lock.name)
            lock.close()


def write_all(locks, jobs):
    """jobs: {path or None: function that writes it into a binary file}. All are written beside their paths, and only
    then renamed; if a kill comes in between, the locks tell the next run which files are the killed one's."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(atomic(path)) for path in filter(None, jobs)}
        for path, f in files.items():
            with writing(path):
                jobs[path](f)
                f.flush()
                os.fsync(f.fileno())
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C leaves all of them or none
        for path, lock in locks.items():
            record(lock, files[path])
    signal.signal(signal.SIGINT, handler)
    for lock in locks.values():
        lock.truncate(0)
    for path in files:
        print(f"wrote {path}")


# ----------------- the input

def list_images(items, image_col=None, prompt_col=None, limit=None):
    """Files, folders, archives, tables -> ids (file names without suffix; whole paths where these clash), sorted paths,
    prompts (None unless all are known)"""
    found, names, left = {}, {}, Counter()  # path: prompt, path: file name
    for path in items:
        if not path or not os.path.exists(path):  # Path("") is the folder you are in
            sys.exit(f"{path or repr(path)}: no such file or folder")
        path = Path(path)
        if not (path.is_dir() or is_archive(path) or is_table(path)):
            found[str(path)] = None
            continue
        need = "image", "name", *["prompt"] * bool(prompt_col)
        table = read_source(path, None, image_col, prompt_col, need, limit, left)
        table = table.with_columns(image=pl.coalesce(there := find_images(table["image"]), "image"))
        if not is_table(path):  # rows without an image are none of its images
            table = table.filter(there.is_not_null())
            inside = walk(path, Counter()) if path.is_dir() else open_archive(str(path), os.getpid())[1]
            odd = [n for n in inside if is_image(n) and not n.isprintable()]  # names need not be text
            found |= {f"{path.absolute()}{'/' if path.is_dir() else '::'}{n}": None for n in odd[:limit]}
        elif empty := table["image"].null_count():
            sys.exit(f"{path}: {empty} of its {len(table)} rows name no image; drop them, or see --image-col")
        found |= dict(table.select("image", "prompt").iter_rows())
        names |= dict(table.filter(pl.col("name").is_not_null()).select("image", "name").iter_rows())
    if not found:
        there = f"; there are: {list_counts(left)}" if left else ""
        sys.exit(f"{', '.join(items)}: no images there{there}")
    paths = sorted(found)
    texts = [os.fsencode(p).decode("utf-8", "replace") for p in paths]
    stems = [Path(names.get(p) or t.split("::")[-1]).stem for p, t in zip(paths, texts)]
    times, prompts = Counter(stems), [found[p] for p in paths]
    ids = [stem if times[stem] == 1 else text for stem, text in zip(stems, texts)]
    if odd := [i for i, n in Counter(ids).items() if n > 1 or len(i) > MAX_TEXT]:
        sys.exit(f"{odd[0]}: two images have this id, or it is too long; rename one")
    if any(prompts) and not all(prompts):
        print(f"{sum(map(bool, prompts)):,} of {len(paths):,} images have a prompt: no cosine", file=sys.stderr)
    return ids, paths, prompts if all(prompts) else None


def read_validation(meta):
    """The validation split of a run's data -> pairs, paths, targets, whether the data is still that of the training"""
    pairs, targets, summary = read_data(meta["data"])
    pairs = pairs.with_row_index("row").filter(pl.col("split") == "val").drop_nulls("image")  # text has none
    paths = [str(Path(meta["data"]) / p) for p in pairs["image"]]
    paths or sys.exit(f"{meta['data']}: no validation images there; name other images")
    return pairs, paths, np.array(targets[pairs["row"]]), summary["hashes"] == meta["data_hashes"]


def has_data(meta):
    return os.path.isfile(os.path.join(meta["data"], "summary.json"))  # pathlib raises if the name is too long


def find_trained(targets, meta):
    """-> (N,): is the prompt of this embedding, or one at cosine >= --split-threshold to it, in the run's training
    data? None if that data is not there any more."""
    if not has_data(meta):
        return None
    try:
        pairs, known, summary = read_data(meta["data"])
    except SystemExit as e:  # a prediction does without
        print(e, file=sys.stderr)
        return None
    if summary["hashes"] != meta["data_hashes"]:
        return None
    train = known[(pairs["split"] == "train").to_numpy()]
    return top_k(targets, train, 1)[0].max(1, initial=-1) >= summary["args"]["split_threshold"]


def render(image, views, spec):
    """RGB image -> its views, uint8 (V, 3, S, S)"""
    return torch.stack([to_square(VIEWS[v](image), spec) for v in views])


class ViewDataset(ImageDataset):
    """Image i, decoded once -> its views, uint8 (V, 3, S, S), and what is wrong with it (black then) or ""."""

    def __init__(self, paths, spec, views):
        super().__init__(paths, spec)
        self.views = views

    def __getitem__(self, i):
        try:
            image = open_rgb(self.paths[i])
        except BadImage as e:
            return torch.zeros(len(self.views), 3, *[self.spec["image_size"]] * 2, dtype=torch.uint8), str(e)
        return render(image, self.views, self.spec), ""


# ----------------- prediction

class TTAModel(nn.Module):
    """uint8 (B, V, 3, S, S) -> unit rows (B, 384): the average of the views' unit embeddings"""

    def __init__(self, checkpoint, precision, device):
        super().__init__()
        self.model, self.meta = load_model(checkpoint)
        self.device, self.spec = device, self.model.spec
        self.precision = pick_precision(precision, device, self.model.backbone)
        self.eval().requires_grad_(False).to(device)
        cast_backbone(self.model.backbone, self.precision)

    def forward(self, images):
        total = 0
        for x in images.unbind(1):
            x = self.model.normalise(x).to(DTYPES[self.precision], memory_format=torch.channels_last)
            total = total + self.model.embed(self.model.backbone(x).float())
        return F.normalize(total, dim=-1)


def embed(model, images, size):
    """model(images), at most `size` at a time, halved when memory runs out -> (B, 384) on the CPU, size"""
    while True:
        try:
            return torch.cat([model(x.to(model.device, non_blocking=True)).cpu() for x in images.split(size)]), size
        except RuntimeError as e:  # a submission must not die of this
            if size == 1 or not out_of_memory(e):
                raise
        size = -(-size // 2)
        torch.cuda.empty_cache()
        print(f"out of memory: continuing with {size} images at a time", file=sys.stderr)


def predict(model, paths, views, args):
    """-> embeddings (N, 384), and what is wrong with each image or "". args: batch_size, workers"""
    atexit.register(kill_workers)  # else an error waits for them forever
    size, found, problems = args.batch_size, [], []
    batches = split_batches(range(len(paths)), size)
    loader = make_loader(ViewDataset(paths, model.spec, views), batches, args, model.device)
    with torch.inference_mode(), tqdm(total=len(paths), desc="predict", unit="image", disable=len(paths) < 64) as bar:
        for images, wrong in loader:
            y, size = embed(model, images, size)
            found.append(y)
            problems += wrong
            bar.update(len(y))
    found = torch.cat(found).numpy()
    check_rows(found, "prediction (--precision fp32 helps if numbers overflowed)")
    return found, problems


# ----------------- readable prompts

def load_corpus(source, text_model, device):
    """A data folder (its training rows, never the validation prompts) or a table -> prompts, embeddings (N, 384)"""
    if not Path(source).is_dir():
        prompts = read_table(source, need=("prompt",))["prompt"].drop_nulls().unique(maintain_order=True).to_list()
        prompts or sys.exit(f"--corpus {source}: no prompts there")
        return prompts, encode_cached(prompts, text_model["name"], device, sha=text_model["sha256"])
    pairs, targets, summary = read_data(source)
    if summary["text_model"] != text_model:
        sys.exit(f"{source}: its prompts are embedded by another model; give another --corpus")
    train = pairs["split"] == "train"
    return pairs["prompt"].filter(train).to_list(), targets[train.to_numpy()]


def nearest_prompts(x, corpus, k):
    """Cosines and rows (M, k) of the corpus (N, D) nearest to each of x (M, D), near-identical ones once; -1: none"""
    cosines, rows = np.full((len(x), k), -1, np.float32), np.full((len(x), k), -1)
    for i, (c, near) in enumerate(zip(*top_k(x, corpus, 2 * k + 8))):
        same, keep = corpus[near] @ corpus[near].T >= SAME, []
        for j in range(len(near)):
            if len(keep) < k and not same[j, keep].any():
                keep.append(j)
        cosines[i, :len(keep)], rows[i, :len(keep)] = c[keep], near[keep]
    return cosines, rows


def name_neighbors(known, cosines, rows):
    """Of nearest_prompts -> for each image [(cosine, prompt)]"""
    return [[(float(c), known[r]) for c, r in zip(*near) if r >= 0] for near in zip(cosines, rows)]


def blend_neighbors(x, corpus, cosines, rows, weight):
    """(1 - weight) * x + weight * its neighbours' average by 1 / (distance^6 + 1e-4)"""
    w = np.where(rows >= 0, 1 / ((2 - 2 * cosines).clip(0) ** 3 + 1e-4), 0)  # d^2 = 2 - 2 cos
    average = np.stack([a @ corpus[r] for a, r in zip(w.astype(np.float32), rows)])
    mixed = (1 - weight) * x + weight * average / np.linalg.norm(average, axis=1, keepdims=True)
    return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


def write_neighbors(file, ids, neighbors):
    rows = [(i, n, c, p) for i, near in zip(ids, neighbors) for n, (c, p) in enumerate(near)]
    pl.DataFrame(rows, schema=["id", "rank", "cosine", "prompt"], orient="row").write_parquet(buffer := io.BytesIO())
    file.write(buffer.getbuffer())  # by Python: on a full disk polars would not say why


def place_texts(paths, locks, overwrite):
    """The NAME.txt beside each image, or exit if one cannot be written, or could be lost"""
    if inside := [p for p in paths if "::" in p and not os.path.exists(p)]:
        sys.exit(f"{inside[0]}: --txt writes beside image files, and this one is inside another file; unpack it")
    texts = [os.path.join(os.path.realpath(Path(p).parent), f"{Path(p).stem}.txt") for p in paths]
    if shared := [t for t, n in Counter([*texts, *map(os.path.realpath, locks)]).items() if n > 1]:
        sys.exit(f"{shared[0]}: --txt of two images, or another output, would have this name; rename one")
    if odd := [t for t in texts if os.path.isdir(t) or not os.access(os.path.dirname(t), os.W_OK)
               or len(os.path.basename(os.fsencode(t))) > 230]:  # atomic's name is longer
        sys.exit(f"{odd[0]}: --txt cannot write there; rename the image, or move it elsewhere")
    for folder in {os.path.dirname(t) for t in texts}:
        sweep(Path(folder), "*.txt")
    killed = {word for lock in locks.values() for word in read_lock(lock)}
    there = [t for t in texts if os.path.lexists(t) and not (os.path.isfile(t) and identify(t) in killed)]
    if there and not overwrite:
        sys.exit(f"{there[0]}: {len(there):,} texts of --txt are already there; move them away, or --overwrite them")
    if there:
        print(f"--txt: {len(there):,} texts will be replaced")
    return texts


def write_texts(texts, neighbors, problems, locks):
    """One prompt per line, nearest first; an unreadable image has none. Ctrl-C waits for all of them. After a kill, the
    locks tell the next run which texts are the killed one's."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for path, near, problem in zip(texts, neighbors, problems):
        if not problem:
            with atomic(path, sync=False) as f:
                f.writelines(" ".join(prompt.split()).encode("utf-8", "replace") + b"\n" for _, prompt in near)
                f.flush()
                for lock in locks.values():
                    record(lock, f)
    signal.signal(signal.SIGINT, handler)
    print(f"wrote {problems.count(''):,} texts beside the images; clean.py and predict.py read them as true prompts")


def measures(n, weight=None, source=None):
    """What means of the cosines of n rows are scores, as train.measures_of -> {name: weights (n,) of sum 1}; only
    "cosine", where every row counts the same, if their weight (n,) is not known."""
    if weight is None:
        return {"cosine": np.full(n, 1 / n)}
    table = pl.DataFrame({"split": ["val"] * n, "weight": weight, "source": source})
    return {name[4:]: w for name, w in measures_of(table).items()}


def mean_and_error(values, groups=None, weights=None):
    """Mean of values (N,) by weights (N,), and its standard error clustered by groups (N,): images of one prompt, or of
    near-identical ones, are not independent (Cameron and Miller 2015). Without either: the usual ones."""
    values = np.asarray(values, np.float64)
    w = np.ones(len(values)) if weights is None else np.asarray(weights)
    mean = w @ values / w.sum()
    _, index = np.unique(np.arange(len(values)) if groups is None else groups, return_inverse=True)
    parts = np.bincount(index, w * (values - mean)) / w.sum()
    return [float(mean), float(np.sqrt((parts ** 2).sum() * len(parts) / max(1, len(parts) - 1)))]


def describe(cosines, groups=None, weights=None):
    text = "{:.4f} ± {:.4f}".format(*mean_and_error(cosines, groups, weights))
    one = groups is not None and len(np.unique(groups)) == 1
    return text.split()[0] + " (one group of prompts, so no standard error)" if one else text


def name_weights(meta, log):
    """Which weights a checkpoint holds. log: metrics.jsonl of its run"""
    if meta.get("soup"):
        return f"an average of {len(meta['soup'])} runs"
    if not meta.get("step") and meta["args"].get("phase") == "ft":
        return f"the start of ft, which {'no epoch beat' if is_finished(log) else 'is not finished'}"
    return f"{'EMA' if meta.get('weights') == 'ema' else 'raw'} weights of step {meta.get('step') or 0:,}"


def parts_of(trained):
    """All rows, or those that were trained on apart from the others: {name: rows}. trained: (N,) or None"""
    if trained is None or not trained.any():
        return {"": slice(None)}
    parts = {"trained-on prompts: ": trained, "other prompts: ": ~trained}
    return {name: rows for name, rows in parts.items() if rows.any()}


def print_scores(name, scores, targets, mean, about):
    """about: OF_ROWS"""
    parts, constant, groups = parts_of(about["trained"]), targets @ mean, about["groups"]
    for part, rows in parts.items():
        print(f"{name}{part}cosine {describe(scores[rows], groups[rows])} (n = {len(scores[rows]):,}); "
              f"constant baseline {constant[rows].mean():.4f}")
    for kind, w in list(measures(len(scores), about["weight"], about["source"]).items())[1:]:
        print(f"{name}{kind} {describe(scores, groups, w)}; constant baseline {w @ constant:.4f}")
    if "" not in parts:
        print("what was trained on, or has a prompt close to it, says nothing about new images")


# ----------------- the report

STYLE = """
:root{color-scheme:light dark;font:15px/1.45 system-ui,sans-serif} *{box-sizing:border-box} h2,p,ol,dd,figure{margin:0}
body{max-width:1280px;margin:auto;padding:1rem;overflow-wrap:anywhere} span{display:block} i{flex:none}
dl{display:flex;flex-wrap:wrap;gap:.4rem 2rem}
dt,label,output,figcaption,span,i,footer,ol::before{opacity:.75;font-size:.8rem}
svg{width:100%;max-width:560px;height:100px;stroke:currentColor;stroke-width:.1} .bars{stroke:#6b8fc4;stroke-width:.9}
search{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:1rem;padding:.6rem 0;background:Canvas}
label{flex:1 1 12rem} input,select{font-size:1rem;padding:.4rem;width:100%}
ul{padding:0;display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr))}
.card{display:grid;grid-template-columns:112px 1fr;gap:.4rem .8rem;padding:.7rem;border:1px solid #8886;
  content-visibility:auto;contain-intrinsic-size:auto 270px} ol{grid-column:1/3;padding:0}
ol::before{content:"nearest known prompts and their cosine to the prediction"}
img,.none{width:112px;height:112px;object-fit:cover;background:#8883} h2,ol>li{display:flex;gap:.6rem;font-size:.9rem}
q{quotes:none;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.card:is(:hover,:focus-within) q{white-space:normal}
button{padding:0;border:0;background:none;align-self:start;cursor:zoom-in} dialog{padding:0;border:0}
dialog img{display:block;width:min(90vw,90vh);height:min(90vw,90vh);object-fit:contain;cursor:zoom-out}
"""
ENLARGE = """
const $ = id => document.getElementById(id);
$('grid').onclick = event => {
  const image = event.target.closest('button')?.firstChild, large = $('large').querySelector('img');
  if (!image) return;
  large.src = image.src;
  large.alt = image.alt;
  $('large').showModal();
};
$('large').onclick = () => $('large').close();
"""
SCRIPT = """
const cards = [...$('grid').children];
const by = {order: c => c.dataset.n, worst: c => c.dataset.c, best: c => -c.dataset.c};
const show = () => {
  const text = $('filter').value.trim().toLowerCase(), key = by[$('sort').value];
  const shown = cards.filter(c => c.textContent.toLowerCase().includes(text)).sort((a, b) => key(a) - key(b));
  $('grid').replaceChildren(...shown);
  $('count').textContent = shown.length + ' of ' + cards.length + ' images';
};
$('sort').oninput = $('filter').oninput = show;
"""


UPLOAD = """
const send = async files => {
  for (const file of files) {
    $('status').textContent = 'predicting ' + file.name;
    const small = file.size <= $('files').dataset.limit;
    const answer = small ? await fetch('/', {method: 'POST', body: file}).catch(() => null) : null;
    const text = await answer?.text() ?? (small ? 'no answer; is predict.py still running?' : 'too large');
    $('grid').insertAdjacentHTML('afterbegin', answer?.ok ? text : '<li class="card"><h2></h2><p></p></li>');
    const [name, problem, image] = ['h2', 'p', 'img'].map(part => $('grid').firstChild.querySelector(part));
    name.textContent = file.name;
    if (image) image.alt = file.name;
    else problem.textContent = text;
  }
  $('status').textContent = $('grid').children.length + ' images';
};
$('files').onchange = () => send($('files').files);
document.ondragover = event => event.preventDefault();
document.ondrop = event => {
  event.preventDefault();
  send(event.dataTransfer.files);
};
document.onpaste = event => send(event.clipboardData.files);
"""


def thumbnail(path):
    """A data: URI of a small JPEG, "" if unreadable"""
    try:
        return encode_thumbnail(open_rgb(path))
    except BadImage:
        return ""


def encode_thumbnail(image):
    """RGB image, which is shrunk -> a data: URI of the largest JPEG that is small enough"""
    for side in (448, 384, 320, 256, 208, 160):
        image.thumbnail((side, side))
        image.save(data := io.BytesIO(), "JPEG", quality=65)
        if data.tell() <= THUMBNAIL:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def histogram(values, baseline):
    """An SVG, with lines at the mean and (dashed) the constant baseline"""
    mean, low, high = np.mean(values), min(*values, baseline), max(*values, baseline) + 1e-6
    counts = np.histogram(np.asarray(values, float), 40, (low, high))[0]
    bars = "".join(f"M{i + 0.5} 100v-{100 * n / counts.max():.1f}" for i, n in enumerate(counts))
    at = [f"M{40 * (v - low) / (high - low):.2f} 0V100" for v in (mean, baseline)]
    label = f"cosines from {low:.2f} to {high:.2f}, with their mean and the constant baseline (dashed)"
    return (f'<figure><svg viewBox="0 0 40 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
            f'<path class="bars" d="{bars}"/><path d="{at[0]}"/><path d="{at[1]}" stroke-dasharray="4"/></svg>'
            f"<figcaption>{label}</figcaption></figure>")


def embolden(text, prompt):
    """Escaped text, in bold the words that the prompt has, too"""
    shared = {*re.findall(r"\w+", (prompt or "").lower())} - STOP
    parts = re.split(r"(\w+)", text)
    bold = "".join(f"<b>{part}</b>" if part.lower() in shared else html.escape(part) for part in parts)
    return bold.replace("</b> <b>", " ")  # fewer elements: 2,000 cards open faster


def card(n, name, picture, cosine=None, prompt=None, near=None, problem=None, trained=None):
    """A list item, all text escaped. near: [(cosine, prompt)]; what is not known is None, an unreadable picture ""."""
    e = html.escape
    key = cosine if cosine is not None else near[0][0] if near else 0  # what the page sorts by
    image = f'<button title="enlarge"><img src="{picture}" alt="{e(name)}" loading="lazy"></button>'
    image = image if picture else '<div class="none" tabindex="0">no image</div>'
    text = f"<h2>{e(name)}</h2>"
    text += "<p><strong>unreadable: got the mean training embedding</strong></p>" if problem else ""
    text += "<p><strong>trained on this prompt</strong></p>" if trained else ""
    label = "true prompt" if cosine is None else f"<b>{cosine:.3f}</b> to the true prompt"
    text += "" if cosine is prompt is None else f"<p><span>{label}</span>{e(prompt or '')}</p>"
    items = "".join(f"<li><i>{c:.2f}</i><q>{embolden(p, prompt)}</q></li>" for c, p in near or ())
    items = items and f'<ol aria-label="nearest known prompts">{items}</ol>'
    return f'<li class="card" data-n="{n}" data-c="{key:.6f}">{image}<div>{text}</div>{items}</li>\n'


def make_page(title, body, script, more=""):
    """The bytes of a self-contained page; its policy lets only our script run. more: of that policy"""
    script = ENLARGE + script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'{more}"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{html.escape(title)}</title>
<style>{STYLE}</style></head><body>
{body}
<dialog id="large" aria-label="enlarged image"><button aria-label="close"><img alt=""></button></dialog>
<script>{script}</script></body></html>
"""
    return CONTROL.sub("\ufffd", page).encode("utf-8", "replace")


def write_report(file, title, facts, names, pictures, cosines=None, baseline=None, prompts=None, neighbors=None,
                 problems=None, trained=None, total=None, made=None):
    """One page. names to trained: columns, as in card; made: {what: value} of the footer"""
    e, n = html.escape, len(names)
    known = [[None] * n if column is None else column for column in (cosines, prompts, neighbors, problems, trained)]
    order = sorted(range(n), key=lambda i: 0 if cosines is None else cosines[i])  # as the page says that it is sorted
    cards = "".join(card(i, names[i], pictures[i], *[column[i] for column in known]) for i in order)
    note = "Below an image: known prompts near the prediction, not the recovered prompt. " if neighbors else ""
    note += "Words of the true prompt are bold. " if neighbors and prompts else ""
    note += f"{n:,} of {total:,} images are shown, evenly spread." if total and n < total else ""
    facts = "".join(f"<div><dt>{e(k)}</dt><dd>{e(str(v))}</dd></div>" for k, v in facts.items())
    made = " · ".join(f"{e(k)} {e(str(v))}" for k, v in (made or {}).items())
    sort = "Sort by the cosine of the " + ("nearest prompt to the prediction" if cosines is None
                                           else "prediction to the true prompt")
    file.write(make_page(title, f"""<header><h1>{e(title)}</h1><dl>{facts}</dl>
{"" if cosines is None else histogram(cosines, baseline)}<p>{note}</p></header><main><search>
<label>{sort} <select id="sort" autocomplete="off"><option value="order">input order</option>
<option value="worst"{"" if cosines is None else " selected"}>worst first</option>
<option value="best">best first</option></select></label>
<label>Show images with this text <input id="filter" type="search" autocomplete="off"></label>
<output id="count" role="status">{n} of {n} images</output></search>
<ul id="grid">
{cards}</ul></main><footer>{made}</footer>""", SCRIPT))


# ----------------- the server

class Server(ThreadingHTTPServer):
    """127.0.0.1 only. answer: the bytes of an image -> the HTML of its card; raises BadImage"""

    def __init__(self, port, title, answer):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.origins = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.page = make_page(title, f"""<header><h1>{html.escape(title)}</h1>
<p>Below an image: known prompts near the prediction, not the recovered prompt.</p></header><main><search>
<label>Drop or paste images anywhere, or choose them
<input id="files" type="file" accept="image/*" multiple data-limit="{MAX_UPLOAD}"></label>
<output id="status" role="status"></output></search><ul id="grid"></ul></main>""", UPLOAD, "; connect-src 'self'")

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # else the client is gone
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST / takes the bytes of an image. No path that a client sends is ever opened."""

    timeout = 60  # seconds for the client to send on

    def log_message(self, *_):
        pass

    def end_headers(self):
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def respond(self, status, body, kind="text/plain"):
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def admit(self, ours=True):
        """Whether to answer; else it has been refused. A page elsewhere may have a name that resolves to 127.0.0.1."""
        if not ours or f"http://{self.headers['Host']}" not in self.server.origins:
            self.respond(403, b"only for the page of this server")
        elif self.path != "/":
            self.respond(404, b"there is only /")
        else:
            return True

    def do_GET(self):
        if self.admit():
            self.respond(200, self.server.page, "text/html")

    def do_POST(self):
        size = self.headers["Content-Length"] or ""
        if not self.admit(self.headers["Origin"] in self.server.origins):
            return
        if not size.isdecimal():
            return self.respond(411, b"needs a Content-Length")
        if len(size) > 9 or int(size) > MAX_UPLOAD:
            return self.respond(413, b"too large")
        data = io.BytesIO(self.rfile.read(int(size)))
        answer = 500, b"predict.py failed; its terminal shows why"
        try:
            with self.server.lock:  # one at a time: memory
                found = self.server.answer(data)
            answer = 200, CONTROL.sub("\ufffd", found).encode("utf-8", "replace"), "text/html"
        except BadImage as e:
            answer = 422, str(e).removeprefix(f"{data}: ").replace(f" {data}", "").encode()
        finally:
            self.respond(*answer)


def serve(args, model, views):
    """Serve the page until Ctrl-C."""
    known, corpus = load_corpus(args.corpus or model.meta["data"], model.meta["text_model"], model.device)

    def answer(file):
        image = open_rgb(file)
        with torch.inference_mode():
            x, _ = embed(model, render(image, views, model.spec)[None], 1)
        if not x.isfinite().all():
            raise BadImage("its prediction is not finite; try --precision fp32")
        near = name_neighbors(known, *nearest_prompts(x.numpy(), corpus, args.neighbors))
        return card(0, "", encode_thumbnail(image), near=near[0])

    try:
        server = Server(args.serve, f"Prompts near an image: {args.run}", answer)
    except OSError as e:
        sys.exit(f"--serve {args.serve}: cannot listen there ({e.strerror}); choose another port")
    with server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{args.serve} is ready; Ctrl-C ends it", flush=True)
        server.serve_forever()


def is_finished(log):
    """Whether metrics.jsonl, which may be anybody's, ends as that of a finished run does"""
    with suppress(OSError, LookupError, ValueError, TypeError, RecursionError):
        if log.is_file() and (log.parent / "best.safetensors").is_file():
            with open(log, "rb") as f:
                f.seek(max(0, log.stat().st_size - 4096))
                return json.loads(f.read().splitlines()[-1])["done"] is True


def newest_run(root="runs"):
    """The phase folder under runs/ that finished last."""
    logs = [log for log in Path(root).glob("*/*/metrics.jsonl") if is_finished(log)]
    if not logs:
        sys.exit(f"{root}/: no finished run there; train one with: python train.py --phase lp (or give --run)")
    return max(logs, key=os.path.getmtime).parent


def parse_args(argv=None):
    p = make_parser(__doc__)
    p.add_argument("images", nargs="*", help="files, folders, zips, tars, tables; none = the run's validation split")
    p.add_argument("--run", help="run, phase or checkpoint; unset = the newest finished run")
    p.add_argument("--tta", type=int, default=1, help=f"views to average, the first N of: {', '.join(VIEWS)}")
    p.add_argument("--image-col", help="of tables; unset = image, path or the like")
    p.add_argument("--prompt-col", help="of tables, true prompts; unset = prompt, text or caption")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each source, for a quick look")
    g = p.add_argument_group("output")
    g.add_argument("--out", help="npz; unset = preds/RUN-PHASE[-images]-ttaN.npz, none for few images")
    g.add_argument("--submission", help="Kaggle CSV to write")
    g.add_argument("--sample-submission", help="its ids, in its order; unset = sorted ids")
    g.add_argument("--html", help="report page to write")
    g.add_argument("--txt", action="store_true", help="write the nearest prompts beside each image, as NAME.txt")
    g.add_argument("--overwrite", action="store_true", help="replace these files")
    g.add_argument("--serve", type=int, nargs="?", const=8000, metavar="PORT", help="page to drop images on, at 8000")
    g = p.add_argument_group("prompts")
    g.add_argument("--neighbors", type=int, help="per image; unset = 1 for --txt, 5 for few images, --html, --serve")
    g.add_argument("--corpus", help="data folder or table of prompts; unset = the training data")
    g.add_argument("--blend-neighbors", type=float, default=0, help="share of their average in the embedding, 0 to 1")
    g = p.add_argument_group("speed")
    g.add_argument("--batch-size", type=int, default=64, help="images at a time")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    g.add_argument("--precision", choices=["auto", *DTYPES], default="auto", help="auto: by the hardware")
    return p.parse_args(argv)


def check_args(args):
    check_ranges(args, ((1, len(VIEWS), "tta"), (1, 65536, "batch_size"), (0, 1024, "workers"), (1, 1e9, "limit"),
                        (int(args.txt or bool(args.serve)), 1000, "neighbors"), (0, 1, "blend_neighbors"),
                        (1024, 65535, "serve")))
    if args.serve and (args.images or args.out or args.submission or args.html or args.txt or args.blend_neighbors):
        sys.exit("--serve: takes its images from the page and writes no files; leave out images and outputs")
    if args.txt and not args.images:
        sys.exit("--txt: writes beside images; name some")
    if args.corpus and not Path(args.corpus).exists():
        sys.exit(f"--corpus {args.corpus}: no such file or folder")


def read_input(args, meta, device):
    """-> ids, paths, names in the report, and where known prompts, targets, OF_ROWS"""
    if args.images:
        ids, paths, prompts = list_images(args.images, args.image_col, args.prompt_col, args.limit)
        targets, prompts = None, None if args.txt else prompts  # which --txt may have written before it was killed
        try:
            text = meta["text_model"]
            targets = encode_cached(prompts, text["name"], device, sha=text["sha256"]) if prompts else None
        except SystemExit as e:  # Kaggle has no encoder, and a submission needs none
            print(f"no cosine to the images' prompts: {e}", file=sys.stderr)
        files = [Path(p.split("::")[-1]) for p in paths]
        names = [file.name if file.stem == i else i for file, i in zip(files, ids)]
        about = dict.fromkeys(OF_ROWS)
        if targets is not None:
            about |= {"groups": keep_one(targets, GROUP)[0], "trained": find_trained(targets, meta)}
        return ids, paths, names, prompts, targets, about
    pairs, paths, targets, unchanged = read_validation(meta)
    if not unchanged:
        print(f"warning: {meta['data']} has changed; its validation rows may have been trained on", file=sys.stderr)
    ids = [f"{row:07d}" for row in pairs["row"]]
    names = [Path(origin).name if origin else i for origin, i in zip(pairs["origin"], ids)]
    about = {"groups": pairs["group"].to_numpy(), "weight": pairs["weight"].to_numpy(), "trained": None,
             "source": pairs["source"].fill_null("").str.slice(0, 1000).to_numpy().astype(str)}
    return ids, paths, names, pairs["prompt"].to_list(), targets, about


def report_run(file, made, paths, names, cosines, baseline, prompts, neighbors, problems, about):
    n, size, trained, groups = len(paths), min(REPORT_MAX, len(paths)), about["trained"], about["groups"]
    parts = {} if cosines is None else parts_of(trained)
    facts = {f"{part}mean cosine": describe(cosines[rows], groups[rows]) for part, rows in parts.items()}
    if parts:
        facts["constant baseline" + " of all images" * (len(parts) > 1)] = f"{baseline:.4f}"
    facts |= {"images": f"{n:,}", "unreadable": sum(map(bool, problems))}
    made = made | {"made by predict.py": datetime.now(timezone.utc).date()}
    shown = [i * n // size for i in range(size)]
    columns = names, cosines, prompts, neighbors, problems, trained
    names, cosines, *rest = [None if column is None else [column[i] for i in shown] for column in columns]
    pictures = [thumbnail(paths[i]) for i in tqdm(shown, "report", unit="image", disable=size < 64)]
    write_report(file, f"Predicted prompts: {made['run']}", facts, names, pictures, cosines, baseline, *rest, n, made)


def main():
    args = parse_args()
    check_args(args)
    checkpoint, views = find_checkpoint(args.run or newest_run()), list(VIEWS)[:args.tta]
    args.run = str(checkpoint.parent)
    meta = load_meta(checkpoint)
    print(f"run {args.run}: {meta['backbone']['model']}, {name_weights(meta, checkpoint.with_name('metrics.jsonl'))}")
    # what to write: of a few single images nothing
    few = 0 < len(args.images) <= FEW and all(is_image(p) for p in args.images)
    if not (args.out or few or args.serve):
        run = "-".join(checkpoint.absolute().parts[-3:-1])
        args.out = f"preds/{run}{'-images' if args.images else ''}-tta{args.tta}.npz"
    needed = args.txt or args.serve
    if needed or (args.neighbors is None and (few or args.html)):
        args.neighbors = args.neighbors or (1 if args.txt else 5)
        if not (args.corpus or has_data(meta)):
            missing = f"{meta['data']}, the training data, is not here: no neighbours without --corpus"
            sys.exit(missing) if needed else print(missing)
            args.neighbors = 0
    if args.corpus and (args.neighbors or args.blend_neighbors) and not Path(args.corpus).is_dir():
        find_encoder(meta["text_model"]["name"], meta["text_model"]["sha256"])  # or exits, before anything slow
    if args.serve:
        return serve(args, TTAModel(checkpoint, args.precision, pick_device()), views)
    table = f"{os.path.splitext(args.out)[0]}.neighbors.parquet" if args.out and args.neighbors else None
    with claim([args.out, table, args.submission, args.html], args.overwrite,
               [*args.images, args.sample_submission, args.corpus, checkpoint]) as locks:
        predict_all(args, checkpoint, views, table, locks)


def predict_all(args, checkpoint, views, table, locks):
    # what to predict, and the known prompts
    model = TTAModel(checkpoint, args.precision, pick_device())
    meta = model.meta
    ids, paths, names, prompts, targets, about = read_input(args, meta, model.device)
    order = order_for(args.sample_submission, ids)
    texts = place_texts(paths, locks, args.overwrite) if args.txt else []
    k = max(args.neighbors or 0, BLEND_K if args.blend_neighbors else 0)
    if k:
        known, corpus = load_corpus(args.corpus or meta["data"], meta["text_model"], model.device)
    # predict; an unreadable image gets the constant baseline
    embeddings, problems = predict(model, paths, views, args)
    good = np.array([not p for p in problems])
    if not good.any():
        sys.exit(f"none of the {len(paths):,} images could be read; {problems[0]}")
    embeddings[~good] = mean = F.normalize(torch.tensor(meta["mean_target"]), dim=0).numpy()
    # the nearest known prompts
    neighbors = scores = baseline = None
    if k:
        cosines, rows = nearest_prompts(embeddings, corpus, k)
    if args.neighbors:
        neighbors = [near[:args.neighbors] for near in name_neighbors(known, cosines, rows)]
    if args.blend_neighbors:
        if targets is not None:
            print_scores("before blending: ", (embeddings * targets).sum(1), targets, mean, about)
        embeddings[good] = blend_neighbors(embeddings[good], corpus, cosines[good, :BLEND_K], rows[good, :BLEND_K],
                                           args.blend_neighbors)
        views.append(f"neighbors-{args.blend_neighbors:g}")
    if targets is not None:
        scores, baseline = (embeddings * targets).sum(1), float((targets @ mean).mean())
    check_rows(embeddings, f"{args.run} with --blend-neighbors {args.blend_neighbors}")
    # files, and what to print
    digest = sha256(checkpoint)[:16] if args.out or args.html else ""  # a gigabyte to read for ViT-L/14
    made = {"run": args.run, "checkpoint": digest, "views": ", ".join(views), "corpus": args.corpus or meta["data"]}
    if texts:
        write_texts(texts, neighbors, problems, locks)
    write_all(locks, {
        args.out: lambda f: write_preds(f, ids=np.array(ids), embeddings=embeddings, targets=targets, **about,
                                        run=args.run, checkpoint=digest, views=np.array(views)),
        table: lambda f: write_neighbors(f, ids, neighbors),
        args.submission: lambda f: write_submission(f, ids, embeddings, order),
        args.html: lambda f: report_run(f, made, paths, names, scores, baseline, prompts, neighbors, problems, about)})
    if neighbors and len(ids) <= FEW:
        print("nearest known prompts (neighbours, not the recovered prompt):")
        for path, near in zip(paths, neighbors):
            print(path, *(f"  {c:.3f}  {p}" for c, p in near), sep="\n")
    for problem in filter(None, problems):
        print(f"{problem}; it got the mean training embedding", file=sys.stderr)
    if targets is not None:
        print_scores("" if args.images else "val ", scores, targets, mean, about)
    if not args.images:
        warn_few(len(ids))
    if args.images and targets is not None and about["trained"] is None:
        print(f"{meta['data']} is not here or has changed, so these prompts may have been trained on", file=sys.stderr)
    if args.out and not args.submission:
        average = [args.out, "--out", f"{os.path.splitext(args.out)[0]}-average.npz", "--submission", "submission.csv"]
        print_next("ensemble.py", *average if args.images else [])
    elif not args.html:
        print_next("predict.py", *args.images, "--run", args.run, "--html", "report.html")


if __name__ == "__main__":
    run(main, "nothing was written")
