"""From a picture and boxes to the teacher's input. Pure tensor functions.

The paper's crops (section 3.3): a proposal at 1x and the same centre at 1.5x, cut from the original picture,
clipped at its border, resized to the teacher's input size without keeping the aspect ratio ("squash": a centre
crop would cut the ends off long boxes), normalised. Boxes are xyxy in absolute float pixels of that picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = (1.0, 1.5)


def enlarge(boxes: Tensor, scale: float) -> Tensor:
    """Boxes [N, 4] of the same centres, ``scale`` times as wide and high."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    return torch.cat([centre - half, centre + half], dim=1)


def to_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Integer crop windows int64 [N, 4] that cover the boxes, clipped to the picture, at least one pixel."""
    low, high = boxes[:, :2].floor().long(), boxes[:, 2:].ceil().long()
    limit = torch.tensor([width, height], device=boxes.device)
    low = torch.minimum(low.clamp(min=0), limit - 1)
    high = torch.minimum(torch.maximum(high, low + 1), limit)
    return torch.cat([low, high], dim=1)


def resize(crop: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """uint8 [3, h, w] to uint8 [3, *size], antialiased, as Pillow does it.

    Equal within one grey level, but for a few pixels in a thousand (two levels) where Pillow resizes the rows
    before the columns and rounds in between.
    """
    exact = crop.device.type == "cpu"  # CUDA resizes floats only
    image = crop[None] if exact else crop[None].float()
    image = F.interpolate(image, size, mode=interpolation, align_corners=False, antialias=True)[0]
    return image if exact else image.round().clamp(0, 255).to(torch.uint8)


def crop_regions(
    picture: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    scales: Sequence[float] = SCALES,
) -> Tensor:
    """The teacher's input for every box at every scale.

    Args:
        picture: uint8 [3, H, W], RGB, on any device; the crops are made there.
        boxes: float [N, 4].
        size, mean, std, interpolation: the teacher's preprocessing.

    Returns:
        float32 [N, len(scales), 3, *size], normalised.
    """
    height, width = picture.shape[1:]
    crops = torch.empty((len(scales), len(boxes), 3, *size), dtype=torch.uint8, device=picture.device)
    picture = picture[None].contiguous(memory_format=torch.channels_last)[0]  # the fast layout for resizing
    for s, scale in enumerate(scales):
        windows = to_pixels(enlarge(boxes.float(), scale), height, width).tolist()
        for n, (x0, y0, x1, y1) in enumerate(windows):
            crops[s, n] = resize(picture[:, y0:y1, x0:x1], size, interpolation)
    mean, std = (torch.tensor(v, device=picture.device).view(3, 1, 1) * 255 for v in (mean, std))
    return ((crops.float() - mean) / std).transpose(0, 1)


def fuse_scales(embeddings: Tensor) -> Tensor:
    """Unit embeddings [N, S, D] of S scales to one unit target [N, D]: sum, then L2 (paper, section 3.3)."""
    return F.normalize(embeddings.sum(1), dim=1)
