"""How an image becomes the network's input."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def scaled_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of an image that fits into ``side`` x ``side``: rounded half to even, in float32, as
    TensorFlow does; at least 1."""
    size = np.array([height, width], np.float32)
    scaled = np.round(size * (np.float32(side) / size).min())
    return max(int(scaled[0]), 1), max(int(scaled[1]), 1)


def legacy_bilinear(image: Tensor, height: int, width: int) -> Tensor:
    """TensorFlow 1's ``resize_images``: float [C, H, W] to [C, height, width].

    Output pixel i is read at i * (old size / new size): corners are matched instead of centres, so that the image
    moves by up to half a pixel against any other resize, and nothing is averaged where it shrinks.
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

    It is normalised before it is resized, and stays in float: no pixel is rounded to a whole number on the way.
    """
    height, width = scaled_size(*image.shape[1:], side)
    image = legacy_bilinear(image, height, width)
    return F.pad(image, (0, side - width, 0, side - height))
