"""
How fast predict.py is, from files on disk, against the backbone alone and a plain loop of the public kind, in one run.
$ python tests/bench/bench_predict.py                    # ViT-B-32, random weights, on this machine
$ python tests/bench/bench_predict.py --model ViT-L-14 --images 4000 --batch-size 256   # a GPU; also --image-size 336
Prints images/s: bare (the same backbone on tensors that are there already), decode (the loader alone), ours, plain
(float32 images, every view its own pass over the files). Rounds are interleaved and the median is taken, so that a busy
machine troubles all alike.
"""
import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import predict  # noqa: E402
import train  # noqa: E402


def make_run(model, image_size, path):
    """A checkpoint of a backbone with random weights: speed does not depend on what they are. -> its Model"""
    flags = ["--phase", "lp", "--model", model, "--pretrained", "none"]
    args = train.parse_args(flags + (["--image-size", str(image_size)] if image_size else []))
    torch.manual_seed(0)
    net = train.Model(*train.make_backbone(args)).eval()
    train.save_model(net, {"mean_target": [1.0] * 384, "text_model": {"name": "none", "sha256": ""}, "data": "",
                           "data_hashes": {}, "args": {}, "n_val": 1}, path)
    return net


def draw(folder, n, side=336):
    """n JPEGs as clean.py writes them: short side 336, quality 95, the detail of a real image (about 70 KB)."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        rough = Image.fromarray(rng.integers(0, 256, (42, 42, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        noise = np.asarray(rough, np.int16) + rng.integers(-12, 13, (side, side, 1))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06d}.jpg", quality=95)
    return [str(p) for p in sorted(folder.iterdir())]


class Plain(Dataset):
    """Normalised float32 images, made in the loader, as public notebooks do."""

    def __init__(self, paths, spec):
        self.paths, self.size = paths, spec["image_size"]
        self.mean, self.std = (torch.tensor(spec[k]).view(3, 1, 1) for k in ("mean", "std"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        image = Image.open(self.paths[i]).convert("RGB").resize((self.size, self.size), Image.BICUBIC)
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - self.mean) / self.std


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="ViT-B-32", help="open_clip name or timm:NAME")
    p.add_argument("--image-size", type=int, help="unset = the model's own")
    p.add_argument("--images", type=int, default=192, help="files to draw")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--rounds", type=int, default=3, help="of each, interleaved")
    p.add_argument("--workers", type=int, default=min(16, os.cpu_count()), help="loader processes")
    args = p.parse_args()
    device = train.pick_device()
    with tempfile.TemporaryDirectory() as tmp:
        checkpoint = Path(tmp) / "best.safetensors"
        net = make_run(args.model, args.image_size, checkpoint).to(device)
        paths = draw(Path(tmp) / "images", args.images)
        model, spec, out = predict.TTAModel(checkpoint, "auto", device), net.spec, {}
        batches = -(-len(paths) // args.batch_size)
        machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        print(f"{args.model}, {args.images} JPEGs of 336 px, batch {args.batch_size}, {args.workers} workers, "
              f"torch {torch.__version__}, {machine}, {model.precision}")

        def bare():
            x = torch.zeros(args.batch_size, 3, spec["image_size"], spec["image_size"], device=device)
            x = x.to(train.DTYPES[model.precision], memory_format=torch.channels_last)
            with torch.inference_mode():
                for _ in range(batches):
                    model.model.backbone(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return batches * args.batch_size

        def decode():
            for _ in DataLoader(predict.ViewDataset(paths, spec, ["image"]), args.batch_size, num_workers=args.workers):
                pass
            return len(paths)

        def ours(views):
            out["ours", views] = predict.predict(model, paths, list(predict.VIEWS)[:views], args)[0]
            return len(paths)

        def plain(views):
            total = 0
            with torch.no_grad():
                for v in range(views):
                    loader = DataLoader(Plain(paths, spec), args.batch_size, num_workers=args.workers)
                    total = total + torch.cat([net(x.to(device).flip(-1) if v else x.to(device)).cpu() for x in loader])
            out["plain", views] = torch.nn.functional.normalize(total, dim=-1).numpy()
            return len(paths)

        jobs = {"bare backbone": bare, "decode alone": decode, "ours, 1 view": lambda: ours(1),
                "plain, 1 view": lambda: plain(1), "ours, 2 views": lambda: ours(2), "plain, 2 views": lambda: plain(2)}
        bare()  # warm up
        rates = {name: [] for name in jobs}
        for name in [*jobs] * args.rounds:
            start = time.perf_counter()
            rates[name].append(jobs[name]() / (time.perf_counter() - start))
    rates = {k: statistics.median(v) for k, v in rates.items()}
    for name, rate in rates.items():
        print(f"{name:<16}{rate:8.1f} images/s")
    worst = max(float((1 - (out["ours", v] * out["plain", v]).sum(1)).max()) for v in (1, 2))
    print(f"ours / plain {rates['ours, 1 view'] / rates['plain, 1 view']:.2f} (1 view), "
          f"{rates['ours, 2 views'] / rates['plain, 2 views']:.2f} (2 views) · largest 1 - cos {worst:.1e}")


if __name__ == "__main__":
    main()
