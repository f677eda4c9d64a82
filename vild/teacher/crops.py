"""From images and boxes to the teacher's input. Pure tensor functions.

The paper's crops (section 3.3): each proposal at 1x and at 1.5x around the same centre, cut from the original image,
clipped to it, resized to the teacher's input size, normalised. Boxes are xyxy in absolute float pixels of their image.
Crops equal ``PIL.Image.crop(window).resize(...)`` (vild/teacher/resize.py says how exactly).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vild.teacher.resize import resize_windows
from vild.teacher.resize_exact import GROUP_BYTES, JOB, constant
from vild.utils.errors import UserError

SCALES = (1.0, 1.5)
MODES = ("squash", "center", "pad")


def enlarge(boxes: Tensor, scale: float) -> Tensor:
    """Boxes [N, 4] with the same centres, ``scale`` times as wide and high."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    return torch.cat([centre - half, centre + half], dim=1)


def to_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """Integer crop windows int64 [N, 4] that cover the boxes, clipped to the image, at least one pixel."""
    low, high = boxes[:, :2].floor().long(), boxes[:, 2:].ceil().long()
    limit = torch.tensor([width, height], device=boxes.device)
    low = torch.minimum(low.clamp(min=0), limit - 1)
    high = torch.minimum(torch.maximum(high, low + 1), limit)
    return torch.cat([low, high], dim=1)


def input_windows(
    height: np.ndarray, width: np.ndarray, size: tuple[int, int], mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What windows of these heights and widths (int64, of one shape) are resized to, and where the crops begin in that
    (negative: padding).

    "squash": to the crop's size; the aspect ratio is lost. The default, and assumed of the paper (whose released code
    reads finished embeddings): the crop shows the whole box and nothing else.
    "center": the shorter edge to the crop's size, then the centre, as in open_clip's preprocessing and CLIP's training.
    Objects keep their shape, but the ends of a long box are cut off.
    "pad": the longer edge to the crop's size, centred on the teacher's mean colour (zero after normalising). Shape and
    ends are kept, at fewer pixels and with bars that CLIP has rarely seen.

    Returns:
        height, width, top, left
    """
    if mode == "squash":
        return np.full_like(height, size[0]), np.full_like(width, size[1]), np.zeros_like(height), np.zeros_like(width)
    if mode == "center" and size[0] == size[1]:  # torchvision's Resize, which open_clip takes there, rounds down
        short = np.minimum(height, width)
        h, w = size[0] * height // short, size[0] * width // short
    else:
        ratio = (np.minimum if mode == "center" else np.maximum)(height / size[0], width / size[1])
        h, w = (np.maximum(1, np.rint(length / ratio).astype(np.int64)) for length in (height, width))
    if mode == "center":
        top, left = (np.rint((length - side) / 2).astype(np.int64) for length, side in zip((h, w), size, strict=True))
        return h, w, top, left
    return h, w, -((size[0] - h) // 2), -((size[1] - w) // 2)


def check_mode(mode: str) -> None:
    """UserError for a crop mode that is none of MODES."""
    if mode not in MODES:
        raise UserError(f"crop mode '{mode}' is none of {', '.join(MODES)}")


def plan_crops(
    boxes: Tensor,
    height: int,
    width: int,
    size: tuple[int, int],
    mode: str = "squash",
    scales: Sequence[float] = SCALES,
) -> Tensor:
    """The crops of an image's boxes (float [N, 4], on the CPU), the plan of :func:`cut_crops`.

    Returns:
        int64 [N * len(scales), 8], each a job of ``resize.py`` without the number of its image.
    """
    boxes = boxes.float()
    windows = torch.stack([to_pixels(enlarge(boxes, scale), height, width) for scale in scales], 1).flatten(0, 1)
    x0, y0, x1, y1 = windows.numpy().T
    return torch.cat([windows, torch.from_numpy(np.stack(input_windows(y1 - y0, x1 - x0, size, mode), 1))], 1)


def cut_crops(
    images: Sequence[Tensor],
    plans: Sequence[Tensor],
    size: tuple[int, int],
    mean: Sequence[float],
    interpolation: str = "bicubic",
    device: torch.device | str = "cpu",
    memory: int = GROUP_BYTES,
) -> Tensor:
    """Crops of several images, in the order of images and plans.

    Args:
        images: uint8 RGB [3, H_i, W_i], on the CPU or on ``device``.
        plans: of each image, by :func:`plan_crops`.
        size, mean, interpolation: the teacher's (``mean`` in 0..1 colours the padding of "pad").
        device: where the crops are made.
        memory: bytes to work in, beside images and crops; for accelerators.

    Returns:
        uint8 [number of crops, 3, *size] on ``device``
    """
    nothing = torch.zeros((0, len(JOB)), dtype=torch.int64)
    jobs = torch.cat([nothing, *(F.pad(plan, (1, 0), value=number) for number, plan in enumerate(plans))])
    fill = [round(255 * value) for value in mean]
    return resize_windows(images, jobs, size, interpolation, fill, device, memory)


def crop_batch(
    images: Sequence[Tensor],
    boxes: Sequence[Tensor],
    size: tuple[int, int],
    mean: Sequence[float],
    interpolation: str = "bicubic",
    scales: Sequence[float] = SCALES,
    mode: str = "squash",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Crops of all boxes (of each image float [N_i, 4], on any device) at every scale; else as :func:`cut_crops`.

    Args:
        mode: one of MODES, see :func:`input_windows`.

    Returns:
        uint8 [sum of N_i, len(scales), 3, *size] on ``device``

    Raises:
        UserError: another mode.
    """
    check_mode(mode)
    rows = torch.cat(list(boxes)).cpu().split([len(b) for b in boxes]) if boxes else []
    plans = [plan_crops(row, *i.shape[1:], size, mode, scales) for i, row in zip(images, rows, strict=True)]
    return cut_crops(images, plans, size, mean, interpolation, device).view(-1, len(scales), 3, *size)


def normalise(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [..., 3, h, w] to the teacher's float32 input of the same shape, on the crops' device."""
    mean, std = (_grey_levels(tuple(v), crops.device) for v in (mean, std))
    return crops.float().sub_(mean).div_(std)


@lru_cache(64)
def _grey_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values in 0..1 to 0..255, float32 [3, 1, 1]."""
    return constant(tuple((torch.tensor(values, dtype=torch.float32) * 255).tolist()), torch.float32, device)


def fuse_scales(embeddings: Tensor) -> Tensor:
    """Unit embeddings [N, S, D] of S scales to one unit target [N, D]: sum, then L2 (paper, section 3.3)."""
    return F.normalize(embeddings.sum(1), dim=1)
