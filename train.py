"""
Train an image tower to predict the sentence embedding of the prompt behind a picture: LP-FT (arXiv 2202.10054).
Reads data/NAME (clean.py); writes runs/NAME/<phase>/{best.safetensors, last.pt, metrics.jsonl, curve.png}.
$ python train.py --phase lp                                             # the head, on frozen features computed once
$ python train.py --phase ft                                             # everything, from the lp head
$ python train.py --phase lp --data data/mine --model ViT-L-14-336 --pretrained openai
$ python train.py --phase ft --data data/mine --layer-decay 0.6 --ema 0.9998 --batch-size 32 --accum-freq 4
$ torchrun --standalone --nproc_per_node 4 train.py --phase ft --data data/mine
All randomness is arithmetic: order and flips come from (seed, epoch), the rest from (seed, step), so a resumed run is the same run.
"""
import argparse
import copy
import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clean import atomic, load_encoder, open_rgb, read_data, run

FORMAT = 1
DTYPES = {"amp_bf16": torch.bfloat16, "amp": torch.float16, "fp32": torch.float32}
FREE = {"workers", "resume", "overwrite", "log_every", "save_every", "out", "data", "report_to", "asked", "dry_run"}  # may change on --resume
DEFAULTS = {  # by phase, where neither the command line nor the data folder says otherwise; the README shows the evidence
    "lp": {"lr": 1e-3, "epochs": 30, "batch_size": 256, "warmup": 50, "hflip": 0.0, "mixgen": 0.0, "ema": 0.0},
    "ft": {"lr": 1e-5, "epochs": 3, "batch_size": 64, "warmup": 200, "hflip": 0.0, "mixgen": 0.0, "ema": 0.0},
}


# ------------------------------------------------------------------------------------------------------------ the model

def build_tower(spec):
    """The architecture that a spec describes, random weights. spec: {"model", "kwargs", "image_size", ...} and for open_clip "config".
    -> module, images (B, 3, S, S) -> features (B, D)."""
    if spec["model"].startswith("timm:"):
        return timm_tower(spec["model"][5:], spec["image_size"], spec["kwargs"])
    from open_clip.model import _build_vision_tower  # the visual half alone: no text tower in memory
    tower = _build_vision_tower(spec["config"]["embed_dim"], {**spec["config"]["vision_cfg"], "image_size": spec["image_size"]}, spec["quick_gelu"])
    if not spec.get("proj"):  # pooled features before the contrastive projection: 1024 for L/14, as in the public recipe
        if getattr(tower, "proj", None) is not None:
            tower.proj = None
        for name in ("drop", "proj", "mlp"):  # open_clip's wrapper of a timm tower
            if hasattr(getattr(tower, "head", None), name):
                delattr(tower.head, name)
    return tower


def timm_tower(name, size, kwargs, pretrained=False):
    """A timm backbone for images of `size` pixels, without its classifier; convnets and the like take any size and know no such argument."""
    import timm
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **{"img_size": size, **kwargs} if size else kwargs)
    except TypeError:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)


def resize_positions(state, module):
    """Fit the position embeddings in `state` to a module built for another image size: bicubic over the patch grid, class and
    register tokens kept (open_clip "positional_embedding" (T, D), timm "pos_embed" (1, T, D); square grids). -> state, changed."""
    for key, new in module.state_dict().items():
        old = state.get(key)
        if not key.endswith(("positional_embedding", "pos_embed")) or old is None or old.shape[:-2] != new.shape[:-2] or old.shape == new.shape:
            continue
        sizes = old.shape[-2], new.shape[-2]
        prefix = next((p for p in range(16) if all(n > p and math.isqrt(n - p) ** 2 == n - p for n in sizes)), None)
        if prefix is None:
            continue  # no square grid: load_strict names it
        a, b = (math.isqrt(n - prefix) for n in sizes)
        grid = old[..., prefix:, :].reshape(1, a, a, -1).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, (b, b), mode="bicubic", antialias=True, align_corners=False).permute(0, 2, 3, 1)
        state[key] = torch.cat([old[..., :prefix, :], grid.reshape(*old.shape[:-2], b * b, -1).to(old.dtype)], -2)
    return state


def make_tower(args):
    """Command line -> (tower with its pretrained weights, spec). The spec goes into the checkpoint and is all that predict.py needs."""
    spec = {"model": args.model, "pretrained": args.pretrained, "kwargs": parse_kwargs(args.model_kwargs), "proj": args.proj}
    optional = ("classifier.", "fc.", "head.") if args.proj else ("proj", "classifier.", "fc.", "head.")
    file = args.pretrained if Path(args.pretrained).is_file() else None
    if args.model.startswith("timm:"):
        import timm
        try:
            tower = timm_tower(args.model[5:], args.image_size, spec["kwargs"])
        except (RuntimeError, TypeError) as e:
            sys.exit(f"--model {args.model} {' '.join(args.model_kwargs)}: {str(e).splitlines()[0]}; names: timm.list_models()")
        norm = timm.data.resolve_model_data_config(tower)
        size = args.image_size or norm["input_size"][-1]
        spec |= {"mean": norm["mean"], "std": norm["std"], "interpolation": norm["interpolation"]}
        if not file and args.pretrained not in ("none", ""):
            try:
                tower = timm_tower(f"{args.model[5:]}.{args.pretrained}", args.image_size, spec["kwargs"], pretrained=True)
            except Exception as e:
                sys.exit(f"--pretrained {args.pretrained}: neither a file nor a tag of {args.model} that can be loaded ({str(e).splitlines()[0]})")
    else:
        import open_clip
        name = args.model
        if name.endswith(".json"):  # an architecture of your own, in open_clip's format
            if not Path(name).is_file():
                sys.exit(f"--model {name}: no such file")
            open_clip.add_model_config(name)
            name = Path(name).stem
        config = open_clip.get_model_config(name)
        if config is None:
            sys.exit(f"--model {args.model}: not an open_clip model; see open_clip.list_models(), or timm:NAME for a timm backbone")
        tag = {} if file or args.pretrained == "none" else open_clip.get_pretrained_cfg(name, args.pretrained)
        if not tag and not file and args.pretrained != "none":
            sys.exit(f"--pretrained {args.pretrained}: neither a file nor a tag of {name}; tags: {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}")
        norm = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic", **(tag or {})}
        # the OpenAI weights were trained with QuickGELU; the tag knows, the model name alone builds plain GELU
        quick = bool(tag.get("quick_gelu", config.get("quick_gelu", False))) or args.force_quick_gelu
        size = args.image_size or config["vision_cfg"].get("image_size", 224)
        spec |= {"mean": norm["mean"], "std": norm["std"], "interpolation": norm["interpolation"], "quick_gelu": quick,
                 "config": {k: config[k] for k in ("embed_dim", "vision_cfg")}, "image_size": size}
        tower = build_tower(spec)
        if tag:
            try:
                full = open_clip.create_model(name, pretrained=args.pretrained, force_quick_gelu=quick, force_image_size=size)
            except Exception as e:
                sys.exit(f"--pretrained {args.pretrained}: cannot be loaded ({str(e).splitlines()[0]}); give a weights file instead")
            load_strict(tower, full.visual.state_dict(), args.pretrained, optional)
    spec |= {"image_size": size, "mean": list(args.image_mean or spec["mean"]), "std": list(args.image_std or spec["std"])}
    if file:
        state = read_weights(file)
        if any(k.startswith("visual.") for k in state):  # a whole CLIP: take the visual half
            state = {k[7:]: v for k, v in state.items() if k.startswith("visual.")}
        load_strict(tower, resize_positions(state, tower), file, optional)
    return tower, spec


def parse_kwargs(items):
    kwargs = {}
    for item in items:
        key, found, value = item.partition("=")
        if not found:
            sys.exit(f"--model-kwargs {item}: must be key=value")
        try:
            kwargs[key] = json.loads(value)
        except ValueError:
            kwargs[key] = value
    return kwargs


def read_weights(path):
    """A safetensors or state-dict file -> {name: tensor}. Never unpickles code."""
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {k.removeprefix("module."): v for k, v in state.items()}
    except Exception as e:
        sys.exit(f"{path}: not a safetensors or plain state-dict file ({str(e).splitlines()[0][:120]})")


def load_strict(module, state, name, optional=()):
    """load_state_dict that says what is wrong in one line; `optional` prefixes may be in the file without being in the module."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in wanted and not k.startswith(optional)]
    shape = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if missing or extra or shape:
        sys.exit(f"{name}: does not fit the model: {len(missing)} missing {missing[:3]}, {len(extra)} unexpected {extra[:3]}, {len(shape)} of another shape {shape[:3]}")
    module.load_state_dict({k: state.get(k, wanted[k]) for k in wanted})


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, as one process would see them. torch's SyncBatchNorm refuses CPUs, where tests run."""

    def forward(self, x):  # (B, D)
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        x, world = x.float(), dist.get_world_size()
        mean = all_reduce(x.mean(0)) / world  # differentiable: the gradient is reduced too
        var = all_reduce((x - mean).square().mean(0)) / world
        with torch.no_grad():
            n = len(x) * world
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Net(nn.Module):
    """tower -> head -> unit-norm embedding. uint8 or normalised float images (B, 3, S, S) -> (B, 384)."""

    def __init__(self, tower, spec, head="linear", width=16, dim=384):
        super().__init__()
        self.tower = tower
        with torch.no_grad():  # the pooled width is not always what a config says
            features = tower.eval()(torch.zeros(1, 3, spec["image_size"], spec["image_size"])).shape[-1]
        if head == "linear":
            self.head = nn.Linear(features, dim)
        else:
            self.head = nn.Sequential(nn.Linear(features, width * 1024), SharedBatchNorm(width * 1024), nn.ReLU(), nn.Linear(width * 1024, dim))
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.register_buffer("mean", torch.tensor(spec["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec["std"]).view(3, 1, 1), persistent=False)

    def pixels(self, x):
        return (x.float() / 255 - self.mean) / self.std  # uint8 over the bus, float on the device

    def forward(self, x):
        return self.embed(self.tower(self.pixels(x) if x.dtype == torch.uint8 else x))

    def embed(self, features):
        return F.normalize(self.head(features).float(), dim=-1)


def depths(net):
    """{parameter name: depth}: 0 the stem, then one per block, the head last. Layer decay and --unfreeze-from count in these; a norm
    after the last block belongs to it. Blocks come from timm's own group_matcher, for open_clip's towers from their names."""
    tower, prefix = (net.tower.trunk, "tower.trunk.") if hasattr(net.tower, "trunk") else (net.tower, "tower.")
    if hasattr(tower, "group_matcher"):
        from timm.models import group_parameters
        found = group_parameters(tower, tower.group_matcher(coarse=False), reverse=True)
    else:
        found, blocks = {}, {}
        names = [n for n, _ in tower.named_parameters()]
        for name in names:  # ViT: transformer.resblocks.7. · ResNet: layer3.5.
            block = re.match(r"transformer\.resblocks\.\d+\.|layer\d+\.\d+\.", name)
            if block:
                blocks.setdefault(block[0], len(blocks) + 1)
            found[name] = blocks[block[0]] if block else len(blocks)
        if not blocks:
            sys.exit(f"{type(tower).__name__}: its blocks are not known, so there is no --layer-decay or --unfreeze-from for it")
    rank = {d: i for i, d in enumerate(sorted(set(found.values())))}
    found = {prefix + n: rank[d] for n, d in found.items()}
    last = max(found.values())
    return {n: last + 1 if n.startswith("head.") else found.get(n, last) for n, _ in net.named_parameters()}


def param_groups(net, lr, wd, decay=1.0, unfreeze_from=0, head_only=False):
    """AdamW groups, one per depth and weight decay: lr * decay ** (distance from the head); matrices decay, biases and norms do not.
    Depths below unfreeze_from are frozen (no gradient, no group)."""
    depth = depths(net) if decay != 1 or unfreeze_from else {n: int(n.startswith("head.")) for n, _ in net.named_parameters()}
    top, groups = max(depth.values()), {}
    if not 0 <= unfreeze_from <= top:
        sys.exit(f"--unfreeze-from {unfreeze_from}: this tower has depths 0 (the stem) to {top} (the head)")
    for name, p in net.named_parameters():
        d = depth[name]
        p.requires_grad_(d == top if head_only else d >= unfreeze_from)
        if p.requires_grad:
            group = {"depth": d, "peak": lr * decay ** (top - d), "weight_decay": wd if p.ndim > 1 else 0.0, "params": []}
            groups.setdefault((d, p.ndim > 1), group)["params"].append(p)
    return [groups[k] for k in sorted(groups)]


def drop_patches(tower, p):
    """FLIP (arXiv 2212.00794): in training a share p of the patches is left out, so a step costs about that much less. ViTs only."""
    inner = getattr(tower, "trunk", tower)
    if hasattr(inner, "patch_dropout"):
        from open_clip.transformer import PatchDropout
        inner.patch_dropout = PatchDropout(p)
    elif hasattr(inner, "patch_drop"):
        from timm.layers import PatchDropout
        inner.patch_drop = PatchDropout(p, num_prefix_tokens=inner.num_prefix_tokens)
    else:
        sys.exit(f"--patch-dropout: {type(inner).__name__} has no patches to drop")


def save_net(net, meta, path):
    """best.safetensors: the weights, and as JSON metadata all it takes to use them."""
    state = {k: v.detach().contiguous().cpu() for k, v in net.state_dict().items()}
    with atomic(path) as f:
        save_file(state, f.name, metadata={"config": json.dumps(meta)})


def find_checkpoint(path):
    """A checkpoint file, a phase folder or a run folder (ft before lp) -> path of best.safetensors. Exits with one line where there is none."""
    path = Path(path)
    for p in (path, path / "best.safetensors", path / "ft/best.safetensors", path / "lp/best.safetensors"):
        if p.is_file():
            return p
    sys.exit(f"{path}: no checkpoint there (best.safetensors); train one with: python train.py --phase lp")


def load_net(path, image_size=None):
    """A checkpoint that save_net wrote -> (Net in eval mode, meta). No flags: it describes itself. image_size: pixels other than those it was
    trained at; position embeddings are resized, and meta["tower"]["image_size"] says so. Exits with one line on what is no such checkpoint."""
    path = find_checkpoint(path)
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {}).get("config", "{}"))
            state = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError, ValueError) as e:
        sys.exit(f"{path}: not a readable checkpoint ({str(e).splitlines()[0]}); train it again")
    if meta.get("format") != FORMAT:
        sys.exit(f"{path}: not a checkpoint of train.py (format {meta.get('format')}, expected {FORMAT})")
    try:
        meta["tower"]["image_size"] = image_size or meta["tower"]["image_size"]
        net = Net(build_tower(meta["tower"]), meta["tower"], **meta["head"])
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as e:
        sys.exit(f"{path}: describes no model that can be built here at {image_size or 'its own'} px ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})")
    load_strict(net, resize_positions(state, net), path)
    return net.eval(), meta


# ------------------------------------------------------------------------------------------------------------- the data

class BadPicture(Exception):
    """A picture that clean.py could read and we cannot."""


class Pictures(Dataset):
    """Pictures as the tower wants them: short side to S, centre crop. -> uint8 tensor (3, S, S)."""

    def __init__(self, paths, spec):
        self.paths, self.size = paths, spec["image_size"]
        self.filter = {"bilinear": Image.BILINEAR, "nearest": Image.NEAREST, "lanczos": Image.LANCZOS}.get(spec["interpolation"], Image.BICUBIC)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return to_square(open_rgb(self.paths[i]), self.size, self.filter)
        except Exception as e:  # decoders raise whatever they like; a training row is never replaced by another
            raise BadPicture(f"{self.paths[i]}: unreadable ({e}); make the data folder again with clean.py --overwrite") from None


def to_square(image, size, resample):
    """PIL image -> uint8 tensor (3, size, size): short side to `size`, centre crop."""
    w, h = image.size
    if (w, h) != (size, size):
        if max(w, h) > 4 * min(w, h):  # a banner: enlarging what the crop throws away could take gigabytes
            w, h = min(w, 2 * h), min(h, 2 * w)
            image = image.crop((left := (image.width - w) // 2, top := (image.height - h) // 2, left + w, top + h))
        scale = size / min(w, h)
        image = image.resize((max(size, round(w * scale)), max(size, round(h * scale))), resample)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class TrainPairs(Dataset):
    """(row, flip) -> what collate stacks. The plan of the run says which rows and which flips, so workers and resume change nothing."""

    def __init__(self, pictures, targets, prompts):
        self.pictures, self.targets, self.prompts = pictures, targets, prompts

    def __getitem__(self, item):
        row, flip = item
        return self.pictures[row], self.targets[row], flip, self.prompts[row], row


def collate(items, mixed=0, tokenize=None):
    """-> pictures, targets, flips, tokens of the prompts that MixGen joins (tokenised here, in the loader's workers) or None, rows."""
    pictures, targets, flips, prompts, rows = zip(*items)
    tokens = dict(tokenize([f"{a} {b}" for a, b in zip(prompts[:mixed], prompts[mixed:2 * mixed])])) if mixed else None
    return torch.stack(pictures), torch.from_numpy(np.stack(targets)), torch.tensor(flips, dtype=torch.bool), tokens, torch.tensor(rows)


def ignore_signals(_):
    """Loader workers leave Ctrl-C to the parent, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def mixgen(images, targets, joined, lam=0.5):
    """MixGen (arXiv 2206.08358, alg. 1): the first m images become blends with the next m, and their targets the embeddings of the
    joined prompts. images (B, 3, H, W) normalised, targets (B, 384), joined (m, 384), m <= B/2; rows m.. stay."""
    m = len(joined)
    mixed = torch.lerp(images[m:2 * m], images[:m], lam)  # the batch is shuffled, so row i + m is a random partner
    return torch.cat([mixed, images[m:]]), torch.cat([joined, targets[m:]])


def extract_features(net, spec, data, paths, views, args, device, dtype, rank, world):
    """Frozen tower features of every row, computed once: memmap (views, N, D), float16 where computed in 16 bits; view 1 is the mirror image.
    Cached by tower, weights, transform and data. Whole batches are shared out over the processes, so their number changes no byte."""
    digest = hashlib.sha256(json.dumps([spec, data, len(paths), views, str(dtype)], sort_keys=True).encode())
    for name, tensor in sorted(net.tower.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    file = Path(args.out).parent / f".features/{digest.hexdigest()[:32]}.npy"
    if not file.is_file():
        # cast once, not by autocast at every batch; BatchNorm statistics do not survive 16 bits
        tower = copy.deepcopy(net.tower).to(device, dtype, memory_format=torch.channels_last).eval()
        for layer in tower.modules():
            if isinstance(layer, _BatchNorm):
                layer.float()
        if args.compile:
            tower.compile()
        rows = [list(range(i, min(i + args.batch_size, len(paths)))) for i in range(0, len(paths), args.batch_size)][rank::world]
        loader = DataLoader(Pictures(paths, spec), batch_sampler=rows, num_workers=args.workers, pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
                            generator=torch.Generator())
        store = np.float32 if dtype == torch.float32 else np.float16
        part = file.with_suffix(".part")
        if rank == 0:
            part.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(part, "w+", store, (views, len(paths), next(net.head.parameters()).shape[1])).flush()
        wait(world)
        out = np.load(part, mmap_mode="r+")
        with torch.inference_mode():
            for i, x in zip(rows, tqdm(loader, desc="features", unit="batch", disable=rank > 0)):
                x = net.pixels(x.to(device, non_blocking=True)).to(dtype, memory_format=torch.channels_last)
                for view in range(views):
                    features = tower(x.flip(-1) if view else x).float().cpu().numpy().astype(store)
                    if not np.isfinite(features).all():
                        sys.exit(f"{paths[i[int(np.argmin(np.isfinite(features).all(1)))]]}: its features are not finite; wrong --pretrained? else try --precision fp32")
                    out[view, i] = features
        out.flush()
        wait(world)
        if rank == 0:
            os.replace(part, file)
        wait(world)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def ridge(features, targets, val_features, val_targets, block=65536):
    """Ridge regression in closed form: features [(N, D), ...] one per view, targets (N, E) -> weight (E, D), bias (E,), lambda, cosine on val.
    One eigendecomposition of the covariance serves the whole grid of lambdas."""
    def blocks():
        for x in features:
            for i in range(0, len(x), block):
                yield torch.from_numpy(np.asarray(x[i:i + block], np.float64)), torch.from_numpy(targets[i:i + block]).double()

    n = len(targets) * len(features)
    mean_x, mean_y = sum(x.sum(0) for x, _ in blocks()) / n, sum(y.sum(0) for _, y in blocks()) / n
    xx, xy = sum((x - mean_x).T @ (x - mean_x) for x, _ in blocks()), sum((x - mean_x).T @ (y - mean_y) for x, y in blocks())
    values, vectors = torch.linalg.eigh(xx)
    xy = vectors.T @ xy  # (D, E) in the eigenbasis
    x, y = (torch.from_numpy(np.asarray(val_features, np.float64)) - mean_x) @ vectors, torch.from_numpy(val_targets)
    scores = {}
    for lam in (values.mean() * torch.logspace(-5, 3, 25, dtype=torch.float64)).tolist():
        scores[lam] = cosine(F.normalize(x @ (xy / (values + lam)[:, None]) + mean_y, dim=-1), y).mean().item()
    lam = max(scores, key=scores.get)
    weight = (vectors @ (xy / (values + lam)[:, None])).T
    return weight.float(), (mean_y - weight @ mean_x).float(), lam, scores[lam]


# --------------------------------------------------------------------------------------------------------- optimisation

def lr_at(step, total, warmup):
    """Linear warm-up, then cosine to zero: the factor on --lr, a pure function of the step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def ema_at(step, decay):
    """EMA decay at a step: rises to `decay`, so that a short run does not average over its start."""
    return min(decay, (1 + step) / (10 + step))


def cosine(predicted, targets):
    return (predicted.float() * targets.float()).sum(-1)


def pick_precision(name, device, net=None):
    """-> (autocast context factory, GradScaler, name). auto: bf16 where the hardware has it, else fp16 on a GPU, float32 on a CPU;
    float32 too for depthwise convolutions on a CPU, which are slower in bf16 (MobileNetV2: by a third)."""
    if name == "auto":
        if device.type == "cuda":
            name = "amp_bf16" if torch.cuda.get_device_capability()[0] >= 8 else "amp"
        else:
            flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
            depthwise = net is not None and any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in net.modules())
            name = "amp_bf16" if ("avx512_bf16" in flags or "amx_bf16" in flags) and not depthwise else "fp32"
    dtype = DTYPES[name]
    return (lambda: torch.autocast(device.type, dtype, enabled=name != "fp32")), torch.amp.GradScaler(device.type, enabled=name == "amp"), name


def hold_memory(device):
    """On a CPU, have glibc keep what it was given: it maps and unmaps every large activation anew, and the page faults cost more than
    the arithmetic (MobileNetV2 at 224 px, two cores: forward 32 -> 124 images/s, training 16 -> 30)."""
    if device.type == "cpu" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def wait(world):
    if world > 1:
        dist.barrier()


def add_up(values, world, device):
    """Sums of numbers over all processes -> list."""
    x = torch.tensor(values, dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(x)
    return x.tolist()


def agree(stopping, saving, world):
    """The largest of every process's flags: all stop after the same step. On the host, so nothing waits for the GPU."""
    flags = torch.tensor([stopping, saving], dtype=torch.int64)
    if world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()


def memory(device):
    """Peak GiB so far: of the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check_finite(recent, names, world):
    """recent: [(step, rows, cosines, gradient norm), ...] since the last look. Exits on every process, with the first bad step and its pictures.
    Looks are rare because they wait for the device; the optimiser has skipped a bad step by itself, so nothing is lost in between."""
    bad = [(step, [names[i] for i in rows[~torch.isfinite(cos).cpu()].tolist()])
           for step, rows, cos, norm in recent if not (torch.isfinite(cos).all() and torch.isfinite(norm))]
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, bad)
        bad = sum(found, [])
    if bad:
        step = min(bad)[0]
        ids = sorted({i for s, pictures in bad if s == step for i in pictures})
        what = f"the loss of {', '.join(ids[:8])} is not finite" if ids else "the gradient is not finite, though every loss is"
        sys.exit(f"step {step}: {what}; stopped before the update, and the checkpoints on disk are good. Mend the data, lower --lr, or try --precision fp32; then --resume")


def draw_curve(file, out, baseline):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    fig, ax = plt.subplots(figsize=(7, 4))
    for key, style in (("train_cosine", {"alpha": .5}), ("val_cosine", {"marker": "."})):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            ax.plot(*zip(*points), label=key.replace("_", " "), **style)
    ax.axhline(baseline, color="gray", ls="--", label="mean vector")
    ax.set_xlabel("step")
    ax.set_ylabel("mean cosine")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    with atomic(out) as f:
        fig.savefig(f, format="png", dpi=120)
    plt.close(fig)


def open_report(name, folder, args):
    """--report-to -> a function that takes one row of metrics.jsonl. The package is imported here, when it is wanted."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder)
            return lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items() if k != "step"] and writer.flush()
        if name == "wandb":
            import wandb
            wandb.init(project="image2prompt", dir=folder, name=str(folder), config=vars(args))
            return lambda row: wandb.log(row, step=row["step"])
    except ImportError:
        sys.exit(f"--report-to {name}: not installed; pip install {name}")
    return lambda row: None


def describe(net, groups, spec, args, device, autocast):
    """--dry-run: what will be trained, at what lr, and what a step costs."""
    from torch.utils.flop_counter import FlopCounterMode
    for g in groups:
        print(f"  depth {g['depth']:>3} · lr {g['peak']:.2e} · weight decay {g['weight_decay']:g} · {sum(p.numel() for p in g['params']):>12,} parameters")
    net.eval()

    def images(n):
        return torch.zeros(n, 3, spec["image_size"], spec["image_size"], dtype=torch.uint8, device=device)

    def kept(n):
        """Bytes that autograd keeps for the backward pass of n images, by storage: saved twice is stored once."""
        found = {}

        def keep(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast():
            net.forward(images(n)).sum()
        return sum(found.values())
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        net.forward(images(1))
    once, per_image = 2 * kept(1) - kept(2), kept(2) - kept(1)  # what does not grow with the batch are weights, cast or not
    activations = max(0, once) + per_image * args.batch_size
    trained = sum(p.numel() for g in groups for p in g["params"])
    state = 4 * (sum(p.numel() for p in net.parameters()) * (2 if args.ema else 1) + 3 * trained)  # weights, EMA; gradient and two moments
    print(f"  {flops.get_total_flops() / 1e9:.2f} GFLOP per image forward ({3 + args.grad_checkpointing} times that to train) · memory, estimated: "
          f"{state / 2**30:.2f} GiB weights and optimiser + {activations / 2**30:.2f} GiB activations at --batch-size {args.batch_size}")


# ----------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Train an image tower to predict prompt embeddings, LP-FT.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--phase", choices=["lp", "ft"], required=True, help="lp: the head on frozen features; ft: everything, from the lp head")
    p.add_argument("--data", default="data/demo", help="folder written by clean.py")
    p.add_argument("--out", default=None, help="run folder; unset = runs/ and the name of the data folder")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier run of this phase")
    p.add_argument("--resume", action="store_true", help="go on from last.pt")
    p.add_argument("--init", default=None, metavar="PATH", help="ft: checkpoint or run to start from; unset = the lp phase of --out, none = a cold start")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, data order and augmentation")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    p.add_argument("--dry-run", action="store_true", help="print the model, every group's lr, FLOPs and memory, run one step, write nothing")
    g = p.add_argument_group("model (ft takes it from its start)")
    g.add_argument("--model", default=None, help="open_clip name, timm:NAME, or an open_clip .json; unset = what the data folder recommends (ViT-L-14; the demo: a small one)")
    g.add_argument("--pretrained", default=None, help="open_clip or timm tag, a weights file, or none; unset = what the data folder recommends (openai)")
    g.add_argument("--model-kwargs", nargs="*", default=[], metavar="K=V", help="extra arguments of the timm model")
    g.add_argument("--force-quick-gelu", action="store_true", help="for OpenAI-style weights files without a tag")
    g.add_argument("--proj", action="store_true", help="features after the contrastive projection instead of before")
    g.add_argument("--image-size", type=int, default=None, help="pixels; unset = the tower's own; ft may use more than lp")
    g.add_argument("--image-mean", type=float, nargs=3, default=None, help="unset = the tower's own")
    g.add_argument("--image-std", type=float, nargs=3, default=None, help="unset = the tower's own")
    g.add_argument("--head", choices=["linear", "mlp"], default=None, help="unset = linear; mlp: 1024 --head-width wide, BatchNorm, ReLU")
    g.add_argument("--head-width", type=int, default=16, help="of the mlp head, in units of 1024")
    g.add_argument("--head-init", choices=["xavier", "ridge"], default=None, help="lp: ridge, for a linear head, starts from the closed form; unset = ridge where it can be")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=None, help=unset("epochs"))
    g.add_argument("--batch-size", type=int, default=None, help=f"of one micro-batch on one device; {unset('batch_size')}")
    g.add_argument("--accum-freq", type=int, default=1, help="micro-batches per step; raise it when you lower --batch-size")
    g.add_argument("--lr", type=float, default=None, help=f"peak learning rate; {unset('lr')}")
    g.add_argument("--wd", type=float, default=0.01, help="weight decay of matrices; biases and norms have none")
    g.add_argument("--warmup", type=int, default=None, help=f"steps, at most a fifth of the run; {unset('warmup')}")
    g.add_argument("--grad-clip-norm", type=float, default=1.0, help="0 = off")
    g.add_argument("--hflip", type=float, default=None, metavar="P", help=f"probability of a mirror image; {unset('hflip')}")
    g.add_argument("--precision", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where the hardware has it")
    g.add_argument("--compile", action="store_true", help="torch.compile, in place; pays off from some hundred steps on")
    g = p.add_argument_group("ft")
    g.add_argument("--mixgen", type=float, default=None, metavar="FRACTION", help=f"of a batch that MixGen blends, at most 0.5; {unset('mixgen')}")
    g.add_argument("--layer-decay", type=float, default=1.0, help="factor on the lr per block, from the head down; the medals used 0.4 to 0.6")
    g.add_argument("--unfreeze-from", type=int, default=0, metavar="DEPTH", help="freeze what lies below this depth (0 the stem, then one per block; --dry-run lists them)")
    g.add_argument("--ema", type=float, default=None, metavar="DECAY", help=f"average of the weights, validated and saved too; 0.9998 for long runs; {unset('ema')}")
    g.add_argument("--wise", type=float, default=None, metavar="ALPHA", help="validate and save (1 - ALPHA) start + ALPHA trained too (WiSE-FT, arXiv 2109.01903)")
    g.add_argument("--freeze-bn", action=argparse.BooleanOptionalAction, default=None, help="keep the tower's BatchNorm statistics; unset = for pretrained towers")
    g.add_argument("--patch-dropout", type=float, default=0.0, metavar="P", help="share of the patches left out in training")
    g.add_argument("--grad-checkpointing", action="store_true", help="a third more time, far less memory")
    g = p.add_argument_group("watching")
    g.add_argument("--log-every", type=int, default=20, help="steps")
    g.add_argument("--save-every", type=float, default=5, help="minutes between writes of last.pt")
    g.add_argument("--report-to", choices=["tensorboard", "wandb"], default=None, help="besides metrics.jsonl")
    return p.parse_args(argv)


def unset(key):
    return f"unset = {DEFAULTS['lp'][key]:g} for lp, {DEFAULTS['ft'][key]:g} for ft"


def fill_defaults(args, summary):
    """Command line > what the data folder recommends > DEFAULTS; then everything cheap is checked. -> the folder of the phase"""
    args.asked = args.model
    advice = summary["recommend"] if args.model in (None, summary["recommend"]["model"]) else {}
    for key, value in {**DEFAULTS[args.phase], **{k: v for k, v in advice.items() if not isinstance(v, dict)}, **advice.get(args.phase, {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.pretrained = args.pretrained or "openai"
    args.out = str(Path(args.out or f"runs/{Path(args.data).resolve().name}"))
    for name, low, high in (("mixgen", 0, 0.5), ("hflip", 0, 1), ("layer_decay", 1e-6, 1), ("ema", 0, 0.999999), ("patch_dropout", 0, 0.99), ("wise", 0, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            sys.exit(f"--{name.replace('_', '-')} {value}: must be in [{low}, {high}]" + (" (arXiv 2206.08358: M <= B/2)" if name == "mixgen" else ""))
    for name, low in (("batch_size", 2), ("epochs", 1), ("accum_freq", 1), ("workers", 0), ("seed", 0), ("warmup", 0), ("log_every", 1), ("head_width", 1), ("image_size", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    if not 0 < args.lr < math.inf:
        sys.exit(f"--lr {args.lr}: must be above 0")
    if args.head_init == "ridge" and (args.phase == "ft" or args.head == "mlp"):
        sys.exit("--head-init ridge: is for --phase lp with --head linear")
    args.head_init = args.head_init or ("ridge" if args.phase == "lp" and args.head != "mlp" else "xavier")
    phase = Path(args.out) / args.phase
    if (phase / "metrics.jsonl").exists() and not (args.overwrite or args.resume or args.dry_run):
        sys.exit(f"{phase}: a run is already there; --resume it, --overwrite it, or choose another --out")
    if args.resume and args.overwrite:
        sys.exit("--resume --overwrite: one of them, please; --overwrite starts again")
    if args.resume and not (phase / "last.pt").is_file():
        sys.exit(f"{phase}: nothing to resume there (no last.pt)")
    return phase


def load_last(path, args, same):
    """last.pt -> dict. Refuses one that is damaged or belongs to other settings, other data or another number of processes (`same`)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = [f"--{k.replace('_', '-')} {v}" for k, v in state["args"].items() if k not in FREE and getattr(args, k, None) != v]
        changed += [f"{k} {v}" for k, v in state["same"].items() if same[k] != v]
    except Exception as e:
        sys.exit(f"{path}: not a readable checkpoint ({str(e).splitlines()[0][:120]}); start again with --overwrite")
    if changed:
        sys.exit(f"{path}: was made with other settings: {', '.join(changed)}")
    return state


def main():
    args = parse_args()
    pairs, targets, summary = read_data(args.data)
    phase = fill_defaults(args, summary)
    lp = args.phase == "lp"
    if pairs["image"].null_count():
        sys.exit(f"{args.data}: has no images (made with --text-only)")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that half-written files go away
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    hold_memory(device)
    if world > 1:  # gloo carries the flags of the hosts, so that agreeing does not wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    torch.manual_seed(args.seed)
    if args.overwrite and rank == 0 and not args.dry_run:
        shutil.rmtree(phase, ignore_errors=True)

    # rows: order in the arrays is the order of pairs.parquet, without the guard rows
    used = np.flatnonzero(pairs["split"].to_numpy() != "guard")
    pairs, targets = pairs[used], np.array(targets[used])
    split, names, prompts = pairs["split"].to_numpy(), pairs["image"].to_list(), pairs["prompt"].to_list()
    train, held = np.flatnonzero(split == "train"), {s: np.flatnonzero(split == s) for s in ("val", "ood") if (split == s).any()}
    batch = args.batch_size * args.accum_freq * (1 if lp else world)  # lp trains on one process: only the features are shared out
    if len(train) < batch or "val" not in held:
        sys.exit(f"{args.data}: {len(train)} training and {len(held.get('val', []))} validation rows; need at least {batch} (--batch-size times --accum-freq times processes) and 1")
    mean = torch.from_numpy(targets[train].mean(0))
    baseline = {s: cosine(F.normalize(mean, dim=0), torch.from_numpy(targets[rows])).mean().item() for s, rows in held.items()}

    # the net: ft takes everything from its start
    if lp or args.init == "none":
        tower, spec = make_tower(args)
        head = {"head": args.head or "linear", "width": args.head_width, "dim": targets.shape[1]}
        net = Net(tower, spec, **head)
    else:
        start = args.init or Path(args.out) / "lp"
        if not args.init and not (start / "best.safetensors").is_file():
            sys.exit(f"{start}: no lp phase to start from; run: python train.py --phase lp --data {args.data} --out {args.out}  (or --init PATH)")
        net, meta = load_net(start, args.image_size)
        spec, head = meta["tower"], meta["head"]
        if meta["text_model"] != summary["text_model"]:
            sys.exit(f"{start}: was trained for {meta['text_model']['name']} targets, but {args.data} has {summary['text_model']['name']}")
        if args.asked not in (None, spec["model"]) or args.head not in (None, head["head"]):
            sys.exit(f"{start}: holds {spec['model']} with a {head['head']} head; leave --model and --head out, or train that lp first")
    autocast, scaler, args.precision = pick_precision(args.precision, device, net.tower)
    meta = {"format": FORMAT, "phase": args.phase, "tower": spec, "head": head, "text_model": summary["text_model"], "data": args.data, "data_hashes": summary["hashes"],
            "baseline": baseline["val"], "n_val": len(held["val"]), "mean_target": mean.tolist(), "seed": args.seed}
    net.to(device, memory_format=torch.channels_last)
    paths = [str(Path(args.data) / n) for n in names]

    # lp works on cached features, and alone; ft on pictures
    encoder, ema, forward, kinds = None, None, net, ["raw"]
    groups = param_groups(net, args.lr, args.wd, args.layer_decay, args.unfreeze_from, head_only=lp)
    params = [p for g in groups for p in g["params"]]
    if lp:
        if args.dry_run:
            features = np.zeros((2, len(paths), next(net.head.parameters()).shape[1]), np.float32)
        else:
            features = extract_features(net, spec, summary["hashes"], paths, 1 + (args.hflip > 0), args, device, DTYPES[args.precision], rank, world)
        if world > 1:
            dist.destroy_process_group()
        if rank > 0:
            return
        world = 1
        if args.head_init == "ridge" and not (args.resume or args.dry_run):
            weight, bias, lam, score = ridge([f[train] for f in features], targets[train], features[0, held["val"]], targets[held["val"]])
            scale = net.head.weight.std().item() / weight.std().item()  # the cosine does not see it, Adam does: its steps have a size of their own
            net.head.load_state_dict({"weight": weight * scale, "bias": bias * scale})
            print(f"ridge head: lambda {lam:.3g} of 25 by val cosine, {score:.4f}")
    else:
        pictures = Pictures(paths, spec)
        if args.mixgen > 0:
            encoder = load_encoder(summary["text_model"]["name"], device)[0]
        if args.patch_dropout:
            drop_patches(net.tower, args.patch_dropout)
        if args.grad_checkpointing:
            net.tower.set_grad_checkpointing(True)
        if args.wise is not None:
            kinds, start_state = [*kinds, "wise"], {k: v.clone() for k, v in net.state_dict().items()}
        if args.ema:
            kinds, ema = [*kinds, "ema"], AveragedModel(net, multi_avg_fn=lambda mean, new, _: torch._foreach_lerp_(mean, new, 1 - ema_at(step, args.ema)))
        if args.compile:
            net.compile()  # in place: wrapping would rename every key of the checkpoint
        if world > 1:
            forward = nn.parallel.DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None)
    if args.dry_run and rank == 0:
        describe(net, groups, spec, args, device, autocast)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)

    # the plan of the run: which rows, mirrored or not, in every micro-batch of every step; a function of (seed, epoch), so resume is arithmetic
    per_epoch = len(train) // batch
    total = args.epochs * per_epoch
    warmup = min(args.warmup, total // 5)

    def plan(step):
        while step < total:
            epoch, done = divmod(step, per_epoch)
            rng = np.random.default_rng((args.seed, epoch))
            order, flip = train[rng.permutation(len(train))], (rng.random(len(names)) < args.hflip).astype(int)
            for i in range(done, per_epoch):
                # dealt like cards: a row and its MixGen partner, M rows on, meet on one device, so any division of the batch mixes the same pairs
                hands = order[i * batch:(i + 1) * batch].reshape(args.batch_size, -1).T
                for rows in hands[rank * args.accum_freq:][:args.accum_freq]:
                    yield list(zip(rows.tolist(), flip[rows].tolist()))
            step += per_epoch - done

    def load(plan, mixed=0):
        """Micro-batches of a plan [[(row, flip), ...], ...]: features in lp, pictures in ft. -> x, targets, flips, MixGen's tokens or None, rows"""
        if not lp:
            tokenize = encoder and partial(encoder.tokenizer, padding=True, truncation=True, max_length=encoder.max_seq_length, return_tensors="pt")
            # its own generator: building an iterator would draw from the global stream and shift dropout after a resume
            yield from DataLoader(TrainPairs(pictures, targets, prompts), batch_sampler=plan, collate_fn=partial(collate, mixed=mixed, tokenize=tokenize),
                                  num_workers=args.workers, pin_memory=device.type == "cuda", worker_init_fn=ignore_signals, generator=torch.Generator())
        for items in plan if lp else ():
            rows, flip = np.array(items).T
            yield torch.from_numpy(features[flip, rows]).float(), torch.from_numpy(targets[rows]), None, None, torch.from_numpy(rows)

    def evaluate(model):
        """-> {split: mean cosine}, rows shared out over the processes."""
        model.eval()
        scores = {}
        for name, rows in held.items():
            mine = rows[rank::world].tolist()
            chunks = [[(i, 0) for i in mine[at:at + args.batch_size]] for at in range(0, len(mine), args.batch_size)]
            with torch.inference_mode(), autocast():
                cos = [cosine(model.embed(x.to(device)) if lp else model(x.to(device)), y.to(device)) for x, y, *_ in load(chunks)]
            total_cos, n = add_up([torch.cat(cos).double().sum().item() if cos else 0.0, len(mine)], world, device)
            scores[name] = total_cos / n
        return scores

    # a resumed run is the same run
    log, step, best, seen, best_head = phase / "metrics.jsonl", 0, {}, [], None
    same = {"processes": world, "data": summary["hashes"]}
    if args.resume:
        state = load_last(phase / "last.pt", args, same)
        (net.head if lp else net).load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.load_state_dict(state["ema"])
        step, best, seen, best_head = state["step"], state["best"], [x.to(device) for x in state["seen"]], state["best_head"]
        if rank == 0:
            kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
            with atomic(log, "w") as f:
                f.write("".join(f"{line}\n" for line in kept))

    def save_last():
        with atomic(phase / "last.pt") as f:
            torch.save({"net": (net.head if lp else net).state_dict(), "ema": ema and ema.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                        "step": step, "best": best, "best_head": best_head, "seen": [x.cpu() for x in seen], "args": vars(args), "same": same}, f)

    def note(**row):
        if rank == 0:
            with open(log, "a") as f:
                f.write(json.dumps(row) + "\n")
            report(row)

    def training():
        net.train()
        for layer in net.tower.modules():  # a pretrained tower's BatchNorm keeps its statistics: the README has the evidence
            if lp or isinstance(layer, _BatchNorm) and (spec["pretrained"] != "none" if args.freeze_bn is None else args.freeze_bn):
                layer.eval()

    def validate():
        nonlocal best_head, drawn
        row = {"step": step, "epoch": round(step / per_epoch, 3)}
        for kind in kinds:
            if kind == "wise":
                trained = {k: v.clone() for k, v in net.state_dict().items()}
                net.load_state_dict({k: torch.lerp(start_state[k], v, args.wise) if v.is_floating_point() else v for k, v in trained.items()})
            model, tail = ema.module if kind == "ema" else net, "" if kind == "raw" else f"_{kind}"
            scores = evaluate(model)
            row |= {f"{split}_cosine{tail}": score for split, score in scores.items()}
            if scores["val"] > best.get(kind, -1.0):  # strictly better, and never NaN; ood is only looked at
                first, best[kind] = scores["val"] > max(best.values(), default=-1.0), scores["val"]
                about = {**meta, "weights": kind, "step": step, **{f"{split}_cosine": score for split, score in scores.items()}}
                if lp:  # the whole tower is written once, at the end or when stopped
                    best_head = {"state": {k: v.cpu().clone() for k, v in net.head.state_dict().items()}, "about": about}
                elif rank == 0:
                    for file in ["best.safetensors"] * first + [f"best-{kind}.safetensors"] * (len(kinds) > 1):
                        save_net(model, about, phase / file)
            if kind == "wise":
                net.load_state_dict(trained)
        note(**row)
        due = time.time() - drawn > 3 or step == total
        if rank == 0 and (due or not lp):  # lp epochs take a moment: not every one is worth a line and a picture
            scores = " · ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items() if "cosine" in k)
            print(f"step {step:,} ({step / total:.0%}) · {scores} · best {max(best.values(), default=-1):.4f} ({levels})", flush=True)
        if rank == 0 and due:
            draw_curve(log, phase / "curve.png", baseline["val"])
            drawn = time.time()
        training()
        return row["val_cosine"]

    def write_head():
        kept = {k: v.clone() for k, v in net.head.state_dict().items()}
        net.head.load_state_dict(best_head["state"])
        save_net(net, best_head["about"], phase / "best.safetensors")
        net.head.load_state_dict(kept)

    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, _: stop.append(number))  # finish the step, save, say how to go on
    levels = "; ".join(f"{s}: n = {len(held[s])}, mean vector {baseline[s]:.4f}" for s in held)
    if rank == 0:
        act = "" if "quick_gelu" not in spec else ", QuickGELU" if spec["quick_gelu"] else ", GELU"
        print(f"{args.phase}: {spec['model']} ({spec['pretrained']}{act}), {spec['image_size']} px, {head['head']} head, {sum(p.numel() for p in params):,} parameters trained, "
              f"{len(train):,} train rows, {total:,} steps of {batch}{f' on {world} processes' if world > 1 else ''}, {args.precision} on {device.type}\n{levels}", flush=True)
        if not args.dry_run:
            phase.mkdir(parents=True, exist_ok=True)
    report = open_report(args.report_to if rank == 0 and not args.dry_run else None, phase, args)
    drawn, score = 0.0, float("nan")
    training()
    if step == 0 and not args.dry_run:
        score = validate()  # ft starts at the lp score
    source, recent = load(plan(step), int(args.mixgen * args.batch_size)), []
    began = saved = clock = time.perf_counter()
    waited, logged = 0.0, step

    while step < total:
        torch.manual_seed(int(np.random.SeedSequence((args.seed, step, rank)).generate_state(1)[0]))  # dropout is a function of the step: nothing to restore
        factor = lr_at(step, total, warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad(set_to_none=True)
        rows, cosines = [], []
        for micro in range(1, args.accum_freq + 1):
            asked = time.perf_counter()
            x, y, flip, tokens, ids = next(source)
            waited += time.perf_counter() - asked
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with forward.no_sync() if world > 1 and micro < args.accum_freq else nullcontext():
                with autocast():
                    if lp:
                        cos = cosine(net.embed(x), y)
                    else:
                        x = net.pixels(x)
                        x = torch.where(flip.to(device, non_blocking=True)[:, None, None, None], x.flip(-1), x)
                        if tokens:
                            with torch.no_grad():
                                joined = encoder({k: v.to(device, non_blocking=True) for k, v in tokens.items()})["sentence_embedding"]
                            x, y = mixgen(x, y, F.normalize(joined.float(), dim=-1))
                        cos = cosine(forward(x), y)
                scaler.scale((1 - cos.mean()) / args.accum_freq).backward()
            rows.append(ids)
            cosines.append(cos.detach())
        scaler.unscale_(optimizer)
        norm, cos = nn.utils.clip_grad_norm_(params, args.grad_clip_norm or math.inf), torch.cat(cosines)
        # no waiting for the device here: the fused AdamW skips a bad step by itself, and check_finite tells at the next look
        if not scaler.is_enabled():  # fp16's overflowing gradients are the scaler's own business
            optimizer.found_inf = 1 - (torch.isfinite(norm) & torch.isfinite(cos).all()).float()
        recent.append((step, torch.cat(rows), cos, torch.zeros(()) if scaler.is_enabled() else norm))
        scaler.step(optimizer)
        scaler.update()
        if ema:
            ema.update_parameters(net)
        seen.append(cos)
        step += 1
        stopping, saving = agree(max(stop, default=0), time.perf_counter() - saved > args.save_every * 60, world)
        if step % args.log_every == 0 or step % per_epoch == 0 or step == total or stopping or saving or args.dry_run:
            check_finite(recent, names, world)
            recent = []
        if step % args.log_every == 0 or step == total or args.dry_run:
            (train_sum, n), now = add_up([torch.cat(seen).double().sum().item(), sum(map(len, seen))], world, device), time.perf_counter()
            rate, share = (step - logged) * batch / (now - clock), waited / (now - clock)
            note_row = {"step": step, "epoch": round(step / per_epoch, 3), "train_cosine": train_sum / n, "lr": args.lr * factor, "grad_norm": norm.item(),
                        "images_per_s": round(rate, 1), "data_wait": round(share, 3), "memory_gib": round(memory(device), 2)}
            if rank == 0 and not lp:
                print(f"step {step:,} ({step / total:.0%}) · loss {1 - train_sum / n:.4f} · val {score:.4f} · lr {args.lr * factor:.2e} · grad {norm.item():.2f} · {rate:.0f} images/s · "
                      f"data wait {share:.0%}{' (raise --workers)' if share > 0.2 else ''} · {note_row['memory_gib']:.1f} GiB · ETA {(total - step) * batch / rate / 60:.1f} min", flush=True)
            if args.dry_run:
                return
            note(**note_row)
            seen, clock, waited, logged = [], now, 0.0, step
        if step % per_epoch == 0:
            paused = time.perf_counter()
            score = validate()
            clock += time.perf_counter() - paused  # images/s are those of training
        if rank == 0 and (stopping or saving or step == total):
            save_last()
            if lp:
                write_head()
        if stopping or saving:
            saved = time.perf_counter()
        if stopping and step < total:
            if rank == 0:
                print(f"stopped at step {step}; go on with: {' '.join([f'torchrun --nproc_per_node {world}' if world > 1 else 'python', *(a for a in sys.argv if a not in ('--overwrite', '--resume'))])} --resume", file=sys.stderr)
            sys.exit(128 + stopping)

    note(step=step, done=True, best=max(best.values()), baseline=baseline["val"], seconds=round(time.perf_counter() - began, 1))
    if rank == 0:
        print(f"{args.phase} done: best val cosine {max(best.values()):.4f} (n = {len(held['val'])}), mean vector {baseline['val']:.4f} -> {phase}/best.safetensors")


def guarded():
    """main(), where running out of memory, a full disk or a lost picture ends as one line too."""
    try:
        main()
    except BadPicture as e:  # comes out of a loader worker wrapped in its traceback
        sys.exit(str(e).strip().splitlines()[-1].split("BadPicture: ")[-1])
    except (RuntimeError, SafetensorError) as e:
        text = str(e)
        if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in text:
            sys.exit("out of memory: halve --batch-size and double --accum-freq (the same training), or add --grad-checkpointing")
        if "PytorchStreamWriter" in text or "unexpected pos" in text or isinstance(e, SafetensorError):
            sys.exit(f"a checkpoint could not be written, the old one is untouched; disk full? ({text.splitlines()[0][:120]})")
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the next line as an error
        for worker in multiprocessing.active_children():
            worker.kill()  # after an error Python would end them by SIGTERM, which they ignore, and wait for ever
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(guarded)
