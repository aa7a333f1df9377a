"""
How fast predict.py is, from files on disk, against the tower alone and a plain loop of the public kind, all in one run.
$ python tests/bench/bench_predict.py                    # ViT-B-32, random weights, on this machine
$ python tests/bench/bench_predict.py --model ViT-L-14 --images 4000 --batch-size 256   # a GPU; also --image-size 336
$ python tests/bench/bench_predict.py --memory 5000      # peak memory instead, with 5,000 files against 500
Prints images/s: bare (the same tower on tensors that are there already), decode (the loader alone), ours (predict.py's
own path), plain (decode, float32, every view its own pass). Rounds are interleaved and the median taken, so that a busy
machine troubles all alike.
"""
import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import predict  # noqa: E402
from train import Net, build_tower, load_net, save_net  # noqa: E402


def make_run(model, image_size, path):
    """A checkpoint of an open_clip tower with random weights: speed does not depend on what they are."""
    import open_clip
    config = open_clip.get_model_config(model)
    spec = {"model": model, "pretrained": "none", "kwargs": {}, "mean": [0.5] * 3, "std": [0.25] * 3,
            "interpolation": "bicubic", "quick_gelu": False,
            "image_size": image_size or config["vision_cfg"]["image_size"],
            "config": {k: config[k] for k in ("embed_dim", "vision_cfg")}}
    head = {"head": "linear", "width": 16, "dim": 384}
    meta = {"format": 1, "tower": spec, "head": head, "mean_target": [1.0] * 384}
    torch.manual_seed(0)
    save_net(Net(build_tower(spec), spec, **head), meta, path)


def draw(folder, n, side=336):
    """n JPEGs as clean.py writes them: short side 336, quality 95, the detail of a picture (about 70 KB)."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        rough = Image.fromarray(rng.integers(0, 256, (42, 42, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        noise = np.asarray(rough, np.int16) + rng.integers(-12, 13, (side, side, 1))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06d}.jpg", quality=95)
    return [str(p) for p in sorted(folder.iterdir())]


class Plain(torch.utils.data.Dataset):
    def __init__(self, paths, spec):
        self.paths, self.spec = paths, spec

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = Image.open(self.paths[i]).convert("RGB")
        s = self.spec["image_size"]
        image = image.resize((s, s), Image.BICUBIC)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (x - torch.tensor(self.spec["mean"]).view(3, 1, 1)) / torch.tensor(self.spec["std"]).view(3, 1, 1)


def plain_loop(net, spec, paths, views, args, device):
    """What public notebooks do: normalised float32 images, model.eval(), no_grad, one pass over the files per view."""
    total = 0
    with torch.no_grad():
        for v in range(views):
            out = []
            for x in DataLoader(Plain(paths, spec), args.batch_size, num_workers=args.workers):
                x = x.to(device)
                out.append(net(x.flip(-1) if v else x).cpu())
            total = total + torch.cat(out)
    return torch.nn.functional.normalize(total, dim=-1).numpy()


def main():
    p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="ViT-B-32", help="open_clip name")
    p.add_argument("--image-size", type=int, default=None, help="unset = the model's own")
    p.add_argument("--images", type=int, default=192, help="files to draw")
    p.add_argument("--batch-size", type=int, default=32, help="images")
    p.add_argument("--rounds", type=int, default=3, help="of each, interleaved")
    p.add_argument("--workers", type=int, default=min(16, os.cpu_count()), help="loader processes")
    p.add_argument("--precision", default="auto", help="of ours and of the bare tower")
    p.add_argument("--compile", action="store_true", help="of ours and of the bare tower")
    p.add_argument("--memory", type=int, default=0, metavar="N",
                   help="instead: peak memory with N files against N / 10")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with tempfile.TemporaryDirectory() as tmp:
        checkpoint = Path(tmp) / "best.safetensors"
        make_run(args.model, args.image_size, checkpoint)
        paths = draw(Path(tmp) / "images", args.images)
        kilobytes = sum(os.path.getsize(f) for f in paths) / len(paths) / 1024
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        print(f"{args.model}, {args.images} JPEGs of 336 px ({kilobytes:.0f} KB each), batch {args.batch_size}, "
              f"{args.workers} workers, torch {torch.__version__}, {machine}")
        one = predict.Viewer(checkpoint, ["image"], args.precision, device, args.compile)
        if args.memory:
            for n in (args.memory // 10, args.memory):
                files = (paths * (n // len(paths) + 1))[:n]
                for _ in predict.predict(one, files, args.batch_size, args.workers, quiet=True):
                    pass
                print(f"{n:,} images: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
            return
        two = predict.Viewer(checkpoint, ["image", "mirror"], args.precision, device, args.compile)
        plain_net, meta = load_net(checkpoint)
        plain_net.to(device)
        size = one.shapes[0][0]
        net = one.nets[str(size)]
        batch = torch.zeros(args.batch_size, 3, size, size, dtype=torch.uint8, device=device)
        batches = -(-len(paths) // args.batch_size)
        out = {}

        def bare():
            with torch.inference_mode():
                x = net.pixels(batch).to(one.dtype)
                for _ in range(batches):
                    net.tower(x)
            sync()
            return batches * args.batch_size

        def decode():
            pictures = predict.Renderings(paths, meta["tower"], one.shapes)
            for _ in DataLoader(pictures, args.batch_size, num_workers=args.workers):
                pass
            return len(paths)

        def ours(viewer):
            parts = predict.predict(viewer, paths, args.batch_size, args.workers, quiet=True)
            out["ours", len(viewer.views)] = np.concatenate([y for _, y, _ in parts])
            return len(paths)

        def plain(views):
            out["plain", views] = plain_loop(plain_net, meta["tower"], paths, views, args, device)
            return len(paths)

        jobs = {"bare tower": bare, "decode alone": decode,
                "ours, 1 view": lambda: ours(one), "plain, 1 view": lambda: plain(1),
                "ours, 2 views": lambda: ours(two), "plain, 2 views": lambda: plain(2)}
        bare()  # warm up
        rates = {name: [] for name in jobs}
        for _ in range(args.rounds):
            for name, job in jobs.items():
                start = time.perf_counter()
                n = job()
                rates[name].append(n / (time.perf_counter() - start))
        rates = {k: statistics.median(v) for k, v in rates.items()}
        for name, rate in rates.items():
            print(f"{name:<16}{rate:8.1f} images/s")
        limit = min(("bare tower", "decode alone"), key=rates.get)
        gain = {v: rates[f"ours, {v}"] / rates[f"plain, {v}"] for v in ("1 view", "2 views")}
        worst = {v: float((1 - (out["ours", v] * out["plain", v]).sum(1)).max()) for v in (1, 2)}
        print(f"ours / {limit} {rates['ours, 1 view'] / rates[limit]:.2f} · "
              f"ours / plain {gain['1 view']:.2f} (1 view), {gain['2 views']:.2f} (2 views) · "
              f"largest 1 - cos {max(worst.values()):.1e} · {one.precision}")
        print(json.dumps({"model": args.model, "precision": one.precision, **rates, "one_minus_cos": worst}))


if __name__ == "__main__":
    main()
