"""
Train an image tower to predict the sentence embedding of the prompt behind a picture: LP-FT (arXiv 2202.10054).
Reads data/NAME (clean.py); writes runs/NAME/<phase>/{best.safetensors, last.pt, metrics.jsonl, curve.png}.
$ python train.py --phase lp                                             # the head, on frozen features computed once
$ python train.py --phase ft                                             # everything, from the lp head
$ python train.py --phase lp --data data/mine --model ViT-L-14-336 --pretrained openai
$ python train.py --phase lp --data data/mine --model timm:mobilenetv2_100 --pretrained weights.safetensors
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from clean import atomic, load_encoder, open_rgb, read_data, run

FORMAT = 1
DEFAULTS = {  # by phase, where neither the command line nor the data folder says otherwise
    "lp": {"lr": 1e-3, "epochs": 30, "batch_size": 256, "warmup": 50, "mixgen": 0.0},
    "ft": {"lr": 1e-5, "epochs": 3, "batch_size": 64, "warmup": 200, "mixgen": 0.25},
}


# ------------------------------------------------------------------------------------------------------------ the model

def build_tower(spec):
    """The architecture that a spec describes, random weights. spec: {"model", "kwargs", "image_size", ...} and for open_clip "config".
    -> module, images (B, 3, S, S) -> features (B, D)."""
    if spec["model"].startswith("timm:"):
        return timm_tower(spec["model"][5:], spec["image_size"], spec["kwargs"])
    from open_clip.model import _build_vision_tower  # the visual half alone: no text tower in memory
    tower = _build_vision_tower(spec["config"]["embed_dim"], {**spec["config"]["vision_cfg"], "image_size": spec["image_size"]}, spec["quick_gelu"])
    if getattr(tower, "proj", None) is not None:
        tower.proj = None  # pooled features before the contrastive projection: 1024 for L/14, as in the public recipe
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
    spec = {"model": args.model, "pretrained": args.pretrained, "kwargs": parse_kwargs(args.model_kwargs)}
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
            load_strict(tower, full.visual.state_dict(), args.pretrained, optional=("proj",))
    spec |= {"image_size": size, "mean": list(args.image_mean or spec["mean"]), "std": list(args.image_std or spec["std"])}
    if file:
        state = read_weights(file)
        if any(k.startswith("visual.") for k in state):  # a whole CLIP: take the visual half
            state = {k[7:]: v for k, v in state.items() if k.startswith("visual.")}
        load_strict(tower, resize_positions(state, tower), file, optional=("proj", "classifier.", "fc.", "head."))
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
            self.head = nn.Sequential(nn.Linear(features, width * 1024), nn.BatchNorm1d(width * 1024), nn.ReLU(), nn.Linear(width * 1024, dim))
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
    meta["tower"]["image_size"] = image_size or meta["tower"]["image_size"]
    net = Net(build_tower(meta["tower"]), meta["tower"], **meta["head"])
    load_strict(net, resize_positions(state, net), path)
    return net.eval(), meta


# ------------------------------------------------------------------------------------------------------------- the data

class Pictures(Dataset):
    """Pictures as the tower wants them: short side to S, centre crop. -> uint8 tensor (3, S, S)."""

    def __init__(self, paths, spec):
        self.paths, self.size = paths, spec["image_size"]
        self.filter = {"bilinear": Image.BILINEAR, "nearest": Image.NEAREST, "lanczos": Image.LANCZOS}.get(spec["interpolation"], Image.BICUBIC)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return to_square(open_rgb(self.paths[i]), self.size, self.filter)


def to_square(image, size, resample):
    """PIL image -> uint8 tensor (3, size, size): short side to `size`, centre crop."""
    w, h = image.size
    if (w, h) != (size, size):
        scale = size / min(w, h)
        image = image.resize((max(size, round(w * scale)), max(size, round(h * scale))), resample)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class TrainPairs(Dataset):
    """Row i -> (uint8 picture, target, prompt, flip?). Augmentation comes from (seed, epoch, row): workers and resume change nothing."""

    def __init__(self, pictures, targets, prompts, hflip, seed, epoch):
        self.pictures, self.targets, self.prompts = pictures, targets, prompts
        self.hflip, self.seed, self.epoch = hflip, seed, epoch

    def __getitem__(self, i):
        flip = self.hflip > 0 and np.random.default_rng((self.seed, self.epoch, i)).random() < self.hflip
        return self.pictures[i], self.targets[i], self.prompts[i], flip


def collate(rows, mixed=0, tokenize=None):
    """Stack a batch; the prompts that MixGen joins are tokenised here, in the loader's workers."""
    images, targets, prompts, flips = zip(*rows)
    m = min(mixed, len(rows) // 2)
    tokens = tokenize([f"{a} {b}" for a, b in zip(prompts[:m], prompts[m:2 * m])]) if m else None
    return torch.stack(images), torch.from_numpy(np.stack(targets)), torch.tensor(flips), tokens


def mixgen(images, targets, joined, lam=0.5):
    """MixGen (arXiv 2206.08358, alg. 1): the first m images become blends with the next m, and their targets the embeddings of the
    joined prompts. images (B, 3, H, W) normalised, targets (B, 384), joined (m, 384), m <= B/2; rows m.. stay."""
    m = len(joined)
    mixed = torch.lerp(images[m:2 * m], images[:m], lam)  # the batch is shuffled, so row i + m is a random partner
    return torch.cat([mixed, images[m:]]), torch.cat([joined, targets[m:]])


def extract_features(net, spec, data, paths, hflip, args, device, autocast):
    """Frozen tower features of every row, computed once: memmap (views, N, D); view 1 is the mirror image. Cached by tower, weights,
    transform and data, so a second lp run starts at once."""
    digest = hashlib.sha256(json.dumps([spec, data, hflip > 0, args.precision], sort_keys=True).encode())
    for name, tensor in sorted(net.tower.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    file = Path(args.out).parent / f".features/{digest.hexdigest()[:32]}.npy"
    if not file.is_file():
        net.to(device).eval()
        loader = DataLoader(Pictures(paths, spec), args.batch_size, num_workers=args.workers, generator=torch.Generator())
        out, done = None, 0
        with atomic(file) as f, torch.inference_mode():
            for x in tqdm(loader, desc="features", unit="batch"):
                x = net.pixels(x.to(device, non_blocking=True))
                with autocast():
                    views = [net.tower(v).float().cpu().numpy() for v in ([x, x.flip(-1)] if hflip > 0 else [x])]
                if out is None:
                    out = np.lib.format.open_memmap(f.name, "w+", np.float32, (len(views), len(paths), views[0].shape[1]))
                out[:, done:done + len(x)] = views
                done += len(x)
            out.flush()
    return np.load(file, mmap_mode="r", allow_pickle=False)


# --------------------------------------------------------------------------------------------------------- optimisation

def lr_at(step, total, warmup):
    """Linear warm-up, then cosine to zero: the factor on --lr, a pure function of the step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def cosine(predicted, targets):
    return (predicted.float() * targets.float()).sum(-1)


def pick_precision(name, device):
    """-> (autocast context factory, GradScaler, name). auto: bf16 where the hardware has it, else fp16 on a GPU, float32 on a CPU."""
    if name == "auto":
        if device.type == "cuda":
            name = "amp_bf16" if torch.cuda.get_device_capability()[0] >= 8 else "amp"
        else:
            flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
            name = "amp_bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
    dtype = {"amp_bf16": torch.bfloat16, "amp": torch.float16, "fp32": torch.float32}[name]
    return (lambda: torch.autocast(device.type, dtype, enabled=name != "fp32")), torch.amp.GradScaler(device.type, enabled=name == "amp"), name


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
    g = p.add_argument_group("model")
    g.add_argument("--model", default=None, help="open_clip name, timm:NAME, or an open_clip .json; unset = what the data folder recommends (ViT-L-14; the demo: a small one)")
    g.add_argument("--pretrained", default=None, help="open_clip or timm tag, a weights file, or none; unset = what the data folder recommends (openai)")
    g.add_argument("--model-kwargs", nargs="*", default=[], metavar="K=V", help="extra arguments of the timm model")
    g.add_argument("--force-quick-gelu", action="store_true", help="for OpenAI-style weights files without a tag")
    g.add_argument("--image-size", type=int, default=None, help="pixels; unset = the tower's own")
    g.add_argument("--image-mean", type=float, nargs=3, default=None, help="unset = the tower's own")
    g.add_argument("--image-std", type=float, nargs=3, default=None, help="unset = the tower's own")
    g.add_argument("--head", choices=["linear", "mlp"], default="linear", help="mlp: 16*1024 wide, BatchNorm, ReLU")
    g.add_argument("--head-width", type=int, default=16, help="of the mlp head, in units of 1024")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=None, help="unset = 30 for lp, 3 for ft")
    g.add_argument("--batch-size", type=int, default=None, help="unset = 256 for lp, 64 for ft")
    g.add_argument("--lr", type=float, default=None, help="peak learning rate; unset = 1e-3 for lp, 1e-5 for ft")
    g.add_argument("--wd", type=float, default=0.01, help="weight decay of matrices; biases and norms have none")
    g.add_argument("--warmup", type=int, default=None, help="steps; unset = 50 for lp, 200 for ft")
    g.add_argument("--grad-clip-norm", type=float, default=1.0, help="0 = off")
    g.add_argument("--hflip", type=float, default=0.5, metavar="P", help="probability of a mirror image")
    g.add_argument("--mixgen", type=float, default=None, metavar="FRACTION", help="of a batch that MixGen blends, at most 0.5; ft only; unset = 0.25")
    g.add_argument("--precision", choices=["auto", "amp_bf16", "amp", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    g.add_argument("--log-every", type=int, default=20, help="steps")
    g.add_argument("--save-every", type=float, default=5, help="minutes between writes of last.pt")
    return p.parse_args(argv)


def fill_defaults(args, summary):
    """Command line > what the data folder recommends > DEFAULTS; then everything cheap is checked."""
    advice = summary["recommend"] if args.model in (None, summary["recommend"]["model"]) else {}
    for key, value in {**DEFAULTS[args.phase], **{k: v for k, v in advice.items() if not isinstance(v, dict)}, **advice.get(args.phase, {})}.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.pretrained = args.pretrained or "openai"
    args.out = str(Path(args.out or f"runs/{Path(args.data).resolve().name}"))
    if not 0 <= args.mixgen <= 0.5:
        sys.exit(f"--mixgen {args.mixgen}: must be in [0, 0.5] (arXiv 2206.08358: M <= B/2)")
    if not 0 <= args.hflip <= 1:
        sys.exit(f"--hflip {args.hflip}: must be in [0, 1]")
    if args.batch_size < 2 or args.epochs < 1 or args.lr <= 0 or args.workers < 0:
        sys.exit("--batch-size must be at least 2, --epochs 1, --lr above 0, --workers 0 or more")
    phase = Path(args.out) / args.phase
    if (phase / "metrics.jsonl").exists() and not args.overwrite and not args.resume:
        sys.exit(f"{phase}: a run is already there; --resume it, --overwrite it, or choose another --out")
    if args.resume and not (phase / "last.pt").is_file():
        sys.exit(f"{phase}: nothing to resume there (no last.pt)")
    return phase


def main():
    args = parse_args()
    pairs, targets, summary = read_data(args.data)
    phase = fill_defaults(args, summary)
    if pairs["image"].null_count():
        sys.exit(f"{args.data}: has no images (made with --text-only)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast, scaler, args.precision = pick_precision(args.precision, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
    if args.overwrite:
        shutil.rmtree(phase, ignore_errors=True)

    # rows: order in the arrays is the order of pairs.parquet
    split = pairs["split"].to_numpy()
    train, val = np.flatnonzero(split == "train"), np.flatnonzero(split == "val")
    if len(train) < args.batch_size or not len(val):
        sys.exit(f"{args.data}: {len(train)} training and {len(val)} validation rows; need at least --batch-size {args.batch_size} and 1")
    paths = [str(Path(args.data) / p) for p in pairs["image"]]
    prompts = pairs["prompt"].to_list()
    mean = torch.from_numpy(targets[train].mean(0))
    baseline = cosine(F.normalize(mean, dim=0), torch.from_numpy(targets[val])).mean().item()

    # the net: ft takes everything from its start, so --model there is only checked
    head = {"head": args.head, "width": args.head_width, "dim": targets.shape[1]}
    if args.phase == "lp" or args.init == "none":
        tower, spec = make_tower(args)
        net = Net(tower, spec, **head)
    else:
        start = args.init or Path(args.out) / "lp"
        if not args.init and not (start / "best.safetensors").is_file():
            sys.exit(f"{start}: no lp phase to start from; run: python train.py --phase lp --data {args.data} --out {args.out}  (or --init PATH)")
        net, meta = load_net(start)
        spec, head = meta["tower"], meta["head"]
        if meta["text_model"] != summary["text_model"]:
            sys.exit(f"{start}: was trained for {meta['text_model']['name']} targets, but {args.data} has {summary['text_model']['name']}")
    meta = {"format": FORMAT, "phase": args.phase, "tower": spec, "head": head, "text_model": summary["text_model"], "data": args.data,
            "data_hashes": summary["hashes"], "baseline": baseline, "n_val": len(val), "mean_target": mean.tolist()}

    # where batches come from: cached features (lp) or pictures (ft). Order is a function of (seed, epoch), so resume is arithmetic.
    per_epoch = len(train) // args.batch_size
    total = args.epochs * per_epoch
    lp = args.phase == "lp"
    if lp:
        features = extract_features(net, spec, summary["hashes"], paths, args.hflip, args, device, autocast)
        encoder = tokenize = None
        params = [(n, p) for n, p in net.head.named_parameters()]
        net.tower.requires_grad_(False)
    else:
        pictures = Pictures(paths, spec)
        encoder = load_encoder(summary["text_model"]["name"], device)[0] if args.mixgen > 0 else None
        tokenize = encoder and (lambda texts: dict(encoder.tokenizer(texts, padding=True, truncation=True, max_length=encoder.max_seq_length, return_tensors="pt")))
        params = list(net.named_parameters())
    net.to(device)

    def batches(step):
        while True:
            epoch, done = divmod(step, per_epoch)
            order = train[np.random.default_rng((args.seed, epoch)).permutation(len(train))][done * args.batch_size:per_epoch * args.batch_size]
            if lp:
                for rows in order.reshape(-1, args.batch_size):
                    flip = np.random.default_rng((args.seed, epoch, int(rows[0]))).random(len(rows)) < args.hflip if args.hflip > 0 else np.zeros(len(rows), int)
                    yield torch.from_numpy(features[flip.astype(int), rows]), torch.from_numpy(targets[rows]), None, None
            else:
                data = TrainPairs(pictures, targets, prompts, args.hflip, args.seed, epoch)
                # its own generator: building an iterator otherwise draws from the global stream and shifts dropout after a resume
                yield from DataLoader(Subset(data, order.tolist()), args.batch_size, num_workers=args.workers, pin_memory=device.type == "cuda",
                                      collate_fn=lambda rows: collate(rows, int(args.mixgen * args.batch_size), tokenize), generator=torch.Generator())
            step += per_epoch - done

    def predict_val():
        net.eval()
        with torch.inference_mode(), autocast():
            if lp:
                return torch.cat([net.embed(torch.from_numpy(np.array(features[0, v])).to(device)) for v in np.array_split(val, -(-len(val) // 4096))])
            loader = DataLoader(Subset(pictures, val.tolist()), args.batch_size, num_workers=args.workers, generator=torch.Generator())
            return torch.cat([net(x.to(device)) for x in loader])

    def validate():
        return cosine(predict_val().cpu(), torch.from_numpy(targets[val])).mean().item()

    # AdamW; matrices decay, biases and norms do not
    optimizer = torch.optim.AdamW([{"params": [p for _, p in params if p.ndim > 1], "weight_decay": args.wd},
                                   {"params": [p for _, p in params if p.ndim <= 1], "weight_decay": 0.0}], lr=args.lr, fused=device.type == "cuda")
    log, step, best = phase / "metrics.jsonl", 0, -1.0
    if args.resume:
        state = load_last(phase / "last.pt", args)
        net.load_state_dict(state["net"], strict=False) if lp else net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        step, best = state["step"], state["best"]
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
        with atomic(log, "w") as f:
            f.write("".join(f"{line}\n" for line in kept))

    def save_last():
        own = {k: v for k, v in net.state_dict().items() if k.startswith("head.") or not lp}
        with atomic(phase / "last.pt") as f:
            torch.save({"net": own, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
                        "step": step, "best": best, "args": vars(args)}, f)

    def note(**row):
        with open(log, "a") as f:
            f.write(json.dumps(row) + "\n")

    def check_val():
        nonlocal best
        score = validate()
        note(step=step, epoch=round(step / per_epoch, 3), val_cosine=score)
        print(f"step {step:,} ({step / total:.0%}) · val cosine {score:.4f} (n = {len(val)}; mean vector {baseline:.4f}, best {max(best, score):.4f})", flush=True)
        if score > best:  # strictly better, and never NaN
            best = score
            save_net(net, {**meta, "val_cosine": score, "step": step}, phase / "best.safetensors")
        draw_curve(log, phase / "curve.png", baseline)

    phase.mkdir(parents=True, exist_ok=True)
    stop = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, _: stop.append(number))  # finish the step, save, say how to go on
    print(f"{args.phase}: {spec['model']} ({spec['pretrained']}), {spec['image_size']} px, head {head['head']}, {sum(p.numel() for _, p in params):,} parameters trained, "
          f"{len(train):,} train / {len(val):,} val, {total:,} steps of {args.batch_size}, {args.precision} on {device.type}")
    if step == 0:
        check_val()  # ft starts at the lp score
    source, began, first, saved, seen = batches(step), time.time(), step, time.time(), []

    while step < total:
        x, y, flip, tokens = next(source)
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        net.head.train() if lp else net.train()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_at(step, total, args.warmup)
        with autocast():
            if lp:
                loss = 1 - cosine(net.embed(x), y).mean()
            else:
                x = net.pixels(x)
                x = torch.where(flip.to(device)[:, None, None, None], x.flip(-1), x)
                if tokens:
                    with torch.no_grad():
                        joined = F.normalize(encoder({k: v.to(device) for k, v in tokens.items()})["sentence_embedding"].float(), dim=-1)
                    x, y = mixgen(x, y, joined)
                loss = 1 - cosine(net(x), y).mean()
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_([p for _, p in params], args.grad_clip_norm or math.inf)
        if not (torch.isfinite(loss) and (torch.isfinite(norm) or scaler.is_enabled())):
            sys.exit(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}: not finite, stopped before the update; best.safetensors is intact. Lower --lr?")
        scaler.step(optimizer)
        scaler.update()
        seen.append(loss.detach())
        step += 1
        if step % args.log_every == 0 or step == total:
            train_cosine, rate = 1 - torch.stack(seen).mean().item(), (step - first) * args.batch_size / (time.time() - began)
            lr, seen = optimizer.param_groups[0]["lr"], []
            note(step=step, epoch=round(step / per_epoch, 3), train_cosine=train_cosine, lr=lr, grad_norm=norm.item(), images_per_s=round(rate, 1))
            if not lp:
                eta = (total - step) * args.batch_size / rate
                print(f"step {step:,} ({step / total:.0%}) · train cosine {train_cosine:.4f} · lr {lr:.2e} · grad {norm.item():.2f} · {rate:.0f} images/s · ETA {eta / 60:.1f} min", flush=True)
        if step % per_epoch == 0:
            check_val()
        if stop or time.time() - saved > args.save_every * 60 or step == total:
            save_last()
            saved = time.time()
        if stop and step < total:
            print(f"stopped at step {step}; go on with: {' '.join(['python', *sys.argv])}{'' if args.resume else ' --resume'}", file=sys.stderr)
            sys.exit(128 + stop[0])

    note(step=step, done=True, best=best, baseline=baseline, seconds=round(time.time() - began, 1))
    print(f"{args.phase} done: best val cosine {best:.4f} (n = {len(val)}), mean vector {baseline:.4f} -> {phase}/best.safetensors")


def load_last(path, args):
    """last.pt -> dict. Refuses one that is damaged or belongs to other settings."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        sys.exit(f"{path}: not a readable checkpoint ({str(e).splitlines()[0][:120]}); start again with --overwrite")
    free = {"workers", "resume", "overwrite", "log_every", "save_every", "out", "data"}
    changed = [k for k, v in state["args"].items() if k not in free and getattr(args, k, None) != v]
    if changed:
        sys.exit(f"{path}: was made with other settings: " + ", ".join(f"--{k.replace('_', '-')} {state['args'][k]}" for k in changed))
    return state


if __name__ == "__main__":
    run(main)
