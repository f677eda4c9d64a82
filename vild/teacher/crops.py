"""From images and boxes to the teacher's input. Pure tensor functions.

The paper's crops (section 3.3): each proposal at 1x and at 1.5x around the same centre, cut from the original image,
clipped to it, resized to the teacher's input size, normalised. Boxes are xyxy in absolute float pixels of their image.
Crops equal ``PIL.Image.crop(window).resize(...)`` (vild/teacher/resize.py says how exactly).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vild.teacher.resize import ResizeJob, resize_windows
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


def input_windows(height: int, width: int, size: tuple[int, int], mode: str) -> tuple[int, int, int, int]:
    """What a window of this height and width is resized to, and where the crop begins in that (negative: padding).

    "squash": to the crop's size; the aspect ratio is lost. The paper's, and the default: the crop shows the whole box
    and nothing else.
    "center": the shorter edge to the crop's size, then the centre, as in open_clip's preprocessing and CLIP's training.
    Objects keep their shape, but the ends of a long box are cut off.
    "pad": the longer edge to the crop's size, centred on the teacher's mean colour (zero after normalising). Shape and
    ends are kept, at fewer pixels and with bars that CLIP has rarely seen.

    Returns:
        height, width, top, left
    """
    if mode not in MODES:
        raise UserError(f"crop mode '{mode}' is none of {', '.join(MODES)}")
    if mode == "squash":
        return *size, 0, 0
    if mode == "center" and size[0] == size[1]:  # torchvision's Resize, which open_clip takes there, rounds down
        short = min(height, width)
        h, w = size[0] * height // short, size[0] * width // short
    else:
        ratio = (min if mode == "center" else max)(height / size[0], width / size[1])
        h, w = max(1, round(height / ratio)), max(1, round(width / ratio))
    if mode == "center":
        return h, w, round((h - size[0]) / 2), round((w - size[1]) / 2)
    return h, w, -((size[0] - h) // 2), -((size[1] - w) // 2)


def crop_batch(
    images: Sequence[Tensor],
    boxes: Sequence[Tensor],
    size: tuple[int, int],
    mean: Sequence[float],
    interpolation: str = "bicubic",
    scales: Sequence[float] = SCALES,
    mode: str = "squash",
) -> Tensor:
    """Crops of all boxes of several images at every scale, in the order of images and boxes.

    Args:
        images: uint8 RGB [3, H_i, W_i], all on the device where the crops are to be.
        boxes: float [N_i, 4] of each image.
        size, mean, interpolation: the teacher's (``mean`` in 0..1 colours the padding of "pad").
        mode: one of MODES, see :func:`input_windows`.

    Returns:
        uint8 [sum of N_i, len(scales), 3, *size]
    """
    jobs = []
    for number, (image, of_image) in enumerate(zip(images, boxes, strict=True)):
        of_image = of_image.cpu().float()
        windows = [to_pixels(enlarge(of_image, scale), *image.shape[1:]) for scale in scales]
        for x0, y0, x1, y1 in torch.stack(windows, 1).flatten(0, 1).tolist():
            jobs.append(ResizeJob(number, x0, y0, x1, y1, *input_windows(y1 - y0, x1 - x0, size, mode)))
    fill = [round(255 * value) for value in mean]
    return resize_windows(images, jobs, size, interpolation, fill).view(-1, len(scales), 3, *size)


def normalise(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [..., 3, h, w] to the teacher's float32 input of the same shape, on the crops' device."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=crops.device).view(3, 1, 1) * 255 for v in (mean, std))
    return crops.float().sub_(mean).div_(std)


def fuse_scales(embeddings: Tensor) -> Tensor:
    """Unit embeddings [N, S, D] of S scales to one unit target [N, D]: sum, then L2 (paper, section 3.3)."""
    return F.normalize(embeddings.sum(1), dim=1)
