"""Masks to COCO's compressed run-length encoding, all at once on the device that has them."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_api
from torch import Tensor

CHUNK = 2**28  # pixels at once


def encode_masks(masks: Tensor) -> list[dict]:
    """The COCO RLE ({"size": [H, W], "counts": str}) of masks, bool [N, H, W] on any device, as pycocotools encodes
    them. On an accelerator run boundaries are found there, and only they come to the host."""
    if masks.device.type == "cpu":
        rles = mask_api.encode(np.asfortranarray(masks.numpy().transpose(1, 2, 0), dtype=np.uint8))
        return [{**rle, "counts": rle["counts"].decode()} for rle in rles]
    return encode_by_boundaries(masks)


def encode_by_boundaries(masks: Tensor) -> list[dict]:
    """:func:`encode_masks` by tensor operations."""
    n, height, width = masks.shape
    step = max(1, CHUNK // max(1, height * width))
    found = [string for part in masks.split(step) for string in _strings(part)] if n else []
    return [{"size": [height, width], "counts": string} for string in found]


def _strings(masks: Tensor) -> list[str]:
    n, pixels = len(masks), masks[0].numel()
    columns = masks.transpose(1, 2).reshape(n, pixels)  # COCO counts along columns
    changes = columns.clone()  # where a pixel differs from the one before it; before the first is background
    changes[:, 1:] ^= columns[:, :-1]
    rows, at = changes.nonzero().T.cpu().numpy()
    # a run ends at each boundary and at the mask's end
    rows, ends = np.append(rows, np.arange(n)), np.append(at, np.full(n, pixels))
    order = rows.argsort(kind="stable")
    rows, ends = rows[order], ends[order]
    first = np.searchsorted(rows, np.arange(n))
    lengths = np.diff(ends, prepend=0)
    lengths[first] = ends[first]
    text, sizes = _compress(lengths, np.arange(len(rows)) - first[rows])
    stops = np.add.reduceat(sizes, first).cumsum().tolist()
    return [text[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def _compress(lengths: np.ndarray, number: np.ndarray) -> tuple[str, np.ndarray]:
    """Run lengths, each the so-manyeth of its mask, to characters of five bits and a continuation bit, little end
    first; from the fourth on the difference to the last but one. Returns all characters, and how many each has."""
    left = lengths.astype(np.int64)
    left[2:] -= np.where(number[2:] > 2, lengths[:-2], 0)
    characters, used = [], []
    going = np.ones(len(left), bool)
    while going.any():
        bits, left = left & 31, left >> 5
        more = np.where(bits & 16, left != -1, left != 0)
        characters.append(bits + 32 * more + 48)
        used.append(going)
        going = going & more
    used = np.stack(used, 1)
    return np.stack(characters, 1)[used].astype(np.uint8).tobytes().decode(), used.sum(1)
