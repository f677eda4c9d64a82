"""Paste masks from their boxes into the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Probabilities [N, M, M] in boxes [N, 4] (xyxy, pixels of the image) to bool [N, height, width].

    As in the first Detectron: the mask gets a border of zeros and its box grows by (M + 2) / M; the corners are
    truncated to whole pixels, both inclusive; the mask is resized to these pixels. Masks are larger than Detectron2's,
    small ones most of all.
    """
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    if not len(masks):
        return pasted
    padded = F.pad(masks.float(), (1, 1, 1, 1))
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    half = half * (padded.shape[-1] / masks.shape[-1])
    corners = torch.cat([centre - half, centre + half], 1).trunc().long().tolist()
    for n, (left, top, right, bottom) in enumerate(corners):
        size = (max(bottom - top + 1, 1), max(right - left + 1, 1))
        whole = F.interpolate(padded[n, None, None], size, mode="bilinear", align_corners=False)[0, 0] > 0.5
        above, below = (min(max(edge, 0), height) for edge in (top, top + size[0]))
        before, behind = (min(max(edge, 0), width) for edge in (left, left + size[1]))
        if above < below and before < behind:
            pasted[n, above:below, before:behind] = whole[above - top : below - top, before - left : behind - left]
    return pasted
