"""Resize and pad an image as the released code does."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def scaled_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of the image resized to fit ``side`` x ``side``, in float32 and rounded half to even as in
    TensorFlow; at least 1."""
    size = np.array([height, width], np.float32)
    scaled = np.round(size * (np.float32(side) / size).min())
    return max(int(scaled[0]), 1), max(int(scaled[1]), 1)


def legacy_bilinear(image: Tensor, height: int, width: int) -> Tensor:
    """TensorFlow 1's ``resize_images``: float [C, H, W] to [C, height, width].

    Output pixel i is read at i * (old size / new size): corners are matched instead of centres, which moves the image
    by up to half a pixel against other resizes, and shrinking does not average.
    """
    for dim, size in ((2, width), (1, height)):
        old = image.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=image.device) * float(np.float32(old) / np.float32(size))
        low = at.floor().long().clamp(max=old - 1)
        high = (low + 1).clamp(max=old - 1)
        share = (at - low).view([-1 if d == dim else 1 for d in range(3)])
        first = image.index_select(dim, low)
        image = first + (image.index_select(dim, high) - first) * share
    return image


def onto_canvas(image: Tensor, side: int) -> Tensor:
    """A normalised image [3, H, W], resized and padded with zeros on the right and below to [3, side, side].

    Normalised before it is resized, and never rounded to integers in between.
    """
    height, width = scaled_size(*image.shape[1:], side)
    image = legacy_bilinear(image, height, width)
    return F.pad(image, (0, side - width, 0, side - height))
