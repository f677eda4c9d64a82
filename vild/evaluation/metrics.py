"""Average precision by groups of classes, and proposal recall. Pure functions over arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

AREAS = ("s", "m", "l")  # up to 32², up to 96², above (COCO)


def class_ap(precision: np.ndarray, area: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """AP and AP50 of every class, in percent; NaN where a class has no ground truth.

    Args:
        precision: [T, R, K, A] as COCOeval accumulates it (T IoU thresholds from 0.5 by 0.05, R recall points,
            K classes, A areas of which 0 is all); -1 where there is no ground truth.
        area: which of the A.

    Returns:
        two arrays [K].
    """
    table = np.where(precision[:, :, :, area] < 0, np.nan, precision[:, :, :, area]) * 100
    return table.mean((0, 1)), table[0].mean(0)


def group_mean(values: np.ndarray, members: Sequence[bool]) -> float:
    """Mean over the members that have ground truth; NaN only if none has."""
    chosen = values[np.asarray(members, bool)]
    chosen = chosen[~np.isnan(chosen)]
    return float(chosen.mean()) if len(chosen) else float("nan")


def scored(splits: Sequence[str]) -> np.ndarray:
    """bool [K]: the classes that "all" means: base and novel ones; every class where none is marked."""
    marked = np.array([bool(s) for s in splits])
    return marked if marked.any() else np.ones(len(splits), bool)


def summarize(precision: np.ndarray, splits: Sequence[str], frequencies: Sequence[str]) -> Mapping[str, float]:
    """The metrics of one IoU type: AP, AP50, AP75 and by object size over base and novel classes together; AP and
    AP50 by base and novel; where frequencies are known, AP of rare, common and frequent classes."""
    ap, ap50 = class_ap(precision)
    everything = scored(splits)
    base, novel = (np.array([s == mark for s in splits]) for mark in ("base", "novel"))
    result = {"AP": group_mean(ap, everything), "AP50": group_mean(ap50, everything)}
    result["AP75"] = group_mean(class_ap(precision[5:6])[0], everything)
    for index, letter in enumerate(AREAS, 1):
        result[f"AP{letter}"] = group_mean(class_ap(precision, index)[0], everything)
    for name, members in (("novel", novel), ("base", base)):
        result[f"AP_{name}"] = group_mean(ap, members)
    for name, members in (("novel", novel), ("base", base), ("all", everything)):
        result[f"AP50_{name}"] = group_mean(ap50, members)
    if any(frequencies):
        for letter in "rcf":
            result[f"AP{letter}"] = group_mean(ap, [f == letter for f in frequencies])
    return result


def fixed_summary(precision: np.ndarray, splits: Sequence[str], frequencies: Sequence[str]) -> Mapping[str, float]:
    """The AP's of :func:`summarize` under names of their own, for a precision of the AP-fixed protocol."""
    whole = summarize(precision, splits, frequencies)
    names = ["AP", "AP_novel", "AP_base", *(f"AP{letter}" for letter in "rcf")]
    return {f"{name}_fixed": whole[name] for name in names if name in whole}


def best_overlaps(boxes: Tensor, proposals: Tensor) -> Tensor:
    """IoU of each ground-truth box with the proposal it is paired with, a proposal serving one box only: the pair
    that overlaps most first, then the next of what is left (as Detectron2 counts proposals' recall).

    Args:
        boxes: [G, 4] xyxy.
        proposals: [N, 4] xyxy.

    Returns:
        float32 [G]; 0 for a box that got none.
    """
    result = torch.zeros(len(boxes))
    overlaps = box_iou(boxes, proposals)
    for _ in range(min(overlaps.shape)):
        box, proposal = divmod(int(overlaps.argmax()), len(proposals))
        result[box] = overlaps[box, proposal].clamp(min=0)
        overlaps[box] = overlaps[:, proposal] = -1
    return result


def average_recall(overlaps: Tensor) -> float:
    """Percent of boxes found, mean over the IoU thresholds 0.5, 0.55 ... 0.95; NaN without a box.

    Args:
        overlaps: [G], of :func:`best_overlaps`.
    """
    thresholds = torch.linspace(0.5, 0.95, 10)
    return 100 * float((overlaps[:, None] >= thresholds - 1e-6).float().mean()) if len(overlaps) else float("nan")


def covered(boxes: Tensor, proposals: Tensor, threshold: float) -> Tensor:
    """bool [G]: which ground-truth boxes [G, 4] some proposal [N, 4] overlaps by at least ``threshold`` IoU."""
    if len(boxes) == 0 or len(proposals) == 0:
        return torch.zeros(len(boxes), dtype=torch.bool)
    return box_iou(boxes, proposals).max(1).values >= threshold
