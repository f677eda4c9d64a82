"""Every AP metric of a detector, declared once: how it is computed, its key in results, the tables that show it.

To report another one, add a line to METRICS, and its column to the TABLES where people should see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IOU_TYPES = {"bbox": "box", "segm": "mask"}  # keys in results, and their titles
AREAS = ("all", "s", "m", "l")  # COCO's areas in COCOeval's order: any, up to 32², up to 96², above


@dataclass(frozen=True)
class Metric:
    """The mean over a group of classes of their AP.

    Attributes:
        key: its name in results files, below "bbox" or "segm".
        group: "all" (base and novel together), "base", "novel", or an LVIS frequency, "r", "c" or "f".
        iou: the IoU threshold in percent; None for the mean over 50, 55 ... 95.
        area: one of AREAS.
        fixed: of the AP-fixed protocol (Dave et al., arXiv 2102.01066), evaluated for LVIS data sets.
    """

    key: str
    group: str = "all"
    iou: int | None = None
    area: str = "all"
    fixed: bool = False

    def __post_init__(self):
        if self.iou is not None and self.iou not in range(50, 100, 5):
            raise ValueError(f"metric {self.key}: the IoU thresholds are 50, 55 ... 95, not {self.iou}")


METRICS = (
    Metric("AP"),
    Metric("AP50", iou=50),
    Metric("AP75", iou=75),
    Metric("APs", area="s"),
    Metric("APm", area="m"),
    Metric("APl", area="l"),
    Metric("AP_novel", "novel"),
    Metric("AP_base", "base"),
    Metric("AP50_novel", "novel", iou=50),
    Metric("AP50_base", "base", iou=50),
    Metric("AP50_all", iou=50),
    Metric("APr", "r"),
    Metric("APc", "c"),
    Metric("APf", "f"),
    *(Metric(f"{key}_fixed", group, fixed=True) for key, group in
      [("AP", "all"), ("AP_novel", "novel"), ("AP_base", "base"), ("APr", "r"), ("APc", "c"), ("APf", "f")]),
)  # fmt: skip
CLASS_METRICS = (Metric("AP"), Metric("AP50", iou=50))  # of single classes, in per_class.json

# Columns are "<IoU type>/<metric>". The tables of published numbers have theirs in vild/report/published.json.
TABLES = {
    "quickstart": ("bbox/AP50_novel", "bbox/AP50_base", "bbox/AP50_all", "bbox/AP", "segm/AP50_novel",
                   "segm/AP50_base"),
    "trust": (*(f"bbox/{key}{group}" for key in ("precision", "recall", "calibration_error")
                for group in ("_novel", "_base", "")), "bbox/boxes_per_image", "bbox/objects_per_image"),
    "ablation": ("bbox/AP50_novel", "bbox/AP50_base", "bbox/AP50_all", "bbox/APr", "bbox/APc", "bbox/APf",
                 "segm/AP50_novel", "segm/AP50_base"),
    "clip_on_crops": ("bbox/AP", "bbox/AP50_novel", "bbox/AP50_base", "bbox/APr", "bbox/APc", "bbox/APf"),
    "transfer": ("bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/APs", "bbox/APm", "bbox/APl"),
}  # fmt: skip
# What tools/diagnostics.py writes by base and novel, to its decimals; all but cosines and progress in percent
DIAGNOSTICS = {
    "teacher_top1": 1,
    "student_top1": 1,
    "student_teacher_cosine": 3,
    "teacher_cosine_jittered": 3,
    "teacher_cosine_unrelated": 3,
    "distillation_progress": 2,
    "proposal_recall50": 1,
    "clip_on_crops_AP50": 1,
}


def title(column: str) -> str:
    """ "box AP50_novel" of "bbox/AP50_novel"."""
    iou_type, metric = column.split("/", 1)
    return f"{IOU_TYPES.get(iou_type, iou_type)} {metric}"


def rules(key: str, protocol: str) -> str:
    """By whose rules a metric of a data set of this protocol is: "COCO", "LVIS" or "AP-fixed"; "" for those that are
    not AP."""
    known = {metric.key: "AP-fixed" if metric.fixed else protocol.upper() for metric in METRICS}
    return known.get(key, "")


def decimal(value: float | None, digits: int = 1) -> str:
    """A cell of a table; "-" where nothing was measured (None or NaN)."""
    return "-" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def ap_by_class(precision: np.ndarray, metric: Metric) -> np.ndarray:
    """The AP [K] of every class in percent; NaN where a class has no ground truth.

    Args:
        precision: [T, R, K, A] as COCOeval accumulates it (T IoU thresholds from 0.5 by 0.05, R recall points,
            K classes, A areas as in AREAS); -1 where there is no ground truth.
        metric: the IoU thresholds and the area to take; its group is ignored.
    """
    at = slice(None) if metric.iou is None else slice((metric.iou - 50) // 5, (metric.iou - 50) // 5 + 1)
    chosen = precision[at, :, :, AREAS.index(metric.area)]
    return (np.where(chosen < 0, np.nan, chosen) * 100).mean((0, 1))


def group_mean(values: np.ndarray, members: Sequence[bool]) -> float:
    """Mean over the members that have ground truth; NaN only if none has."""
    chosen = values[np.asarray(members, bool)]
    chosen = chosen[~np.isnan(chosen)]
    return float(chosen.mean()) if len(chosen) else float("nan")


def summarize(
    precision: np.ndarray, splits: Sequence[str], frequencies: Sequence[str], fixed: bool = False
) -> dict[str, float]:
    """The metrics of one IoU type in percent, by key; those by frequency only where frequencies are known.

    Args:
        precision: see :func:`ap_by_class`; of the AP-fixed protocol if ``fixed``, which selects its metrics.
        splits: of each class "base", "novel" or "". Classes without a split are left out of the group "all",
            unless no class has one.
        frequencies: of each class "r", "c", "f" or "".
    """
    marked = np.array([bool(s) for s in splits])
    groups = {"all": marked if marked.any() else ~marked}
    groups |= {split: np.array([s == split for s in splits]) for split in ("base", "novel")}
    if any(frequencies):
        groups |= {letter: np.array([f == letter for f in frequencies]) for letter in "rcf"}
    return {
        metric.key: group_mean(ap_by_class(precision, metric), groups[metric.group])
        for metric in METRICS
        if metric.fixed == fixed and metric.group in groups
    }
