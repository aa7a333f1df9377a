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
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clean import atomic, has_bf16, load_encoder, open_rgb, read_data, reason, run

FORMAT = 1
DTYPES = {"amp_bf16": torch.bfloat16, "amp": torch.float16, "fp32": torch.float32}
# flags that may change on --resume
FREE = {"workers", "resume", "overwrite", "log_every", "save_every", "out", "data", "report_to", "dry_run"}
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
    vision = {**spec["config"]["vision_cfg"], "image_size": spec["image_size"], "output_tokens": False}
    tower = _build_vision_tower(spec["config"]["embed_dim"], vision, spec["quick_gelu"])
    if not spec.get("proj"):  # pooled features before the contrastive projection (1024 for L/14), as in the recipe
        tower.proj = None
        for name in ("drop", "proj", "mlp"):  # open_clip's wrapper of a timm tower
            if hasattr(getattr(tower, "head", None), name):
                delattr(tower.head, name)
    return tower


def timm_tower(name, size, kwargs, pretrained=False):
    """A timm backbone without its classifier for images of `size` pixels, or of its own size (None)."""
    import timm
    if ":" in name or any(k.startswith(("pretrained", "checkpoint", "cache")) for k in kwargs):  # a checkpoint asks too
        raise ValueError(f"timm:{name} {kwargs} would open files or the hub; weights come from --pretrained")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **{"img_size": size, **kwargs})
    except TypeError:  # convnets and the like take any size and know no such argument
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)


def resize_positions(state, module):
    """-> state, its position embeddings fitted to a module built for another image size: bicubic over the square patch
    grid, class and register tokens kept; open_clip "positional_embedding" (T, D), timm "pos_embed" (1, T, D)."""
    from timm.layers import resample_abs_pos_embed
    for key, new in module.state_dict().items():
        old = state.get(key, new)
        if old.shape == new.shape or old.ndim != new.ndim or not key.endswith(("positional_embedding", "pos_embed")):
            continue
        sizes = old.shape[-2], new.shape[-2]
        prefix = next((p for p in range(16) if all(n > p and math.isqrt(n - p) ** 2 == n - p for n in sizes)), None)
        if prefix is not None and old.shape[-1] == new.shape[-1]:  # else no square grid: load_strict names it
            side = math.isqrt(sizes[1] - prefix)
            old = old.reshape(1, *old.shape[-2:])
            state[key] = resample_abs_pos_embed(old, (side, side), num_prefix_tokens=prefix).reshape(new.shape)
    return state


def make_tower(args):
    """Command line -> (tower with its pretrained weights, spec). The spec goes into the checkpoint: it is all that
    build_tower and predict.py need."""
    file = Path(args.pretrained).is_file()
    tag = None if file or args.pretrained in ("none", "") else args.pretrained
    describe_tower = timm_spec if args.model.startswith("timm:") else open_clip_spec
    spec, state = describe_tower(args, tag, dict(args.model_kwargs))
    spec |= {"model": args.model, "pretrained": args.pretrained, "proj": args.proj}
    spec |= {"mean": list(args.image_mean or spec["mean"]), "std": list(args.image_std or spec["std"])}
    tower = build_tower(spec)
    if file:
        state = read_weights(args.pretrained)
        if any(k.startswith("visual.") for k in state):  # a whole CLIP: take the visual half
            state = {k[7:]: v for k, v in state.items() if k.startswith("visual.")}
    if state:  # what classifies or projects is not used here
        unused = "proj", "classifier.", "fc.", "head."
        load_strict(tower, resize_positions(state, tower), args.pretrained, unused)
    return tower, spec


def timm_spec(args, tag, kwargs):
    """--model timm:NAME -> (spec, weights of the pretrained tag or None)"""
    import timm
    name = f"{args.model[5:]}.{tag}" if tag else args.model[5:]  # every tag has its own mean, std and size
    try:
        with torch.random.fork_rng([]):  # build_tower draws the random weights that are used
            tower = timm_tower(name, args.image_size, kwargs, pretrained=bool(tag))
    except Exception as e:
        if tag:
            sys.exit(f"--pretrained {tag}: neither a file nor a tag of {args.model} that can be loaded ({brief(e)})")
        sys.exit(f"--model {args.model} {kwargs or ''}: {brief(e)}; names: timm.list_models()")
    if tag and "quickgelu" not in name and any("QuickGELU" in n for n in tower.pretrained_cfg.get("notes") or ()):
        sys.exit(f"--pretrained {tag}: was trained with QuickGELU, which {args.model} does not have; take "
                 f"--model {args.model.replace('clip_', 'clip_quickgelu_')} or the open_clip model")
    norm = timm.data.resolve_model_data_config(tower)
    spec = {k: norm[k] for k in ("mean", "std", "interpolation")}
    spec |= {"kwargs": kwargs, "image_size": args.image_size or norm["input_size"][-1]}
    return spec, tower.state_dict() if tag else None


def open_clip_spec(args, tag, kwargs):
    """--model NAME or FILE.json, an architecture of your own in open_clip's format -> as timm_spec."""
    import open_clip
    name = args.model
    if name.endswith(".json"):
        if not Path(name).is_file():
            sys.exit(f"--model {name}: no such file")
        open_clip.add_model_config(name)
        name = Path(name).stem
    config = open_clip.get_model_config(name)
    if config is None:
        sys.exit(f"--model {name}: not an open_clip model (open_clip.list_models()), nor timm:NAME, nor a .json")
    known = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        sys.exit(f"--pretrained {tag}: neither a file nor a tag of {name}; tags: {tags}")
    norm = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic"}
    # the OpenAI weights were trained with QuickGELU; the tag knows, the model name alone builds plain GELU
    quick = bool(known.get("quick_gelu", config.get("quick_gelu", False))) or args.force_quick_gelu
    size = args.image_size or config["vision_cfg"].get("image_size", 224)
    spec = {k: known.get(k, v) for k, v in norm.items()}
    spec |= {"config": {k: config[k] for k in ("embed_dim", "vision_cfg")}, "kwargs": kwargs, "quick_gelu": quick,
             "image_size": size}
    if not tag:
        return spec, None
    try:
        full = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick, force_image_size=size)
    except Exception as e:
        sys.exit(f"--pretrained {tag}: cannot be loaded ({brief(e)}); give a weights file instead")
    return spec, full.visual.state_dict()


def key_value(item):
    """"depth=4" -> ("depth", 4)"""
    key, found, value = item.partition("=")
    if not found:
        sys.exit(f"--model-kwargs {item}: must be key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def read_weights(path):
    """A safetensors or state-dict file -> {name: tensor}. Never unpickles code."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()}
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
    if not any(v.is_meta for v in wanted.values()):  # else only the fit was asked for
        module.load_state_dict({k: state.get(k, wanted[k]) for k in wanted})


def brief(error):
    """An error in one short line, for messages of our own: torch's can be long."""
    return reason(error)[:120]


class AllReduce(torch.autograd.Function):
    """The sum over all processes, differentiable."""

    @staticmethod
    def forward(_, x):
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x
    backward = forward  # the gradient is summed too


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, as one process would see them. torch's SyncBatchNorm refuses CPUs."""

    def forward(self, x):  # (B, D)
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        x, world = x.float(), dist.get_world_size()
        mean = AllReduce.apply(x.mean(0)) / world
        var = AllReduce.apply((x - mean).square().mean(0)) / world
        with torch.no_grad():
            n = len(x) * world
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Net(nn.Module):
    """tower -> head -> unit-norm embedding (B, 384). Takes images (B, 3, S, S), uint8 or normalised float, or what the
    tower made of them (B, D). Layers in `frozen` stay in eval mode while the rest trains."""

    def __init__(self, tower, spec, head="linear", width=16, dim=384):
        super().__init__()
        self.tower, self.spec, self.frozen = tower, spec, []
        with torch.no_grad():  # the pooled width is not always what a config says
            self.features = tower.eval()(torch.zeros(1, 3, spec["image_size"], spec["image_size"])).shape[-1]
        if head == "linear":
            self.head = nn.Linear(self.features, dim)
        else:
            hidden = width * 1024
            self.head = nn.Sequential(nn.Linear(self.features, hidden), SharedBatchNorm(hidden), nn.ReLU(),
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
        if x.dtype == torch.uint8:
            x = self.pixels(x)
        return self.embed(self.tower(x) if x.ndim == 4 else x)

    def embed(self, features):
        return F.normalize(self.head(features).float(), dim=-1)

    def train(self, mode=True):
        super().train(mode)
        for layer in self.frozen:
            layer.eval()
        return self


def depths(net):
    """{parameter name: depth}: 0 the stem, then one per block, the head last. Layer decay and --unfreeze-from count in
    these; what follows the last block belongs to it. A timm tower knows its blocks, for open_clip's they stand here."""
    from timm.models import group_parameters
    wrapped = hasattr(net.tower, "trunk")  # open_clip around a timm backbone
    tower, prefix = (net.tower.trunk, "tower.trunk.") if wrapped else (net.tower, "tower.")
    matcher = {"stem": "conv|bn|class_embedding|positional_embedding|ln_pre",  # in timm's format; ViT, ResNet, the rest
               "blocks": [(r"transformer\.resblocks\.(\d+)", None), (r"layer(\d+)\.(\d+)", None), (".*", (99999,))]}
    if hasattr(tower, "group_matcher"):
        matcher = tower.group_matcher(coarse=False)
    found = {prefix + n: d for n, d in group_parameters(tower, matcher, reverse=True).items()}
    last = max(found.values())
    if not last:
        sys.exit(f"{type(tower).__name__}: its blocks are not known, so no --layer-decay or --unfreeze-from for it")
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
        p.requires_grad_(p.requires_grad and (d == top if head_only else d >= unfreeze_from))
        if p.requires_grad:
            group = {"depth": d, "peak": lr * decay ** (top - d), "weight_decay": wd if matrix else 0.0, "params": []}
            groups.setdefault((d, matrix), group)["params"].append(p)
    return [groups[k] for k in sorted(groups)]


def drop_patches(tower, p):
    """FLIP (arXiv 2212.00794), ViTs only: in training a share p of the patches is left out, and as much of the cost."""
    from timm.layers import PatchDropout, PatchDropoutWithIndices
    inner = getattr(tower, "trunk", tower)
    if type(inner).__name__ in ("Eva", "NaFlexVit"):  # rotate by position, so they must know which patches stayed
        inner.patch_drop = PatchDropoutWithIndices(p, num_prefix_tokens=inner.num_prefix_tokens)
    elif hasattr(inner, "patch_drop") and hasattr(inner, "num_prefix_tokens"):  # SAM's windows want every patch
        inner.patch_drop = PatchDropout(p, num_prefix_tokens=inner.num_prefix_tokens)
    elif hasattr(inner, "patch_dropout"):  # open_clip's own module chooses on the CPU, which the GPU then waits for
        inner.patch_dropout = PatchDropout(p)
    else:
        sys.exit(f"--patch-dropout: {type(inner).__name__} has no patches to drop")


def checkpoint_gradients(tower, trained_bn):
    """--grad-checkpointing, or one line where it would do nothing or harm."""
    if trained_bn:  # the second forward pass would move the running statistics again
        sys.exit("--grad-checkpointing: not with BatchNorm that trains; add --freeze-bn")
    try:
        tower.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        tower = None
    if tower is None or type(tower).__name__ == "ModifiedResNet":  # whose method is empty
        sys.exit("--grad-checkpointing: this tower has none; lower --batch-size and raise --accum-freq instead")


def save_net(net, meta, path, head=None):
    """best.safetensors: the weights, and as JSON metadata all it takes to use them. head: its state, if not net's."""
    state = net.state_dict() | {f"head.{k}": v for k, v in (head or {}).items()}
    with atomic(path) as f:
        f.write(to_safetensors({k: v.contiguous().cpu() for k, v in state.items()}, {"config": json.dumps(meta)}))


def find_checkpoint(path):
    """A checkpoint file, a phase folder or a run folder (ft before lp) -> path of best.safetensors. Exits if none."""
    path = Path(path)
    for p in (path, path / "best.safetensors", path / "ft/best.safetensors", path / "lp/best.safetensors"):
        if p.is_file():
            return p
    sys.exit(f"{path}: no checkpoint there (best.safetensors); train one with: python train.py --phase lp")


def load_meta(path):
    """The metadata of a checkpoint that save_net wrote -> dict. Exits with one line on what is no such checkpoint."""
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {}).get("config", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        sys.exit(f"{path}: not a readable checkpoint ({brief(e)}); train it again")
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        sys.exit(f"{path}: not a checkpoint of train.py (format {found}, expected {FORMAT})")
    try:
        meta["tower"]["model"].lower(), meta["tower"]["kwargs"].items(), meta["head"].items()
        meta.setdefault("text_model", {}).get("name")
    except (KeyError, AttributeError, TypeError) as e:
        sys.exit(f"{path}: not a checkpoint of train.py ({type(e).__name__}: {brief(e)})")
    return meta


def load_net(path, image_size=None):
    """A checkpoint that save_net wrote -> (Net in eval mode, meta). No flags: it describes itself. Exits with one line
    on what is no such checkpoint. image_size: pixels other than those it was trained at; position embeddings are
    resized, and meta["tower"]["image_size"] says so."""
    path = find_checkpoint(path)
    meta, state = load_meta(path), load_file(path)
    try:
        # not under "meta" below: the first import makes tensors of its own
        import_module("timm" if meta["tower"]["model"].startswith("timm:") else "open_clip")
        meta["tower"]["image_size"] = image_size or meta["tower"]["image_size"]
        for device in ("meta", "cpu"):  # first without memory: what it claims to be may be larger than what it is
            with torch.device(device):
                net = Net(build_tower(meta["tower"]), meta["tower"], **meta["head"])
            load_strict(net, resize_positions(state, net), path)
    except Exception as e:  # whatever torch, timm and open_clip make of a description that is wrong or hostile
        sys.exit(f"{path}: describes no model that can be built here at {image_size or 'its own'} px "
                 f"({type(e).__name__}: {brief(e)})")
    return net.eval(), meta


# ------------------------------------------------------------------------------------------------------------- the data

class BadPicture(Exception):
    """A picture that clean.py could read and we cannot."""


class Pictures(Dataset):
    """Pictures as the tower wants them: short side to S, centre crop. -> uint8 tensor (3, S, S)."""

    def __init__(self, paths, spec):
        self.paths, self.size = paths, spec["image_size"]
        self.filter = getattr(Image.Resampling, spec["interpolation"].upper(), Image.Resampling.BICUBIC)

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


class Batches(Dataset):
    """Whole micro-batches, put together in the workers: (rows, flips) -> pictures, targets, flips, tokens of the first
    `mixed` prompts joined with the next for MixGen, or {}, rows."""

    def __init__(self, pictures, targets, prompts, mixed=0, tokenize=None):
        self.pictures, self.targets, self.prompts = pictures, targets, prompts
        self.mixed, self.tokenize = mixed, tokenize

    def __getitem__(self, item):
        (rows, flips), m, tokens = item, self.mixed, None
        if m:
            tokens = self.tokenize([f"{self.prompts[a]} {self.prompts[b]}" for a, b in zip(rows[:m], rows[m:2 * m])])
        x, y = torch.stack([self.pictures[i] for i in rows]), torch.from_numpy(self.targets[rows])
        return x, y, torch.from_numpy(flips), dict(tokens or {}), torch.from_numpy(rows)


def load_features(plan, features, targets):
    """lp's micro-batches of a plan, from memory; the same five things as Batches gives."""
    for rows, flips in plan:
        x, y = torch.from_numpy(features[flips.astype(int), rows]).float(), torch.from_numpy(targets[rows])
        yield x, y, None, None, torch.from_numpy(rows)


def plan(train_rows, n_rows, batch, args, rank, step):
    """The micro-batches of this process from `step` on, each (rows, whether mirrored): a function of (seed, epoch), so
    workers and resume change nothing. train_rows: indices among all n_rows; batch: rows per step in all processes."""
    per_epoch = len(train_rows) // batch
    for epoch in range(step // per_epoch, args.epochs):
        rng = np.random.default_rng((args.seed, epoch))
        order = train_rows[rng.permutation(len(train_rows))]
        flips = rng.random(n_rows) < args.hflip
        for i in range(max(0, step - epoch * per_epoch), per_epoch):
            # dealt like cards: a row and its MixGen partner, M rows on, meet on one device,
            # so any division of the batch mixes the same pairs
            hands = order[i * batch:(i + 1) * batch].reshape(args.batch_size, -1).T
            for hand in hands[rank * args.accum_freq:][:args.accum_freq]:
                yield hand.copy(), flips[hand]


def in_order(rows, size):
    """The same kind of plan, for scoring: no mirror images."""
    return [(r, np.zeros(len(r), bool)) for r in (rows[i:i + size] for i in range(0, len(rows), size))]


def make_loader(dataset, args, device, **batches):
    """Pictures in worker processes."""
    # its own generator: building an iterator would draw from the global stream and shift dropout after a resume
    return DataLoader(dataset, num_workers=args.workers, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_signals, generator=torch.Generator(), **batches)


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


def features_file(net, data, n, views, args):
    """Where the features of n pictures lie: a name made of the tower, its weights, its transform and the data."""
    digest = hashlib.sha256(json.dumps([net.spec, data, n, views, args.precision], sort_keys=True).encode())
    for name, tensor in sorted(net.tower.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return Path(args.out).parent / f".features/{digest.hexdigest()[:32]}.npy"


def extract_features(net, file, paths, views, args, device, rank=0, world=1):
    """Frozen tower features of every picture, computed once -> memmap (views, N, D), float16 where computed in 16 bits;
    view 1 is the mirror image. Whole batches are shared out over the processes, so their number changes no byte. What a
    killed run had done is not done again: the file .done has a byte per picture, set when its features are on disk."""
    found = None
    with suppress(OSError, ValueError, EOFError):  # not there, or cut short
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    if all(gather(found is not None)):
        return found
    dtype, n = DTYPES[args.precision], len(paths)
    # cast once, not by autocast at every batch; BatchNorm statistics do not survive 16 bits
    tower = copy.deepcopy(net.tower).to(device, dtype, memory_format=torch.channels_last).eval()
    for layer in tower.modules():
        if isinstance(layer, _BatchNorm):
            layer.float()
    if args.compile:
        tower.compile(dynamic=False)

    # written beside, under the name of this run: another run may be making the same file
    part, done = (file.with_suffix(f".{Path(args.out).name}.{end}") for end in ("part", "done"))
    store = np.dtype(np.float32 if dtype == torch.float32 else np.float16)
    row_bytes = net.features * store.itemsize
    header = {"descr": store.str, "fortran_order": False, "shape": (views, n, net.features)}
    if rank == 0 and not (part.is_file() and done.is_file() and done.stat().st_size == n):
        file.parent.mkdir(parents=True, exist_ok=True)
        done.write_bytes(bytes(n))
        with open(part, "wb") as f:
            np.lib.format.write_array_header_1_0(f, header)
            f.truncate(f.tell() + views * n * row_bytes)
    wait(world)
    have = np.fromfile(done, np.uint8)
    batches = [b.tolist() for b in torch.arange(n).split(args.batch_size)][rank::world]
    todo = [b for b in batches if not have[b].all()]
    loader, pending, synced = make_loader(Pictures(paths, net.spec), args, device, batch_sampler=todo), [], time.time()
    with open(part, "r+b") as out, open(done, "r+b") as marks, torch.inference_mode():
        start = os.path.getsize(part) - views * n * row_bytes
        bar = tqdm(zip(todo, loader), "features", len(batches), initial=len(batches) - len(todo), unit="batch",
                   disable=rank > 0)
        for rows, x in bar:
            x = net.pixels(x.to(device, non_blocking=True)).to(dtype, memory_format=torch.channels_last)
            for view in range(views):
                features = tower(x.flip(-1) if view else x).float().cpu().numpy().astype(store)
                finite = np.isfinite(features).all(1)
                if not finite.all():
                    sys.exit(f"{paths[rows[int(np.argmin(finite))]]}: its features are not finite; "
                             "wrong --pretrained? else try --precision fp32")
                out.seek(start + (view * n + rows[0]) * row_bytes)
                out.write(features.tobytes())
            pending.append(rows)
            if time.time() - synced > 10 or rows is todo[-1]:
                out.flush()
                os.fsync(out.fileno())
                for finished in pending:
                    marks.seek(finished[0])
                    marks.write(b"\1" * len(finished))
                marks.flush()
                pending, synced = [], time.time()
    wait(world)
    if rank == 0:
        os.replace(part, file)
        done.unlink()
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


def update_ema(ema, net, step, decay):
    """What AveragedModel of torch.optim.swa_utils does, which would have the GPU wait for its counter at every step.
    Buffers are copied."""
    average, params = get_ema_multi_avg_fn(ema_at(step, decay)), [list(m.parameters()) for m in (ema, net)]
    average(*params, None)
    for mine, new in zip(ema.buffers(), net.buffers()):
        mine.copy_(new)


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


def over_all(x, op=dist.ReduceOp.SUM):
    """A tensor, reduced over all processes -> list."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x.tolist()


def gather(x):
    """What every process has, as a list; rank 0's first."""
    if not dist.is_initialized():
        return [x]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, x)
    return found


def tally(cos):
    """Cosines (B,) -> their sum and number. Sums of these over batches and processes give the exact mean."""
    return torch.stack([cos, torch.ones_like(cos)]).double().sum(1)


def evaluate(net, batches, autocast, device):
    """Mean cosine over micro-batches, of which every process has its own; some may have none."""
    net.eval()
    seen = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.inference_mode(), autocast():
        for x, y, *_ in batches:
            seen += tally(cosine(net(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)))
    total, n = over_all(seen)
    return total / n


def memory(device):
    """Peak GiB so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ------------------------------------------------------------------------------------------------------------- watching

def check_finite(recent, names, scaler):
    """recent: [(step, rows, cosines, gradient norm), ...] since the last look. Exits on every process, with the first
    bad step and its pictures. Looks are rare because they wait for the device; the optimiser has skipped a bad step by
    itself, so nothing is lost in between."""
    bad = []
    for step, rows, cos, norm in recent:
        pictures = [names[i] for i in rows[~torch.isfinite(cos).cpu()].tolist()]
        if pictures or not torch.isfinite(norm):
            bad.append((step, pictures))
    bad = sum(gather(bad), [])
    if bad:
        step = min(bad)[0]
        ids = sorted({i for s, pictures in bad if s == step for i in pictures})
        what = f"the loss of {', '.join(ids[:8])}" if ids else "the gradient, though no loss,"
        sys.exit(f"step {step}: {what} is not finite; stopped before the update, and the checkpoints on disk are good. "
                 "Mend the data, or start again (--overwrite) with a lower --lr or --precision fp32")
    if scaler.is_enabled() and scaler.get_scale() < 2 ** -10:  # it halves at every step that it skips
        sys.exit(f"step {recent[-1][0]}: the gradient overflows float16 at any scale, so no step is taken any more; "
                 "start again (--overwrite) with --precision fp32, or amp_bf16 where the hardware has it")


def log_line(step, total, row, val, eta):
    """A row of metrics.jsonl for people; eta in seconds."""
    slow = " (raise --workers)" if row["data_wait"] > 0.2 else ""
    return (f"step {step:,} ({step / total:.0%}) · loss {1 - row['train_cosine']:.4f} · val {val:.4f} · "
            f"lr {row['lr']:.2e} · grad {row['grad_norm']:.2f} · {row['images_per_s']:.0f} images/s · "
            f"data wait {row['data_wait']:.0%}{slow} · {row['memory_gib']:.1f} GiB · ETA {eta / 60:.1f} min")


def cut_log(file, step):
    """Drop what --resume will write again: rows after a step, the last word of a run, a torn last line."""
    kept = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        with suppress(ValueError):
            row = json.loads(line)
            kept += [line + "\n"] if row["step"] <= step and "done" not in row else []
    with atomic(file, "w") as f:
        f.writelines(kept)


def draw_curve(file, out, baseline):
    from matplotlib.figure import Figure  # without pyplot, which wants a display and keeps every figure
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    fig = Figure(figsize=(7, 4), layout="tight")
    ax = fig.subplots()
    for key, style in (("train_cosine", {"alpha": .5}), ("val_cosine", {"marker": "."})):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            ax.plot(*zip(*points), label=key.replace("_", " "), **style)
    ax.axhline(baseline, color="gray", ls="--", label="mean vector")
    ax.set(xlabel="step", ylabel="mean cosine")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    with atomic(out) as f:
        fig.savefig(f, format="png", dpi=120)


def open_log(file, args, step):
    """-> a function that appends a row to metrics.jsonl and to what --report-to names, which is imported here."""
    writer = wandb = None
    try:
        if args.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(file.parent, purge_step=step + 1 if step else None)  # a resumed run's are dropped
        if args.report_to == "wandb":
            import wandb
            wandb.init(project="image2prompt", dir=file.parent, name=str(file.parent), config=vars(args))
    except ImportError:
        sys.exit(f"--report-to {args.report_to}: not installed; pip install {args.report_to}")

    def note(step, **row):
        with open(file, "a") as f:
            f.write(json.dumps({"step": step, **row}) + "\n")
        if wandb:
            wandb.log(row, step=step)
        if writer:
            for key, value in row.items():
                writer.add_scalar(key, value, step)
            writer.flush()
    return note


def describe(net, groups, spec, args, device, autocast):
    """--dry-run: what will be trained, at what lr, and what a step costs."""
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
    per_image = kept(2) - kept(1)
    once = max(0, kept(1) - per_image)  # what does not grow with the batch are weights, cast or not
    trained = sum(count(g["params"]) for g in groups)
    weights = count(net.parameters()) * (2 if args.ema else 1)
    state = 4 * (weights + 3 * trained)  # bytes: weights and their EMA; gradient and two moments
    flops = count_flops(net, images(1)) / 1e9
    print(f"  {flops:.4g} GFLOP per image forward ({3 + args.grad_checkpointing} times that to train) · memory, "
          f"estimated: {state / 2**30:.2f} GiB weights and optimiser + "
          f"{(once + per_image * args.batch_size) / 2**30:.2f} GiB activations at --batch-size {args.batch_size}")


def count_flops(net, images):
    """FLOPs of a forward pass, an addition and a multiplication being two. The counter knows matrix products and
    convolutions, but not every fused kernel of attention: so without those."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        net.forward(images)
    torch.backends.mha.set_fastpath_enabled(fast)
    return flops.get_total_flops()


def count(params):
    return sum(p.numel() for p in params)


# ----------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    def unset(key):
        return f"unset = {DEFAULTS['lp'][key]:g} for lp, {DEFAULTS['ft'][key]:g} for ft"

    p = argparse.ArgumentParser(description="Train an image tower to predict prompt embeddings, LP-FT.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p.add_argument("--phase", choices=["lp", "ft"], required=True,
                   help="lp: the head on frozen features; ft: everything, from the lp head")
    p.add_argument("--data", default="data/demo", help="folder written by clean.py")
    p.add_argument("--out", help="run folder; unset = runs/ and the name of the data folder")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier run of this phase")
    p.add_argument("--resume", action="store_true", help="go on from last.pt")
    p.add_argument("--init", metavar="PATH", help="ft: run to start from; unset = lp of --out, none = a cold start")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, data order and augmentation")
    p.add_argument("--deterministic", action="store_true", help="bit-exact on a GPU too; slower; some models cannot")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    p.add_argument("--dry-run", action="store_true", help="show lr by group, FLOPs, memory; one step; write nothing")
    g = p.add_argument_group("model (ft takes it from its start)")
    g.add_argument("--model", help="open_clip name or .json, or timm:NAME; unset = as the data says (ViT-L-14)")
    g.add_argument("--pretrained", help="tag, weights file, or none; unset = as the data folder says (openai)")
    g.add_argument("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="of the timm model")
    g.add_argument("--force-quick-gelu", action="store_true", help="for OpenAI-style weights files without a tag")
    g.add_argument("--proj", action="store_true", help="features after the contrastive projection instead of before")
    g.add_argument("--image-size", type=int, help="pixels; unset = the tower's own; ft may use more than lp")
    g.add_argument("--image-mean", type=float, nargs=3, help="unset = the tower's own")
    g.add_argument("--image-std", type=float, nargs=3, help="unset = the tower's own")
    g.add_argument("--head", choices=["linear", "mlp"], help="unset = linear; mlp: --head-width wide, BatchNorm, ReLU")
    g.add_argument("--head-width", type=int, help="of the mlp head, in units of 1024; unset = 16")
    g.add_argument("--head-init", choices=["xavier", "ridge"],
                   help="lp: ridge, for a linear head, starts from the closed form; unset = ridge where it can be")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, help=unset("epochs"))
    g.add_argument("--batch-size", type=int, help=f"of one micro-batch on one device; {unset('batch_size')}")
    g.add_argument("--accum-freq", type=int, default=1, help="micro-batches per step; more for a lower --batch-size")
    g.add_argument("--lr", type=float, help=f"peak learning rate; {unset('lr')}")
    g.add_argument("--wd", type=float, default=0.01, help="weight decay of matrices; biases and norms have none")
    g.add_argument("--warmup", type=int, help=f"steps, at most a fifth of the run; {unset('warmup')}")
    g.add_argument("--grad-clip-norm", type=float, default=1.0, help="0 = off")
    g.add_argument("--hflip", type=float, metavar="P", help=f"probability of a mirror image; {unset('hflip')}")
    g.add_argument("--precision", choices=["auto", *DTYPES], default="auto",
                   help="auto: bf16 where hardware has it; fp32 is TF32 on a GPU")
    g.add_argument("--compile", action="store_true", help="in place; pays off from some hundred steps on")
    g = p.add_argument_group("ft")
    g.add_argument("--mixgen", type=float, metavar="FRACTION", help=f"of a batch, to blend; {unset('mixgen')}")
    g.add_argument("--layer-decay", type=float, default=1.0, help="lr factor per block, downwards; medals: 0.4 to 0.6")
    g.add_argument("--unfreeze-from", type=int, default=0, metavar="DEPTH",
                   help="freeze what is below: 0 the stem, then one per block; --dry-run lists them")
    g.add_argument("--ema", type=float, metavar="DECAY", help=f"average the weights too; 0 = off; {unset('ema')}")
    g.add_argument("--wise", type=float, metavar="ALPHA", help="also (1 - ALPHA) start + ALPHA trained (WiSE-FT)")
    g.add_argument("--freeze-bn", action=argparse.BooleanOptionalAction,
                   help="keep the tower's BatchNorm statistics; unset = for pretrained towers")
    g.add_argument("--patch-dropout", type=float, default=0.0, metavar="P", help="share of patches to leave out")
    g.add_argument("--grad-checkpointing", action="store_true", help="a third more time, far less memory")
    g = p.add_argument_group("watching")
    g.add_argument("--log-every", type=int, default=20, help="steps")
    g.add_argument("--save-every", type=float, default=5, help="minutes between writes of last.pt")
    g.add_argument("--report-to", choices=["tensorboard", "wandb"], help="besides metrics.jsonl")
    return p.parse_args(argv)


def prepare(args, summary):
    """Fills what the command line leaves open, by what the data folder recommends and by DEFAULTS; checks all that is
    cheap. -> phase folder; what the net comes from: {"tower", "head", ...} of last.pt or of ft's start, or None"""
    args.out = str(Path(args.out or f"runs/{Path(args.data).resolve().name}"))
    phase, begin = Path(args.out) / args.phase, None
    if args.resume and (args.overwrite or args.dry_run):
        sys.exit(f"--resume {'--overwrite' if args.overwrite else '--dry-run'}: one of them, please")
    if (phase / "metrics.jsonl").exists() and not (args.overwrite or args.resume or args.dry_run):
        sys.exit(f"{phase}: a run is already there; --resume it, --overwrite it, or choose another --out")
    if args.resume and not (phase / "last.pt").is_file():
        sys.exit(f"{phase}: nothing to resume there (no last.pt)")
    if args.resume:
        begin = load_last(phase / "last.pt")
    elif args.phase == "ft" and args.init != "none":
        begin = find_start(args, phase, summary)

    off = {"layer_decay": 1, **dict.fromkeys(("mixgen", "unfreeze_from", "ema", "wise", "freeze_bn", "patch_dropout",
                                              "grad_checkpointing"), False)}
    idle = [flag(k) for k, v in off.items() if getattr(args, k) not in (None, v)]
    if idle and args.phase == "lp":
        sys.exit(f"{' '.join(idle)}: for --phase ft; lp trains the head alone, on features computed once")

    # the data folder's advice is for one model
    advice, fresh = summary["recommend"], args.phase == "lp" or args.init == "none"
    if (args.model if fresh else begin["tower"]["model"]) not in (None, advice["model"]):
        advice = {}
    known = {**DEFAULTS[args.phase], **advice.get(args.phase, {})}
    if fresh:  # else the start says what tower it is
        known |= {"pretrained": "openai", **{k: v for k, v in advice.items() if not isinstance(v, dict)}}
    for key, value in known.items():
        if getattr(args, key) is None:
            setattr(args, key, value)

    for low, high, keys in ((0, 1, "hflip wise"), (0, 0.5, "mixgen"), (1e-6, 1, "layer_decay"), (0, 0.999999, "ema"),
                            (0, 0.99, "patch_dropout"), (1e-12, 1e6, "lr"),
                            (0, 1e12, "workers seed warmup wd grad_clip_norm save_every"),
                            (1, 1e12, "epochs accum_freq log_every head_width image_size"), (2, 1e12, "batch_size")):
        for key in keys.split():
            value = getattr(args, key)
            if value is not None and not low <= value <= high:
                sys.exit(f"{flag(key)} {value}: must be in [{low}, {high:g}]")
    mixed = args.mixgen * args.batch_size
    if abs(mixed - round(mixed)) > 1e-6:
        sys.exit(f"--mixgen {args.mixgen}: blends {mixed:g} of a --batch-size of {args.batch_size}; must be whole")
    if args.head_init == "ridge" and (args.phase == "ft" or args.head == "mlp"):
        sys.exit("--head-init ridge: is for --phase lp with --head linear")
    args.head_init = args.head_init or ("ridge" if args.phase == "lp" and args.head != "mlp" else "xavier")
    return phase, begin


def find_start(args, phase, summary):
    """The checkpoint that ft starts from -> its metadata, and its "path". It says what is trained: flags that say
    otherwise are an error, and so are other targets."""
    if not args.init and not (Path(args.out) / "lp/best.safetensors").is_file():
        sys.exit(f"{args.out}/lp: no lp phase to start from; run: python train.py --phase lp --data {args.data} "
                 f"--out {args.out}  (or --init PATH)")
    path = find_checkpoint(args.init or Path(args.out) / "lp")
    if args.overwrite and path.resolve().parent == phase.resolve():
        sys.exit(f"--init {args.init}: is what --overwrite would delete; choose another --out")
    meta = load_meta(path)
    if meta["text_model"] != summary["text_model"]:
        sys.exit(f"{path}: was trained for {meta['text_model'].get('name')} targets, "
                 f"but {args.data} has {summary['text_model']['name']}")
    tower, head = meta["tower"], meta["head"]
    told = {"model": tower["model"], "pretrained": tower.get("pretrained"), "proj": tower.get("proj"),
            "model_kwargs": list(tower["kwargs"].items()), "force_quick_gelu": tower.get("quick_gelu"),
            "image_mean": tower.get("mean"), "image_std": tower.get("std"),
            "head": head.get("head"), "head_width": head.get("width")}
    wrong = [flag(k) for k, v in told.items() if getattr(args, k) not in (None, False, [], v)]
    if wrong:
        sys.exit(f"{path}: holds {tower['model']} with a {head.get('head')} head; leave {' '.join(wrong)} out, "
                 "or train that lp first")
    return {**meta, "path": path}


def flag(key):
    return f"--{key.replace('_', '-')}"


def load_last(path):
    """last.pt -> dict of tensors and plain values; one that cannot be read ends in one line."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["tower"]["model"], state["settings"].items(), state["net"].items()  # what other files have not
        return state
    except Exception as e:
        sys.exit(f"{path}: not a readable checkpoint ({brief(e)}); start again with --overwrite")


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


def start_net(args, begin, dim):
    """-> the Net that training starts from, arguments of its head. lp builds it from the command line, ft loads it."""
    if args.phase == "ft" and args.resume:  # its weights come with the rest of last.pt
        return Net(build_tower(begin["tower"]), begin["tower"], **begin["head"]), begin["head"]
    if begin and args.phase == "ft":
        return load_net(begin["path"], args.image_size)[0], begin["head"]
    tower, spec = make_tower(args)
    head = {"head": args.head or "linear", "width": args.head_width or 16, "dim": dim}
    try:
        return Net(tower, spec, **head), head
    except Exception as e:  # a size that the tower cannot take, and whatever else stands in somebody's description
        sys.exit(f"--model {args.model}: cannot be used at {spec['image_size']} px ({type(e).__name__}: {brief(e)})")


def resume_command(world):
    words = shlex.join([*(a for a in sys.argv if a not in ("--overwrite", "--resume")), "--resume"])
    return f"the same torchrun command and {words}" if world > 1 else f"python {words}"


def main():
    args = parse_args()
    pairs, targets, summary = read_data(args.data)
    phase, begin = prepare(args, summary)
    lp = args.phase == "lp"
    if pairs["image"].null_count():
        sys.exit(f"{args.data}: has no images (made with --text-only)")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that half-written files go away
    device, rank, world = pick_device(args)
    torch.manual_seed(args.seed)

    # rows: order in the arrays is the order of pairs.parquet, without the guard rows
    used = np.flatnonzero(pairs["split"].to_numpy() != "guard")
    pairs, targets = pairs[used], np.array(targets[used])
    split, prompts = pairs["split"].to_numpy(), pairs["prompt"].to_list()
    paths = [str(Path(args.data) / name) for name in pairs["image"]]
    train_rows = np.flatnonzero(split == "train")
    held = {s: np.flatnonzero(split == s) for s in ("val", "ood") if (split == s).any()}
    batch = args.batch_size * args.accum_freq * (1 if lp else world)  # lp trains on one process
    if len(train_rows) < batch or "val" not in held:
        sys.exit(f"{args.data}: {len(train_rows)} training and {len(held.get('val', []))} validation rows; "
                 f"need at least {batch} (--batch-size times --accum-freq times processes) and 1")
    if not all(np.isfinite(targets[rows]).all() for rows in held.values()):
        sys.exit(f"{args.data}: has targets that are not finite; make it again with clean.py --overwrite")
    mean = targets[train_rows].mean(0)
    baseline = {s: float((targets[rows] @ mean).mean() / np.linalg.norm(mean)) for s, rows in held.items()}
    per_epoch = len(train_rows) // batch
    total = args.epochs * per_epoch
    warmup = min(args.warmup, total // 5)

    # the net; trained: the part of it that changes; models: the weights that are validated
    net, head = start_net(args, begin, targets.shape[1])
    spec = net.spec
    autocast, scaler, args.precision = pick_precision(args.precision, device, net.tower)
    meta = {"format": FORMAT, "phase": args.phase, "tower": spec, "head": head, "text_model": summary["text_model"],
            "data": args.data, "data_hashes": summary["hashes"], "baseline": baseline["val"],
            "n_val": len(held["val"]), "mean_target": mean.tolist(), "seed": args.seed}
    same = {"processes": 1 if lp else world, "data": summary["hashes"]}  # what, besides flags, may not change on resume
    groups = param_groups(net, args.lr, args.wd, args.layer_decay, args.unfreeze_from, head_only=lp)
    params = [p for g in groups for p in g["params"]]
    # a pretrained tower's BatchNorm keeps its statistics: the README has the evidence
    freeze_bn = lp or (spec["pretrained"] != "none" if args.freeze_bn is None else args.freeze_bn)
    if world > 1 and device.type == "cuda" and not freeze_bn:
        from timm.layers import convert_sync_batchnorm
        net.tower = convert_sync_batchnorm(net.tower)
    norms = [m for m in net.tower.modules() if isinstance(m, _BatchNorm)]
    net.frozen = list(net.tower.modules()) if lp else [m for m in norms if freeze_bn or not m.weight.requires_grad]
    net.to(device, memory_format=torch.channels_last)
    trained, forward, models, ema, start, step = net.head if lp else net, net, {"raw": net}, None, None, 0

    if lp:  # on cached features, from here on as one process
        views = 1 + (args.hflip > 0)
        file = features_file(net, summary["hashes"], len(paths), views, args)
        same["features"] = file.stem
        if args.dry_run:
            features = np.zeros((views, len(paths), net.features), np.float32)
        else:
            features = extract_features(net, file, paths, views, args, device, rank, world)
        if world > 1:
            dist.destroy_process_group()
        if rank > 0:
            return
        world = 1
        if args.head_init == "ridge" and not (args.resume or args.dry_run):
            start_from_ridge(net.head, features, targets, train_rows, held["val"])
    else:  # on pictures
        pictures, tokenize = Pictures(paths, spec), None
        if args.mixgen > 0:
            encoder, text_model = load_encoder(summary["text_model"]["name"], device)
            if text_model != summary["text_model"]:
                sys.exit(f"--mixgen: {text_model['name']} is not the encoder that made the targets of {args.data}")
            tokenize = partial(encoder.tokenizer, padding=True, truncation=True, max_length=encoder.max_seq_length,
                               return_tensors="pt")
        if args.patch_dropout:
            drop_patches(net.tower, args.patch_dropout)
        if args.grad_checkpointing:
            checkpoint_gradients(net.tower, trained_bn=len(norms) > len(net.frozen))
        if args.wise is not None:
            models["wise"], start = copy.deepcopy(net), begin["start"] if args.resume else net.state_dict()
            start = {k: v.to(device, copy=True) for k, v in start.items()}
        if args.ema:
            models["ema"] = ema = copy.deepcopy(net).requires_grad_(False)
        if args.compile:
            net.compile(dynamic=False)  # in place: wrapping would rename every key of the checkpoint
        if world > 1:
            gpus = [device.index] if device.type == "cuda" else None
            forward = nn.parallel.DistributedDataParallel(net, device_ids=gpus)

    levels = "; ".join(f"{s}: n = {len(held[s])}, mean vector {baseline[s]:.4f}" for s in held)
    if rank == 0:
        act = "" if "quick_gelu" not in spec else ", QuickGELU" if spec["quick_gelu"] else ", GELU"
        print(f"{args.phase}: {spec['model']} ({spec['pretrained']}{act}), {spec['image_size']} px, "
              f"{head['head']} head, {count(params):,} parameters trained, {len(train_rows):,} train rows, "
              f"{total:,} steps of {batch} on {world} x {device.type}, {args.precision}\n{levels}", flush=True)
        if args.dry_run:
            describe(net, groups, spec, args, device, autocast)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)

    # a resumed run is the same run. best: {kind of weights: val cosine}; seen: sum and number of cosines since the
    # last log line; recent: what check_finite has not seen
    log, best, best_head, recent = phase / "metrics.jsonl", {}, {}, []
    seen, score = torch.zeros(2, dtype=torch.float64, device=device), math.nan
    settings = {**{flag(k): v for k, v in vars(args).items() if k not in FREE}, **same}
    if args.resume:
        changed = [f"{k} {v}" for k, v in begin["settings"].items() if settings.get(k) != v]
        if changed:
            sys.exit(f"{phase}/last.pt: was made with other settings: {', '.join(changed)}")
        for name, part in (("net", trained), ("optimizer", optimizer), ("scaler", scaler), ("ema", ema)):
            if part:
                part.load_state_dict(begin[name])
        step, best, best_head, score = (begin[k] for k in ("step", "best", "best_head", "score"))
        seen = begin["seen"][rank].to(device)
    del begin  # gigabytes
    note = lambda step, **row: None  # noqa: E731
    if rank == 0 and not args.dry_run:
        phase.mkdir(parents=True, exist_ok=True)
        for old in phase.glob("*" if args.overwrite else ".*.tmp"):  # only now, when nothing can be wrong any more
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        cut_log(log, step)
        note = open_log(log, args, step)

    def load(plan, mixed=0):
        """A plan's micro-batches: x (features in lp, pictures in ft), targets, flips, MixGen's tokens or None, rows."""
        if lp:
            return load_features(plan, features, targets)
        return make_loader(Batches(pictures, targets, prompts, mixed, tokenize), args, device, batch_size=None,
                           sampler=plan)

    def validate():
        """Score every kind of weights, keep those that are the best of their kind so far. -> val cosine of the raw"""
        row = {}
        for kind, model in models.items():
            if kind == "wise":
                model.load_state_dict(wise(start, net.state_dict(), args.wise))
            for buffer in model.buffers() if world > 1 else ():  # else each process scores, and rank 0 saves, its own
                dist.broadcast(buffer, 0)
            scores = {f"{s}_cosine": evaluate(model, load(in_order(rows[rank::world], args.batch_size)), autocast,
                                              device) for s, rows in held.items()}
            if not all(map(math.isfinite, scores.values())):
                sys.exit(f"step {step}: validation ({kind} weights) is not finite, {scores}; try --precision fp32")
            row |= {k if kind == "raw" else f"{k}_{kind}": v for k, v in scores.items()}
            top = max(best.values(), default=-math.inf)
            if scores["val_cosine"] > best.get(kind, -math.inf):  # strictly better; ood is only looked at
                best[kind] = scores["val_cosine"]
                about = {**meta, "weights": kind, "step": step, **scores}
                if lp:
                    best_head.update(state=copy.deepcopy(net.head.state_dict()), about=about)
                elif rank == 0:
                    for name in ["best"] * (best[kind] > top) + [f"best-{kind}"] * (len(models) > 1):
                        save_net(model, about, phase / f"{name}.safetensors")
        net.train()
        note(step, epoch=round(step / per_epoch, 3), **row)
        # lp epochs take a moment: a tenth of them is worth a line and a picture
        if rank == 0 and (not lp or step == total or step // per_epoch % -(-args.epochs // 10) == 0):
            scores = " · ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items())
            print(f"step {step:,} ({step / total:.0%}) · {scores} · best {max(best.values()):.4f} ({levels})",
                  flush=True)
            draw_curve(log, phase / "curve.png", baseline["val"])
        return row["val_cosine"]

    def save():
        """What --resume needs. lp validates too often to write a whole net each time: its best is written here too."""
        every_seen = gather(seen.cpu())
        if rank == 0:
            with atomic(phase / "last.pt") as f:
                torch.save({"net": trained.state_dict(), "ema": ema and ema.state_dict(), "start": start,
                            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
                            "best": best, "best_head": best_head, "seen": every_seen, "score": score,
                            "tower": spec, "head": head, "settings": settings}, f)
            if lp:
                save_net(net, best_head["about"], phase / "best.safetensors", best_head["state"])
        wait(world)  # torchrun kills the process that still writes when another has left

    put = partial(torch.Tensor.to, device=device, non_blocking=True)
    stop, stopping = [], 0
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, _: stop.append(number))  # finish the step, save, say how to go on
    net.train()
    if step == 0 and not args.dry_run:
        score = validate()  # ft starts at the lp score
    source = iter(load(plan(train_rows, len(paths), batch, args, rank, step), round(args.mixgen * args.batch_size)))
    began = saved = clock = time.perf_counter()
    waited, logged = 0.0, step

    while step < total and not stopping:
        torch.manual_seed(seed_at(args.seed, step, rank))
        factor = lr_at(step, total, warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad()
        rows, cosines = [], []
        for micro in range(1, args.accum_freq + 1):
            asked = time.perf_counter()
            x, y, flip, tokens, ids = next(source)
            waited += time.perf_counter() - asked
            x, y = put(x), put(y)
            with forward.no_sync() if world > 1 and micro < args.accum_freq else nullcontext():
                with autocast():
                    if not lp:
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
            update_ema(ema, net, step, args.ema)
        seen += tally(cos)
        step += 1

        # all processes stop and save after the same step; asked on the host, so nothing waits for the GPU
        late, epoch_end = time.perf_counter() - saved > args.save_every * 60, step % per_epoch == 0
        stopping, saving = over_all(torch.tensor([max(stop, default=0), late]), dist.ReduceOp.MAX)
        logging = step % args.log_every == 0 or epoch_end or args.dry_run
        if logging or stopping or saving:
            check_finite(recent, paths, scaler)
            recent.clear()
        if logging:
            (cos_sum, n), seconds = over_all(seen), time.perf_counter() - clock
            rate = (step - logged) * batch / seconds
            row = {"epoch": round(step / per_epoch, 3), "train_cosine": cos_sum / n, "lr": args.lr * factor,
                   "grad_norm": norm.item(), "images_per_s": round(rate, 1), "data_wait": round(waited / seconds, 3),
                   "memory_gib": round(memory(device), 2)}
            note(step, **row)
            if rank == 0 and (args.dry_run or not lp):
                print(log_line(step, total, row, score, eta=(total - step) * batch / rate), flush=True)
            if args.dry_run:
                break
            seen, waited, logged, clock = torch.zeros_like(seen), 0.0, step, time.perf_counter()
        paused = time.perf_counter()
        if epoch_end:
            score = validate()
        if stopping or saving or step == total:
            save()
            saved = time.perf_counter()
        clock += time.perf_counter() - paused  # images/s are those of training

    if world > 1:  # not after an error: the others would be waited for
        dist.destroy_process_group()
    if step < total and not args.dry_run:
        if rank == 0:
            print(f"stopped at step {step}; go on with: {resume_command(world)}", file=sys.stderr)
        sys.exit(128 + stopping)
    if rank == 0 and not args.dry_run:
        note(step, done=True, best=max(best.values()), baseline=baseline["val"],
             seconds=round(time.perf_counter() - began, 1))
        print(f"{args.phase} done: best val cosine {max(best.values()):.4f} (n = {len(held['val'])}), "
              f"mean vector {baseline['val']:.4f} -> {phase}/best.safetensors")


def guarded():
    """main(), where running out of memory, a full disk or a lost picture ends as one line too."""
    try:
        main()
    except BadPicture as e:  # comes out of a loader worker wrapped in its traceback
        sys.exit(str(e).strip().splitlines()[-1].split("BadPicture: ")[-1])
    except (RuntimeError, MemoryError, SafetensorError) as e:
        text = str(e)
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or re.search(
                "can't allocate memory|CUDA error: out of memory|_STATUS_ALLOC_FAILED", text):
            sys.exit("out of memory: halve --batch-size and double --accum-freq (the same training), "
                     "or add --grad-checkpointing")
        if "DataLoader worker" in text:
            sys.exit(f"a loader worker died ({brief(e)}); out of memory, or of shared memory in a container "
                     "(docker run --shm-size)? try fewer --workers, or 0")
        if "PytorchStreamWriter" in text or "unexpected pos" in text or isinstance(e, SafetensorError):
            sys.exit(f"a checkpoint could not be written, the old one is untouched; disk full? ({brief(e)})")
        if "does not have a deterministic implementation" in text:
            sys.exit(f"--deterministic: {text.split(', but')[0]}; leave it out, or train another --model")
        if isinstance(e, dist.DistBackendError) or "gloo" in text:
            sys.exit("another process of this run has ended; its own message says why")
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the next line as an error
        for worker in multiprocessing.active_children():
            worker.kill()  # after an error Python would end them by SIGTERM, which they ignore, and wait for ever


if __name__ == "__main__":
    run(guarded)
