"""Score detections against ground truth by the COCO or the LVIS protocol."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vild.data.classes import Classes
from vild.data.masks import has_mask
from vild.evaluation.matching import precision
from vild.evaluation.metrics import CLASS_METRICS, ap_by_class, summarize
from vild.evaluation.results import ResultArrays, best_of_each
from vild.utils.errors import UserError

LVIS_PER_IMAGE = 300
FIXED_PER_CLASS = 10_000
LEAST_LIMIT = 20  # detections an image; nobody limits a detector to fewer


@dataclass(frozen=True)
class GroundTruth:
    """What detections are scored against.

    Attributes:
        document: content of an annotation file in LVIS or COCO format (shared: never modified).
        classes: the classes offered to the detector, in order. If any is marked base or novel, unmarked classes are
            not scored.
        protocol: "coco" (every class is evaluated on every image; 100 detections per image and class) or "lvis"
            (federated: a class is evaluated only on images where its presence is known; 300 detections per image).
    """

    document: dict
    classes: Classes
    protocol: str

    @functools.cached_property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """image_id to (height, width)."""
        return {i["id"]: (i["height"], i["width"]) for i in self.document["images"]}

    def only_annotated_images(self) -> GroundTruth:
        """Drop images without an annotation of a base or novel class (as in the COCO 48/17 files)."""
        marked = {i for i, s in zip(self.classes.ids, self.classes.splits, strict=True) if s}
        kept = {a["image_id"] for a in self.document["annotations"] if a["category_id"] in marked}
        images = [i for i in self.document["images"] if i["id"] in kept]
        return replace(self, document={**self.document, "images": images})


@dataclass
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: {"bbox" or "segm": {metric key: percent}}; NaN for a group without ground truth.
        counts: sizes of what was scored, by name.
        classes: one row per class, as in per_class.json.
        notes: what to know beside the metrics, a line each.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    classes: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def scored_iou_types(truth: GroundTruth, iou_types: Sequence[str], where: str) -> tuple[tuple[str, ...], list[str]]:
    """What can be scored of "bbox" and "segm": masks only if the annotations have them. Returns the IoU types, and the
    notes that say why one is missing.

    Raises:
        UserError: some annotations of ``where`` have a mask and some have none; or nothing is left.
    """
    if "segm" not in iou_types:
        return tuple(iou_types), []
    ids = set(truth.classes.ids)
    mine = [a for a in truth.document["annotations"] if a["category_id"] in ids and a["image_id"] in truth.sizes]
    without = [a["id"] for a in mine if not has_mask(a.get("segmentation"))]
    if not without:
        return tuple(iou_types), []
    share = f"{len(without)} of {len(mine)} annotations have no mask"
    if len(without) < len(mine):
        some = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
        raise UserError(
            f"{where}: {share} (id {some}): mask AP would be wrong; add them, or evaluate boxes alone "
            "(--iou-type bbox, MODEL.MASK_ON False)"
        )
    if "bbox" not in iou_types:
        raise UserError(f"{where}: {share}: there is no mask AP")
    return ("bbox",), [f"no mask AP: {share}"]


def evaluate(
    truth: GroundTruth, detections: ResultArrays, iou_types: tuple[str, ...], fixed: bool = False
) -> Evaluation:
    """Score detections.

    Args:
        detections: of any categories and images; those not in the ground truth are dropped.
        fixed: also evaluate AP-fixed (Dave et al., arXiv 2102.01066): at most 10,000 detections per class over the
            whole data set, no limit per image. It is another protocol, with metrics of its own.
    """
    classes = truth.classes
    detections = detections.take(
        np.isin(detections.category_ids, classes.ids) & np.isin(detections.image_ids, list(truth.sizes))
    )
    by_image: dict[int, list[dict]] = {}
    ids = set(classes.ids)
    for a in truth.document["annotations"]:
        if a["category_id"] in ids:
            by_image.setdefault(a["image_id"], []).append(_annotation(a, truth.protocol))
    result = Evaluation(counts=_counts(truth, by_image, detections), classes=_class_rows(classes, by_image, detections))
    lvis = truth.protocol == "lvis"
    limited = best_of_each(detections.image_ids, detections, LVIS_PER_IMAGE) if lvis else detections
    best = best_of_each(detections.category_ids, detections, FIXED_PER_CLASS) if fixed else None
    for iou_type in iou_types:
        match = functools.partial(precision, truth.document["images"], by_image, classes=classes.ids, iou_type=iou_type)
        curves = match(limited, lvis=lvis)
        metrics = summarize(curves, classes.splits, classes.frequencies)
        if best is not None:
            metrics |= summarize(match(best, lvis=True), classes.splits, classes.frequencies, fixed=True)
            result.notes = _lower_bound(result.counts)
        result.metrics[iou_type] = metrics
        for metric in CLASS_METRICS:
            for row, ap in zip(result.classes, ap_by_class(curves, metric).tolist(), strict=True):
                row[f"{iou_type}/{metric.key}"] = None if np.isnan(ap) else ap
    return result


def _lower_bound(counts: dict[str, int]) -> list[str]:
    """The note on AP-fixed if detections look cut off: several images have the most detections."""
    most, images = counts["most_detections_of_a_picture"], counts["pictures_with_most_detections"]
    if most < LEAST_LIMIT or images < 2:
        return []
    return [
        f"AP_fixed is a lower bound if the detector was limited to {most} detections an image, as {images} images "
        "suggest: it is meant for detections without that limit (TEST.DETECTIONS_PER_IMAGE)"
    ]


def _annotation(annotation: dict, protocol: str) -> dict:
    """No crowds in LVIS; the area defaults to the box's."""
    crowd = 0 if protocol == "lvis" else int(annotation.get("iscrowd", 0))
    area = annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])
    return {**annotation, "iscrowd": crowd, "area": area}


def _counts(truth: GroundTruth, by_image: dict, detections: ResultArrays) -> dict[str, int]:
    """How much ground truth and how many detections the metrics are based on."""
    classes = truth.classes
    present = {a["category_id"] for rows in by_image.values() for a in rows if not a["iscrowd"]}
    counts = {"pictures": len(truth.document["images"]), "offered": len(classes.ids), "detections": len(detections)}
    for mark in ("base", "novel"):
        members = [i for i, s in zip(classes.ids, classes.splits, strict=True) if s == mark]
        counts[f"classes_{mark}"] = len(members)
        counts[f"classes_{mark}_with_ground_truth"] = len(present & set(members))
    per_image = np.unique(detections.image_ids, return_counts=True)[1]
    counts["most_detections_of_a_picture"] = most = int(per_image.max(initial=0))
    counts["pictures_with_most_detections"] = int((per_image == most).sum())
    return counts


def _class_rows(classes: Classes, by_image: dict, detections: ResultArrays) -> list[dict]:
    boxes, images = dict.fromkeys(classes.ids, 0), {i: set() for i in classes.ids}
    for image_id, rows in by_image.items():
        for a in rows:
            boxes[a["category_id"]] += 1
            images[a["category_id"]].add(image_id)
    found = dict(zip(*(v.tolist() for v in np.unique(detections.category_ids, return_counts=True)), strict=True))
    return [
        {"id": i, "name": n, "split": s, "frequency": f, "pictures": len(images[i]), "boxes": boxes[i],
         "detections": found.get(i, 0)}
        for i, n, s, f in zip(classes.ids, classes.names, classes.splits, classes.frequencies, strict=True)
    ]  # fmt: skip
