"""Evaluation, from the files to AP, beside pycocotools and lvis-api.

Synthetic results of LVIS's size: 300 detections per image, 1,203 classes. Each program runs in a process of its own;
both sides on --reference-images, ours alone on --num-images (the memory of the others grows with the images). The rows
show the AP of each program: they must agree."""

# Each program's process imports this module: what the other programs do not need is imported in functions

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

CLASSES = 1203
SIZE = (480, 640)  # height, width


def run(args: argparse.Namespace) -> Iterator[dict]:
    from benchmarks.common import row

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        count = args.reference_images
        small = write_case(Path(folder), count, 300)
        for protocol, baseline, reference in (("coco", "pycocotools", pycocotools), ("lvis", "lvis-api", lvis_api)):
            mine, theirs = measure(ours, *small, protocol), measure(reference, *small)
            measures = {"baseline_GiB": theirs[2], "ours_GiB": mine[2], "baseline_AP": theirs[0], "ours_AP": mine[0]}
            yield row(f"{protocol} box AP, {count} images", baseline, theirs[1], mine[1], **measures)
        large = write_case(Path(folder), args.num_images, 300, masks=args.masks)
        for iou_type in ("bbox", "segm")[: 1 + args.masks]:
            ap, seconds, gibibytes = measure(ours, *large, "lvis", iou_type)
            what = f"lvis {iou_type} AP, {args.num_images} images"
            yield {"what": what, "baseline": None, "ours_s": seconds, "ours_GiB": gibibytes, "ours_AP": ap}


def write_case(folder: Path, image_count: int, per_image: int, masks: bool = False, seed: int = 0) -> tuple[Path, Path]:
    """Write synthetic ground truth in LVIS's format (twelve boxes per image, classes by a power law) and results, which
    find each box once, moved a little, among noise up to ``per_image``. With ``masks``: rectangles. Returns both."""
    from benchmarks.common import random_boxes

    rng, frequency = np.random.default_rng(seed), 1 / np.arange(1, CLASSES + 1) ** 0.8
    truth, results = folder / f"gt_{image_count}.json", folder / f"results_{image_count}.json"
    images, annotations = [], []

    def records(image_id: int, boxes: np.ndarray, names: np.ndarray) -> Iterator[dict]:
        for box, name in zip(boxes.tolist(), names.tolist(), strict=True):
            mask = {"segmentation": _rectangle(box)} if masks else {}
            yield {"image_id": image_id, "category_id": name, "bbox": box, **mask}

    with open(results, "w") as file:
        for image_id in range(1, image_count + 1):
            names = rng.choice(CLASSES, per_image, p=frequency / frequency.sum()) + 1
            boxes, scores = random_boxes(rng, per_image, *SIZE, smallest=16), rng.uniform(0, 0.7, per_image)
            boxes[:, 2:] -= boxes[:, :2]  # xywh
            for record in records(image_id, boxes[:12], names[:12]):
                _, _, width, height = record["bbox"]
                annotations.append({**record, "id": len(annotations) + 1, "area": width * height, "iscrowd": 0})
            negative = np.setdiff1d(rng.integers(1, CLASSES + 1, 6), names[:12]).tolist()
            image = {"id": image_id, "height": SIZE[0], "width": SIZE[1], "file_name": f"{image_id}.jpg"}
            images.append({**image, "neg_category_ids": negative, "not_exhaustive_category_ids": []})
            boxes[:12] = (boxes[:12] + rng.normal(0, 3, (12, 4))).clip(1)
            scores[:12] = rng.uniform(0.3, 1, 12)
            found = [{**r, "score": s} for r, s in zip(records(image_id, boxes, names), scores.tolist(), strict=True)]
            file.write("[\n" if image_id == 1 else ",\n")
            file.write(",\n".join(map(json.dumps, found)))
        file.write("\n]\n")
    categories = [{"id": c, "name": f"class {c}", "frequency": "fcr"[c % 3]} for c in range(1, CLASSES + 1)]
    truth.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return truth, results


def _rectangle(box: list[float]) -> dict:
    rle = mask_api.frPyObjects(np.array([box]), *SIZE)[0]
    return {"size": list(SIZE), "counts": rle["counts"].decode()}


def ours(truth: Path, results: Path, protocol: str, iou_type: str = "bbox") -> float:
    """AP, computed as tools/evaluate.py does."""
    from vild.data import datasets
    from vild.data.annotations import load_annotations
    from vild.data.classes import make_classes, read_split
    from vild.evaluation.protocol import GroundTruth, evaluate
    from vild.evaluation.results import read_results

    document = load_annotations(truth)
    case = GroundTruth(document, make_classes(document["categories"], read_split("lvis", datasets.root())), protocol)
    found = read_results(results, case.sizes, set(case.classes.ids), masks=iou_type == "segm")
    return evaluate(case, found, (iou_type,)).metrics[iou_type]["AP"]


def pycocotools(truth: Path, results: Path) -> float:
    """Box AP by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = COCO(str(truth))
    run = COCOeval(data, data.loadRes(str(results)), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return 100 * run.stats[0]


def lvis_api(truth: Path, results: Path) -> float:
    """Box AP by lvis-api 0.5.3, with the ``np.float`` that it needs."""
    np.float = float
    from lvis import LVIS, LVISEval, LVISResults

    data = LVIS(str(truth))
    run = LVISEval(data, LVISResults(data, str(results)), "bbox")
    run.run()
    return 100 * run.results["AP"]


def measure(function: Callable[..., float], *args: object) -> tuple[float, float, float]:
    """Run a function in a process of its own: (its value, seconds, peak memory in GiB, the interpreter included)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(timed, (function, args))


def timed(function: Callable[..., float], args: tuple) -> tuple[float, float, float]:
    start = time.perf_counter()
    value = function(*args)
    return value, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
