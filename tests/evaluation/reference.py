"""Random data sets full of what evaluators get wrong, and the reference implementations run on them."""

import contextlib
import copy
import io
import json

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def random_world(seed, lvis, image_count=25, classes=12, most=400):
    """An annotation document and results: ties, crowds (COCO), ignored, negative and not-exhaustive categories
    (LVIS), more than 300 detections, images without annotations or detections, two classes without ground truth,
    records in no order."""
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for image_id in (7 * n + 3 for n in range(image_count)):
        height, width = (int(v) for v in rng.integers(60, 200, 2))
        truth = [] if rng.random() < 0.15 else [_thing(rng, height, width) for _ in range(rng.integers(1, 14))]
        for box, mask in truth:
            crowd = int(not lvis and rng.random() < 0.1)
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "bbox": box, "segmentation": mask,
                                "category_id": int(rng.integers(1, classes - 1)), "iscrowd": crowd,
                                "area": box[2] * box[3] * float(rng.uniform(0.3, 1))})  # fmt: skip
        here = [a for a in annotations if a["image_id"] == image_id]
        image = {"id": image_id, "height": height, "width": width, "file_name": f"{image_id}.jpg"}
        if lvis:
            present = {a["category_id"] for a in here}
            absent = [c for c in range(1, classes + 1) if c not in present]
            image["neg_category_ids"] = [c for c in absent if rng.random() < 0.3]
            image["not_exhaustive_category_ids"] = [c for c in present if rng.random() < 0.3]
        images.append(image)
        for _ in range(0 if rng.random() < 0.1 else rng.integers(0, most)):
            category = int(rng.integers(1, classes + 1))
            if here and rng.random() < 0.6:
                near = here[rng.integers(len(here))]
                category = near["category_id"] if rng.random() < 0.8 else category
                box, mask = _thing(rng, height, width, np.array(near["bbox"]) + rng.normal(0, 3, 4))
            else:
                box, mask = _thing(rng, height, width)
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "segmentation": mask,
                            "score": round(float(rng.random()), 2)})  # fmt: skip
    categories = [{"id": c, "name": f"class {c}", "frequency": "rcf"[c % 3]} for c in range(1, classes + 1)]
    rng.shuffle(results)
    return {"images": images, "annotations": annotations, "categories": categories}, results


def _thing(rng, height, width, box=None):
    """A box inside the image and the mask of a kite in it."""
    if box is None:
        box = [rng.uniform(0, width * 0.7), rng.uniform(0, height * 0.7), rng.uniform(2, width), rng.uniform(2, height)]
    x, y = max(0.0, float(box[0])), max(0.0, float(box[1]))
    w, h = (max(1.0, min(float(v), limit)) for v, limit in zip(box[2:], (width - x, height - y), strict=True))
    kite = [x, y, x + w, y + h * 0.2, x + w * 0.8, y + h, x, y + h * 0.6]
    mask = mask_api.merge(mask_api.frPyObjects([kite], height, width))
    return [x, y, w, h], {"size": mask["size"], "counts": mask["counts"].decode()}


def as_detectron2_does(results, iou_type):
    """Detectron2 takes the boxes away from masks, so that their areas are the masks'."""
    results = copy.deepcopy(results)
    for result in results if iou_type == "segm" else ():
        del result["bbox"]
    return results


def pycocotools_precision(document, results, iou_type):
    """[T, R, K, A] of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(as_detectron2_does(results, iou_type)), iou_type)
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][..., -1]


def lvis_precision(document, results, iou_type, folder, per_image=300):
    """[T, R, K, A] of lvis-api 0.5.3."""
    with _lvis_run(document, results, iou_type, folder, per_image) as run:
        run.evaluate()
        run.accumulate()
    return run.eval["precision"]


def lvis_matches(document, results, folder):
    """Category, score and whether it has an object (boxes, IoU 0.5) of each detection that lvis-api does not ignore."""
    with _lvis_run(document, results, "bbox", folder, -1) as run:
        run.params.iou_thrs, run.params.area_rng = np.array([0.5]), run.params.area_rng[:1]
        run.evaluate()
    return sorted(
        (e["category_id"], score, bool(match))
        for e in run.eval_imgs if e
        for score, match, ignored in zip(e["dt_scores"], e["dt_matches"][0], e["dt_ignore"][0], strict=True)
        if not ignored
    )  # fmt: skip


@contextlib.contextmanager
def _lvis_run(document, results, iou_type, folder, per_image):
    """A run of lvis-api 0.5.3, which needs the ``np.float`` that NumPy took away."""
    np.float = float
    try:
        from lvis import LVIS, LVISEval, LVISResults

        path = folder / "lvis_gt.json"
        path.write_text(json.dumps(document))
        truth = LVIS(str(path))
        found = LVISResults(truth, as_detectron2_does(results, iou_type), max_dets=per_image)
        yield LVISEval(truth, found, iou_type)
    finally:
        del np.float
