"""Score detections against ground truth by the COCO or the LVIS protocol. hotcoco matches and accumulates as
pycocotools and lvis-api do."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import hotcoco
import numpy as np

from vild.data.classes import Classes
from vild.evaluation.metrics import CLASS_METRICS, ap_by_class, summarize
from vild.evaluation.results import ResultArrays, best_per_class

IMAGES_AT_ONCE = 500
LVIS_PER_IMAGE = 300
FIXED_PER_CLASS = 10_000


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
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    classes: list[dict] = field(default_factory=list)


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
    best = best_per_class(detections, FIXED_PER_CLASS) if fixed else None
    for iou_type in iou_types:
        precision = _precision(truth, by_image, detections, iou_type)
        metrics = summarize(precision, classes.splits, classes.frequencies)
        if best is not None:
            unlimited = max(1, len(best))
            fixed_precision = _precision(truth, by_image, best, iou_type, unlimited)
            metrics |= summarize(fixed_precision, classes.splits, classes.frequencies, fixed=True)
        result.metrics[iou_type] = metrics
        for metric in CLASS_METRICS:
            for row, ap in zip(result.classes, ap_by_class(precision, metric).tolist(), strict=True):
                row[f"{iou_type}/{metric.key}"] = None if np.isnan(ap) else ap
    return result


def _annotation(annotation: dict, protocol: str) -> dict:
    """No crowds in LVIS; the area defaults to the box's."""
    crowd = 0 if protocol == "lvis" else annotation.get("iscrowd", 0)
    area = annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])
    return {**annotation, "iscrowd": crowd, "area": area}


def _precision(
    truth: GroundTruth, by_image: dict, detections: ResultArrays, iou_type: str, limit: int = 0
) -> np.ndarray:
    """[T, R, K, A] as COCOeval accumulates it, IMAGES_AT_ONCE images matched at a time to bound memory."""
    lvis = truth.protocol == "lvis"
    params = hotcoco.Params(iou_type)
    if limit:
        params.max_dets = [limit]
    elif lvis:
        params.max_dets = [LVIS_PER_IMAGE]
    classes = zip(truth.classes.ids, truth.classes.names, truth.classes.frequencies, strict=True)
    categories = [{"id": i, "name": n, "frequency": f or "f"} for i, n, f in classes]
    run = hotcoco.StreamingEval(categories, iou_type, lvis_style=lvis, params=params)
    images = sorted(truth.document["images"], key=lambda i: i["id"])
    for start in range(0, len(images), IMAGES_AT_ONCE):
        some = images[start : start + IMAGES_AT_ONCE]
        annotations = [a for i in some for a in by_image.get(i["id"], ())]
        first, last = np.searchsorted(detections.image_ids, [some[0]["id"], some[-1]["id"] + 1])
        run.update(some, annotations, _records(detections, slice(first, last), truth.sizes, iou_type))
    whole = run.finalize()
    whole.accumulate()
    precision = np.asarray(whole.eval["precision"])
    assert precision.shape[2] == len(categories)
    return precision[..., -1]


def _records(detections: ResultArrays, part: slice, sizes: dict, iou_type: str) -> np.ndarray | list[dict]:
    """Some detections in hotcoco's form. Masks come without boxes, so that the area is the mask's, as in Detectron2's
    evaluators."""
    columns = (detections.image_ids[part], detections.category_ids[part], detections.scores[part])
    if iou_type == "bbox":
        image_ids, category_ids, scores = columns
        return np.column_stack([image_ids, detections.boxes[part], scores, category_ids]).astype(np.float64)
    rows = zip(*(column.tolist() for column in columns), detections.masks[part], strict=True)
    return [
        {"image_id": i, "category_id": c, "score": s, "segmentation": {"size": list(sizes[i]), "counts": m}}
        for i, c, s, m in rows
    ]


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
    counts["most_detections_of_a_picture"] = int(per_image.max(initial=0))
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
