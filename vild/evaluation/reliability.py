"""Can the scores of detections be believed? Precision and recall at the threshold that people see, and calibration.

A detection is right if it is matched with an object of its class: by descending score, each object at most once, at an
IoU of at least 0.5. A second box on an object is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_api

from vild.evaluation.protocol import GroundTruth
from vild.evaluation.results import ResultArrays

IOU = 0.5
BINS = 10
LEAST = 0.05  # detections with lower scores are left out of the calibration error: there are as many as one asks for


@dataclass(frozen=True)
class Judged:
    """N detections that can be judged, and the objects there are.

    Attributes:
        scores: float64 [N].
        right: bool [N].
        classes: int64 [N], contiguous.
        objects: int64 [C], number of objects of each class.
        images: number of images.
    """

    scores: np.ndarray
    right: np.ndarray
    classes: np.ndarray
    objects: np.ndarray
    images: int

    def of(self, members: Sequence[bool]) -> Judged:
        """Only the classes ``members``, bool [C]."""
        members = np.asarray(members, bool)
        keep = members[self.classes]
        objects = np.where(members, self.objects, 0)
        return Judged(self.scores[keep], self.right[keep], self.classes[keep], objects, self.images)


@dataclass(frozen=True)
class Objects:
    """The ground truth of one image.

    Attributes:
        boxes: float64 [G, 4], xywh.
        classes: int64 [G], contiguous.
        crowd: bool [G].
        known: the classes of which the image says whether they are there; None: all.
        partly: classes of which it may have more objects (LVIS's ``not_exhaustive_category_ids``).
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    known: frozenset[int] | None = None
    partly: frozenset[int] = frozenset()

    def match(self, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Match the image's detections, boxes [N, 4] as xywh.

        Returns:
            bool [N], right; bool [N], can be judged: not those within a crowd, nor of a class that is not known, nor
            those without an object of a class that is partly annotated.
        """
        right, judged = np.zeros(len(boxes), bool), np.ones(len(boxes), bool)
        if self.known is not None:
            judged = np.isin(classes, list(self.known))
        for number in np.intersect1d(classes, self.classes):
            rows, mine = np.flatnonzero(classes == number), np.flatnonzero(self.classes == number)
            rows = rows[np.argsort(-scores[rows], kind="stable")]
            crowd, overlaps = self.crowd[mine], mask_api.iou(boxes[rows], self.boxes[mine], self.crowd[mine].tolist())
            free = ~crowd
            for row, overlap in zip(rows, overlaps, strict=True):
                best = int(np.where(free, overlap, -1).argmax())
                if free[best] and overlap[best] >= IOU:
                    right[row], free[best] = True, False
                elif (overlap[crowd] >= IOU).any():
                    judged[row] = False
        return right, judged & (right | ~np.isin(classes, list(self.partly)))


def objects_by_image(truth: GroundTruth) -> dict[int, Objects]:
    """image_id to its objects of the classes that are offered; in LVIS's protocol with the classes that are known."""
    index = {category: k for k, category in enumerate(truth.classes.ids)}
    annotations: dict[int, list[dict]] = {image_id: [] for image_id in truth.sizes}
    for a in truth.document["annotations"]:
        if a["category_id"] in index:
            annotations[a["image_id"]].append(a)
    result = {}
    for image in truth.document["images"]:
        some, known, partly = annotations[image["id"]], None, frozenset()
        classes = np.array([index[a["category_id"]] for a in some], np.int64)
        if truth.protocol == "lvis":
            known = frozenset(index[c] for c in image.get("neg_category_ids", ()) if c in index) | {*classes.tolist()}
            partly = frozenset(index[c] for c in image.get("not_exhaustive_category_ids", ()) if c in index)
        boxes = np.array([a["bbox"] for a in some], np.float64).reshape(-1, 4)
        crowd = np.array([truth.protocol != "lvis" and bool(a.get("iscrowd", 0)) for a in some], bool)
        result[image["id"]] = Objects(boxes, classes, crowd, known, partly)
    return result


def judge(truth: GroundTruth, detections: ResultArrays) -> Judged:
    """Match the detections of a data set; ``image_ids`` must be sorted (as ``read_results`` returns them)."""
    index = {category: k for k, category in enumerate(truth.classes.ids)}
    detections = detections.take(np.isin(detections.category_ids, truth.classes.ids))
    classes = np.array([index[c] for c in detections.category_ids.tolist()], np.int64)
    right, judged = np.zeros(len(classes), bool), np.zeros(len(classes), bool)
    counts = np.zeros(len(index), np.int64)
    for image_id, objects in objects_by_image(truth).items():
        counts += np.bincount(objects.classes[~objects.crowd], minlength=len(index))
        here = slice(*(np.searchsorted(detections.image_ids, image_id, side) for side in ("left", "right")))
        right[here], judged[here] = objects.match(detections.boxes[here], classes[here], detections.scores[here])
    return Judged(detections.scores[judged], right[judged], classes[judged], counts, len(truth.sizes))


def precision(judged: Judged, threshold: float) -> float:
    """Share of right detections among those at or above the threshold, in percent; NaN without any."""
    shown = judged.right[judged.scores >= threshold]
    return 100 * float(shown.mean()) if len(shown) else float("nan")


def recall(judged: Judged, threshold: float) -> float:
    """Share of the objects that a detection at or above the threshold found, in percent; NaN without objects."""
    total = judged.objects.sum()
    return 100 * float(judged.right[judged.scores >= threshold].sum() / total) if total else float("nan")


def diagram(judged: Judged) -> list[tuple[int, float, float]]:
    """The reliability diagram: for each of BINS equal bins of scores the number of detections, their mean score and the
    share of right ones (NaN in an empty bin). Scores up to LEAST are left out."""
    keep = judged.scores > LEAST
    scores, right = judged.scores[keep], judged.right[keep]
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    rows = []
    for number in range(BINS):
        here = bins == number
        means = (scores[here].mean(), right[here].mean()) if here.any() else (float("nan"),) * 2
        rows.append((int(here.sum()), float(means[0]), float(means[1])))
    return rows


def calibration_error(judged: Judged) -> float:
    """Detection calibration error (D-ECE; Küppers et al., arXiv 2004.13546) over scores alone: the mean distance in
    percent between score and share of right detections over the bins of :func:`diagram`, each with the weight of its
    detections; NaN without any."""
    rows = [row for row in diagram(judged) if row[0]]
    total = sum(count for count, _, _ in rows)
    return 100 * sum(count * abs(score - right) for count, score, right in rows) / total if rows else float("nan")


def summarize_reliability(judged: Judged, splits: Sequence[str], threshold: float) -> dict[str, float]:
    """Precision, recall and calibration error in percent and boxes an image, for base, novel and all classes.

    ``splits``: as of ``metrics.summarize``.
    """
    marked = np.array([bool(s) for s in splits])
    groups = {"": marked if marked.any() else ~marked}
    groups |= {f"_{split}": np.array([s == split for s in splits]) for split in ("base", "novel")}
    result = {}
    for suffix, members in groups.items():
        some = judged.of(members)
        result[f"precision{suffix}"] = precision(some, threshold)
        result[f"recall{suffix}"] = recall(some, threshold)
        result[f"calibration_error{suffix}"] = calibration_error(some)
        result[f"boxes_per_image{suffix}"] = float((some.scores >= threshold).sum() / max(judged.images, 1))
        result[f"objects_per_image{suffix}"] = float(some.objects.sum() / max(judged.images, 1))
    return result
