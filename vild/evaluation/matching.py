"""Precision over recall, matched and accumulated by hotcoco as pycocotools does.

LVIS's rules are put into COCO's form, image by image, because hotcoco's LVIS style cannot be kept from taking the best
300 detections of an image, and AP-fixed has no such limit: detections of a class that the image says nothing about are
left out; where a class is not exhaustively annotated, a crowd over the whole image ignores those that find no object.
Images, classes and annotations are numbered, because hotcoco reads ids as floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import hotcoco
import numpy as np
from pycocotools import mask as mask_api

from vild.data.masks import usable
from vild.evaluation.results import ResultArrays

IMAGES_AT_ONCE = 500
THIN = 1e-6  # pixels; sides below it are lost beside coordinates, and match no object
EVERYWHERE = [-1e9, -1e9, 2e9, 2e9]  # xywh


def precision(
    images: Sequence[dict],
    annotations: Mapping[int, Sequence[dict]],
    detections: ResultArrays,
    classes: Sequence[int],
    iou_type: str,
    lvis: bool,
) -> np.ndarray:
    """[T, R, K, A] as COCOeval accumulates it (see ``metrics.ap_by_class``).

    COCO's rules take the best 100 detections of a class in an image, LVIS's all that are given. IMAGES_AT_ONCE images
    are matched at a time to bound memory.

    Args:
        images: records of an annotation file.
        annotations: those of each image id, of ``classes`` only, with bbox, area and iscrowd.
        detections: of ``images`` and ``classes`` only.
        classes: category ids, ascending.
    """
    params = hotcoco.Params(iou_type)
    if lvis:
        params.max_dets = [max(1, len(detections))]
    numbers = {category: k for k, category in enumerate(classes, 1)}
    names = [{"id": k, "name": str(k)} for k in numbers.values()]
    run = hotcoco.StreamingEval(names, iou_type, params=params)
    images = sorted(images, key=lambda i: i["id"])
    ids = np.array([i["id"] for i in images], np.int64)
    first, last = (np.searchsorted(detections.image_ids, ids, side) for side in ("left", "right"))
    count = 0
    for start in range(0, len(images), IMAGES_AT_ONCE):
        some, things, rows = [], [], []
        for n, image in enumerate(images[start : start + IMAGES_AT_ONCE], start):
            mine, found = list(annotations.get(image["id"], ())), np.arange(first[n], last[n])
            if lvis:
                crowds, found = _as_coco(image, mine, detections, found, numbers, iou_type)
                mine += crowds
            some.append({"id": n + 1, "height": image["height"], "width": image["width"]})
            things += [_numbered(a, count + k, n + 1, numbers, iou_type) for k, a in enumerate(mine, 1)]
            count += len(mine)
            rows.append(found)
        run.update(some, things, _records(detections.take(np.concatenate(rows)), images, ids, classes, iou_type))
    whole = run.finalize()
    whole.accumulate()
    result = np.asarray(whole.eval["precision"])
    assert result.shape[2] == len(names)
    return result[..., -1]


def _as_coco(
    image: dict, annotations: list[dict], detections: ResultArrays, rows: np.ndarray, classes: Mapping, iou_type: str
) -> tuple[list[dict], np.ndarray]:
    """LVIS's rules for an image in COCO's form: crowds to add to its annotations, and which of its detections count."""
    known = {a["category_id"] for a in annotations}.union(image.get("neg_category_ids", ()))
    rows = rows[np.isin(detections.category_ids[rows], np.array([*known], np.int64))]
    unsure = [c for c in {*image.get("not_exhaustive_category_ids", ())} & known if c in classes]
    if not unsure:
        return [], rows
    # what is too thin to overlap with a crowd finds no object either
    if iou_type == "bbox":
        thin = detections.boxes[rows, 2:].min(1, initial=1) < THIN
    else:
        size = [image["height"], image["width"]]
        thin = np.array([mask_api.area({"size": size, "counts": detections.masks[r]}) == 0 for r in rows], bool)
    rows = rows[~(thin & np.isin(detections.category_ids[rows], np.array(unsure, np.int64)))]
    whole = {"size": [image["height"], image["width"]], "counts": [0, image["height"] * image["width"]]}
    crowd = {"bbox": EVERYWHERE, "area": 0, "iscrowd": 1, "segmentation": whole}
    return [{"category_id": c, **crowd} for c in unsure], rows


def _numbered(annotation: dict, number: int, image: int, classes: Mapping[int, int], iou_type: str) -> dict:
    """An annotation in hotcoco's form."""
    numbers = {"id": number, "image_id": image, "category_id": classes[annotation["category_id"]]}
    mask = {"segmentation": usable(annotation["segmentation"])} if iou_type == "segm" else {}
    return numbers | {key: annotation[key] for key in ("bbox", "area", "iscrowd")} | mask


def _records(
    detections: ResultArrays, images: Sequence[dict], ids: np.ndarray, classes: Sequence[int], iou_type: str
) -> np.ndarray | list[dict]:
    """Detections in hotcoco's form. Masks come without boxes, so that the area is the mask's, as in Detectron2's
    evaluators."""
    numbers = np.searchsorted(ids, detections.image_ids) + 1
    names = np.searchsorted(np.array(classes, np.int64), detections.category_ids) + 1
    if iou_type == "bbox":
        return np.column_stack([numbers, detections.boxes, detections.scores, names]).astype(np.float64)
    rows = zip(numbers.tolist(), names.tolist(), detections.scores.tolist(), detections.masks, strict=True)
    return [
        {"image_id": i, "category_id": c, "score": s,
         "segmentation": {"size": [images[i - 1]["height"], images[i - 1]["width"]], "counts": m}}
        for i, c, s, m in rows
    ]  # fmt: skip
