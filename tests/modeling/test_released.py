"""The released model's images and backbone against a few lines of NumPy. The similar
convention of Detectron2 or PyTorch must fail the same comparison."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.resnet import BasicStem
from torch import nn

from tests.modeling.agreement import agrees
from vild.modeling.released.backbone import ReleasedFPN, ReleasedP6, ReleasedStem
from vild.modeling.released.preprocessing import legacy_bilinear, onto_canvas, scaled_size

RNG = np.random.default_rng(0)


def random(*shape) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# images


def resized(image, height, width):
    """Legacy bilinear of [C, H, W], pixel by pixel."""
    out = np.empty((len(image), height, width))
    rows, columns = image.shape[1], image.shape[2]
    for i in range(height):
        for j in range(width):
            y, x = i * rows / height, j * columns / width
            y0, x0 = int(y), int(x)
            y1, x1, a, b = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1), y - y0, x - x0
            top = (1 - b) * image[:, y0, x0] + b * image[:, y0, x1]
            out[:, i, j] = (1 - a) * top + a * ((1 - b) * image[:, y1, x0] + b * image[:, y1, x1])
    return out


@pytest.mark.parametrize("size", [(23, 31), (7, 9), (10, 40), (13, 17), (1, 5)])
def test_legacy_bilinear(size):
    image = random(3, 13, 17)
    expected = resized(image, *size)
    assert agrees(legacy_bilinear(torch.from_numpy(image), *size), expected)
    centred = F.interpolate(torch.from_numpy(image)[None], size, mode="bilinear", align_corners=False)[0]
    corners = F.interpolate(torch.from_numpy(image)[None], size, mode="bilinear", align_corners=True)[0]
    if size != (13, 17):
        assert not agrees(centred, expected) and not agrees(corners, expected)


def test_sizes_fit_the_canvas():
    assert scaled_size(427, 640, 1024) == (683, 1024) and scaled_size(640, 480, 1024) == (1024, 768)
    assert scaled_size(3, 2048, 1024) == (2, 1024) and scaled_size(5, 2048, 1024) == (2, 1024)  # half to even
    assert scaled_size(1, 4000, 1024) == (1, 1024) and scaled_size(64, 64, 64) == (64, 64)


def test_the_canvas_is_padded_on_the_right_and_below():
    image = random(3, 10, 20)
    canvas = onto_canvas(torch.from_numpy(image), 64)
    assert canvas.shape == (3, 64, 64) and not canvas[:, 32:].any()
    assert agrees(canvas[:, :32], resized(image, 32, 64))
    upright = onto_canvas(torch.from_numpy(image.transpose(0, 2, 1)), 64)
    assert torch.allclose(upright, canvas.mT, atol=1e-6)


# backbone


def test_the_stem_pools_from_the_right_and_below():
    x = random(2, 4, 8, 12)
    inside = np.pad(np.maximum(x, 0), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(inside, (3, 3), (2, 3))[:, :, ::2, ::2]
    expected = windows.max((4, 5))
    for kind, right in ((ReleasedStem, True), (BasicStem, False)):  # Detectron2's pads on both sides
        stem = kind(in_channels=4, out_channels=4)
        stem.conv1 = nn.Identity()
        with torch.no_grad():
            assert agrees(stem(torch.from_numpy(x.copy())), expected) is right


def strided(x, weight, bias):
    """3x3 convolution [C, H, W] of stride 2, padded with zeros on the right and below."""
    x = np.pad(x, ((0, 0), (0, 1), (0, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2]
    return np.einsum("chwij,ocij->ohw", windows, weight) + bias[:, None, None]


def test_p6_samples_from_the_right_and_below():
    block = ReleasedP6(4)
    nn.init.normal_(block.conv.bias)
    x, weight, bias = random(1, 4, 8, 6), block.conv.weight.detach(), block.conv.bias.detach()
    expected = strided(x[0], weight.numpy(), bias.numpy())
    with torch.no_grad():
        assert agrees(block(torch.from_numpy(x))[0][0], expected)
    assert not agrees(F.conv2d(torch.from_numpy(x), weight, bias, 2, 1)[0], expected)


class Maps(Backbone):
    """The same maps for every image."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, x):
        return self.maps

    def output_shape(self):
        return {f"res{n}": ShapeSpec(channels=4, stride=2**n) for n in range(2, 6)}


def test_the_pyramid_is_normalised_at_its_end():
    maps = {f"res{n}": torch.from_numpy(random(1, 4, 2 ** (7 - n), 2 ** (7 - n))) for n in range(2, 6)}
    fpn = ReleasedFPN(Maps(maps), list(maps), 4, "BN").eval()
    for name, x in fpn.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.rand_like(x) + 0.5 if "norms" in name else torch.randn_like(x))
    weights = {name: x.numpy() for name, x in fpn.state_dict().items()}

    def conv(x, name):
        side = weights[f"{name}.weight"].shape[-1]
        x = np.pad(x, ((0, 0), *[(side // 2, side // 2)] * 2))
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), (1, 2))
        return np.einsum("chwij,ocij->ohw", windows, weights[f"{name}.weight"]) + weights[f"{name}.bias"][:, None, None]

    plain, above = {}, np.zeros((4, 2, 2))
    for level in (5, 4, 3, 2):
        above = conv(maps[f"res{level}"].numpy()[0], f"fpn_lateral{level}") + np.kron(above, np.ones((1, 2, 2)))
        plain[f"p{level}"] = conv(above, f"fpn_output{level}")
    plain["p6"] = strided(plain["p5"], weights["top_block.conv.weight"], weights["top_block.conv.bias"])
    with torch.no_grad():
        found = fpn(None)
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"] and fpn.size_divisibility == 64
    for name, x in plain.items():
        gamma, beta, mean, variance = (
            weights[f"norms.{name}.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")
        )
        expected = (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta
        assert agrees(found[name][0], expected, 1e-3) and not agrees(found[name][0], np.maximum(expected, 0), 1e-3)
