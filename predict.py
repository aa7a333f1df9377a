"""
Predict prompt embeddings of pictures with a trained run, with test-time augmentation.
Reads runs/NAME/<phase>/best.safetensors and pictures; writes preds/NAME.npz and, if asked, a Kaggle submission.
$ python predict.py                                             # the validation split of the newest finished run, with its cosine
$ python predict.py --tta 2 images/ --run runs/demo/ft --submission submission.csv
$ python predict.py test/ --sample-submission sample_submission.csv --submission submission.csv
"""
import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clean import atomic, read_data, run
from train import Pictures, cosine, find_checkpoint, load_net, pick_precision

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VIEWS = ["image", "mirror"]  # --tta N takes the first N


def read_preds(path):
    """preds/NAME.npz -> dict: ids (N,) str, embeddings float32 (N, 384) unit rows, targets (N, 384) or None, groups (N,) or None, run, views."""
    try:
        with np.load(path, allow_pickle=False) as f:
            preds = {k: f[k] for k in f.files}
        ids, x = preds["ids"], preds["embeddings"]
    except (OSError, ValueError, KeyError, EOFError) as e:
        sys.exit(f"{path}: not a predictions file ({str(e).splitlines()[0] if str(e) else type(e).__name__}); predict.py writes them")
    except Exception as e:  # a damaged zip raises its own kinds
        sys.exit(f"{path}: damaged ({e}); make it again with predict.py")
    if x.ndim != 2 or len(ids) != len(x) or len(set(ids.tolist())) != len(ids) or not np.isfinite(x).all():
        sys.exit(f"{path}: {len(ids)} ids for embeddings of shape {x.shape}; ids must be unique and embeddings finite")
    return {"targets": None, "groups": None, **preds, "run": str(preds.get("run", Path(path).stem)), "views": preds.get("views", np.array([])).tolist()}


def write_preds(path, **arrays):
    with atomic(path) as f:
        np.savez(f, **{k: v for k, v in arrays.items() if v is not None})


def read_sample(path):
    """Kaggle's sample_submission.csv -> image ids in its order. Every image must have its 384 rows together and in order."""
    try:
        rows = [line.split(",")[0] for line in Path(path).read_text().splitlines()[1:] if line]
        pairs = [r.rsplit("_", 1) for r in rows]
        ids = [i for i, e in pairs if e == "0"]
        width = len(rows) // max(1, len(ids))
        if not ids or [f"{i}_{e}" for i in ids for e in range(width)] != rows:
            raise ValueError("rows are not imgId_0, imgId_1, ... image by image")
    except (OSError, ValueError) as e:
        sys.exit(f"--sample-submission {path}: not a sample submission ({e})")
    return ids


def write_submission(path, ids, embeddings, sample=None):
    """Kaggle CSV `imgId_eId,val`: 384 rows an image, images in the order of `sample` (ids), else sorted. Nine digits cost < 1e-8 of cosine."""
    rows = {i: n for n, i in enumerate(ids)}
    order = sample or sorted(ids)
    missing, extra = [i for i in order if i not in rows], sorted(set(ids) - set(order))
    if missing or extra:
        sys.exit(f"--sample-submission: {len(missing)} of its ids have no prediction {missing[:3]}, {len(extra)} predictions are not in it {extra[:3]}")
    with atomic(path, "w") as f:
        f.write("imgId_eId,val\n")
        for i in order:
            f.writelines(f"{i}_{e},{v:.9g}\n" for e, v in enumerate(embeddings[rows[i]].tolist()))


def list_images(items):
    """Files and folders (recursive) -> (ids, paths), sorted. An id is the file name without suffix; where two clash, ids are whole paths."""
    paths = []
    for item in map(Path, items):
        if item.is_dir():
            paths += sorted(p for p in item.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif item.is_file():
            paths.append(item)
        else:
            sys.exit(f"{item}: no such file or folder")
    if not paths:
        sys.exit(f"{', '.join(items)}: no images there ({' '.join(sorted(SUFFIXES))})")
    paths = sorted(dict.fromkeys(paths))
    ids = [p.stem for p in paths]
    clash = {i for i, n in Counter(ids).items() if n > 1}
    return [p.as_posix() if p.stem in clash else p.stem for p in paths], paths


class Readable(Dataset):
    """Pictures, where an unreadable one is a marked row and never a shifted one: -> (uint8 picture, readable?)."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        try:
            return self.pictures[i], True
        except Exception:  # decoders raise whatever they like on hostile bytes
            return torch.zeros(3, self.pictures.size, self.pictures.size, dtype=torch.uint8), False


def render(x, view):
    """One of VIEWS of normalised images (B, 3, S, S)."""
    return x.flip(-1) if view == "mirror" else x


def embed(net, x, views):
    """Images (B, 3, S, S) -> (B, 384): each view's embedding has unit norm, so each has the same say in the average."""
    return F.normalize(torch.stack([net(render(x, v)) for v in views]).mean(0), dim=-1)


def newest_run(root="runs"):
    """The phase folder under runs/ that finished last, by the closing line of its metrics.jsonl."""
    finished = []
    for log in Path(root).glob("*/*/metrics.jsonl"):
        lines = log.read_text().splitlines()
        if lines and '"done": true' in lines[-1] and (log.parent / "best.safetensors").is_file():
            finished.append((log.stat().st_mtime, log.parent))
    if not finished:
        sys.exit(f"{root}/: no finished run there; train one with: python train.py --phase lp, then --phase ft  (or name one with --run)")
    return max(finished)[1]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Predict prompt embeddings of pictures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("images", nargs="*", metavar="IMAGES", help="files or folders; none = the validation split of the run's data, with its cosine")
    p.add_argument("--run", default=None, help="run folder, phase folder or checkpoint; unset = the newest finished run under runs/")
    p.add_argument("--tta", type=int, default=1, help=f"views to average, the first N of: {', '.join(VIEWS)}")
    p.add_argument("--out", default=None, help="predictions file; unset = preds/RUN-PHASE-ttaN.npz, or ...-images-ttaN.npz for IMAGES")
    p.add_argument("--submission", default=None, help="Kaggle CSV to write")
    p.add_argument("--sample-submission", default=None, help="its ids, in its order; unset = sorted ids")
    p.add_argument("--overwrite", action="store_true", help="replace --out and --submission")
    p.add_argument("--batch-size", type=int, default=64, help="images at a time")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    p.add_argument("--precision", choices=["auto", "amp_bf16", "amp", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    return p.parse_args(argv)


def main():
    args = parse_args()
    if not 1 <= args.tta <= len(VIEWS):
        sys.exit(f"--tta {args.tta}: there are {len(VIEWS)} views: {', '.join(VIEWS)}")
    checkpoint = find_checkpoint(args.run or newest_run())
    print(f"run {checkpoint.parent}")
    out = Path(args.out or f"preds/{checkpoint.parent.parent.name}-{checkpoint.parent.name}{'-images' if args.images else ''}-tta{args.tta}.npz")
    for path in filter(None, (out, args.submission)):
        if Path(path).exists() and not args.overwrite:
            sys.exit(f"{path}: already there; choose another name, or replace it with --overwrite")
    sample = read_sample(args.sample_submission) if args.sample_submission else None
    net, meta = load_net(checkpoint)

    # what to predict
    targets = groups = None
    if args.images:
        ids, paths = list_images(args.images)
    else:
        pairs, everything, summary = read_data(meta["data"])
        if summary["hashes"] != meta["data_hashes"]:
            print(f"warning: {meta['data']} has changed since this run was trained on it; its validation rows may have been trained on", file=sys.stderr)
        rows = np.flatnonzero(pairs["split"].to_numpy() == "val")
        paths = [Path(meta["data"]) / p for p in pairs["image"].gather(rows)]
        ids, targets, groups = [p.stem for p in paths], everything[rows], pairs["group"].to_numpy()[rows]

    # each picture decoded once, each view through the tower
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast, _, _ = pick_precision(args.precision, device)
    net.to(device)
    loader = DataLoader(Readable(Pictures(paths, meta["tower"])), args.batch_size, num_workers=args.workers, pin_memory=device.type == "cuda")
    embeddings, bad = [], []
    with torch.inference_mode(), autocast():
        for x, good in tqdm(loader, desc="predict", unit="batch", disable=len(paths) < 64):
            y = embed(net, net.pixels(x.to(device, non_blocking=True)), VIEWS[:args.tta]).cpu()
            y[~good] = F.normalize(torch.tensor(meta["mean_target"]), dim=0)  # the best guess about a picture that cannot be seen
            bad += [paths[len(embeddings) * args.batch_size + i] for i in np.flatnonzero(~good.numpy())]
            embeddings.append(y)
    embeddings = torch.cat(embeddings).numpy()
    for path in bad:
        print(f"{path}: unreadable, got the mean training embedding", file=sys.stderr)

    if args.submission:
        write_submission(args.submission, ids, embeddings, sample)
        print(f"wrote {args.submission} ({len(ids)} images)")
    write_preds(out, ids=np.array(ids), embeddings=embeddings, targets=targets, groups=groups, run=str(checkpoint.parent), views=np.array(VIEWS[:args.tta]))
    print(f"wrote {out} ({len(ids)} images, views: {', '.join(VIEWS[:args.tta])})")
    if targets is not None:
        score = cosine(torch.from_numpy(embeddings), torch.from_numpy(targets))
        print(f"val cosine {score.mean():.4f} ± {score.std() / len(score) ** .5:.4f} (n = {len(score)}); mean vector {meta['baseline']:.4f}")


if __name__ == "__main__":
    run(main)
