"""What train.py promises: towers, checkpoints, resume, numerics."""
import json

import pytest
import torch

from conftest import TINY, command
from train import Net, build_tower, load_net, save_net

torch.set_num_threads(2)


def tiny_spec(model):
    spec = {"model": model, "pretrained": "none", "kwargs": {}, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    if not model.startswith("timm:"):
        config = json.load(open(TINY))
        spec |= {"config": {k: config[k] for k in ("embed_dim", "vision_cfg")}, "quick_gelu": False}
    return spec


@pytest.mark.parametrize("model", ["tiny", "timm:test_vit", "timm:test_vit2", "timm:test_convnext"])
def test_another_image_size(model, tmp_path):
    """The position grid is interpolated, the class token is not, a convnet needs nothing; asking for the trained size changes nothing."""
    spec = tiny_spec(model)
    net = Net(build_tower(spec), spec)
    for p in net.parameters():
        torch.nn.init.normal_(p)
    meta = {"format": 1, "tower": spec, "head": {"head": "linear", "width": 16, "dim": 384}}
    save_net(net.eval(), meta, tmp_path / "best.safetensors")
    same, _ = load_net(tmp_path)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(same(x), net(x))
    big, meta = load_net(tmp_path, image_size=64)
    assert meta["tower"]["image_size"] == 64 and big(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 384)
    changed = [k for k, v in big.state_dict().items() if v.shape != net.state_dict()[k].shape]
    assert len(changed) == (0 if "conv" in model else 1)
    for k in changed:
        old, new = net.state_dict()[k], big.state_dict()[k]
        prefix = 0 if old.shape[-2] in (4, 16) else 1
        assert torch.equal(old[..., :prefix, :], new[..., :prefix, :])
        side = int((new.shape[-2] - prefix) ** .5)  # bicubic on a doubled grid keeps the mean up to the border
        assert new.shape[-2] == prefix + side * side
