"""
Predict the prompt embeddings of pictures with a trained run: nearest known prompts, a Kaggle submission, a report page.
Reads runs/NAME/<phase>/best.safetensors and pictures; writes preds/NAME.npz and what is asked for beside it.
$ python predict.py                             # the validation split of the newest finished run, with its cosine
$ python predict.py picture.png                 # prints the nearest known prompts
$ python predict.py images/ more.zip --run runs/demo/ft --tta 4 --html report.html
$ python predict.py test/ --sample-submission sample_submission.csv --submission submission.csv
$ torchrun --standalone --nproc_per_node=4 -- predict.py images/    # images shared out, the same bytes
"""
import argparse
import base64
import hashlib
import html
import io
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from clean import (IMAGE_COLUMNS, IMAGE_SUFFIXES, PROMPT_COLUMNS, TABLE_SUFFIXES, atomic, encode_cached, is_archive,
                   list_members, open_rgb, read_data, read_table, reason, run, sha256)
from train import (DTYPES, Pictures, centre_crop, cosine, find_checkpoint, hold_memory, load_net, pick_precision,
                   to_square)

VIEWS = {  # --tta N takes the first N. name: (resolution as a factor, share of the centre that is seen, mirrored)
    "image": (1, 1, False), "mirror": (1, 1, True),
    "large": (1.25, 1, False), "large-mirror": (1.25, 1, True),  # more pixels: position embeddings are resized
    "zoom": (1, 0.8, False), "zoom-mirror": (1, 0.8, True),
}
SAME = 0.95  # neighbours this close to a nearer one are the same prompt in other words, and counted once
FEW = 8  # so many pictures are looked at one by one: their neighbours are printed
NEIGHBORS = 5  # shown where --neighbors does not say
BLEND_K = 100  # neighbours in the average
BAD_MAX = 20  # unreadable pictures named one by one
REPORT_MAX = 2000  # cards in the report, about 6 KB each


# ---------------------------------------------------------------------------------------------------------- the formats

def read_preds(path):
    """preds/NAME.npz, or a Kaggle CSV of somebody's model -> dict: ids (N,) str, embeddings float32 (N, D), targets or
    None, groups (N,) or None, run, checkpoint (a hash or ""), views [str]. Exits with one line on what is neither."""
    if str(path).lower().endswith(".csv"):
        ids, x = read_submission(path)
        preds = {"ids": np.array(ids), "embeddings": x}
    else:
        try:
            with np.load(path, allow_pickle=False) as f:
                preds = {k: f[k] for k in f.files}
            preds["ids"], preds["embeddings"]  # KeyError where one is lacking
        except Exception as e:  # numpy, zipfile and zlib each raise their own kinds on damaged or hostile bytes
            sys.exit(f"{path}: not a predictions file ({reason(e)}); make one with: python predict.py --out {path}")
    ids, x, y = preds["ids"], preds["embeddings"], preds.get("targets")
    table = ids.ndim == 1 and x.ndim == 2 and len(ids) == len(x) and x.dtype.kind == "f"
    if not table or len(set(ids.tolist())) < len(ids) or not np.isfinite(x).all():
        sys.exit(f"{path}: ids of shape {ids.shape} for embeddings of shape {x.shape}; "
                 "they must agree, ids be unique and embeddings finite")
    if y is not None and (y.shape != x.shape or y.dtype.kind != "f" or not np.isfinite(y).all()):
        sys.exit(f"{path}: targets of shape {y.shape} for embeddings of shape {x.shape}; they must agree and be finite")
    return {"targets": None, "groups": None, **preds, "run": str(preds.get("run", Path(path).stem)),
            "checkpoint": str(preds.get("checkpoint", "")), "views": np.atleast_1d(preds.get("views", [])).tolist()}


def write_preds(path, **arrays):
    with atomic(path) as f:
        np.savez(f, **{k: v for k, v in arrays.items() if v is not None})


def read_submission(path):
    """A Kaggle CSV `imgId_eId,val`, each image's D rows together and in order -> ids, values float32 (N, D)."""
    try:
        types = {"imgId_eId": pl.String, "val": pl.Float32}
        table = pl.read_csv(path, columns=list(types), schema_overrides=types)
        key = table["imgId_eId"].str.extract_groups(r"^(?s)(.*)_(\d+)$")
        name, e = key.struct[0], key.struct[1].cast(pl.Int64).to_numpy()
        restarts = np.flatnonzero(e[1:] <= e[:-1])  # the second image begins behind the first of these
        width = int(restarts[0]) + 1 if len(restarts) else len(e)
        row = np.arange(len(e))
        first = row // width * width  # the row in which its image begins
        if not len(e) or len(e) % width or (e != row - first).any() or (name != name.gather(first)).any():
            raise ValueError("rows are not imgId_0, imgId_1, ... image by image")
        ids = name.gather_every(width).to_list()
        if len(set(ids)) != len(ids):
            raise ValueError(f"{Counter(ids).most_common(1)[0][0]} is there twice")
        return ids, table["val"].to_numpy().reshape(-1, width)
    except (pl.exceptions.PolarsError, OSError, ValueError, TypeError) as e:
        sys.exit(f"{path}: not a Kaggle submission imgId_eId,val ({reason(e)})")


def order_for(sample, ids):
    """Rows of `ids` in the order that a submission wants: the sample's, else sorted. Exits on missing or extra ids."""
    row = {i: n for n, i in enumerate(ids)}
    wanted = read_submission(sample)[0] if sample else sorted(ids)
    missing, extra = [i for i in wanted if i not in row], sorted(set(ids) - set(wanted))
    if missing or extra:
        sys.exit(f"--sample-submission {sample}: {len(missing)} of its ids have no picture {missing[:3]}, "
                 f"{len(extra)} pictures are not in it {extra[:3]}; give exactly its images")
    return [row[i] for i in wanted]


def write_submission(path, ids, embeddings, order):
    """Kaggle CSV `imgId_eId,val`, image by image in `order`, streamed. Seven decimals cost < 1e-12 of cosine."""
    ids, width = pl.Series(ids, dtype=pl.String), embeddings.shape[1]
    with atomic(path) as f:
        f.write(b"imgId_eId,val\n")
        for start in range(0, len(order), 1024):
            rows = np.array(order[start:start + 1024])
            table = pl.DataFrame({"i": ids.gather(np.repeat(rows, width)), "e": np.tile(np.arange(width), len(rows)),
                                  "val": embeddings[rows].ravel()})
            table = table.select(pl.format("{}_{}", "i", "e"), "val")
            f.write(table.write_csv(include_header=False, float_precision=7).encode())


# ------------------------------------------------------------------------------------------------------------ the input

def list_images(items, image_col=None, prompt_col=None):
    """Files, folders (recursive), zips and tars (in place), tables with an image column -> ids, sorted paths, prompts.
    An id is the file name without suffix; where two clash, both are whole paths. prompts: None unless all are known."""
    found = {}  # path: prompt
    for item in items:
        path = Path(item)
        if path.is_dir():
            found |= {str(p): None for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()}
        elif not path.is_file():
            sys.exit(f"{item}: no such file or folder")
        elif is_archive(path):
            try:
                found |= {f"{path}::{m}": None for m in list_members(path)}
            except Exception as e:  # zipfile, tarfile and zlib each raise their own kinds
                sys.exit(f"{path}: not a readable archive ({reason(e)})")
        elif path.suffix.lower() in TABLE_SUFFIXES:
            need = ("image", "prompt") if prompt_col else ("image",)
            table = read_table(path, image_col, prompt_col, need=need)
            empty = table["image"].null_count()
            if empty:
                sys.exit(f"{path}: {empty} of its {len(table)} rows name no image; drop them, "
                         "or name another column with --image-col")
            found |= dict(table.select("image", "prompt").iter_rows())
        else:
            found[str(path)] = None
    if not found:
        sys.exit(f"{', '.join(items)}: no images there ({' '.join(IMAGE_SUFFIXES)})")
    paths = sorted(found)
    stems = [as_text(Path(p.split("::")[-1]).stem) for p in paths]
    times = Counter(stems)
    ids = [stem if times[stem] == 1 else as_text(Path(p).as_posix()) for stem, p in zip(stems, paths)]
    prompts = [found[p] for p in paths]
    return ids, paths, prompts if all(prompts) else None


def as_text(path):
    """Names on a disk need not be text."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_validation(meta):
    """The validation split of a run's data -> pairs, image paths, targets (N, D), and whether the data is still that of
    the training: if not, the run may have seen these rows."""
    pairs, targets, summary = read_data(meta["data"])
    rows = np.flatnonzero(pairs["split"].to_numpy() == "val")
    if not len(rows):
        sys.exit(f"{meta['data']}: has no validation rows (made with --val-fraction 0); name the pictures to predict")
    paths = [str(Path(meta["data"]) / p) for p in pairs["image"].gather(rows)]
    return pairs[rows], paths, targets[rows], summary["hashes"] == meta["data_hashes"]


class Renderings(Pictures):
    """Picture i, decoded once, for every (size, share) that the views need -> ([uint8 (3, size, size)], readable?).
    One that cannot be read is a marked black row: never skipped, never replaced by its neighbour."""

    def __init__(self, paths, spec, shapes):
        super().__init__(paths, spec)
        self.shapes = shapes

    def __getitem__(self, i):
        try:
            image = open_rgb(self.paths[i])
            return [to_square(centre(image, share), size, self.filter) for size, share in self.shapes], True
        except Exception:  # decoders raise whatever they like on hostile bytes
            return [torch.zeros(3, size, size, dtype=torch.uint8) for size, _ in self.shapes], False


def centre(image, share):
    if share == 1:
        return image
    side = max(1, round(min(image.size) * share))
    return centre_crop(image, side, side)


def why(path):
    """What is wrong with a picture that could not be read, in a few words."""
    try:
        open_rgb(path)
        return "unreadable"
    except FileNotFoundError:
        return "no such file"
    except Exception as e:
        return " ".join(str(e).split())[:120] or type(e).__name__


# ----------------------------------------------------------------------------------------------------------- prediction

def patch_side(net, spec):
    """Image sizes are multiples of it: a transformer's patches (open_clip, timm), a convolutional net's stride."""
    side = spec.get("config", {}).get("vision_cfg", {}).get("patch_size")
    return int(side or np.max(getattr(getattr(net.tower, "patch_embed", None), "patch_size", 32)))


class Viewer(nn.Module):
    """Nets and views of one checkpoint. forward: [uint8 (B, 3, size, size)], one per shape -> float32 (B, 384), unit
    rows. Each view's embedding is normalised first, so each has the same say in the average."""

    def __init__(self, checkpoint, views, precision="auto", device="cpu", compiled=False):
        super().__init__()
        net, self.meta = load_net(checkpoint)
        self.device = torch.device(device)
        self.precision = pick_precision(precision, self.device, net)[2]
        self.dtype = DTYPES[self.precision]
        own = self.meta["tower"]["image_size"]
        patch = patch_side(net, self.meta["tower"])
        self.shapes, self.views, self.nets = [], [], nn.ModuleDict()
        for factor, share, mirrored in map(VIEWS.get, views):
            size = own if factor == 1 else math.ceil(own * factor / patch) * patch
            if (size, share) not in self.shapes:
                self.shapes.append((size, share))
            if str(size) not in self.nets:
                self.nets[str(size)] = net if size == own else load_net(checkpoint, size)[0]
            self.views.append((self.shapes.index((size, share)), str(size), mirrored))
        self.eval().requires_grad_(False).to(self.device)
        for n in self.nets.values():
            n.tower.to(self.dtype)  # once; autocast would cast every weight again for every batch
            for m in n.tower.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.float()  # running variances do not fit eight bits of mantissa
            if compiled:
                n.tower.compile()

    def forward(self, pictures):
        total = 0
        for shape, size, mirrored in self.views:
            net, x = self.nets[size], pictures[shape]
            x = net.pixels(x.flip(-1) if mirrored else x).to(self.dtype)
            total = total + net.embed(net.tower(x).float())
        return F.normalize(total, dim=-1)


def embed(viewer, pictures, size):
    """viewer(pictures), at most `size` images at a time; out of memory halves it. -> (B, 384) on the CPU, that size."""
    while True:
        try:
            parts = []
            for i in range(0, len(pictures[0]), size):
                parts.append(viewer([p[i:i + size].to(viewer.device, non_blocking=True) for p in pictures]).cpu())
            return torch.cat(parts), size
        except RuntimeError as e:
            if "memory" not in str(e).lower():
                raise
        if size == 1:
            sys.exit(f"out of memory with one image at a time on {viewer.device}; "
                     "free some, or predict with fewer or smaller --views")
        size = -(-size // 2)
        torch.cuda.empty_cache()
        print(f"out of memory: going on with {size} images at a time", file=sys.stderr)


def predict(viewer, paths, batch_size=64, workers=0, todo=None, quiet=False):
    """Yield (first row, embeddings (B, 384), readable (B,)) for the batches numbered `todo` (all): rows n * batch_size
    onwards. The batches are the same whoever predicts them and whenever, so their bytes are too."""
    todo = range(-(-len(paths) // batch_size)) if todo is None else todo
    rows = [range(n * batch_size, min((n + 1) * batch_size, len(paths))) for n in todo]
    loader = DataLoader(Renderings(paths, viewer.meta["tower"], viewer.shapes), batch_sampler=rows, num_workers=workers,
                        pin_memory=viewer.device.type == "cuda", generator=torch.Generator())
    bar = tqdm(total=sum(map(len, rows)), desc="predict", unit="image", disable=quiet or None)
    with torch.inference_mode(), bar:
        for batch, (pictures, readable) in zip(rows, loader):
            y, batch_size = embed(viewer, pictures, batch_size)
            yield batch[0], y.numpy(), readable.numpy()
            bar.update(len(batch))


def open_scratch(out, key, rows, width):
    """Finished rows live beside --out until all are there: a killed command goes on where it was, and torchrun's ranks
    meet here. -> path, array (rows, width + 1) on disk, its last column 0 = not yet, 1 = predicted, 2 = unreadable.
    `key`: what the rows are computed from; another one starts anew."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = out.with_name(f".{out.name}.{digest}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.iterdir():
        if re.fullmatch(re.escape(f".{out.name}.") + r"[0-9a-f]{16}\.partial", old.name) and old != path:
            old.unlink(missing_ok=True)
    size = rows * (width + 1) * 4
    with open(path, "ab") as f:
        if hasattr(os, "posix_fallocate"):  # blocks are reserved now: on a full disk a memory map would kill us later
            os.posix_fallocate(f.fileno(), 0, size)
        else:
            os.truncate(f.fileno(), size)
    return path, np.memmap(path, np.float32, "r+", shape=(rows, width + 1))


# ----------------------------------------------------------------------------------------------------- readable prompts

def load_corpus(source, text_model, device):
    """A data folder (its training rows; never the validation prompts) or any table of prompts -> prompts, (N, 384)."""
    if not Path(source).is_dir():
        prompts = read_table(source, text_only=True)["prompt"].drop_nulls().unique(maintain_order=True).to_list()
        return prompts, encode_cached(prompts, text_model["name"], device)
    pairs, targets, summary = read_data(source)
    if summary["text_model"] != text_model:
        sys.exit(f"{source}: its prompts are embedded by {summary['text_model']['name']}, "
                 f"the run predicts for {text_model['name']}; give another --corpus")
    rows = np.flatnonzero(pairs["split"].to_numpy() == "train")
    return pairs["prompt"].gather(rows).to_list(), np.ascontiguousarray(targets[rows])


def nearest_prompts(x, corpus, k):
    """The k nearest rows of `corpus` (N, D) to each row of x (M, D), near-identical ones counted once.
    -> cosines (M, k), rows (M, k); -1 = no more among the nearest 2 k + FEW."""
    import faiss
    index = faiss.IndexFlatIP(corpus.shape[1])
    index.add(corpus)
    cosines, rows = np.full((len(x), k), -1, np.float32), np.full((len(x), k), -1)
    for start in tqdm(range(0, len(x), 256), desc="neighbours", unit="block", disable=len(x) < 2000 or None):
        found = index.search(np.ascontiguousarray(x[start:start + 256]), min(len(corpus), 2 * k + FEW))
        for i, (c, near) in enumerate(zip(*found), start):
            same = corpus[near] @ corpus[near].T >= SAME
            keep = []
            for j in range(len(near)):
                if len(keep) < k and not same[j, keep].any():
                    keep.append(j)
            cosines[i, :len(keep)], rows[i, :len(keep)] = c[keep], near[keep]
    return cosines, rows


def blend_neighbors(x, corpus, cosines, rows, weight):
    """(1 - weight) * x + weight * its neighbours' average, each weighted by 1 / (distance^6 + 1e-4). -> unit rows"""
    w = np.where(rows >= 0, 1 / ((2 - 2 * cosines).clip(0) ** 3 + 1e-4), 0)  # unit rows: d^2 = 2 - 2 cos
    average = np.stack([a @ corpus[r] for a, r in zip(w.astype(np.float32), rows)])
    mixed = (1 - weight) * x + weight * average / np.linalg.norm(average, axis=1, keepdims=True)
    return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


def score(embeddings, targets):
    """Mean cosine ± standard error, as text."""
    c = (embeddings * targets).sum(1)
    return f"{c.mean():.4f} ± {c.std(ddof=len(c) > 1) / len(c) ** .5:.4f}"


def printable(text):
    """Prompts are other people's text: no control characters on the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


# ----------------------------------------------------------------------------------------------------------- the report

class Thumbnails(Pictures):
    """Picture i -> a data: URI of a JPEG of at most 160 pixels, "" where it cannot be read."""

    def __getitem__(self, i):
        try:
            image = open_rgb(self.paths[i])
            image.thumbnail((160, 160))
            image.save(data := io.BytesIO(), "JPEG", quality=72)
            return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        except Exception:
            return ""


STYLE = """
:root{color-scheme:light dark;
  --bg:#f6f6f3;--card:#fff;--ink:#1c1d20;--dim:#5c5f66;--line:#dcdcd6;--accent:#2d5fa8;--bar:#7d9cc9}
@media(prefers-color-scheme:dark){:root{
  --bg:#15171a;--card:#1f2226;--ink:#e8e8e6;--dim:#a3a7ae;--line:#353a40;--accent:#8db4f0;--bar:#4f6f9f}}
*{box-sizing:border-box} body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
header,main{max-width:1280px;margin:auto;padding:.6rem 1rem} header{padding-bottom:0}
h1{font-size:1.35rem;margin:.2rem 0 .6rem;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:0 0 .8rem} dt{color:var(--dim);font-size:.8rem}
dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}
p.note{color:var(--dim);margin:.4rem 0;max-width:75ch}
svg{width:100%;max-width:560px;height:auto;display:block} svg text{fill:var(--dim);font:11px system-ui,sans-serif}
form{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:end;padding:.6rem 0;
  background:var(--bg);border-bottom:1px solid var(--line)}
label{display:grid;font-size:.8rem;color:var(--dim)} label.grow{flex:1 1 12rem}
input,select{font:inherit;padding:.4rem .5rem;color:var(--ink);background:var(--card);border:1px solid var(--line);
  border-radius:6px;width:100%}
:focus-visible{outline:3px solid var(--accent);outline-offset:1px} output{color:var(--dim);padding:.4rem 0}
ul.grid{list-style:none;margin:1rem 0;padding:0;display:grid;gap:.8rem;align-items:start;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem;overflow-wrap:anywhere;
  content-visibility:auto;contain-intrinsic-size:auto 270px} .card[hidden]{display:none}
.top{display:grid;grid-template-columns:112px 1fr;gap:0 .8rem;align-items:start} .top p,.top h2{margin:0}
img,.none{width:112px;height:112px;object-fit:cover;border-radius:6px;background:var(--line)}
.none{display:grid;place-items:center;color:var(--dim);font-size:.8rem}
h2{font-size:.85rem;font-weight:600;display:flex;justify-content:space-between;gap:.6rem}
b,ol span{font-variant-numeric:tabular-nums} .top p span{color:var(--dim);font-size:.75rem;display:block}
.top p,ol q{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:5;overflow:hidden}
ol{list-style:none;margin:.5rem 0 0;padding:.4rem 0 0;border-top:1px solid var(--line);font-size:.85rem}
ol li{display:flex;gap:.6rem} ol span{color:var(--dim);flex:none}
ol q{quotes:none;-webkit-line-clamp:1} .card:is(:hover,:focus) :is(p,q){-webkit-line-clamp:none}
"""
SCRIPT = """
const $ = id => document.getElementById(id), grid = $('grid'), cards = [...grid.children];
const text = new Map(cards.map(c => [c, c.textContent.toLowerCase()]));
const by = {order: (a, b) => a.dataset.n - b.dataset.n,
            worst: (a, b) => a.dataset.c - b.dataset.c,
            best: (a, b) => b.dataset.c - a.dataset.c};
const count = () => {
  $('count').textContent = cards.filter(c => !c.hidden).length + ' of ' + cards.length + ' pictures';
};
$('sort').oninput = () => grid.append(...cards.sort(by[$('sort').value]));
$('filter').oninput = () => {
  const q = $('filter').value.trim().toLowerCase();
  cards.forEach(c => c.hidden = !text.get(c).includes(q));
  count();
};
$('form').onsubmit = e => e.preventDefault();
count();
"""


def histogram(values, baseline):
    """An inline SVG of how the cosines are spread, with their mean and the baseline."""
    counts, edges = np.histogram(values, 40)
    mean, lo, hi = float(np.mean(values)), min(edges[0], baseline), max(edges[-1], baseline)
    at = lambda v: 10 + 540 * (v - lo) / max(1e-9, hi - lo)  # noqa: E731
    svg = ""
    for a, b, n in zip(edges, edges[1:], counts):
        height = 100 * n / counts.max()
        svg += (f'<rect x="{at(a):.1f}" y="{120 - height:.1f}" width="{max(1, at(b) - at(a) - 1):.1f}" '
                f'height="{height:.1f}" fill="var(--bar)"/>')
    left, right = sorted([(mean, f"mean {mean:.3f}"), (baseline, f"mean vector {baseline:.3f}")])
    for (v, label), dx, anchor in ((left, -4, "end"), (right, 4, "start")):
        svg += (f'<path d="M{at(v):.1f} 6V120" stroke="currentColor" stroke-dasharray="{3 * (v == baseline)}"/>'
                f'<text x="{at(v) + dx:.1f}" y="14" text-anchor="{anchor}">{label}</text>')
    label = f"Histogram of the cosines, {lo:.2f} to {hi:.2f}: {left[1]}, {right[1]}"
    return (f'<svg viewBox="0 0 560 140" role="img" aria-label="{label}">{svg}<text x="10" y="136">{lo:.2f}</text>'
            f'<text x="550" y="136" text-anchor="end">{hi:.2f}</text></svg>')


def card(n, name, thumbnail, value, prompt, near, bad):
    """A picture in the report. value (its cosine), prompt (the true one), near (its neighbours): None if unknown."""
    e, key = html.escape, value  # key: what the page sorts by
    if value is None:
        key = near[0][0] if near else 0
    text = f'<li class="card" tabindex="0" data-n="{n}" data-c="{key:.6f}"><div class="top">'
    if thumbnail:
        text += f'<img src="{thumbnail}" alt="" loading="lazy" decoding="async" width="112" height="112">'
    else:
        text += '<div class="none">no picture</div>'
    text += f"<div><h2>{e(name)}" + ("" if value is None else f"<b>{value:.3f}</b>") + "</h2>"
    if bad:
        text += "<p><strong>unreadable: got the mean training embedding</strong></p>"
    if prompt is not None:
        text += f"<p><span>true prompt</span>{e(prompt)}</p>"
    text += "</div></div>"
    if near is not None:
        items = "".join(f"<li><span>{c:.2f}</span><q>{e(p)}</q></li>" for c, p in near)
        text += f'<ol aria-label="nearest known prompts">{items}</ol>'
    return f"{text}</li>\n"


def write_report(path, title, ids, thumbnails, facts, cosines=None, baseline=None, prompts=None, neighbors=None, bad=(),
                 shown=None):
    """One self-contained page that opens from disk. Ids and prompts are hostile text: escaped here, and the page's
    policy lets no script run but ours. facts {name: value}; neighbors[i] [(cosine, prompt)]; thumbnails of the rows
    `shown` (all)."""
    e, shown = html.escape, range(len(ids)) if shown is None else shown
    at = lambda values, i: values[i] if values is not None else None  # noqa: E731
    cards = [card(n, str(ids[i]), thumbnail, at(cosines, i), at(prompts, i), at(neighbors, i), i in bad)
             for n, (i, thumbnail) in enumerate(zip(shown, thumbnails))]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    note = ""
    if neighbors:
        note = ("Below each picture: the nearest known prompts to what was predicted, with their cosines. "
                "They are neighbours, not the recovered prompt. ")
    if len(cards) < len(ids):
        note += f"{len(cards):,} of {len(ids):,} pictures are shown, evenly spread."
    sort = "by cosine of the nearest prompt" if cosines is None else "by cosine to the true prompt"
    facts = "".join(f"<div><dt>{e(k)}</dt><dd>{e(str(v))}</dd></div>" for k, v in facts.items())
    chart = histogram(cosines, baseline) if cosines is not None and len(cosines) else ""
    with atomic(path, "w", encoding="utf-8", errors="replace") as f:
        f.write(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>{e(title)}</title>
<style>{STYLE}</style></head><body>
<header><h1>{e(title)}</h1><dl>{facts}</dl>
{chart}<p class="note">{note}</p></header>
<main><form id="form" role="search"><label for="sort">Sort {sort}<select id="sort">
<option value="order">as predicted</option><option value="worst">worst first</option>
<option value="best">best first</option></select></label>
<label class="grow" for="filter">Show only pictures with this text<input id="filter" type="search" autocomplete="off">
</label><output id="count" for="sort filter" role="status"></output></form>
<ul class="grid" id="grid" aria-label="pictures">
{"".join(cards)}</ul></main><script>{SCRIPT}</script></body></html>
""")


# ----------------------------------------------------------------------------------------------------------------- main

def newest_run(root="runs"):
    """The phase folder under runs/ that finished last, by the closing line of its metrics.jsonl."""
    finished = []
    for log in Path(root).glob("*/*/metrics.jsonl"):
        lines = log.read_text().splitlines()
        if lines and '"done": true' in lines[-1] and (log.parent / "best.safetensors").is_file():
            finished.append((log.stat().st_mtime, log.parent))
    if not finished:
        sys.exit(f"{root}/: no finished run there; train one with: python train.py --phase lp, then --phase ft  "
                 "(or name one with --run)")
    return max(finished)[1]


def refuse_existing(paths, overwrite):
    for path in filter(None, paths):
        if Path(path).exists() and not overwrite:
            sys.exit(f"{path}: already there; choose another name, or replace it with --overwrite")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Predict prompt embeddings of pictures.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("images", nargs="*", metavar="IMAGES",
                   help="pictures, folders, zips, tars, tables with an image column; none = the run's validation split")
    p.add_argument("--run", help="run folder, phase folder or checkpoint; unset = the newest finished run under runs/")
    p.add_argument("--image-col", help=f"of tables; unset = the first of {', '.join(IMAGE_COLUMNS)}")
    p.add_argument("--prompt-col", help=f"of tables, true prompts; unset = the first of {', '.join(PROMPT_COLUMNS)}")
    p.add_argument("--strict", action="store_true",
                   help="stop at an unreadable picture instead of predicting the mean training embedding")
    g = p.add_argument_group("views")
    g.add_argument("--tta", type=int, default=1, help=f"views to average, the first N of: {', '.join(VIEWS)}")
    g.add_argument("--views", nargs="+", choices=VIEWS, metavar="VIEW", help="name the views instead")
    g = p.add_argument_group("output")
    g.add_argument("--out", help="predictions file; unset = preds/RUN-PHASE-ttaN.npz, ...-images-ttaN.npz for IMAGES, "
                   "nothing for a few single pictures")
    g.add_argument("--submission", help="Kaggle CSV to write")
    g.add_argument("--sample-submission", help="its ids, in its order; unset = sorted ids")
    g.add_argument("--csv", help="plain table to write: id, cosine where known, the embedding")
    g.add_argument("--html", help="report page to write")
    g.add_argument("--overwrite", action="store_true", help="replace these files")
    g = p.add_argument_group("readable prompts")
    g.add_argument("--neighbors", type=int, metavar="K",
                   help="nearest known prompts per picture; unset = 5 for a few single pictures and for --html")
    g.add_argument("--corpus", help="where from: a data folder or a table of prompts (embedded once, cached); "
                   "unset = the run's training data")
    g.add_argument("--blend-neighbors", type=float, default=0, metavar="W",
                   help="share of the neighbours' average in the embedding, 0 to 1")
    g = p.add_argument_group("speed")
    g.add_argument("--batch-size", type=int, default=64, help="images at a time; halved when memory runs out")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    g.add_argument("--precision", choices=["auto", "amp_bf16", "amp", "fp32"], default="auto",
                   help="auto: bf16 where the hardware has it")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="compile the tower: pays off from some thousand images")
    return p.parse_args(argv)


def check_args(args):
    """Everything cheap, before anything slow."""
    if not 1 <= args.tta <= len(VIEWS):
        sys.exit(f"--tta {args.tta}: there are {len(VIEWS)} views: {', '.join(VIEWS)}")
    if not 0 <= args.blend_neighbors <= 1:
        sys.exit(f"--blend-neighbors {args.blend_neighbors}: must be in [0, 1]")
    if args.batch_size < 1 or args.workers < 0 or (args.neighbors or 0) < 0:
        sys.exit("--batch-size must be at least 1, --workers and --neighbors 0 or more")
    if args.views and len(set(args.views)) < len(args.views):
        sys.exit(f"--views {' '.join(args.views)}: the same view twice adds nothing")
    if args.corpus and not Path(args.corpus).exists():
        sys.exit(f"--corpus {args.corpus}: no such file or folder")


def main():
    args = parse_args()
    check_args(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else (lambda *a, **k: None)
    checkpoint = find_checkpoint(args.run or newest_run())
    say(f"run {checkpoint.parent}")
    views = args.views or list(VIEWS)[:args.tta]

    # what to write
    few = world == 1 and 0 < len(args.images) <= FEW
    looking = few and all(Path(p).is_file() and Path(p).suffix.lower() in IMAGE_SUFFIXES for p in args.images)
    out = Path(args.out) if args.out else None
    if not out and not looking:
        name, phase = checkpoint.parent.parent.name, checkpoint.parent.name
        tag = "-".join(args.views) if args.views else f"tta{args.tta}"
        out = Path(f"preds/{name}-{phase}{'-images' if args.images else ''}-{tag}.npz")
    refuse_existing([out, args.submission, args.csv, args.html], args.overwrite)

    # the nets, and how many known prompts to show and to search for
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    hold_memory(device)
    viewer = Viewer(checkpoint, views, args.precision, device, args.compile)
    meta = viewer.meta
    k = args.neighbors or 0
    if args.neighbors is None and (looking or args.html):
        k = NEIGHBORS
        if not args.corpus and not (Path(meta["data"]) / "summary.json").is_file():
            say(f"{meta['data']}, the training data, is not here: no neighbours are shown (name prompts with --corpus)")
            k = 0
    search = max(k, BLEND_K if args.blend_neighbors else 0)
    table = out.with_suffix(".neighbors.parquet") if out and k else None
    refuse_existing([table], args.overwrite)

    # what to predict, and what is known about it
    targets = groups = None
    if args.images:
        ids, paths, prompts = list_images(args.images, args.image_col, args.prompt_col)
    else:
        pairs, paths, targets, unchanged = read_validation(meta)
        if not unchanged:
            say(f"warning: {meta['data']} has changed since this run was trained on it; "
                "its validation rows may have been trained on", file=sys.stderr)
        ids, prompts, groups = [Path(p).stem for p in paths], pairs["prompt"].to_list(), pairs["group"].to_numpy()
    order = order_for(args.sample_submission, ids) if args.submission or args.sample_submission else None
    if rank == 0 and targets is None and prompts:
        targets = encode_cached(prompts, meta["text_model"]["name"], device)
    if rank == 0 and search:
        known, corpus = load_corpus(args.corpus or meta["data"], meta["text_model"], device)

    # each picture decoded once, each view through the tower; finished rows go to a file that all ranks share
    if world > 1:
        torch.distributed.init_process_group("gloo")
    fallback = F.normalize(torch.tensor(meta["mean_target"]), dim=0).numpy()  # the best guess about a picture unseen
    digest = sha256(checkpoint)
    scratch, results = None, np.zeros((len(paths), len(fallback) + 1), np.float32)
    if out:
        key = [digest, *views, viewer.precision, args.batch_size, args.compile]
        key += [f"{i}\0{p}" for i, p in zip(ids, paths)]
        scratch, results = open_scratch(out, key, len(paths), len(fallback))
    done, size = results[:, -1] == 1, args.batch_size
    todo = [n for n in range(-(-len(paths) // size)) if not done[n * size:(n + 1) * size].all()]
    if done.any():
        say(f"going on: {done.sum():,} of {len(paths):,} are there")
    if world > 1:
        torch.distributed.barrier()  # all have seen what is done before anybody does more
    mine = todo[rank::world]  # whole batches, so every world size gives the same bytes
    for row, y, readable in predict(viewer, paths, size, args.workers, mine, quiet=rank > 0 or len(paths) < 64):
        if args.strict and not readable.all():
            path = paths[row + int(np.argmin(readable))]
            sys.exit(f"{path}: {why(path)}; mend it, or predict without --strict")
        y[~readable] = fallback
        results[row:row + len(y), :-1] = y
        results[row:row + len(y), -1] = np.where(readable, 1, 2)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if rank > 0:
            return
    embeddings, good = np.array(results[:, :-1]), results[:, -1] == 1
    bad = np.flatnonzero(~good)
    if not good.any():
        sys.exit(f"none of the {len(paths):,} pictures could be read; {paths[0]}: {why(paths[0])}")

    # what they mean: the nearest known prompts, which may also have a say in the embedding
    neighbors = None
    if search:
        cosines, rows = nearest_prompts(embeddings, corpus, search)
    if args.blend_neighbors:
        if targets is not None:
            print(f"cosine {score(embeddings, targets)} before blending")
        embeddings[good] = blend_neighbors(embeddings[good], corpus, cosines[good, :BLEND_K], rows[good, :BLEND_K],
                                           args.blend_neighbors)
        views = [*views, f"neighbors-{args.blend_neighbors:g}"]
    if k:
        neighbors = [[(float(c), known[r]) for c, r in zip(cs[:k], rs[:k]) if r >= 0] for cs, rs in zip(cosines, rows)]
        if len(ids) <= FEW:
            print("nearest known prompts (neighbours of what was predicted, not the recovered prompt):")
            for path, near in zip(paths, neighbors):
                print(printable(path), *(f"  {c:.3f}  {printable(p)}" for c, p in near), sep="\n")

    # files
    own = mean = baseline = None
    if targets is not None:
        own = cosine(torch.from_numpy(embeddings), torch.from_numpy(targets)).numpy()
        mean, baseline = score(embeddings, targets), float((targets @ fallback).mean())
    if out:
        write_preds(out, ids=np.array(ids), embeddings=embeddings, targets=targets, groups=groups,
                    run=str(checkpoint.parent), checkpoint=digest[:16], views=np.array(views))
        print(f"wrote {out} ({len(ids):,} images, views: {', '.join(views)})")
    if args.submission:
        write_submission(args.submission, ids, embeddings, order)
        print(f"wrote {args.submission} ({len(ids):,} images)")
    if args.csv:
        columns = {"id": ids} if own is None else {"id": ids, "cosine": own}
        columns |= {f"e{e}": column for e, column in enumerate(embeddings.T)}
        with atomic(args.csv) as f:
            pl.DataFrame(columns).write_csv(f)
        print(f"wrote {args.csv}")
    if table:
        rows = [(i, n, c, p) for i, near in zip(ids, neighbors) for n, (c, p) in enumerate(near)]
        with atomic(table) as f:
            pl.DataFrame(rows, schema=["id", "rank", "cosine", "prompt"], orient="row").write_parquet(f)
        print(f"wrote {table}")
    if args.html:
        shown = np.unique(np.linspace(0, len(ids) - 1, min(REPORT_MAX, len(ids))).astype(int)).tolist()
        thumbnails = Subset(Thumbnails(paths, meta["tower"]), shown)
        loader = DataLoader(thumbnails, batch_size=None, num_workers=args.workers)
        bar = tqdm(loader, desc="report", unit="image", disable=len(shown) < 64 or None)
        facts = {"pictures": f"{len(ids):,}"}
        if own is not None:
            facts |= {"mean cosine": mean, "mean vector": f"{baseline:.4f}"}
        facts |= {"unreadable": len(bad), "run": checkpoint.parent, "views": ", ".join(views)}
        write_report(args.html, f"Predicted prompts: {checkpoint.parent}", ids, bar, facts, own, baseline, prompts,
                     neighbors, set(bad.tolist()), shown)
        print(f"wrote {args.html} ({len(shown):,} pictures)")
    if scratch:
        scratch.unlink()
    for i in bad[:BAD_MAX]:
        print(f"{paths[i]}: {why(paths[i])}; it got the mean training embedding", file=sys.stderr)
    if len(bad) > BAD_MAX:
        print(f"and {len(bad) - BAD_MAX:,} more unreadable pictures, {len(bad):,} of {len(ids):,} in all",
              file=sys.stderr)
    if targets is not None:
        print(f"{'' if args.images else 'val '}cosine {mean} (n = {len(ids)}); mean vector {baseline:.4f}")


if __name__ == "__main__":
    run(main)
