"""
Predict the prompt embeddings of images with a trained run: nearest known prompts, a Kaggle submission, a report page.
Reads runs/NAME/<phase>/best.safetensors and images; writes preds/NAME.npz and what is asked for beside it.

$ python predict.py                             # the validation split of the newest finished run, with its cosine
$ python predict.py image.png                   # prints the nearest known prompts
$ python predict.py images/ more.zip --run runs/demo/ft --tta 4 --html report.html
$ python predict.py test/ --sample-submission sample_submission.csv --submission submission.csv
"""
import base64
import hashlib
import html
import io
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import nn
from tqdm import tqdm

from clean import (IMAGE_COLUMNS, IMAGE_SUFFIXES, PROMPT_COLUMNS, TABLE_SUFFIXES, BadImage, atomic, encode_cached,
                   is_archive, make_parser, open_rgb, read_data, read_source, read_table, reason, sha256, top_k)
from train import (DTYPES, ImageDataset, cast_backbone, centre_crop, find_checkpoint, load_model, make_loader, pick_device,
                   pick_precision, to_square)


def zoom(image, share=0.8):
    side = max(1, round(min(image.size) * share))
    return centre_crop(image, side, side)


VIEWS = {  # --tta N averages the first N. name: function from RGB image to RGB image; a view of your own is a line here
    "image": lambda image: image,
    "mirror": ImageOps.mirror,
    "zoom": zoom,
    "zoom-mirror": lambda image: ImageOps.mirror(zoom(image)),
}
SAME = 0.95  # neighbours this close to a nearer one are the same prompt in other words, and counted once
FEW = 8  # so many images are looked at one by one: their neighbours are printed
BLEND_K = 100  # neighbours in the average of --blend-neighbors
BAD_MAX = 20  # unreadable images named one by one
REPORT_MAX = 2000  # cards in the report, about 6 KB each


# -------------------------------------------------------------------------------------------------------- the formats

def read_preds(path):
    """preds/NAME.npz, or a Kaggle CSV of somebody's model -> dict: ids (N,) str, embeddings float32 (N, D), targets or
    None, groups (N,) or None, run, checkpoint (a hash or ""), views [str]. Exits in one line on what is neither."""
    if str(path).lower().endswith(".csv"):
        ids, x = read_submission(path)
        preds = {"ids": np.array(ids), "embeddings": x}
    else:
        try:
            with np.load(path, allow_pickle=False) as f:
                preds = {k: f[k] for k in f.files}
            preds["ids"], preds["embeddings"]  # KeyError where one is lacking
        except Exception as e:  # a decoder: numpy, zipfile and zlib each raise their own kinds on damaged bytes
            sys.exit(f"{path}: not a predictions file ({reason(e)}); make one with: python predict.py --out {path}")
    ids, x, y = preds["ids"], preds["embeddings"], preds.get("targets", preds["embeddings"])
    floats = x.dtype.kind == y.dtype.kind == "f" and ids.ndim == 1 and x.ndim == 2 and len(ids) == len(x)
    if not floats or x.shape != y.shape or len(set(ids.tolist())) < len(ids) or not np.isfinite([x, y]).all():
        sys.exit(f"{path}: ids {ids.shape}, embeddings {x.shape}, targets {y.shape}: they must agree, ids be unique, "
                 "the rest finite numbers")
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
        sys.exit(f"--sample-submission {sample}: {len(missing)} of its ids have no image {missing[:3]}, "
                 f"{len(extra)} images are not in it {extra[:3]}; give exactly its images")
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
    print(f"wrote {path} ({len(order):,} images)")


# ---------------------------------------------------------------------------------------------------------- the input

def list_images(items, image_col=None, prompt_col=None):
    """Files, folders, zips, tars (in place) and tables with an image column -> ids, sorted paths, prompts (None unless
    all are known). An id is the file name without suffix; where two clash, both are whole paths."""
    found = {}  # path: prompt
    for item in items:
        path = Path(item)
        if not path.exists():
            sys.exit(f"{item}: no such file or folder")
        if path.is_dir():  # names on a disk need not be text, which a table could not hold
            found |= {str(p): None for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()}
        elif is_archive(path) or path.suffix.lower() in TABLE_SUFFIXES:
            table = read_source(path, None, image_col, prompt_col, ("image", "prompt") if prompt_col else ("image",))
            if empty := table["image"].null_count():
                sys.exit(f"{path}: {empty} of its {len(table)} rows name no image; drop them, or see --image-col")
            found |= dict(table.select("image", "prompt").iter_rows())
        else:
            found[str(path)] = None
    if not found:
        sys.exit(f"{', '.join(items)}: no images there ({' '.join(IMAGE_SUFFIXES)})")
    paths = sorted(found)
    texts = [os.fsencode(p).decode("utf-8", "replace") for p in paths]  # names on a disk need not be text
    stems = [Path(t.split("::")[-1]).stem for t in texts]
    times, prompts = Counter(stems), [found[p] for p in paths]
    ids = [stem if times[stem] == 1 else text for stem, text in zip(stems, texts)]
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        sys.exit(f"{twice[0]}: two images have this id; rename one")
    return ids, paths, prompts if all(prompts) else None


def read_validation(meta):
    """The validation split of a run's data -> pairs, image paths, targets (N, D), and whether the data is still that of
    the training: if not, the run may have seen these rows."""
    pairs, targets, summary = read_data(meta["data"])
    pairs = pairs.with_row_index("row").filter(pl.col("split") == "val")
    paths = [str(Path(meta["data"]) / p) for p in pairs["image"]]
    return pairs, paths, np.array(targets[pairs["row"]]), summary["hashes"] == meta["data_hashes"]


class ViewDataset(ImageDataset):
    """Image i, decoded once -> its views, uint8 (V, 3, S, S), and what is wrong with it, or "". An unreadable one is a
    marked black row: never skipped, never replaced by its neighbour."""

    def __init__(self, paths, spec, views):
        super().__init__(paths, spec)
        self.views = views

    def __getitem__(self, i):
        try:
            image = open_rgb(self.paths[i])
        except BadImage as e:
            return torch.zeros(len(self.views), 3, *[self.spec["image_size"]] * 2, dtype=torch.uint8), str(e)
        return torch.stack([to_square(VIEWS[v](image), self.spec) for v in self.views]), ""


# --------------------------------------------------------------------------------------------------------- prediction

class TTAModel(nn.Module):
    """Test-time augmentation: uint8 (B, V, 3, S, S) -> float32 (B, 384), unit rows. Each view's embedding has length 1,
    so each has the same say in the average."""

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
    """model(images), at most `size` at a time; running out of memory halves it. -> (B, 384) on the CPU, that size."""
    while True:
        try:
            parts = [model(x.to(model.device, non_blocking=True)).cpu() for x in images.split(size)]
            return torch.cat(parts), size
        except RuntimeError as e:  # a submission must not die of this
            if size == 1 or not (isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)):
                raise
        size = -(-size // 2)
        torch.cuda.empty_cache()
        print(f"out of memory: continuing with {size} images at a time", file=sys.stderr)


def predict(model, paths, views, args):
    """-> embeddings (N, 384), and what is wrong with each image, "" where nothing is. args: batch_size, workers"""
    size, rows = args.batch_size, range(len(paths))
    batches = [rows[i:i + size] for i in range(0, len(rows), size)]
    loader = make_loader(ViewDataset(paths, model.spec, views), batches, args, model.device)
    found, problems = [], []
    with torch.inference_mode(), tqdm(total=len(paths), desc="predict", unit="image", disable=len(paths) < 64) as bar:
        for images, wrong in loader:
            y, size = embed(model, images, size)
            found.append(y)
            problems += wrong
            bar.update(len(y))
    return torch.cat(found).numpy(), problems


# --------------------------------------------------------------------------------------------------- readable prompts

def load_corpus(source, text_model, device):
    """A data folder (its training rows; never the validation prompts) or any table of prompts -> prompts, (N, 384)."""
    if not Path(source).is_dir():
        prompts = read_table(source, need=("prompt",))["prompt"].drop_nulls().unique(maintain_order=True).to_list()
        return prompts, encode_cached(prompts, text_model["name"], device)
    pairs, targets, summary = read_data(source)
    if summary["text_model"] != text_model:
        sys.exit(f"{source}: its prompts are embedded by {summary['text_model']['name']}, "
                 f"the run predicts for {text_model['name']}; give another --corpus")
    rows = np.flatnonzero(pairs["split"].to_numpy() == "train")
    return pairs["prompt"].gather(rows).to_list(), np.ascontiguousarray(targets[rows])


def nearest_prompts(x, corpus, k):
    """The k nearest rows of `corpus` (N, D) to each row of x (M, D), near-identical ones counted once.
    -> cosines (M, k), rows (M, k); -1 = no more among the nearest 2 k + 8."""
    cosines, rows = np.full((len(x), k), -1, np.float32), np.full((len(x), k), -1)
    for i, (c, near) in enumerate(zip(*top_k(x, corpus, 2 * k + 8))):
        same, keep = corpus[near] @ corpus[near].T >= SAME, []
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


def write_neighbors(path, ids, neighbors):
    """id, rank, cosine, prompt of every neighbour, as Parquet."""
    rows = [(i, n, c, p) for i, near in zip(ids, neighbors) for n, (c, p) in enumerate(near)]
    with atomic(path) as f:
        pl.DataFrame(rows, schema=["id", "rank", "cosine", "prompt"], orient="row").write_parquet(f)
    print(f"wrote {path}")


def describe(cosines):
    """Mean cosine ± standard error, as text."""
    return f"{cosines.mean():.4f} ± {cosines.std(ddof=int(len(cosines) > 1)) / len(cosines) ** .5:.4f}"


def printable(text):
    """Prompts are other people's text: no control characters on the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


# --------------------------------------------------------------------------------------------------------- the report

STYLE = """
:root{color-scheme:light dark;--bg:#f6f6f3;--card:#fff;--ink:#1c1d20;--dim:#5c5f66;--line:#dcdcd6;--bar:#7d9cc9}
@media(prefers-color-scheme:dark){
  :root{--bg:#15171a;--card:#1f2226;--ink:#e8e8e6;--dim:#a3a7ae;--line:#353a40;--bar:#4f6f9f}}
*{box-sizing:border-box} body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
header,main{max-width:1280px;margin:auto;padding:.6rem 1rem} h1{font-size:1.35rem;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:.4rem 2rem} dt,label,output,.dim{color:var(--dim);font-size:.8rem} dd{margin:0}
svg{width:100%;max-width:560px} svg text{fill:var(--dim);font:11px system-ui,sans-serif}
form{position:sticky;top:0;display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:end;padding:.6rem 0;
  background:var(--bg);border-bottom:1px solid var(--line)} label{display:grid} label.grow{flex:1 1 12rem}
input,select{font:inherit;padding:.4rem;color:var(--ink);background:var(--card);border:1px solid var(--line);width:100%}
ul{list-style:none;padding:0;display:grid;gap:.8rem;align-items:start;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem;overflow-wrap:anywhere;
  content-visibility:auto;contain-intrinsic-size:auto 270px}
.top{display:grid;grid-template-columns:112px 1fr;gap:0 .8rem} .top p,.top h2{margin:0}
img,.none{width:112px;height:112px;object-fit:cover;border-radius:6px;background:var(--line)}
h2{font-size:.85rem;display:flex;justify-content:space-between;gap:.6rem} .dim{display:block}
p,q{display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:5;overflow:hidden}
ol{list-style:none;margin:.5rem 0 0;padding:.4rem 0 0;border-top:1px solid var(--line);font-size:.85rem}
ol li{display:flex;gap:.6rem;align-items:start} i{flex:none;color:var(--dim)} q{quotes:none;-webkit-line-clamp:1}
.card:is(:hover,:focus) :is(p,q){-webkit-line-clamp:none}
"""
SCRIPT = """
const $ = id => document.getElementById(id), grid = $('grid'), cards = [...grid.children];
const text = new Map(cards.map(c => [c, c.textContent.toLowerCase()]));
const by = {order: (a, b) => a.dataset.n - b.dataset.n, worst: (a, b) => a.dataset.c - b.dataset.c,
            best: (a, b) => b.dataset.c - a.dataset.c};
const show = () => {
  const q = $('filter').value.trim().toLowerCase(), shown = cards.filter(c => text.get(c).includes(q));
  grid.replaceChildren(...shown.sort(by[$('sort').value]));
  $('count').textContent = shown.length + ' of ' + cards.length + ' images';
};
$('sort').oninput = $('filter').oninput = show;
$('form').onsubmit = e => e.preventDefault();
show();
"""


def thumbnail(path):
    """A data: URI of a JPEG of at most 160 pixels, "" where the image cannot be read."""
    try:
        image = open_rgb(path)
    except BadImage:
        return ""
    image.thumbnail((160, 160))
    image.save(data := io.BytesIO(), "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def histogram(values, baseline):
    """An inline SVG of how the cosines are spread, with their mean and the constant baseline."""
    counts, edges = np.histogram(values, 40)
    mean, low, high = float(np.mean(values)), min(edges[0], baseline), max(edges[-1], baseline)
    at = lambda v: 10 + 540 * (v - low) / max(1e-9, high - low)  # noqa: E731
    width, svg = max(1, at(edges[1]) - at(edges[0]) - 1), ""
    for left, n in zip(edges, 100 * counts / counts.max()):
        svg += f'<rect x="{at(left):.1f}" y="{120 - n:.1f}" width="{width:.1f}" height="{n:.1f}" fill="var(--bar)"/>'
    marks = sorted([(mean, f"mean {mean:.3f}"), (baseline, f"constant baseline {baseline:.3f}")])
    for (v, label), dx, anchor in zip(marks, (-4, 4), ("end", "start")):
        svg += (f'<path d="M{at(v):.1f} 6V120" stroke="currentColor" stroke-dasharray="{3 * (v == baseline)}"/>'
                f'<text x="{at(v) + dx:.1f}" y="14" text-anchor="{anchor}">{label}</text>')
    label = f"Histogram of the cosines, {low:.2f} to {high:.2f}: {marks[0][1]}, {marks[1][1]}"
    return (f'<svg viewBox="0 0 560 140" role="img" aria-label="{label}">{svg}<text x="10" y="136">{low:.2f}</text>'
            f'<text x="550" y="136" text-anchor="end">{high:.2f}</text></svg>')


def card(n, name, picture, cosine, prompt, near, problem):
    """An image in the report. picture: a data: URI or ""; cosine to the true prompt, prompt, near [(cosine, prompt)]:
    None where not known; problem: what is wrong with the image, or "". All text is somebody's: escaped here."""
    e, key = html.escape, cosine if cosine is not None else near[0][0] if near else 0  # key: what the page sorts by
    text = f'<li class="card" tabindex="0" data-n="{n}" data-c="{key:.6f}"><div class="top">'
    text += (f'<img src="{picture}" alt="" loading="lazy" decoding="async" width="112" height="112">' if picture else
             '<div class="none">no image</div>')
    text += f"<div><h2>{e(name)}{'' if cosine is None else f'<b>{cosine:.3f}</b>'}</h2>"
    text += "<p><strong>unreadable: got the mean training embedding</strong></p>" if problem else ""
    text += "" if prompt is None else f'<p><span class="dim">true prompt</span>{e(prompt)}</p>'
    items = "".join(f"<li><i>{c:.2f}</i><q>{e(p)}</q></li>" for c, p in near or ())
    text += "</div></div>" + (f'<ol aria-label="nearest known prompts">{items}</ol>' if near is not None else "")
    return f"{text}</li>\n"


def write_report(path, title, facts, names, pictures, cosines=None, baseline=None, prompts=None, neighbors=None,
                 problems=None, total=None):
    """One self-contained page that opens from disk; its policy lets no script run but ours. facts {name: value}; of each
    card: name, picture (data: URI), and where known cosine, prompt, neighbors [(cosine, prompt)], problem."""
    e, n, none = html.escape, len(names), [None] * len(names)
    cards = "".join(card(i, *rest) for i, rest in enumerate(zip(
        names, pictures, none if cosines is None else cosines, prompts or none, neighbors or none, problems or none)))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    note = "" if not neighbors else ("Below each image: the nearest known prompts to what was predicted, with their "
                                     "cosines. They are neighbours, not the recovered prompt. ")
    note += f"{n:,} of {total:,} images are shown, evenly spread." if total and n < total else ""
    sort = "by cosine of the nearest prompt" if cosines is None else "by cosine to the true prompt"
    facts = "".join(f"<div><dt>{e(k)}</dt><dd>{e(str(v))}</dd></div>" for k, v in facts.items())
    chart = histogram(cosines, baseline) if cosines is not None and n else ""
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
<label class="grow" for="filter">Show only images with this text<input id="filter" type="search" autocomplete="off">
</label><output id="count" for="sort filter" role="status"></output></form>
<ul id="grid" aria-label="images">
{cards}</ul></main><script>{SCRIPT}</script></body></html>
""")


# --------------------------------------------------------------------------------------------------------------- main

def newest_run(root="runs"):
    """The phase folder under runs/ that finished last, by the closing line of its metrics.jsonl."""
    finished = []
    for log in Path(root).glob("*/*/metrics.jsonl"):
        lines = log.read_text().splitlines()
        if lines and '"done": true' in lines[-1] and (log.parent / "best.safetensors").is_file():
            finished.append((log.stat().st_mtime, log.parent))
    if not finished:
        sys.exit(f"{root}/: no finished run there; train one with: python train.py --phase lp, or name one with --run")
    return max(finished)[1]


def refuse_existing(paths, overwrite):
    for path in filter(None, paths):
        if Path(path).exists() and not overwrite:
            sys.exit(f"{path}: already there; choose another name, or replace it with --overwrite")


def parse_args(argv=None):
    p = make_parser(__doc__)
    p.add_argument("images", nargs="*", metavar="IMAGES",
                   help="images, folders, zips, tars, tables with an image column; none = the run's validation split")
    p.add_argument("--run", help="run folder, phase folder or checkpoint; unset = the newest finished run under runs/")
    p.add_argument("--tta", type=int, default=1, help=f"views to average, the first N of: {', '.join(VIEWS)}")
    p.add_argument("--image-col", help=f"of tables; unset = the first of {', '.join(IMAGE_COLUMNS)}")
    p.add_argument("--prompt-col", help=f"of tables, true prompts; unset = the first of {', '.join(PROMPT_COLUMNS)}")
    g = p.add_argument_group("output")
    g.add_argument("--out", help="predictions file; unset = preds/RUN-PHASE-ttaN.npz, ...-images-ttaN.npz for IMAGES, "
                   "nothing for a few single images")
    g.add_argument("--submission", help="Kaggle CSV to write")
    g.add_argument("--sample-submission", help="its ids, in its order; unset = sorted ids")
    g.add_argument("--html", help="report page to write")
    g.add_argument("--overwrite", action="store_true", help="replace these files")
    g = p.add_argument_group("readable prompts")
    g.add_argument("--neighbors", type=int, metavar="K",
                   help="nearest known prompts per image; unset = 5 for a few single images and for --html")
    g.add_argument("--corpus", help="where from: a data folder or a table of prompts (embedded once, cached); "
                   "unset = the run's training data")
    g.add_argument("--blend-neighbors", type=float, default=0, metavar="W",
                   help="share of the neighbours' average in the embedding, 0 to 1")
    g = p.add_argument_group("speed")
    g.add_argument("--batch-size", type=int, default=64, help="images at a time; halved when memory runs out")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    g.add_argument("--precision", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where the hardware has it")
    return p.parse_args(argv)


def check_args(args):
    """Everything cheap, before anything slow."""
    for key, low, high in (("tta", 1, len(VIEWS)), ("blend_neighbors", 0, 1), ("batch_size", 1, 1e9), ("workers", 0, 1e9),
                           ("neighbors", 0, 1e9)):
        if getattr(args, key) is not None and not low <= getattr(args, key) <= high:
            sys.exit(f"--{key.replace('_', '-')} {getattr(args, key)}: must be in [{low}, {high:g}]")
    if args.corpus and not Path(args.corpus).exists():
        sys.exit(f"--corpus {args.corpus}: no such file or folder")


def read_input(args, meta, device):
    """What to predict -> ids (N,), paths, and names that people know; where known prompts, targets (N, 384), groups (N,)."""
    if args.images:
        ids, paths, prompts = list_images(args.images, args.image_col, args.prompt_col)
        targets = encode_cached(prompts, meta["text_model"]["name"], device) if prompts else None
        return ids, paths, ids, prompts, targets, None
    pairs, paths, targets, unchanged = read_validation(meta)
    if not unchanged:
        print(f"warning: {meta['data']} has changed since this run was trained on it; "
              "its validation rows may have been trained on", file=sys.stderr)
    ids = [f"{row:07d}" for row in pairs["row"]]
    names = [Path(origin).name if origin else i for origin, i in zip(pairs["origin"], ids)]
    return ids, paths, names, pairs["prompt"].to_list(), targets, pairs["group"].to_numpy()


def report_run(args, meta, paths, names, embeddings, targets, fallback, prompts, neighbors, problems):
    """The report page of a run, of at most REPORT_MAX images, evenly spread."""
    n, cosines = len(paths), None if targets is None else (embeddings * targets).sum(1)
    facts = {"images": f"{n:,}", "unreadable": sum(map(bool, problems)), "run": args.run, "views": args.tta}
    if targets is not None:
        facts = {"mean cosine": describe(cosines), "constant baseline": f"{(targets @ fallback).mean():.4f}", **facts}
    shown = np.unique(np.linspace(0, n - 1, min(REPORT_MAX, n)).astype(int)).tolist()
    pictures = [thumbnail(paths[i]) for i in tqdm(shown, "report", unit="image", disable=len(shown) < 64)]
    columns = [values and [values[i] for i in shown]
               for values in (names, cosines if cosines is None else cosines.tolist(), prompts, neighbors, problems)]
    write_report(args.html, f"Predicted prompts: {args.run}", facts, columns[0], pictures, columns[1],
                 None if targets is None else float((targets @ fallback).mean()), *columns[2:], n)
    print(f"wrote {args.html} ({len(shown):,} images)")


def main():
    args = parse_args()
    check_args(args)
    checkpoint, views = find_checkpoint(args.run or newest_run()), list(VIEWS)[:args.tta]
    args.run = str(checkpoint.parent)
    print(f"run {args.run}")

    # what to write
    looking = 0 < len(args.images) <= FEW and all(
        Path(p).is_file() and Path(p).suffix.lower() in IMAGE_SUFFIXES for p in args.images)  # a few single images
    out = Path(args.out) if args.out else None
    if not out and not looking:
        run, phase = checkpoint.parts[-3:-1] if len(checkpoint.parts) > 2 else ("run", checkpoint.parent.name)
        out = Path(f"preds/{run}-{phase}{'-images' if args.images else ''}-tta{args.tta}.npz")
    device = pick_device()
    model = TTAModel(checkpoint, args.precision, device)
    meta, k = model.meta, args.neighbors or 0
    if args.neighbors is None and (looking or args.html):
        k = 5 if args.corpus or (Path(meta["data"]) / "summary.json").is_file() else 0
        if not k:
            print(f"{meta['data']}, the training data, is not here: no neighbours are shown (name prompts with --corpus)")
    table = out.with_suffix(".neighbors.parquet") if out and k else None
    refuse_existing([out, table, args.submission, args.html], args.overwrite)

    # what to predict; the known prompts
    ids, paths, names, prompts, targets, groups = read_input(args, meta, device)
    order = order_for(args.sample_submission, ids) if args.submission or args.sample_submission else None
    if k or args.blend_neighbors:
        known, corpus = load_corpus(args.corpus or meta["data"], meta["text_model"], device)

    # predict; an unreadable image gets the best guess about an image unseen
    embeddings, problems = predict(model, paths, views, args)
    fallback, good = F.normalize(torch.tensor(meta["mean_target"]), dim=0).numpy(), np.array([not p for p in problems])
    embeddings[~good] = fallback
    if not good.any():
        sys.exit(f"none of the {len(paths):,} images could be read; {problems[0]}")

    # the nearest known prompts, which may also have a say in the embedding
    neighbors = None
    if k or args.blend_neighbors:
        cosines, rows = nearest_prompts(embeddings, corpus, max(k, BLEND_K if args.blend_neighbors else 0))
        neighbors = [[(float(c), known[r]) for c, r in zip(cs[:k], rs[:k]) if r >= 0]
                     for cs, rs in zip(cosines, rows)] if k else None
    if args.blend_neighbors:
        if targets is not None:
            print(f"cosine {describe((embeddings * targets).sum(1))} before blending")
        embeddings[good] = blend_neighbors(embeddings[good], corpus, cosines[good, :BLEND_K], rows[good, :BLEND_K],
                                           args.blend_neighbors)
        views.append(f"neighbors-{args.blend_neighbors:g}")
    if neighbors and len(ids) <= FEW:
        print("nearest known prompts (neighbours of what was predicted, not the recovered prompt):")
        for path, near in zip(paths, neighbors):
            print(printable(path), *(f"  {c:.3f}  {printable(p)}" for c, p in near), sep="\n")

    # files
    if out:
        write_preds(out, ids=np.array(ids), embeddings=embeddings, targets=targets, groups=groups, run=args.run,
                    checkpoint=sha256(checkpoint)[:16], views=np.array(views))
        print(f"wrote {out} ({len(ids):,} images, views: {', '.join(views)})")
    if args.submission:
        write_submission(args.submission, ids, embeddings, order)
    if table:
        write_neighbors(table, ids, neighbors)
    if args.html:
        report_run(args, meta, paths, names, embeddings, targets, fallback, prompts, neighbors, problems)
    bad = [p for p in problems if p]
    for problem in bad[:BAD_MAX]:
        print(f"{problem}; it got the mean training embedding", file=sys.stderr)
    if len(bad) > BAD_MAX:
        print(f"and {len(bad) - BAD_MAX:,} more unreadable images, {len(bad):,} of {len(ids):,} in all", file=sys.stderr)
    if targets is not None:
        print(f"{'' if args.images else 'val '}cosine {describe((embeddings * targets).sum(1))} (n = {len(ids)}); "
              f"constant baseline {(targets @ fallback).mean():.4f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; nothing was written")
