"""
Train an image backbone to predict the sentence embedding of the prompt behind an image: LP-FT (arXiv 2202.10054).
Reads data/NAME (clean.py); writes runs/NAME/<phase>/{best.safetensors, metrics.jsonl, curve.png}, ft also last.pt.

$ python train.py --phase lp                             # linear probe: the head, on frozen features computed once
$ python train.py --phase ft                             # fine-tuning: everything, from the lp head
$ python train.py --phase lp --data data/mine --model ViT-L-14-336 --pretrained openai
$ python train.py --phase ft --data data/mine --layer-decay 0.6 --batch-size 32 --accum-freq 4
$ python train.py --phase ft --data data/mine --resume   # with the settings of last.pt
$ torchrun --standalone --nproc_per_node 4 train.py --phase ft --data data/mine

Order and flips are functions of (seed, epoch), dropout is one of (seed, step), so a resumed run is the same run.
"""
import argparse
import atexit
import copy
import ctypes
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

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

from clean import BadImage, atomic, encode, has_bf16, load_encoder, make_parser, open_rgb, read_data, reason

FORMAT = 2
SHARD = 2048  # images between two writes of frozen features: what a kill -9 can cost
DTYPES = {"amp_bf16": torch.bfloat16, "amp": torch.float16, "fp32": torch.float32}
DEFAULTS = {  # by phase, where neither command line nor data folder says otherwise; docs/results.md has the evidence
    "lp": {"lr": 1e-3, "epochs": 30, "batch_size": 256, "warmup": 50, "ema": 0.0},
    "ft": {"lr": 1e-5, "epochs": 3, "batch_size": 64, "warmup": 200, "ema": 0.9998},
}


# ---------------------------------------------------------------------------------------------------------- backbones

def build_backbone(spec, pretrained=None):
    """The backbone that a spec describes, with random weights or those of a tag or file, loaded by open_clip or timm:
    images (B, 3, S, S) -> pooled features (B, D), before the contrastive projection (1024 for L/14)."""
    name, size = spec["model"], spec["image_size"]
    if name.startswith("timm:"):
        import timm
        name, kwargs = name[5:], {"num_classes": 0, **spec["kwargs"]}
        if pretrained and Path(pretrained).is_file():
            kwargs |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": read_weights(pretrained)}}
        elif pretrained:
            name, kwargs["pretrained"] = f"{name}.{pretrained}", True
        try:
            return timm.create_model(name, **({"img_size": size} if size else {}), **kwargs)
        except TypeError:  # convolutional networks take any size and know no such argument
            return timm.create_model(name, **kwargs)
    import open_clip
    if pretrained:
        clip = open_clip.create_model(Path(name).stem, pretrained, force_quick_gelu=spec["quick_gelu"],
                                      force_image_size=size)
    else:
        vision = {**spec["config"]["vision_cfg"], "image_size": size, "timm_model_pretrained": False}
        text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}  # required, and thrown away
        clip = open_clip.CLIP(spec["config"]["embed_dim"], vision, text, quick_gelu=spec["quick_gelu"])
    clip.visual.proj, clip.visual.output_tokens = None, False
    for part in ("drop", "proj", "mlp"):  # open_clip's wrapper of a timm backbone
        if hasattr(getattr(clip.visual, "head", None), part):
            delattr(clip.visual.head, part)
    return clip.visual


def read_weights(path):
    """A safetensors or state-dict file -> {name: tensor}. Never unpickles code."""
    if str(path).endswith(".safetensors"):
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()}


def make_backbone(args):
    """Command line -> (backbone with its pretrained weights, spec). The spec goes into the checkpoint: all that it takes
    to build the backbone again, and the transform of its pretrained tag."""
    name, kwargs, tag = args.model, dict(args.model_kwargs), None if args.pretrained == "none" else args.pretrained
    spec = {"model": name, "pretrained": args.pretrained, "kwargs": kwargs, "image_size": args.image_size}
    if name.startswith("timm:"):
        import timm
        if ":" in name[5:] or any(k.startswith(("pretrained", "checkpoint", "cache")) for k in kwargs):
            sys.exit(f"--model {name} {kwargs}: would open files or the hub; use --pretrained")
        if not timm.is_model(name[5:]):
            sys.exit(f"--model {name}: timm has no such model; see timm.list_models()")
    else:
        spec |= open_clip_spec(args, tag)
    try:
        backbone = build_backbone(spec, tag)
    except Exception as e:  # the hub, and decoders of somebody's file, raise many kinds
        if not tag:
            raise
        sys.exit(f"--pretrained {tag}: neither a weights file nor a tag of {name} that can be loaded ({reason(e)})")
    if name.startswith("timm:"):
        if tag and "quickgelu" not in name and "QuickGELU" in str(backbone.pretrained_cfg.get("notes")):
            sys.exit(f"--pretrained {tag}: was trained with QuickGELU, which {name} does not have; "
                     f"take --model {name.replace('clip_', 'clip_quickgelu_')}")
        known = timm.data.resolve_model_data_config(backbone)
        spec |= {k: known[k] for k in ("mean", "std", "interpolation")}
        spec |= {"resize_mode": "squash" if known["crop_mode"] == "squash" else "shortest",
                 "image_size": args.image_size or known["input_size"][-1]}
    return backbone, spec | {"mean": list(args.image_mean or spec["mean"]), "std": list(args.image_std or spec["std"])}


def open_clip_spec(args, tag):
    """--model NAME, or FILE.json, an architecture of your own in open_clip's format -> the rest of its spec."""
    import open_clip
    name = args.model
    if name.endswith(".json") and Path(name).is_file():
        open_clip.add_model_config(name)
        name = Path(name).stem
    config = open_clip.get_model_config(name)
    if config is None:
        sys.exit(f"--model {name}: not an open_clip model (open_clip.list_models()), nor timm:NAME, nor a .json file")
    known = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not known and not Path(tag).is_file():
        sys.exit(f"--pretrained {tag}: neither a weights file nor a tag of {name}; "
                 f"tags: {', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}")
    spec = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, "interpolation": "bicubic",
            "resize_mode": "shortest", "quick_gelu": config.get("quick_gelu", False)}
    spec = {k: known.get(k, v) for k, v in spec.items()}
    # the OpenAI weights were trained with QuickGELU; the tag knows, the model name alone builds plain GELU
    spec["quick_gelu"] = spec["quick_gelu"] or args.force_quick_gelu
    return spec | {"image_size": args.image_size or config["vision_cfg"].get("image_size", 224),
                   "config": {k: config[k] for k in ("embed_dim", "vision_cfg")}}


# -------------------------------------------------------------------------------------------------------------- model

def linear_head(features, dim):
    head = nn.Linear(features, dim)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def mlp_head(features, dim, hidden=16 * 1024):
    return nn.Sequential(linear_head(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), linear_head(hidden, dim))


HEADS = {"linear": linear_head, "mlp": mlp_head}  # name: function (features, dim) -> module that initialised itself


class Model(nn.Module):
    """backbone -> head -> unit-norm embeddings (B, 384), from images (B, 3, S, S), uint8 or normalised floats. Modules in
    `frozen` stay in eval mode while the rest trains."""

    def __init__(self, backbone, spec, head="linear", dim=384):
        super().__init__()
        self.backbone, self.spec, self.head_name, self.dim, self.frozen = backbone, spec, head, dim, []
        with torch.no_grad():  # the pooled width is not always what a config says
            self.width = backbone.eval()(torch.zeros(1, 3, spec["image_size"], spec["image_size"])).shape[-1]
        self.head = HEADS[head](self.width, dim)
        self.register_buffer("mean", torch.tensor(spec["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec["std"]).view(3, 1, 1), persistent=False)

    def normalise(self, images):
        return (images.float() / 255 - self.mean) / self.std  # uint8 over the bus, float on the device

    def embed(self, features):
        return F.normalize(self.head(features).float(), dim=-1)

    def forward(self, images):
        return self.embed(self.backbone(self.normalise(images) if images.dtype == torch.uint8 else images))

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def describe(self):
        """What load_model needs besides the weights."""
        return {"format": FORMAT, "backbone": self.spec, "head": self.head_name, "dim": self.dim}


def save_model(model, meta, path):
    """best.safetensors: the weights, and as JSON metadata all it takes to use them."""
    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    with atomic(path) as f:
        f.write(to_safetensors(state, {"config": json.dumps({**meta, **model.describe()})}))


def find_checkpoint(path):
    """A checkpoint file, a phase folder or a run folder (ft before lp) -> path of best.safetensors. Exits if none."""
    for p in (Path(path) / end for end in ("", "best.safetensors", "ft/best.safetensors", "lp/best.safetensors")):
        if p.is_file():
            return p
    sys.exit(f"{path}: no checkpoint there (best.safetensors); train one with: python train.py --phase lp")


def load_meta(path):
    """The metadata of a checkpoint, which anybody may have made -> dict; exits in one line if it is none of ours."""
    try:
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {}).get("config", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        sys.exit(f"{path}: not a readable checkpoint ({reason(e)}); train it again")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        sys.exit(f"{path}: not a checkpoint of this train.py (its format is not {FORMAT}); train it again")
    with suppress(KeyError, AttributeError, TypeError):
        spec, vision = meta["backbone"], meta["backbone"].get("config", {}).get("vision_cfg", {})
        names = [spec["model"].removeprefix("timm:"), vision.get("timm_model_name") or "", *spec["kwargs"]]
        if (not any(":" in n or n.startswith(("pretrained", "checkpoint", "cache")) for n in names)  # no files, no hub
                and 8 <= spec["image_size"] <= 2048 and 1 <= meta["dim"] <= 4096 and meta["head"] in HEADS
                and len(spec["mean"]) == len(spec["std"]) == 3 and meta["text_model"]["name"].strip()):
            return meta
    sys.exit(f"{path}: describes no model of train.py (head {meta.get('head')!r}; known: {', '.join(HEADS)})")


def load_model(path):
    """A checkpoint of save_model -> (Model in eval mode, metadata). No flags: it describes itself. Exits in one line if
    its weights do not fit that."""
    path = find_checkpoint(path)
    meta, state = load_meta(path), load_file(path)
    spec, found = meta["backbone"], {k: v.shape for k, v in state.items()}
    __import__("timm" if spec["model"].startswith("timm:") else "open_clip")  # which makes tensors: not under "meta"
    for device in ("meta", "cpu"):  # first without memory: what it claims to be may be larger than what it is
        with torch.device(device):
            model = Model(build_backbone(spec), spec, meta["head"], meta["dim"])
        wanted = {k: v.shape for k, v in model.state_dict().items()}
        if wrong := [k for k in wanted | found if wanted.get(k) != found.get(k)]:
            sys.exit(f"{path}: does not fit the model that it describes: {len(wrong)} tensors, first {wrong[:3]}")
    model.load_state_dict(state)
    return model.eval(), meta


def depths(model):
    """{parameter name: depth}: 0 the stem, then one per block, the head last. Layer decay and --unfreeze-from count in
    these; what follows the last block belongs to it. A timm backbone knows its blocks, open_clip's are listed here."""
    from timm.models import group_parameters
    wrapped = hasattr(model.backbone, "trunk")  # open_clip around a timm backbone
    backbone, prefix = (model.backbone.trunk, "backbone.trunk.") if wrapped else (model.backbone, "backbone.")
    matcher = {"stem": "conv|bn|class_embedding|positional_embedding|ln_pre",  # in timm's format; ViT, ResNet, the rest
               "blocks": [(r"transformer\.resblocks\.(\d+)", None), (r"layer(\d+)\.(\d+)", None), (".*", (99999,))]}
    if hasattr(backbone, "group_matcher"):
        matcher = backbone.group_matcher(coarse=False)
    found = {prefix + n: d for n, d in group_parameters(backbone, matcher, reverse=True).items()}
    last = max(found.values())
    return {n: last + 1 if n.startswith("head.") else found.get(n, last) for n, _ in model.named_parameters()}


def param_groups(model, lr, wd, decay=1.0, unfreeze_from=0):
    """Optimiser groups, one per depth and weight decay: lr * decay ** (distance from the head); matrices decay, biases
    and norms do not. Depths below unfreeze_from are frozen: no gradient, no group."""
    depth = depths(model)
    top, groups = max(depth.values()), {}
    if unfreeze_from > top:
        sys.exit(f"--unfreeze-from {unfreeze_from}: this backbone has depths 0 (the stem) to {top} (the head)")
    for name, p in model.named_parameters():
        d, matrix = depth[name], p.ndim > 1
        p.requires_grad_(d >= unfreeze_from)
        if p.requires_grad:
            group = {"depth": d, "peak": lr * decay ** (top - d), "weight_decay": wd if matrix else 0.0, "params": []}
            groups.setdefault((d, matrix), group)["params"].append(p)
    return [groups[k] for k in sorted(groups)]


# --------------------------------------------------------------------------------------------------------------- data

def load_data(folder, batch):
    """A data folder without its buffer rows -> namespace: paths, prompts, targets float32 (N, 384), rows of train, held
    {"val", "ood": rows}, mean (384,) of the training targets, baseline {split: its cosine}, summary."""
    pairs, targets, summary = read_data(folder)
    used = np.flatnonzero(pairs["split"].to_numpy() != "guard")
    pairs, targets, split = pairs[used], np.array(targets[used]), pairs["split"].to_numpy()[used]
    train, held = np.flatnonzero(split == "train"), {s: np.flatnonzero(split == s) for s in ("val", "ood") if s in split}
    if pairs["image"].null_count():
        sys.exit(f"{folder}: has no images (made with --text-only)")
    if len(train) < batch or "val" not in held:
        sys.exit(f"{folder}: {len(train)} training and {len(held.get('val', []))} validation rows; "
                 f"need at least {batch} (--batch-size times --accum-freq times processes) and 1")
    if len(bad := np.flatnonzero(~np.isfinite(targets).all(1))):
        sys.exit(f"{folder}: targets of {len(bad)} rows are not finite, first {pairs['image'][int(bad[0])]}; "
                 "make it again with clean.py --overwrite")
    mean = targets[train].mean(0)
    baseline = {s: float((targets[rows] @ mean).mean() / np.linalg.norm(mean)) for s, rows in held.items()}
    return SimpleNamespace(paths=[str(Path(folder) / p) for p in pairs["image"]], prompts=pairs["prompt"].to_list(),
                           targets=targets, train=train, held=held, mean=mean, baseline=baseline, summary=summary)


def to_square(image, spec):
    """The transform: RGB image -> uint8 tensor (3, S, S). Short side to S, then the centre; or squashed, where the
    backbone was trained so."""
    size, resample = spec["image_size"], getattr(Image.Resampling, spec["interpolation"].upper(), Image.BICUBIC)
    if spec["resize_mode"] == "squash":
        image = image.resize((size, size), resample)
    elif image.size != (size, size):
        w, h = image.size
        if max(w, h) > 4 * min(w, h):  # a banner: enlarging what the crop throws away could take gigabytes
            image = centre_crop(image, min(w, 2 * h), min(h, 2 * w))
        scale = size / min(image.size)
        image = image.resize([max(size, round(side * scale)) for side in image.size], resample)
        image = centre_crop(image, size, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def centre_crop(image, w, h):
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


class ImageDataset(Dataset):
    """Row -> uint8 (3, S, S). An unreadable image raises BadImage: no row is ever replaced by another."""

    def __init__(self, paths, spec):
        self.paths, self.spec = paths, spec

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return to_square(open_rgb(self.paths[i]), self.spec)


def make_loader(dataset, batches, args, device):
    """batches: iterable of row numbers, one list per batch -> DataLoader of their images, in order."""
    # its own generator: building an iterator would draw from the global stream and shift dropout after a resume
    return DataLoader(dataset, batch_sampler=batches, num_workers=args.workers, worker_init_fn=ignore_signals,
                      pin_memory=device.type == "cuda", generator=torch.Generator())


def ignore_signals(_):
    """Loader workers leave signals to the parent, which finishes its step and saves."""
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, signal.SIG_IGN)


def kill_workers():
    """After an error Python would end them by SIGTERM, which they ignore, and wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report it as another error
    for worker in multiprocessing.active_children():
        worker.kill()


def split_batches(rows, size):
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def batch_sampler(train, args, step, rank=0, world=1):
    """Micro-batches of this process from `step` on, each (rows, mirrored): a function of (seed, epoch) alone. Rows are
    interleaved over the micro-batches of a step so that MixGen partners (i, i + M) share one, however it is divided."""
    batch = args.batch_size * args.accum_freq * world
    per_epoch = len(train) // batch
    for epoch in range(step // per_epoch, args.epochs):
        rng = np.random.default_rng((args.seed, epoch))
        order, mirrored = rng.permutation(train), rng.random(len(train)) < args.hflip
        for i in range(max(0, step - epoch * per_epoch), per_epoch):
            micro = np.arange(i * batch, (i + 1) * batch).reshape(args.batch_size, -1).T
            for places in micro[rank * args.accum_freq:(rank + 1) * args.accum_freq]:
                yield order[places], mirrored[places]


def mixgen(images, targets, joined, lam=0.5):
    """MixGen (arXiv 2206.08358, alg. 1): the first m images become blends with the next m, and their targets the
    embeddings of the joined prompts; rows m.. stay. images (B, 3, H, W) normalised, targets (B, 384), joined (m, 384),
    m <= B/2."""
    m = len(joined)
    mixed = torch.lerp(images[m:2 * m], images[:m], lam)  # the batch is shuffled, so row i + m is a random partner
    return torch.cat([mixed, images[m:]]), torch.cat([joined, targets[m:]])


# ------------------------------------------------------------------------------------------------------- optimisation

def loss_fn(predicted, targets):
    """What is minimised and what the log calls loss: 1 - cosine. Unit rows (B, 384), float32 -> scalar."""
    return 1 - (predicted * targets).sum(-1).mean()


def lr_at(step, total, warmup):
    """Linear warm-up, then cosine to zero: the factor on --lr, a pure function of the step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def update_ema(ema, model, step, decay):
    """ema = d ema + (1 - d) model, d rising to `decay`, so that a short run does not average over its start; buffers are
    copied. As torch's AveragedModel, which would have the GPU wait for its counter at every step."""
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average(list(ema.parameters()), list(model.parameters()), None)
    for mine, new in zip(ema.buffers(), model.buffers()):
        mine.copy_(new)


def pick_precision(name, device, model):
    """auto: bf16 where the hardware has it, else fp16 on a GPU and float32 on a CPU; there float32 too for depthwise
    convolutions, which bf16 slows down (MobileNetV2: by a third)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "amp_bf16" if has_bf16("cuda") else "amp"
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
    return "amp_bf16" if has_bf16("cpu") and not depthwise else "fp32"


def cast_backbone(backbone, precision):
    """For inference: cast once, not by autocast at every batch. BatchNorm statistics do not survive 16 bits."""
    backbone.to(DTYPES[precision], memory_format=torch.channels_last).eval()
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.float()
    return backbone


def pick_device():
    """-> device of this process. On a CPU, have glibc keep what it was given: else it maps and unmaps every large
    activation anew, and page faults cost more than arithmetic (ViT-B-32 in ft: 32 instead of 124 images/s)."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        return torch.device("cuda", torch.cuda.current_device())
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return torch.device("cpu")


def reduce_all(values, op=dist.ReduceOp.SUM):
    """Numbers, reduced over all processes (by gloo on the host, so nothing waits for the GPU) -> list."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


def open_log(phase, args, step=0):
    """-> function (step, **row) that appends a row to metrics.jsonl (and --wandb's), whose first holds the arguments."""
    file, kept = phase / "metrics.jsonl", [json.dumps({"step": 0, "args": vars(args)})]
    if step:  # a resumed run writes the later rows again
        rows = file.read_text().splitlines()
        kept = [line for line in rows if line.endswith("}") and json.loads(line)["step"] <= step]  # the last may be torn
    with atomic(file, "w") as f:
        f.write("\n".join(kept) + "\n")
    if args.wandb:
        import wandb
        wandb.init(project="image2prompt", dir=phase, name=str(phase), config=vars(args))

    def log(step, **row):
        with open(file, "a") as f:
            f.write(json.dumps({"step": step, **row}) + "\n")
        if args.wandb:
            wandb.log(row, step=step)
    return log


def report(phase, at, row, best, data):
    """A validation as one line, every cosine beside the n and constant baseline of its split; and curve.png."""
    scores = " · ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items() if "cosine" in k)
    levels = "; ".join(f"{s}: n = {len(rows)}, constant baseline {data.baseline[s]:.4f}" for s, rows in data.held.items())
    print(f"{at} · {scores} · best {best:.4f} ({levels})", flush=True)
    from matplotlib.figure import Figure  # without pyplot, which wants a display and keeps every figure
    rows, fig = [json.loads(line) for line in open(phase / "metrics.jsonl")], Figure((7, 4), layout="tight")
    ax = fig.subplots()
    for key in ("loss", "val_cosine", "val_cosine_ema"):
        if points := [(r["step"], 1 - r[key] if key == "loss" else r[key]) for r in rows if key in r]:
            ax.plot(*zip(*points), label="1 - loss" if key == "loss" else key.replace("_", " "), marker=".")
    ax.axhline(data.baseline["val"], color="gray", ls="--", label="constant baseline")
    ax.set(xlabel="step", ylabel="mean cosine")
    ax.legend(frameon=False)
    with atomic(phase / "curve.png") as f:
        fig.savefig(f, format="png", dpi=120)


# ------------------------------------------------------------------------------------------------------- linear probe

def extract_features(model, run):
    """Frozen features of every image, computed once -> (views, N, D), float16 where computed in 16 bits; view 1 is the
    mirror image, for --hflip. One file per SHARD images, shared out over the processes, in a folder named by backbone,
    weights, transform and data: an interrupted or later run computes only what is missing."""
    args, data, device, dtype = run.args, run.data, run.device, DTYPES[run.args.precision]
    views, rows = 1 + (args.hflip > 0), range(len(data.paths))
    digest = hashlib.sha256(json.dumps([model.spec, data.summary["hashes"], views, args.precision]).encode())
    for name, tensor in sorted(model.backbone.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    folder = Path(args.out) / f".features/{digest.hexdigest()[:32]}"
    shards = {folder / f"{r.start:09d}.npy": r for r in split_batches(rows, SHARD)}
    todo = {file: split_batches(shards[file], args.batch_size) for file in shards if not file.is_file()}
    todo = dict(list(todo.items())[run.rank::run.world])
    backbone = cast_backbone(copy.deepcopy(model.backbone).to(device), args.precision)
    if args.compile:
        backbone.compile(dynamic=False)
    images = iter(make_loader(ImageDataset(data.paths, model.spec), sum(todo.values(), []), args, device))
    with tqdm(total=SHARD * len(todo), desc="features", unit="image", disable=run.rank > 0) as bar:
        for file, batches in todo.items():
            parts = []
            for batch in batches:
                x = model.normalise(next(images).to(device, non_blocking=True))
                x = x.to(dtype, memory_format=torch.channels_last)
                with torch.inference_mode():
                    parts.append(torch.stack([backbone(x.flip(-1) if v else x).float().cpu() for v in range(views)]))
                bar.update(len(batch))
            shard = torch.cat(parts, 1)  # (views, rows, D)
            if len(bad := (~shard.isfinite()).any(-1).any(0).nonzero()):
                sys.exit(f"{data.paths[shards[file][int(bad[0])]]}: its features are not finite; "
                         "wrong --pretrained? else try --precision fp32")
            with atomic(file) as f:
                np.save(f, shard.numpy().astype(np.float32 if dtype == torch.float32 else np.float16))
    if run.world > 1:
        dist.barrier()
    return torch.from_numpy(np.concatenate([np.load(file, allow_pickle=False) for file in shards], 1))


def ridge(x, y, x_val, y_val, block=65536):
    """Ridge regression in closed form: x (N, D), y (N, E) -> weight (E, D), bias (E,), lambda, cosine on validation. One
    eigendecomposition of the covariance serves the whole grid of lambdas."""
    mean_x, mean_y, xx, xy = sum(b.double().sum(0) for b in x.split(block)) / len(x), y.double().mean(0), 0, 0
    for a, b in zip(x.split(block), y.split(block)):
        a, b = a.double() - mean_x, b.double() - mean_y
        xx, xy = xx + a.T @ a, xy + a.T @ b
    values, vectors = torch.linalg.eigh(xx)
    xy, v, scores = vectors.T @ xy, (x_val.double() - mean_x) @ vectors, {}  # in the eigenbasis
    for lam in (values.mean() * torch.logspace(-5, 3, 25, dtype=torch.float64)).tolist():
        scores[lam] = 1 - loss_fn(F.normalize(v @ (xy / (values + lam)[:, None]) + mean_y, dim=-1), y_val).item()
    lam = max(scores, key=scores.get)
    weight = (vectors @ (xy / (values + lam)[:, None])).T
    return weight.float(), (mean_y - weight @ mean_x).float(), lam, scores[lam]


def linear_probe(model, run):
    """--phase lp: the head alone, in float32, on features computed once. Minutes at most, so there is nothing to resume.
    -> best val cosine"""
    args, data, device, phase, best = run.args, run.data, run.device, run.phase, -math.inf
    x, y = extract_features(model, run), torch.from_numpy(data.targets)  # (views, N, D), (N, 384)
    if run.rank > 0:
        return best
    if isinstance(model.head, nn.Linear):  # start from the closed form
        train, val = data.train, data.held["val"]
        weight, bias, lam, score = ridge(x[:, train].flatten(0, 1), y[train].repeat(len(x), 1), x[0, val], y[val])
        scale = model.head.weight.std() / weight.std()  # the cosine ignores it, but Adam's step size does not
        model.head.load_state_dict({"weight": weight * scale, "bias": bias * scale})
        print(f"ridge head: lambda {lam:.3g} of 25 by val cosine, {score:.4f}")
    head = model.head.to(device)
    groups = [{"params": [p for p in head.parameters() if p.ndim > 1], "weight_decay": args.wd},
              {"params": [p for p in head.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    per_epoch, batches, log = len(data.train) // args.batch_size, batch_sampler(data.train, args, 0), open_log(phase, args)
    total = args.epochs * per_epoch
    for epoch in range(args.epochs + 1):  # epoch 0 is the start
        losses, row = [], {"epoch": epoch}
        head.train()
        for step in range(max(0, epoch - 1) * per_epoch, epoch * per_epoch):
            rows, mirrored = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_at(step, total, min(args.warmup, total // 5))
            loss = loss_fn(model.embed(x[mirrored.astype(int), rows].float().to(device)), y[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), args.grad_clip_norm or math.inf)
            optimizer.step()
            losses.append(loss.detach())
        head.eval()
        with torch.inference_mode():
            row |= {"loss": torch.stack(losses).mean().item()} if losses else {}
            for split, rows in data.held.items():  # ood is only looked at, never selected on
                predicted = [model.embed(x[0, r].float().to(device)).cpu() for r in torch.from_numpy(rows).split(8192)]
                row[f"{split}_cosine"] = 1 - loss_fn(torch.cat(predicted), y[rows]).item()
        if not all(map(math.isfinite, row.values())):
            sys.exit(f"epoch {epoch}: not finite, {row}; try a lower --lr")
        log(epoch * per_epoch, **row)
        if row["val_cosine"] > best:
            best, best_head = row["val_cosine"], copy.deepcopy(head.state_dict())
            about = {"weights": "raw", "step": epoch * per_epoch, **row}
        if epoch % -(-args.epochs // 10) == 0 or epoch == args.epochs:
            report(phase, f"epoch {epoch} ({epoch / args.epochs:.0%})", row, best, data)
    head.load_state_dict(best_head)
    save_model(model, {**run.meta, **about}, phase / "best.safetensors")
    log(total, done=True, best=best)
    return best


# -------------------------------------------------------------------------------------------------------- fine-tuning

def freeze_and_checkpoint(model, args):
    """BatchNorm of a pretrained backbone, and of frozen layers, keeps its statistics. --grad-checkpointing, or one line
    where it would do nothing or harm."""
    norms = [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
    model.frozen = [m for m in norms if model.spec["pretrained"] != "none" or not m.weight.requires_grad]
    if args.grad_checkpointing:
        if len(norms) > len(model.frozen):  # the second forward pass would move the running statistics again
            sys.exit("--grad-checkpointing: not with BatchNorm that trains")
        if not hasattr(model.backbone, "set_grad_checkpointing") or type(model.backbone).__name__ == "ModifiedResNet":
            sys.exit("--grad-checkpointing: this backbone has none; lower --batch-size and raise --accum-freq instead")
        model.backbone.set_grad_checkpointing(True)


def validate(models, run, step, total, best):
    """Score every kind of weights on every held-out split; keep the best by val cosine, strictly better. Every process
    scores its share of the batches, with the buffers of rank 0, which are those that are saved.
    -> best val cosine so far, val cosine of the raw weights"""
    args, data, device, row = run.args, run.data, run.device, {}
    for kind, model in models.items():
        model.eval()
        for buffer in model.buffers() if run.world > 1 else ():
            dist.broadcast(buffer, 0)
        for split, rows in data.held.items():
            batches, cosines = split_batches(rows, args.batch_size)[run.rank::run.world], [0.0]
            for r, x in zip(batches, make_loader(ImageDataset(data.paths, model.spec), batches, args, device)):
                with torch.inference_mode(), run.autocast():
                    predicted = model(x.to(device, non_blocking=True))
                cosines.append((predicted * torch.from_numpy(data.targets[r]).to(device)).sum(-1).double().sum())
            row[f"{split}_cosine" + "_ema" * (kind == "ema")] = reduce_all(float(sum(cosines))) / len(rows)
    if not all(map(math.isfinite, row.values())):
        sys.exit(f"step {step}: validation is not finite, {row}; try --precision fp32")
    kind = max(models, key=lambda k: row["val_cosine" + "_ema" * (k == "ema")])
    top = row["val_cosine" + "_ema" * (kind == "ema")]
    if run.rank == 0:
        run.log(step, **row)
        if top > best:  # ood is only looked at
            save_model(models[kind], {**run.meta, **row, "weights": kind, "step": step, "val_cosine": top},
                       run.phase / "best.safetensors")
        report(run.phase, f"step {step:,} ({step / total:.0%})", row, max(best, top), data)
    models["raw"].train()
    return max(best, top), row["val_cosine"]


def settle(recent, step, scaler, world):
    """Losses and gradient norms since the last look, tensors (2,) of the steps before `step` -> losses as floats, means
    over the processes. Exits at one that is not finite, before anything is saved. Waits for the device, so it is rare."""
    losses, norms = torch.stack(recent).double().cpu().unbind(1)
    bad = ~losses.isfinite() | (~norms.isfinite() & (not scaler.is_enabled()))  # overflow is the scaler's own business
    if bad.any() or scaler.is_enabled() and scaler.get_scale() < 2 ** -10:  # it halves at every step that it skips
        i = int(bad.int().argmax())
        sys.exit(f"step {step - len(recent) + i}: loss {losses[i]:.4g}, gradient norm {norms[i]:.4g}: not finite, or beyond "
                 "float16. What is saved is from before; start again (--overwrite) with a lower --lr or --precision fp32")
    return reduce_all(losses / world)


def finetune(model, run, last=None):
    """--phase ft: everything, by mixed precision, accumulation, MixGen, EMA and DDP. last: what last.pt holds, or None.
    A signal (Ctrl-C, SIGTERM, SLURM's SIGUSR1) finishes the step and saves. -> best val cosine, that signal or 0"""
    args, data, device, rank, world = run.args, run.data, run.device, run.rank, run.world
    groups = param_groups(model, args.lr, args.wd, args.layer_decay, args.unfreeze_from)
    params = [p for g in groups for p in g["params"]]
    freeze_and_checkpoint(model, args)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)  # or any other of torch's kind
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "amp")
    models = {"raw": model} | ({"ema": copy.deepcopy(model).requires_grad_(False)} if args.ema else {})
    encoder = load_encoder(data.summary["text_model"]["name"], device)[0] if args.mixgen else None
    batch, m = args.batch_size * args.accum_freq * world, round(args.mixgen * args.batch_size)
    per_epoch = len(data.train) // batch
    step, best, score, losses, recent, total = 0, -math.inf, math.nan, [], [], args.epochs * per_epoch
    parts = {**models, "optimizer": optimizer, "scaler": scaler}
    if last:
        for key, part in parts.items():
            part.load_state_dict(last[key])
        step, best, score, losses = (last[k] for k in ("step", "best", "score", "losses"))
    if args.compile:
        model.compile(dynamic=False)  # in place: wrapping would rename every key of the checkpoint
    forward = model if world == 1 else nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None)
    run.log = open_log(run.phase, args, step) if rank == 0 and not args.dry_run else lambda step, **row: None
    stop, stopping = [], 0
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, lambda number, _: stop.append(number))
    for g in groups if args.dry_run else ():
        print(f"  depth {g['depth']:>3} · lr {g['peak']:.2e} · weight decay {g['weight_decay']:g} · "
              f"{sum(p.numel() for p in g['params']):>12,} parameters")
    if step == 0 and not args.dry_run:  # ft starts at the lp score
        best, score = validate(models, run, step, total, best)
    model.train()
    batches = batch_sampler(data.train, args, step, rank, world)
    ahead = (rows for rows, _ in batch_sampler(data.train, args, step, rank, world))  # the loader's workers run ahead
    images = iter(make_loader(ImageDataset(data.paths, model.spec), ahead, args, device))
    saved, clock, logged = time.perf_counter(), time.perf_counter(), step

    while step < total and not stopping:
        torch.manual_seed(int(np.random.SeedSequence((args.seed, step, rank)).generate_state(1)[0]))  # dropout
        factor, step_loss = lr_at(step, total, min(args.warmup, total // 5)), 0
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad()
        for micro in range(args.accum_freq):
            rows, mirrored = next(batches)
            x = model.normalise(next(images).to(device, non_blocking=True))
            y = torch.from_numpy(data.targets[rows]).to(device, non_blocking=True)
            if args.hflip:
                x = torch.where(torch.from_numpy(mirrored).to(device)[:, None, None, None], x.flip(-1), x)
            if args.mixgen:
                joined = [f"{data.prompts[a]} {data.prompts[b]}" for a, b in zip(rows[:m], rows[m:2 * m])]
                x, y = mixgen(x, y, torch.from_numpy(encode(joined, encoder)).to(device))
            with nullcontext() if world == 1 or micro == args.accum_freq - 1 else forward.no_sync():
                with run.autocast():
                    predicted = forward(x)
                loss = loss_fn(predicted, y) / args.accum_freq
                scaler.scale(loss).backward()
            step_loss += loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, args.grad_clip_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        if args.ema:
            update_ema(models["ema"], model, step, args.ema)
        recent.append(torch.stack([step_loss, norm]))
        step += 1

        # all processes stop and save after the same step; agreed on the host, so nothing waits for the GPU
        late, epoch_end = time.perf_counter() - saved > args.save_every * 60, step % per_epoch == 0
        stopping, late = map(int, reduce_all([max(stop, default=0), late], dist.ReduceOp.MAX))
        saving, logging = late or stopping or step == total, step % args.log_every == 0 or epoch_end or args.dry_run
        if logging or saving:
            losses, recent = losses + settle(recent, step, scaler, world), []
        if logging:
            rate, loss = (step - logged) * batch / (time.perf_counter() - clock), sum(losses) / len(losses)
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(0).ru_maxrss * 1024
            row = {"epoch": round(step / per_epoch, 3), "loss": loss, "lr": args.lr * factor, "grad_norm": norm.item(),
                   "images_per_s": round(rate, 1), "memory_gib": round(peak / 2**30, 2)}
            run.log(step, **row)
            if rank == 0:
                print(f"step {step:,} ({step / total:.0%}) · loss {loss:.4f} · val {score:.4f} · lr {row['lr']:.2e} · "
                      f"grad {norm:.2f} · {rate:.0f} images/s · {row['memory_gib']:.1f} GiB · "
                      f"ETA {(total - step) * batch / rate / 60:.1f} min", flush=True)
            losses, logged, clock = [], step, time.perf_counter()
        if args.dry_run and step == 2:  # a step to warm up, one that was measured
            break
        paused = time.perf_counter()
        if epoch_end:
            best, score = validate(models, run, step, total, best)
        if saving:
            if rank == 0:
                with atomic(run.phase / "last.pt") as f:
                    torch.save({**{k: part.state_dict() for k, part in parts.items()}, "step": step, "best": best,
                                "score": score, "losses": losses, "meta": {**run.meta, **model.describe()},
                                "args": vars(args), "world": world}, f)
            reduce_all(0)  # torchrun kills the process that still writes when another has left
            saved = time.perf_counter()
        clock += time.perf_counter() - paused  # images/s are those of training
    if step == total:
        run.log(step, done=True, best=best)
    return best, stopping if step < total else 0


# --------------------------------------------------------------------------------------------------------------- main

def parse_args(argv=None):
    def unset(key):
        return f"unset = {DEFAULTS['lp'][key]:g} for lp, {DEFAULTS['ft'][key]:g} for ft"

    p = make_parser(__doc__)
    p.add_argument("--phase", choices=["lp", "ft"], required=True,
                   help="lp: the head on frozen features; ft: everything, from the lp head")
    p.add_argument("--data", help="folder written by clean.py; unset = data/demo")
    p.add_argument("--out", help="run folder; unset = runs/ and the name of the data folder")
    p.add_argument("--overwrite", action="store_true", help="replace an earlier run of this phase")
    p.add_argument("--resume", action="store_true", help="ft: continue from last.pt, with all its settings but --data, "
                   "--out and --workers")
    p.add_argument("--init", metavar="PATH", help="ft: run to start from; unset = lp of --out, none = a cold start")
    p.add_argument("--seed", type=int, default=0, help="of initialisation, data order and augmentation")
    p.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    p.add_argument("--dry-run", action="store_true", help="ft: show learning rates by depth, measure peak memory and "
                   "images/s of one step, write nothing")
    g = p.add_argument_group("model (ft takes it from its start)")
    g.add_argument("--model", help="open_clip name or .json, or timm:NAME; unset = as the data says (ViT-L-14)")
    g.add_argument("--pretrained", help="tag, weights file, or none; unset = as the data says (openai)")
    g.add_argument("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="of the timm model")
    g.add_argument("--force-quick-gelu", action="store_true", help="for OpenAI-style weights files, which have no tag")
    g.add_argument("--image-size", type=int, help="pixels; unset = the backbone's own")
    g.add_argument("--image-mean", type=float, nargs=3, help="unset = the backbone's own")
    g.add_argument("--image-std", type=float, nargs=3, help="unset = the backbone's own")
    g.add_argument("--head", choices=HEADS, help="unset = linear; mlp: 16 * 1024 wide, BatchNorm, ReLU")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, help=unset("epochs"))
    g.add_argument("--batch-size", type=int, help=f"of one micro-batch on one device; {unset('batch_size')}")
    g.add_argument("--accum-freq", type=int, default=1, help="micro-batches per step; raise it as --batch-size falls")
    g.add_argument("--lr", type=float, help=f"peak learning rate; {unset('lr')}")
    g.add_argument("--wd", type=float, default=0.01, help="weight decay of matrices; biases and norms have none")
    g.add_argument("--warmup", type=int, help=f"steps, at most a fifth of the run; {unset('warmup')}")
    g.add_argument("--grad-clip-norm", type=float, default=1.0, help="0 = off")
    g.add_argument("--hflip", type=float, default=0.0, metavar="P", help="probability of a mirror image")
    g.add_argument("--precision", choices=["auto", *DTYPES], default="auto",
                   help="auto: bf16 where the hardware has it; fp32 is TF32 on a GPU")
    g.add_argument("--compile", action="store_true", help="pays off from some hundred steps on")
    g = p.add_argument_group("ft")
    g.add_argument("--mixgen", type=float, default=0.0, metavar="FRACTION", help="share of a batch to blend, up to 0.5")
    g.add_argument("--layer-decay", type=float, default=1.0, help="lr factor per block, downwards; medals: 0.4 to 0.6")
    g.add_argument("--unfreeze-from", type=int, default=0, metavar="DEPTH",
                   help="freeze what is below: 0 the stem, then one per block; --dry-run lists them")
    g.add_argument("--ema", type=float, metavar="DECAY", help=f"average the weights too; 0 = off; {unset('ema')}")
    g.add_argument("--grad-checkpointing", action="store_true", help="a third more time, far less memory")
    g.add_argument("--log-every", type=int, default=20, help="steps")
    g.add_argument("--save-every", type=float, default=5, help="minutes between writes of last.pt")
    g.add_argument("--wandb", action="store_true", help="besides metrics.jsonl")
    return p.parse_args(argv)


def key_value(item):
    """"depth=4" -> ("depth", 4)"""
    key, _, value = item.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def flags(keys):
    return ", ".join(f"--{k.replace('_', '-')}" for k in keys)


def find_start(args, phase):
    """What training starts from -> settings; metadata of that model, with its "path", or None where the command line
    says what to build; what last.pt holds, with --resume."""
    if args.resume:
        if not (phase / "last.pt").is_file():
            sys.exit(f"{phase}: nothing to resume (no last.pt); lp keeps its features, so simply run it again")
        try:
            last = torch.load(phase / "last.pt", map_location="cpu", weights_only=True)
            settings, begin = last["args"] | {"resume": True, "out": args.out, "workers": args.workers}, last["meta"]
        except Exception as e:  # a decoder, of a file that may be cut or foreign
            sys.exit(f"{phase}/last.pt: not a readable checkpoint ({reason(e)}); start again with --overwrite")
        if last["world"] != int(os.environ.get("WORLD_SIZE", 1)):
            sys.exit(f"{phase}/last.pt: was written by {last['world']} processes; resume it on as many")
        return argparse.Namespace(**settings | ({"data": args.data} if args.data else {})), begin, last
    args.data = args.data or "data/demo"
    if (phase / "metrics.jsonl").exists() and not (args.overwrite or args.dry_run):
        sys.exit(f"{phase}: a run is already there; --overwrite it, choose another --out, or (ft) --resume it")
    of_ft = [k for k in ("init", "mixgen", "unfreeze_from", "ema", "grad_checkpointing", "dry_run") if getattr(args, k)]
    if args.phase == "lp" and (of_ft or args.layer_decay != 1):
        sys.exit(f"{flags(of_ft or ['layer_decay'])}: for --phase ft; lp trains the head alone, on features computed once")
    if args.phase == "lp" or args.init == "none":
        return args, None, None
    if not args.init and not (Path(args.out) / "lp/best.safetensors").is_file():
        sys.exit(f"{args.out}/lp: no lp phase to start from; run: python train.py --phase lp --data {args.data} "
                 f"--out {args.out}  (or --init PATH)")
    path = find_checkpoint(args.init or Path(args.out) / "lp")
    if args.overwrite and path.resolve().parent == phase.resolve():
        sys.exit(f"--init {args.init}: is what --overwrite would replace; choose another --out")
    of_model = ("model", "pretrained", "model_kwargs", "force_quick_gelu", "image_size", "image_mean", "image_std", "head")
    if given := [k for k in of_model if getattr(args, k)]:
        sys.exit(f"{flags(given)}: ft takes its model from {path}; leave them out, or train that lp first")
    return args, load_meta(path) | {"path": path}, None


def check_settings(args, begin):
    """Fill what the command line leaves open, by what the data folder recommends and by DEFAULTS; check what is cheap."""
    summary = read_data(args.data)[2]
    advice, model = summary["recommend"], begin["backbone"]["model"] if begin else args.model
    advice = advice if model in (None, advice["model"]) else {}  # it is for one model
    known = DEFAULTS[args.phase] | {k: v for k, v in advice.get(args.phase, {}).items() if k in ("lr", "epochs")}
    if not begin:
        known |= {"model": "ViT-L-14", "pretrained": "openai", "head": "linear"}
        known |= {k: advice[k] for k in ("model", "pretrained", "image_size") if k in advice}
    for key, value in known.items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    for low, high, keys in ((0, 1, "hflip"), (0, 0.5, "mixgen"), (1e-6, 1, "layer_decay"), (0, 0.999999, "ema"),
                            (1e-12, 1e6, "lr"), (0, 1e12, "workers seed warmup wd grad_clip_norm save_every unfreeze_from"),
                            (1, 1e12, "epochs accum_freq log_every"), (2, 1e12, "batch_size"), (8, 2048, "image_size")):
        for key in keys.split():
            if getattr(args, key) is not None and not low <= getattr(args, key) <= high:
                sys.exit(f"{flags([key])} {getattr(args, key)}: must be in [{low}, {high:g}]")
    mixed = args.mixgen * args.batch_size
    if abs(mixed - round(mixed)) > 1e-6:
        sys.exit(f"--mixgen {args.mixgen}: blends {mixed:g} of a --batch-size of {args.batch_size}; must be whole")
    if begin and begin["text_model"] != summary["text_model"]:
        sys.exit(f"{begin.get('path', 'last.pt')}: was trained for {begin['text_model']['name']} targets, "
                 f"but {args.data} has {summary['text_model']['name']}")
    if args.resume and begin["data_hashes"] != summary["hashes"]:
        sys.exit(f"{args.data}: is not the data that last.pt was trained on; start again with --overwrite")
    if args.wandb and not importlib.util.find_spec("wandb"):
        sys.exit("--wandb: not installed; pip install wandb")


def main():
    args = parse_args()
    args.out = str(Path(args.out or f"runs/{Path(args.data or 'data/demo').resolve().name}"))
    phase = Path(args.out) / args.phase
    args, begin, last = find_start(args, phase)
    check_settings(args, begin)
    atexit.register(kill_workers)
    rank, world, lp = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), args.phase == "lp"
    device = pick_device()
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    torch.manual_seed(args.seed)
    batch = args.batch_size * args.accum_freq * (1 if lp else world)  # lp trains on one process
    data = load_data(args.data, batch)

    # the model: of last.pt, whose weights come later; of a checkpoint; or from the command line
    if last:
        model = Model(build_backbone(begin["backbone"]), begin["backbone"], begin["head"], begin["dim"])
    elif begin:
        model = load_model(begin["path"])[0]
    else:
        model = Model(*make_backbone(args), args.head, data.targets.shape[1])
    if world > 1 and device.type == "cuda" and not lp:
        from timm.layers import convert_sync_batchnorm
        model = convert_sync_batchnorm(model)
    spec, args.precision = model.spec, pick_precision(args.precision, device, model.backbone)
    meta = {"phase": args.phase, "text_model": data.summary["text_model"], "data": args.data,
            "data_hashes": data.summary["hashes"], "baseline": data.baseline["val"], "n_val": len(data.held["val"]),
            "mean_target": data.mean.tolist(), "args": vars(args)}
    run = SimpleNamespace(args=args, data=data, phase=phase, meta=meta, device=device, rank=rank, world=world,
                          autocast=lambda: torch.autocast(device.type, DTYPES[args.precision],
                                                          enabled=args.precision != "fp32"))
    if rank == 0:
        gelu = "" if "quick_gelu" not in spec else ", QuickGELU" if spec["quick_gelu"] else ", GELU"
        print(f"{args.phase}: {spec['model']} ({spec['pretrained']}{gelu}), {spec['image_size']} px, {model.head_name} head, "
              f"{len(data.train):,} train rows, {args.epochs} epochs of {len(data.train) // batch} steps of {batch} on "
              f"{1 if lp else world} x {device.type}, {args.precision}", flush=True)
        if args.overwrite and not args.dry_run:  # only now, when nothing can be wrong any more
            for name in ("metrics.jsonl", "best.safetensors", "last.pt", "curve.png"):
                (phase / name).unlink(missing_ok=True)
    try:
        best, stopped = (linear_probe(model, run), 0) if lp else finetune(model, run, last)
    except BadImage as e:  # out of a loader worker it comes wrapped in its traceback
        sys.exit(f"{str(e).strip().splitlines()[-1].split('BadImage: ')[-1]}; make the data folder again with clean.py")
    if world > 1:
        dist.destroy_process_group()
    if stopped:
        print(f"stopped and saved; resume with: train.py --phase ft --out {args.out} --resume", file=sys.stderr)
        sys.exit(128 + stopped)
    if rank == 0 and not args.dry_run:
        print(f"{args.phase} done: best val cosine {best:.4f} (n = {meta['n_val']}), constant baseline "
              f"{meta['baseline']:.4f} -> {phase}/best.safetensors")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again (lp keeps its features)")
