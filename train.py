"""
Train an image tower to predict the sentence embedding of the prompt behind a picture: LP-FT (arXiv 2202.10054).
Reads data/NAME (clean.py); writes runs/NAME/<phase>/{best.safetensors, last.pt, metrics.jsonl, curve.png}.
$ python train.py --phase lp                                             # the head, on frozen features computed once
$ python train.py --phase ft                                             # everything, from the lp head
$ python train.py --phase lp --data data/mine --model ViT-L-14-336 --pretrained openai
$ python train.py --phase ft --data data/mine --layer-decay 0.6 --batch-size 32 --accum-freq 4
$ torchrun --standalone --nproc_per_node 4 train.py --phase ft --data data/mine
All randomness is arithmetic: order and flips come from (seed, epoch), the rest from (seed, step), so a resumed run is
the same run.
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

from clean import atomic, has_bf16, load_encoder, open_rgb, read_data, reason, run

FORMAT = 1
DTYPES = {"amp_bf16": torch.bfloat16, "amp": torch.float16, "fp32": torch.float32}
FREE = {"workers", "resume", "overwrite", "log_every", "save_every", "out", "data", "report_to", "asked",
        "dry_run"}  # flags that may change on --resume
DEFAULTS = {  # by phase, where neither command line nor data folder says otherwise; the README shows the evidence
    "lp": {"lr": 1e-3, "epochs": 30, "batch_size": 256, "warmup": 50, "hflip": 0.0, "mixgen": 0.0, "ema": 0.0},
    "ft": {"lr": 1e-5, "epochs": 3, "batch_size": 64, "warmup": 200, "hflip": 0.0, "mixgen": 0.0, "ema": 0.9998},
}


# ------------------------------------------------------------------------------------------------------------ the model

def build_tower(spec):
    """The architecture that a spec describes, random weights. -> module, images (B, 3, S, S) -> features (B, D).
    spec: {"model", "kwargs", "image_size", ...}, for open_clip "config" and "quick_gelu" too."""
    if spec["model"].startswith("timm:"):
        return timm_tower(spec["model"][5:], spec["image_size"], spec["kwargs"])
    from open_clip.model import _build_vision_tower  # the visual half alone: no text tower in memory
    vision = {**spec["config"]["vision_cfg"], "image_size": spec["image_size"]}
    tower = _build_vision_tower(spec["config"]["embed_dim"], vision, spec["quick_gelu"])
    if not spec.get("proj"):  # pooled features before the contrastive projection (1024 for L/14), as in the recipe
        if getattr(tower, "proj", None) is not None:
            tower.proj = None
        for name in ("drop", "proj", "mlp"):  # open_clip's wrapper of a timm tower
            if hasattr(getattr(tower, "head", None), name):
                delattr(tower.head, name)
    return tower


def timm_tower(name, size, kwargs, pretrained=False):
    """A timm backbone without its classifier for images of `size` pixels, or of its own size (None)."""
    import timm
    sized = {"img_size": size, **kwargs} if size else kwargs
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
    except TypeError:  # convnets and the like take any size and know no such argument
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)


def resize_positions(state, module):
    """-> state, its position embeddings fitted to a module built for another image size: bicubic over the square patch
    grid, class and register tokens kept; open_clip "positional_embedding" (T, D), timm "pos_embed" (1, T, D)."""
    for key, new in module.state_dict().items():
        old = state.get(key)
        if not key.endswith(("positional_embedding", "pos_embed")) or old is None:
            continue
        if old.shape == new.shape or old.shape[:-2] != new.shape[:-2]:
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
    """Command line -> (tower with its pretrained weights, spec). The spec goes into the checkpoint: it is all that
    build_tower and predict.py need."""
    kwargs = parse_kwargs(args.model_kwargs)
    spec = {"model": args.model, "pretrained": args.pretrained, "kwargs": kwargs, "proj": args.proj}
    file = args.pretrained if Path(args.pretrained).is_file() else None
    tag = None if file or args.pretrained in ("none", "") else args.pretrained
    make = make_timm if args.model.startswith("timm:") else make_open_clip
    tower, spec = make(args, spec, tag)
    spec |= {"mean": list(args.image_mean or spec["mean"]), "std": list(args.image_std or spec["std"])}
    if file:
        state = read_weights(file)
        if any(k.startswith("visual.") for k in state):  # a whole CLIP: take the visual half
            state = {k[7:]: v for k, v in state.items() if k.startswith("visual.")}
        load_strict(tower, resize_positions(state, tower), file, unused(args))
    return tower, spec


def make_timm(args, spec, tag):
    """--model timm:NAME -> (tower, complete spec); weights of the pretrained tag, random ones without."""
    import timm
    name = args.model[5:]
    try:
        tower = timm_tower(name, args.image_size, spec["kwargs"])
    except (RuntimeError, TypeError) as e:
        sys.exit(f"--model {args.model} {' '.join(args.model_kwargs)}: {brief(e)}; names: timm.list_models()")
    norm = timm.data.resolve_model_data_config(tower)
    if tag:
        try:
            tower = timm_tower(f"{name}.{tag}", args.image_size, spec["kwargs"], pretrained=True)
        except Exception as e:
            sys.exit(f"--pretrained {tag}: neither a file nor a tag of {args.model} that can be loaded ({brief(e)})")
    return tower, {**spec, "mean": norm["mean"], "std": norm["std"], "interpolation": norm["interpolation"],
                   "image_size": args.image_size or norm["input_size"][-1]}


def make_open_clip(args, spec, tag):
    """--model NAME or FILE.json, an architecture of your own in open_clip's format -> as make_timm."""
    import open_clip
    name = args.model
    if name.endswith(".json"):
        if not Path(name).is_file():
            sys.exit(f"--model {name}: no such file")
        open_clip.add_model_config(name)
        name = Path(name).stem
    config = open_clip.get_model_config(name)
    if config is None:
        sys.exit(f"--model {args.model}: not an open_clip model; see open_clip.list_models(), "
                 "or timm:NAME for a timm backbone")
    known = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        sys.exit(f"--pretrained {tag}: neither a file nor a tag of {name}; tags: {tags}")
    norm = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic"}
    # the OpenAI weights were trained with QuickGELU; the tag knows, the model name alone builds plain GELU
    quick = bool(known.get("quick_gelu", config.get("quick_gelu", False))) or args.force_quick_gelu
    size = args.image_size or config["vision_cfg"].get("image_size", 224)
    spec = {**spec, **{k: known.get(k, v) for k, v in norm.items()}, "quick_gelu": quick,
            "config": {k: config[k] for k in ("embed_dim", "vision_cfg")}, "image_size": size}
    tower = build_tower(spec)
    if tag:
        try:
            full = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick, force_image_size=size)
        except Exception as e:
            sys.exit(f"--pretrained {tag}: cannot be loaded ({brief(e)}); give a weights file instead")
        load_strict(tower, full.visual.state_dict(), tag, unused(args))
    return tower, spec


def unused(args):
    """Prefixes of weights that a file may hold and our towers have no use for."""
    return ("classifier.", "fc.", "head.") if args.proj else ("proj", "classifier.", "fc.", "head.")


def parse_kwargs(items):
    """["pad_type=same", "depth=4"] -> {"pad_type": "same", "depth": 4}"""
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
        sys.exit(f"{path}: not a safetensors or plain state-dict file ({brief(e)})")


def load_strict(module, state, name, optional=()):
    """load_state_dict that says what is wrong in one line. optional: prefixes that may be in the state alone."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in wanted and not k.startswith(optional)]
    shape = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if missing or extra or shape:
        sys.exit(f"{name}: does not fit the model: {len(missing)} missing {missing[:3]}, "
                 f"{len(extra)} unexpected {extra[:3]}, {len(shape)} of another shape {shape[:3]}")
    module.load_state_dict({k: state.get(k, wanted[k]) for k in wanted})


def brief(error):
    """An error in one short line, for messages of our own: torch's can be long."""
    return reason(error)[:120]


def snapshot(module):
    """A copy of a module's state that further training leaves alone."""
    return {k: v.clone() for k, v in module.state_dict().items()}


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, as one process would see them. torch's SyncBatchNorm refuses CPUs."""

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
            hidden = width * 1024
            self.head = nn.Sequential(nn.Linear(features, hidden), SharedBatchNorm(hidden), nn.ReLU(),
                                      nn.Linear(hidden, dim))
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
    """{parameter name: depth}: 0 the stem, then one per block, the head last. Layer decay and --unfreeze-from count in
    these; a norm after the last block belongs to it. Blocks come from timm's own group_matcher, for open_clip's towers
    from their names."""
    wrapped = hasattr(net.tower, "trunk")  # open_clip around a timm backbone
    tower, prefix = (net.tower.trunk, "tower.trunk.") if wrapped else (net.tower, "tower.")
    if hasattr(tower, "group_matcher"):
        from timm.models import group_parameters
        found = group_parameters(tower, tower.group_matcher(coarse=False), reverse=True)
    else:
        found, blocks = {}, {}
        for name, _ in tower.named_parameters():
            # ViT: transformer.resblocks.7. · ResNet: layer3.5.
            block = re.match(r"transformer\.resblocks\.\d+\.|layer\d+\.\d+\.", name)
            if block:
                blocks.setdefault(block[0], len(blocks) + 1)
            found[name] = blocks[block[0]] if block else len(blocks)
        if not blocks:
            sys.exit(f"{type(tower).__name__}: its blocks are not known, so there is no --layer-decay or "
                     "--unfreeze-from for it")
    rank = {d: i for i, d in enumerate(sorted(set(found.values())))}
    found = {prefix + n: rank[d] for n, d in found.items()}
    last = max(found.values())
    return {n: last + 1 if n.startswith("head.") else found.get(n, last) for n, _ in net.named_parameters()}


def param_groups(net, lr, wd, decay=1.0, unfreeze_from=0, head_only=False):
    """AdamW groups, one per depth and weight decay: lr * decay ** (distance from the head); matrices decay, biases and
    norms do not. Depths below unfreeze_from are frozen (no gradient, no group)."""
    if decay != 1 or unfreeze_from:
        depth = depths(net)
    else:
        depth = {n: int(n.startswith("head.")) for n, _ in net.named_parameters()}
    top, groups = max(depth.values()), {}
    if not 0 <= unfreeze_from <= top:
        sys.exit(f"--unfreeze-from {unfreeze_from}: this tower has depths 0 (the stem) to {top} (the head)")
    for name, p in net.named_parameters():
        d, matrix = depth[name], p.ndim > 1
        p.requires_grad_(d == top if head_only else d >= unfreeze_from)
        if p.requires_grad:
            group = {"depth": d, "peak": lr * decay ** (top - d), "weight_decay": wd if matrix else 0.0, "params": []}
            groups.setdefault((d, matrix), group)["params"].append(p)
    return [groups[k] for k in sorted(groups)]


def drop_patches(tower, p):
    """FLIP (arXiv 2212.00794), ViTs only: in training a share p of the patches is left out, and as much of the cost."""
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
    """A checkpoint file, a phase folder or a run folder (ft before lp) -> path of best.safetensors. Exits if none."""
    path = Path(path)
    for p in (path, path / "best.safetensors", path / "ft/best.safetensors", path / "lp/best.safetensors"):
        if p.is_file():
            return p
    sys.exit(f"{path}: no checkpoint there (best.safetensors); train one with: python train.py --phase lp")


def load_net(path, image_size=None):
    """A checkpoint that save_net wrote -> (Net in eval mode, meta). No flags: it describes itself. Exits with one line
    on what is no such checkpoint. image_size: pixels other than those it was trained at; position embeddings are
    resized, and meta["tower"]["image_size"] says so."""
    path = find_checkpoint(path)
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {}).get("config", "{}"))
            state = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError, ValueError) as e:
        sys.exit(f"{path}: not a readable checkpoint ({brief(e)}); train it again")
    if meta.get("format") != FORMAT:
        sys.exit(f"{path}: not a checkpoint of train.py (format {meta.get('format')}, expected {FORMAT})")
    try:
        meta["tower"]["image_size"] = image_size or meta["tower"]["image_size"]
        net = Net(build_tower(meta["tower"]), meta["tower"], **meta["head"])
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as e:
        sys.exit(f"{path}: describes no model that can be built here at {image_size or 'its own'} px "
                 f"({type(e).__name__}: {brief(e)})")
    load_strict(net, resize_positions(state, net), path)
    return net.eval(), meta


# ------------------------------------------------------------------------------------------------------------- the data

class BadPicture(Exception):
    """A picture that clean.py could read and we cannot."""


class Pictures(Dataset):
    """Pictures as the tower wants them: short side to S, centre crop. -> uint8 tensor (3, S, S)."""

    def __init__(self, paths, spec):
        self.paths, self.size = paths, spec["image_size"]
        filters = {"bilinear": Image.BILINEAR, "nearest": Image.NEAREST, "lanczos": Image.LANCZOS}
        self.filter = filters.get(spec["interpolation"], Image.BICUBIC)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return to_square(open_rgb(self.paths[i]), self.size, self.filter)
        except Exception as e:  # decoders raise whatever they like; a training row is never replaced by another
            fix = "make the data folder again with clean.py --overwrite"
            raise BadPicture(f"{self.paths[i]}: unreadable ({e}); {fix}") from None


def to_square(image, size, resample):
    """PIL image -> uint8 tensor (3, size, size): short side to `size`, centre crop."""
    w, h = image.size
    if (w, h) != (size, size):
        if max(w, h) > 4 * min(w, h):  # a banner: enlarging what the crop throws away could take gigabytes
            w, h = min(w, 2 * h), min(h, 2 * w)
            image = centre_crop(image, w, h)
        scale = size / min(w, h)
        image = image.resize((max(size, round(w * scale)), max(size, round(h * scale))), resample)
        image = centre_crop(image, size, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def centre_crop(image, w, h):
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


class TrainPairs(Dataset):
    """(row, flip) -> what collate stacks. The plan says which rows and flips, so workers and resume change nothing."""

    def __init__(self, pictures, targets, prompts):
        self.pictures, self.targets, self.prompts = pictures, targets, prompts

    def __getitem__(self, item):
        row, flip = item
        return self.pictures[row], self.targets[row], flip, self.prompts[row], row


def collate(items, mixed=0, tokenize=None):
    """-> pictures, targets, flips, tokens of the prompts that MixGen joins or None (made here, in the workers), rows"""
    pictures, targets, flips, prompts, rows = zip(*items)
    tokens = None
    if mixed:
        tokens = dict(tokenize([f"{a} {b}" for a, b in zip(prompts[:mixed], prompts[mixed:2 * mixed])]))
    flips = torch.tensor(flips, dtype=torch.bool)
    return torch.stack(pictures), torch.from_numpy(np.stack(targets)), flips, tokens, torch.tensor(rows)


def plan(train, rows, batch, args, rank, step):
    """The micro-batches of this process from `step` on, each [(row, 1 if mirrored else 0), ...]: a function of (seed,
    epoch), so resume is arithmetic. train: indices among all `rows`; batch: rows per step, over all processes."""
    per_epoch = len(train) // batch
    for epoch in range(step // per_epoch, args.epochs):
        rng = np.random.default_rng((args.seed, epoch))
        order = train[rng.permutation(len(train))]
        flip = (rng.random(rows) < args.hflip).astype(int)
        for i in range(max(0, step - epoch * per_epoch), per_epoch):
            # dealt like cards: a row and its MixGen partner, M rows on, meet on one device,
            # so any division of the batch mixes the same pairs
            hands = order[i * batch:(i + 1) * batch].reshape(args.batch_size, -1).T
            for hand in hands[rank * args.accum_freq:][:args.accum_freq]:
                yield list(zip(hand.tolist(), flip[hand].tolist()))


def load_features(plan, features, targets):
    """lp's micro-batches of a plan, from memory; the same five things as collate gives."""
    for items in plan:
        rows, flip = np.array(items).T
        x, y = torch.from_numpy(features[flip, rows]).float(), torch.from_numpy(targets[rows])
        yield x, y, None, None, torch.from_numpy(rows)


def make_loader(dataset, plan, args, device, **more):
    """Pictures in worker processes, in the batches that a plan lists."""
    # its own generator: building an iterator would draw from the global stream and shift dropout after a resume
    return DataLoader(dataset, batch_sampler=plan, num_workers=args.workers, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_signals, generator=torch.Generator(), **more)


def ignore_signals(_):
    """Loader workers leave Ctrl-C to the parent, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def mixgen(images, targets, joined, lam=0.5):
    """MixGen (arXiv 2206.08358, alg. 1): the first m images become blends with the next m, and their targets the
    embeddings of the joined prompts; rows m.. stay. images (B, 3, H, W) normalised, targets (B, 384), joined (m, 384),
    m <= B/2."""
    m = len(joined)
    mixed = torch.lerp(images[m:2 * m], images[:m], lam)  # the batch is shuffled, so row i + m is a random partner
    return torch.cat([mixed, images[m:]]), torch.cat([joined, targets[m:]])


def extract_features(net, spec, data, paths, views, args, device, dtype, rank, world):
    """Frozen tower features of every row, computed once: memmap (views, N, D), float16 where computed in 16 bits; view
    1 is the mirror image. Cached by tower, weights, transform and data. Whole batches are shared out over the
    processes, so their number changes no byte."""
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
        starts = range(0, len(paths), args.batch_size)
        rows = [list(range(i, min(i + args.batch_size, len(paths)))) for i in starts][rank::world]
        loader = make_loader(Pictures(paths, spec), rows, args, device)
        store = np.float32 if dtype == torch.float32 else np.float16
        part = file.with_suffix(".part")
        if rank == 0:
            part.parent.mkdir(parents=True, exist_ok=True)
            shape = views, len(paths), next(net.head.parameters()).shape[1]
            np.lib.format.open_memmap(part, "w+", store, shape).flush()
        wait(world)
        out = np.load(part, mmap_mode="r+")
        with torch.inference_mode():
            for i, x in zip(tqdm(rows, desc="features", unit="batch", disable=rank > 0), loader):
                x = net.pixels(x.to(device, non_blocking=True)).to(dtype, memory_format=torch.channels_last)
                for view in range(views):
                    features = tower(x.flip(-1) if view else x).float().cpu().numpy().astype(store)
                    finite = np.isfinite(features).all(1)
                    if not finite.all():
                        sys.exit(f"{paths[i[int(np.argmin(finite))]]}: its features are not finite; "
                                 "wrong --pretrained? else try --precision fp32")
                    out[view, i] = features
        out.flush()
        wait(world)
        if rank == 0:
            os.replace(part, file)
        wait(world)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def ridge(features, targets, val_features, val_targets, block=65536):
    """Ridge regression in closed form: features [(N, D), ...] one per view, targets (N, E) -> weight (E, D), bias (E,),
    lambda, cosine on val. One eigendecomposition of the covariance serves the whole grid of lambdas."""
    def blocks():
        for x in features:
            for i in range(0, len(x), block):
                x_block, y_block = np.asarray(x[i:i + block], np.float64), targets[i:i + block]
                yield torch.from_numpy(x_block), torch.from_numpy(y_block).double()

    n = len(targets) * len(features)
    mean_x, mean_y = sum(x.sum(0) for x, _ in blocks()) / n, sum(y.sum(0) for _, y in blocks()) / n
    xx = sum((x - mean_x).T @ (x - mean_x) for x, _ in blocks())
    xy = sum((x - mean_x).T @ (y - mean_y) for x, y in blocks())
    values, vectors = torch.linalg.eigh(xx)
    xy = vectors.T @ xy  # (D, E) in the eigenbasis
    x = (torch.from_numpy(np.asarray(val_features, np.float64)) - mean_x) @ vectors
    y = torch.from_numpy(val_targets)
    scores = {}
    for lam in (values.mean() * torch.logspace(-5, 3, 25, dtype=torch.float64)).tolist():
        predicted = F.normalize(x @ (xy / (values + lam)[:, None]) + mean_y, dim=-1)
        scores[lam] = cosine(predicted, y).mean().item()
    lam = max(scores, key=scores.get)
    weight = (vectors @ (xy / (values + lam)[:, None])).T
    return weight.float(), (mean_y - weight @ mean_x).float(), lam, scores[lam]


def start_from_ridge(head, features, targets, train, val):
    """Put the closed form into a linear head, as large as its random weights were: the cosine does not see the scale,
    Adam does, whose steps have a size of their own."""
    weight, bias, lam, score = ridge([f[train] for f in features], targets[train], features[0, val], targets[val])
    scale = head.weight.std().item() / weight.std().item()
    head.load_state_dict({"weight": weight * scale, "bias": bias * scale})
    print(f"ridge head: lambda {lam:.3g} of 25 by val cosine, {score:.4f}")


# --------------------------------------------------------------------------------------------------------- optimisation

def lr_at(step, total, warmup):
    """Linear warm-up, then cosine to zero: the factor on --lr, a pure function of the step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def seed_at(seed, step, rank):
    """The seed of dropout and patch dropout, a pure function too: nothing to restore on --resume."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])


def ema_at(step, decay):
    """EMA decay at a step: rises to `decay`, so that a short run does not average over its start."""
    return min(decay, (1 + step) / (10 + step))


def wise(start, trained, alpha):
    """WiSE-FT (arXiv 2109.01903): (1 - alpha) start + alpha trained, of two states of a net; counters as trained."""
    return {k: torch.lerp(start[k], v, alpha) if v.is_floating_point() else v for k, v in trained.items()}


def cosine(predicted, targets):
    return (predicted.float() * targets.float()).sum(-1)


def pick_precision(name, device, net=None):
    """-> (autocast context factory, GradScaler, name). auto: bf16 where the hardware has it, else fp16 on a GPU,
    float32 on a CPU; float32 too for depthwise convolutions on a CPU, slower in bf16 (MobileNetV2: by a third)."""
    if name == "auto" and device.type == "cuda":
        name = "amp_bf16" if has_bf16("cuda") else "amp"
    elif name == "auto":
        depthwise = net is not None and any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in net.modules())
        name = "amp_bf16" if has_bf16("cpu") and not depthwise else "fp32"
    scaler = torch.amp.GradScaler(device.type, enabled=name == "amp")
    return lambda: torch.autocast(device.type, DTYPES[name], enabled=name != "fp32"), scaler, name


def hold_memory(device):
    """On a CPU, have glibc keep what it was given: else it maps and unmaps every large activation anew, and the page
    faults cost more than the arithmetic (measure it: tests/bench/bench_train.py --hold-memory)."""
    if device.type == "cpu" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def wait(world):
    if world > 1:
        dist.barrier()


def mean_of(parts, world, device):
    """Mean of all the numbers in a list of vectors, over all processes; the list of one process may be empty."""
    total = torch.cat(parts).double().sum().item() if parts else 0.0
    x = torch.tensor([total, sum(map(len, parts))], dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(x)
    total, n = x.tolist()
    return total / n


def agree(stopping, saving, world):
    """The largest of every process's flags: all stop after the same step. On the host, so nothing waits for the GPU."""
    flags = torch.tensor([stopping, saving], dtype=torch.int64)
    if world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()


def memory(device):
    """Peak GiB so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def check_finite(recent, names, world):
    """recent: [(step, rows, cosines, gradient norm), ...] since the last look. Exits on every process, with the first
    bad step and its pictures. Looks are rare because they wait for the device; the optimiser has skipped a bad step by
    itself, so nothing is lost in between."""
    bad = []
    for step, rows, cos, norm in recent:
        finite = torch.isfinite(cos)
        if not (finite.all() and torch.isfinite(norm)):
            bad.append((step, [names[i] for i in rows[~finite.cpu()].tolist()]))
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, bad)
        bad = sum(found, [])
    if bad:
        step = min(bad)[0]
        ids = sorted({i for s, pictures in bad if s == step for i in pictures})
        what = "the gradient is not finite, though every loss is"
        if ids:
            what = f"the loss of {', '.join(ids[:8])} is not finite"
        sys.exit(f"step {step}: {what}; stopped before the update, and the checkpoints on disk are good. "
                 "Mend the data, lower --lr, or try --precision fp32; then --resume")


def cut_log(file, step):
    """Drop the rows of metrics.jsonl after a step."""
    kept = [line for line in file.read_text().splitlines() if json.loads(line)["step"] <= step]
    with atomic(file, "w") as f:
        f.write("".join(f"{line}\n" for line in kept))


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
    """--report-to -> a function that takes a row of metrics.jsonl. The package is imported here, when it is wanted."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(folder)

            def report(row):
                for key, value in row.items():
                    if key != "step":
                        writer.add_scalar(key, value, row["step"])
                writer.flush()
            return report
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
        print(f"  depth {g['depth']:>3} · lr {g['peak']:.2e} · weight decay {g['weight_decay']:g} · "
              f"{count(g['params']):>12,} parameters")
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
    per_image = kept(2) - kept(1)
    once = max(0, kept(1) - per_image)  # what does not grow with the batch are weights, cast or not
    trained = sum(count(g["params"]) for g in groups)
    weights = count(net.parameters()) * (2 if args.ema else 1)
    state = 4 * (weights + 3 * trained)  # bytes: weights and their EMA; gradient and two moments
    print(f"  {flops.get_total_flops() / 1e9:.2f} GFLOP per image forward ({3 + args.grad_checkpointing} times that to "
          f"train) · memory, estimated: {state / 2**30:.2f} GiB weights and optimiser + "
          f"{(once + per_image * args.batch_size) / 2**30:.2f} GiB activations at --batch-size {args.batch_size}")


def count(params):
    return sum(p.numel() for p in params)


# ----------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Train an image tower to predict prompt embeddings, LP-FT.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--phase", choices=["lp", "ft"], required=True,
                   help="lp: the head on frozen features; ft: everything, from the lp head")
    p.add_argument("--data", default="data/demo", help="folder written by clean.py")
    p.add_argument("--out", default=None, help="run folder; unset = runs/ and the name of the data folder")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier run of this phase")
    p.add_argument("--resume", action="store_true", help="go on from last.pt")
    p.add_argument("--init", default=None, metavar="PATH",
                   help="ft: checkpoint or run to start from; unset = the lp phase of --out, none = a cold start")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, data order and augmentation")
    p.add_argument("--deterministic", action="store_true",
                   help="bit-exact on a GPU too; slower, and stops where an operation has no deterministic kernel")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    p.add_argument("--dry-run", action="store_true",
                   help="print the model, every group's lr, FLOPs and memory, run one step, write nothing")
    g = p.add_argument_group("model (ft takes it from its start)")
    g.add_argument("--model", default=None, help="open_clip name, timm:NAME, or an open_clip .json; unset = "
                   "what the data folder recommends (ViT-L-14; the demo: a small one)")
    g.add_argument("--pretrained", default=None, help="open_clip or timm tag, a weights file, or none; unset = "
                   "what the data folder recommends (openai)")
    g.add_argument("--model-kwargs", nargs="*", default=[], metavar="K=V", help="extra arguments of the timm model")
    g.add_argument("--force-quick-gelu", action="store_true", help="for OpenAI-style weights files without a tag")
    g.add_argument("--proj", action="store_true", help="features after the contrastive projection instead of before")
    g.add_argument("--image-size", type=int, default=None,
                   help="pixels; unset = the tower's own; ft may use more than lp")
    g.add_argument("--image-mean", type=float, nargs=3, default=None, help="unset = the tower's own")
    g.add_argument("--image-std", type=float, nargs=3, default=None, help="unset = the tower's own")
    g.add_argument("--head", choices=["linear", "mlp"], default=None,
                   help="unset = linear; mlp: 1024 --head-width wide, BatchNorm, ReLU")
    g.add_argument("--head-width", type=int, default=16, help="of the mlp head, in units of 1024")
    g.add_argument("--head-init", choices=["xavier", "ridge"], default=None,
                   help="lp: ridge, for a linear head, starts from the closed form; unset = ridge where it can be")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=None, help=unset("epochs"))
    g.add_argument("--batch-size", type=int, default=None,
                   help=f"of one micro-batch on one device; {unset('batch_size')}")
    g.add_argument("--accum-freq", type=int, default=1,
                   help="micro-batches per step; raise it when you lower --batch-size")
    g.add_argument("--lr", type=float, default=None, help=f"peak learning rate; {unset('lr')}")
    g.add_argument("--wd", type=float, default=0.01, help="weight decay of matrices; biases and norms have none")
    g.add_argument("--warmup", type=int, default=None, help=f"steps, at most a fifth of the run; {unset('warmup')}")
    g.add_argument("--grad-clip-norm", type=float, default=1.0, help="0 = off")
    g.add_argument("--hflip", type=float, default=None, metavar="P",
                   help=f"probability of a mirror image; {unset('hflip')}")
    g.add_argument("--precision", choices=["auto", *DTYPES], default="auto",
                   help="auto: bf16 where the hardware has it")
    g.add_argument("--compile", action="store_true",
                   help="torch.compile, in place; pays off from some hundred steps on")
    g = p.add_argument_group("ft")
    g.add_argument("--mixgen", type=float, default=None, metavar="FRACTION",
                   help=f"of a batch that MixGen blends, at most 0.5; {unset('mixgen')}")
    g.add_argument("--layer-decay", type=float, default=1.0,
                   help="factor on the lr per block, from the head down; the medals used 0.4 to 0.6")
    g.add_argument("--unfreeze-from", type=int, default=0, metavar="DEPTH", help="freeze what lies below this depth "
                   "(0 the stem, then one per block; --dry-run lists them)")
    g.add_argument("--ema", type=float, default=None, metavar="DECAY", help="average of the weights, validated and "
                   f"saved too, shorter at the start; 0 = off; {unset('ema')}")
    g.add_argument("--wise", type=float, default=None, metavar="ALPHA",
                   help="validate and save (1 - ALPHA) start + ALPHA trained too (WiSE-FT, arXiv 2109.01903)")
    g.add_argument("--freeze-bn", action=argparse.BooleanOptionalAction, default=None,
                   help="keep the tower's BatchNorm statistics; unset = for pretrained towers")
    g.add_argument("--patch-dropout", type=float, default=0.0, metavar="P",
                   help="share of the patches left out in training")
    g.add_argument("--grad-checkpointing", action="store_true", help="a third more time, far less memory")
    g = p.add_argument_group("watching")
    g.add_argument("--log-every", type=int, default=20, help="steps")
    g.add_argument("--save-every", type=float, default=5, help="minutes between writes of last.pt")
    g.add_argument("--report-to", choices=["tensorboard", "wandb"], default=None, help="besides metrics.jsonl")
    return p.parse_args(argv)


def unset(key):
    return f"unset = {DEFAULTS['lp'][key]:g} for lp, {DEFAULTS['ft'][key]:g} for ft"


def fill_defaults(args, summary):
    """Command line > what the data folder recommends > DEFAULTS; then all that is cheap is checked. -> phase folder"""
    args.asked = args.model
    advice = summary["recommend"] if args.model in (None, summary["recommend"]["model"]) else {}
    of_both = {k: v for k, v in advice.items() if not isinstance(v, dict)}
    for key, value in {**DEFAULTS[args.phase], **of_both, **advice.get(args.phase, {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.pretrained = args.pretrained or "openai"
    args.out = str(Path(args.out or f"runs/{Path(args.data).resolve().name}"))
    for key, low, high in (("mixgen", 0, 0.5), ("hflip", 0, 1), ("layer_decay", 1e-6, 1), ("ema", 0, 0.999999),
                           ("patch_dropout", 0, 0.99), ("wise", 0, 1)):
        value = getattr(args, key)
        if value is not None and not low <= value <= high:
            why = " (arXiv 2206.08358: M <= B/2)" if key == "mixgen" else ""
            sys.exit(f"{flag(key)} {value}: must be in [{low}, {high}]{why}")
    for key, low in (("batch_size", 2), ("epochs", 1), ("accum_freq", 1), ("workers", 0), ("seed", 0), ("warmup", 0),
                     ("log_every", 1), ("head_width", 1), ("image_size", 1)):
        value = getattr(args, key)
        if value is not None and value < low:
            sys.exit(f"{flag(key)} {value}: must be at least {low}")
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


def flag(key):
    return f"--{key.replace('_', '-')}"


def load_last(path, args, same):
    """last.pt -> dict. Refuses one that is damaged or of other settings, other data or other processes (`same`)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = [f"{flag(k)} {v}" for k, v in state["args"].items() if k not in FREE and getattr(args, k, None) != v]
        changed += [f"{k} {v}" for k, v in state["same"].items() if same[k] != v]
    except Exception as e:
        sys.exit(f"{path}: not a readable checkpoint ({brief(e)}); start again with --overwrite")
    if changed:
        sys.exit(f"{path}: was made with other settings: {', '.join(changed)}")
    return state


def pick_device(args):
    """-> device, rank of this process, number of processes; and what has to be set before anything is computed."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    hold_memory(device)
    if world > 1:  # gloo carries the flags of the hosts, so that agreeing does not wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device, rank, world


def start_net(args, summary, dim):
    """-> the Net that training starts from, spec of its tower, arguments of its head. lp builds one, ft loads one."""
    if args.phase == "lp" or args.init == "none":
        tower, spec = make_tower(args)
        head = {"head": args.head or "linear", "width": args.head_width, "dim": dim}
        return Net(tower, spec, **head), spec, head
    start = args.init or Path(args.out) / "lp"
    if not args.init and not (start / "best.safetensors").is_file():
        sys.exit(f"{start}: no lp phase to start from; run: python train.py --phase lp --data {args.data} "
                 f"--out {args.out}  (or --init PATH)")
    net, meta = load_net(start, args.image_size)
    spec, head = meta["tower"], meta["head"]
    if meta["text_model"] != summary["text_model"]:
        sys.exit(f"{start}: was trained for {meta['text_model']['name']} targets, "
                 f"but {args.data} has {summary['text_model']['name']}")
    if args.asked not in (None, spec["model"]) or args.head not in (None, head["head"]):
        sys.exit(f"{start}: holds {spec['model']} with a {head['head']} head; "
                 "leave --model and --head out, or train that lp first")
    return net, spec, head


def resume_command(world):
    start = f"torchrun --nproc_per_node {world}" if world > 1 else "python"
    return " ".join([start, *(a for a in sys.argv if a not in ("--overwrite", "--resume")), "--resume"])


def main():
    args = parse_args()
    pairs, targets, summary = read_data(args.data)
    phase = fill_defaults(args, summary)
    lp = args.phase == "lp"
    if pairs["image"].null_count():
        sys.exit(f"{args.data}: has no images (made with --text-only)")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that half-written files go away
    device, rank, world = pick_device(args)
    torch.manual_seed(args.seed)
    if args.overwrite and rank == 0 and not args.dry_run:
        shutil.rmtree(phase, ignore_errors=True)

    # rows: order in the arrays is the order of pairs.parquet, without the guard rows
    used = np.flatnonzero(pairs["split"].to_numpy() != "guard")
    pairs, targets = pairs[used], np.array(targets[used])
    split, names, prompts = pairs["split"].to_numpy(), pairs["image"].to_list(), pairs["prompt"].to_list()
    train = np.flatnonzero(split == "train")
    held = {s: np.flatnonzero(split == s) for s in ("val", "ood") if (split == s).any()}
    batch = args.batch_size * args.accum_freq * (1 if lp else world)  # lp trains on one process
    if len(train) < batch or "val" not in held:
        sys.exit(f"{args.data}: {len(train)} training and {len(held.get('val', []))} validation rows; "
                 f"need at least {batch} (--batch-size times --accum-freq times processes) and 1")
    mean = torch.from_numpy(targets[train].mean(0))
    baseline = {s: cosine(F.normalize(mean, dim=0), torch.from_numpy(targets[rows])).mean().item()
                for s, rows in held.items()}

    # the net; trained: the part of it that changes
    net, spec, head = start_net(args, summary, targets.shape[1])
    autocast, scaler, args.precision = pick_precision(args.precision, device, net.tower)
    meta = {"format": FORMAT, "phase": args.phase, "tower": spec, "head": head, "text_model": summary["text_model"],
            "data": args.data, "data_hashes": summary["hashes"], "baseline": baseline["val"],
            "n_val": len(held["val"]), "mean_target": mean.tolist(), "seed": args.seed}
    net.to(device, memory_format=torch.channels_last)
    groups = param_groups(net, args.lr, args.wd, args.layer_decay, args.unfreeze_from, head_only=lp)
    params = [p for g in groups for p in g["params"]]
    trained, forward = net.head if lp else net, net
    paths = [str(Path(args.data) / n) for n in names]
    ema, start_state, encoder = None, None, None

    if lp:  # on cached features, from here on as one process
        if args.dry_run:
            features = np.zeros((2, len(paths), next(net.head.parameters()).shape[1]), np.float32)
        else:
            views = 1 + (args.hflip > 0)
            features = extract_features(net, spec, summary["hashes"], paths, views, args, device,
                                        DTYPES[args.precision], rank, world)
        if world > 1:
            dist.destroy_process_group()
        if rank > 0:
            return
        world = 1
        if args.head_init == "ridge" and not (args.resume or args.dry_run):
            start_from_ridge(net.head, features, targets, train, held["val"])
    else:  # on pictures
        dataset = TrainPairs(Pictures(paths, spec), targets, prompts)
        if args.mixgen > 0:
            encoder = load_encoder(summary["text_model"]["name"], device)[0]
        if args.patch_dropout:
            drop_patches(net.tower, args.patch_dropout)
        if args.grad_checkpointing:
            net.tower.set_grad_checkpointing(True)
        if args.wise is not None:
            start_state = snapshot(net)
        if args.ema:
            def average(means, new, _):
                torch._foreach_lerp_(means, new, 1 - ema_at(step, args.ema))
            ema = AveragedModel(net, multi_avg_fn=average)
        if args.compile:
            net.compile()  # in place: wrapping would rename every key of the checkpoint
        if world > 1:
            gpus = [device.index] if device.type == "cuda" else None
            forward = nn.parallel.DistributedDataParallel(net, device_ids=gpus)
    if args.dry_run and rank == 0:
        describe(net, groups, spec, args, device, autocast)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    per_epoch = len(train) // batch
    total = args.epochs * per_epoch
    warmup = min(args.warmup, total // 5)

    # a resumed run is the same run. best: {kind of weights: val cosine}; seen: cosines since the last log line
    log, step, best, best_head, seen = phase / "metrics.jsonl", 0, {}, {}, []
    same = {"processes": world, "data": summary["hashes"]}
    if args.resume:
        state = load_last(phase / "last.pt", args, same)
        trained.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.load_state_dict(state["ema"])
        step, best, best_head = state["step"], state["best"], state["best_head"] or {}
        seen = [x.to(device) for x in state["seen"]]
        if rank == 0:
            cut_log(log, step)

    def save():
        """What --resume needs. lp validates too often to write a whole net each time: its best is written here too."""
        with atomic(phase / "last.pt") as f:
            torch.save({"net": trained.state_dict(), "ema": ema and ema.state_dict(), "step": step, "best": best,
                        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                        "best_head": best_head or None, "seen": [x.cpu() for x in seen],
                        "args": vars(args), "same": same}, f)
        if lp:
            latest = snapshot(net.head)
            net.head.load_state_dict(best_head["state"])
            save_net(net, best_head["about"], phase / "best.safetensors")
            net.head.load_state_dict(latest)

    def note(**row):
        if rank == 0:
            with open(log, "a") as f:
                f.write(json.dumps(row) + "\n")
            report(row)

    def load(plan, mixed=0):
        """A plan's micro-batches: x (features in lp, pictures in ft), targets, flips, MixGen's tokens or None, rows."""
        if lp:
            return load_features(plan, features, targets)
        tokenize = encoder and partial(encoder.tokenizer, padding=True, truncation=True,
                                       max_length=encoder.max_seq_length, return_tensors="pt")
        return make_loader(dataset, plan, args, device, collate_fn=partial(collate, mixed=mixed, tokenize=tokenize))

    def put(x):
        return x.to(device, non_blocking=True)

    # a pretrained tower's BatchNorm keeps its statistics: the README has the evidence
    freeze_bn = spec["pretrained"] != "none" if args.freeze_bn is None else args.freeze_bn

    def train_mode():
        net.train()
        for layer in net.tower.modules():
            if lp or freeze_bn and isinstance(layer, _BatchNorm):
                layer.eval()

    def evaluate(model):
        """-> {split: mean cosine}, rows shared out over the processes."""
        model.eval()
        scores = {}
        for name, rows in held.items():
            mine = [(i, 0) for i in rows[rank::world].tolist()]
            chunks = [mine[at:at + args.batch_size] for at in range(0, len(mine), args.batch_size)]
            cos = []
            with torch.inference_mode(), autocast():
                for x, y, *_ in load(chunks):
                    predicted = model.embed(put(x)) if lp else model(put(x))
                    cos.append(cosine(predicted, put(y)))
            scores[name] = mean_of(cos, world, device)
        return scores

    def candidates():
        """The weights that are validated, one after the other: as trained, WiSE-FT, EMA."""
        yield "raw", net
        if start_state:
            latest = snapshot(net)
            net.load_state_dict(wise(start_state, latest, args.wise))
            yield "wise", net
            net.load_state_dict(latest)
        if ema:
            yield "ema", ema.module

    def validate():
        """Score every candidate, keep those that are the best of their kind so far. -> val cosine of the raw weights"""
        nonlocal drawn
        row = {"step": step, "epoch": round(step / per_epoch, 3)}
        for kind, model in candidates():
            scores = {f"{split}_cosine": score for split, score in evaluate(model).items()}
            row |= {k if kind == "raw" else f"{k}_{kind}": v for k, v in scores.items()}
            if scores["val_cosine"] > best.get(kind, -1.0):  # strictly better, and never NaN; ood is only looked at
                best_of_all = scores["val_cosine"] > max(best.values(), default=-1.0)
                best[kind] = scores["val_cosine"]
                about = {**meta, "weights": kind, "step": step, **scores}
                if lp:
                    best_head.update(state=snapshot(net.head), about=about)
                elif rank == 0:
                    if best_of_all:
                        save_net(model, about, phase / "best.safetensors")
                    if start_state or ema:
                        save_net(model, about, phase / f"best-{kind}.safetensors")
        train_mode()
        note(**row)
        due = time.time() - drawn > 3 or step == total  # lp epochs take a moment: not each is worth line and picture
        if rank == 0 and (due or not lp):
            scores = " · ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items() if "cosine" in k)
            print(f"step {step:,} ({step / total:.0%}) · {scores} · best {max(best.values(), default=-1):.4f} "
                  f"({levels})", flush=True)
        if rank == 0 and due:
            draw_curve(log, phase / "curve.png", baseline["val"])
            drawn = time.time()
        return row["val_cosine"]

    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, _: stop.append(number))  # finish the step, save, say how to go on
    levels = "; ".join(f"{s}: n = {len(held[s])}, mean vector {baseline[s]:.4f}" for s in held)
    if rank == 0:
        act = "" if "quick_gelu" not in spec else ", QuickGELU" if spec["quick_gelu"] else ", GELU"
        many = f" on {world} processes" if world > 1 else ""
        print(f"{args.phase}: {spec['model']} ({spec['pretrained']}{act}), {spec['image_size']} px, "
              f"{head['head']} head, {count(params):,} parameters trained, {len(train):,} train rows, "
              f"{total:,} steps of {batch}{many}, {args.precision} on {device.type}\n{levels}", flush=True)
        if not args.dry_run:
            phase.mkdir(parents=True, exist_ok=True)
    report = open_report(args.report_to if rank == 0 and not args.dry_run else None, phase, args)
    drawn, score = 0.0, float("nan")
    train_mode()
    if step == 0 and not args.dry_run:
        score = validate()  # ft starts at the lp score
    source = iter(load(plan(train, len(names), batch, args, rank, step), mixed=int(args.mixgen * args.batch_size)))
    began = saved = clock = time.perf_counter()
    waited, logged, recent = 0.0, step, []

    while step < total:
        torch.manual_seed(seed_at(args.seed, step, rank))
        factor = lr_at(step, total, warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad(set_to_none=True)
        rows, cosines = [], []
        for micro in range(1, args.accum_freq + 1):
            asked = time.perf_counter()
            x, y, flip, tokens, ids = next(source)
            waited += time.perf_counter() - asked
            x, y = put(x), put(y)
            with forward.no_sync() if world > 1 and micro < args.accum_freq else nullcontext():
                with autocast():
                    if lp:
                        cos = cosine(net.embed(x), y)
                    else:
                        x = net.pixels(x)
                        x = torch.where(put(flip)[:, None, None, None], x.flip(-1), x)
                        if tokens:
                            with torch.no_grad():
                                joined = encoder({k: put(v) for k, v in tokens.items()})["sentence_embedding"]
                            x, y = mixgen(x, y, F.normalize(joined.float(), dim=-1))
                        cos = cosine(forward(x), y)
                scaler.scale((1 - cos.mean()) / args.accum_freq).backward()
            rows.append(ids)
            cosines.append(cos.detach())
        scaler.unscale_(optimizer)
        norm, cos = nn.utils.clip_grad_norm_(params, args.grad_clip_norm or math.inf), torch.cat(cosines)
        # no waiting for the device here: the fused AdamW skips a bad step by itself, check_finite tells later
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
        logging = step % args.log_every == 0 or step == total or args.dry_run
        if logging or step % per_epoch == 0 or stopping or saving:
            check_finite(recent, names, world)
            recent = []
        if logging:
            mean_cos, now = mean_of(seen, world, device), time.perf_counter()
            rate, share = (step - logged) * batch / (now - clock), waited / (now - clock)
            row = {"step": step, "epoch": round(step / per_epoch, 3), "train_cosine": mean_cos,
                   "lr": args.lr * factor, "grad_norm": norm.item(), "images_per_s": round(rate, 1),
                   "data_wait": round(share, 3), "memory_gib": round(memory(device), 2)}
            if rank == 0 and not lp:
                print(f"step {step:,} ({step / total:.0%}) · loss {1 - mean_cos:.4f} · val {score:.4f} · "
                      f"lr {row['lr']:.2e} · grad {row['grad_norm']:.2f} · {rate:.0f} images/s · data wait {share:.0%}"
                      f"{' (raise --workers)' if share > 0.2 else ''} · {row['memory_gib']:.1f} GiB · "
                      f"ETA {(total - step) * batch / rate / 60:.1f} min", flush=True)
            if args.dry_run:
                return
            note(**row)
            seen, clock, waited, logged = [], now, 0.0, step
        if step % per_epoch == 0:
            paused = time.perf_counter()
            score = validate()
            clock += time.perf_counter() - paused  # images/s are those of training
        if stopping or saving or step == total:
            if rank == 0:
                save()
            saved = time.perf_counter()
        if stopping and step < total:
            if rank == 0:
                print(f"stopped at step {step}; go on with: {resume_command(world)}", file=sys.stderr)
            sys.exit(128 + stopping)

    note(step=step, done=True, best=max(best.values()), baseline=baseline["val"],
         seconds=round(time.perf_counter() - began, 1))
    if rank == 0:
        print(f"{args.phase} done: best val cosine {max(best.values()):.4f} (n = {len(held['val'])}), "
              f"mean vector {baseline['val']:.4f} -> {phase}/best.safetensors")


def guarded():
    """main(), where running out of memory, a full disk or a lost picture ends as one line too."""
    try:
        main()
    except BadPicture as e:  # comes out of a loader worker wrapped in its traceback
        sys.exit(str(e).strip().splitlines()[-1].split("BadPicture: ")[-1])
    except (RuntimeError, SafetensorError) as e:
        text = str(e)
        if isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in text:
            sys.exit("out of memory: halve --batch-size and double --accum-freq (the same training), "
                     "or add --grad-checkpointing")
        if "PytorchStreamWriter" in text or "unexpected pos" in text or isinstance(e, SafetensorError):
            sys.exit(f"a checkpoint could not be written, the old one is untouched; disk full? ({brief(e)})")
        if "does not have a deterministic implementation" in text:
            sys.exit(f"--deterministic: {text.split(', but')[0]}; leave it out, or train another --model")
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the next line as an error
        for worker in multiprocessing.active_children():
            worker.kill()  # after an error Python would end them by SIGTERM, which they ignore, and wait for ever
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(guarded)
