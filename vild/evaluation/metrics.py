"""Average precision by groups of classes, and proposal recall. Pure functions over arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou


def class_ap(precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AP and AP50 of every class, in percent; NaN where a class has no ground truth.

    Args:
        precision: [T, R, K, A, M] as COCOeval accumulates it (T IoU thresholds from 0.5, R recall points,
            K classes, A areas of which 0 is all, M limits of detections of which the last counts); -1 where
            there is no ground truth.

    Returns:
        two arrays [K].
    """
    table = np.where(precision[:, :, :, 0, -1] < 0, np.nan, precision[:, :, :, 0, -1]) * 100
    return table.mean((0, 1)), table[0].mean(0)


def group_mean(values: np.ndarray, members: Sequence[bool]) -> float:
    """Mean over the members that have ground truth; NaN only if none has."""
    chosen = values[np.asarray(members, bool)]
    chosen = chosen[~np.isnan(chosen)]
    return float(chosen.mean()) if len(chosen) else float("nan")


def summarize(precision: np.ndarray, splits: Sequence[str], frequencies: Sequence[str]) -> Mapping[str, float]:
    """The metrics of one IoU type: AP, AP50, by base/novel/all and, where known, by frequency."""
    ap, ap50 = class_ap(precision)
    everything = np.ones(len(ap), bool)
    base, novel = (np.array([s == mark for s in splits]) for mark in ("base", "novel"))
    result = {"AP": group_mean(ap, everything), "AP50": group_mean(ap50, everything)}
    for name, members in (("novel", novel), ("base", base)):
        result[f"AP_{name}"] = group_mean(ap, members)
    for name, members in (("novel", novel), ("base", base), ("all", everything)):
        result[f"AP50_{name}"] = group_mean(ap50, members)
    if any(frequencies):
        for letter in "rcf":
            result[f"AP{letter}"] = group_mean(ap, [f == letter for f in frequencies])
    return result


def covered(boxes: Tensor, proposals: Tensor, threshold: float) -> Tensor:
    """bool [G]: which ground-truth boxes [G, 4] some proposal [N, 4] overlaps by at least ``threshold`` IoU."""
    if len(boxes) == 0 or len(proposals) == 0:
        return torch.zeros(len(boxes), dtype=torch.bool)
    return box_iou(boxes, proposals).max(1).values >= threshold
