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
    from benchmarks.common import ratio

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        count = args.reference_images
        small = write_case(Path(folder), count, 300)
        for protocol, baseline, reference in (("coco", "pycocotools", pycocotools), ("lvis", "lvis-api", lvis_api)):
            mine, theirs = measure(ours, *small, protocol), measure(reference, *small)
            yield {
                "what": f"{protocol} box AP, {count} images", "baseline": baseline,
                **ratio(theirs[1], mine[1]),
                "baseline_GiB": theirs[2], "ours_GiB": mine[2], "baseline_AP": theirs[0], "ours_AP": mine[0],
            }  # fmt: skip
        large = write_case(Path(folder), args.num_images, 300, masks=args.masks)
        for iou_type in ("bbox", "segm")[: 1 + args.masks]:
            mine = measure(ours, *large, "lvis", iou_type)
            yield {"what": f"lvis {iou_type} AP, {args.num_images} images", "baseline": None, "ours_s": mine[1],
                   "ours_GiB": mine[2], "ours_AP": mine[0]}  # fmt: skip


def write_case(folder: Path, image_count: int, per_image: int, masks: bool = False, seed: int = 0) -> tuple[Path, Path]:
    """Write synthetic ground truth in LVIS's format (twelve boxes per image, classes by a power law) and results, which
    find each box once, moved a little, among noise up to ``per_image``. With ``masks``: rectangles. Returns both."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, CLASSES + 1) ** 0.8
    share /= share.sum()
    truth, results = folder / f"gt_{image_count}.json", folder / f"results_{image_count}.json"
    images, annotations = [], []
    with open(results, "w") as file:
        for image_id in range(1, image_count + 1):
            boxes, classes = _boxes(rng, 12), rng.choice(CLASSES, 12, p=share) + 1
            rows = zip(boxes.tolist(), classes.tolist(), strict=True)
            annotations += [
                {"id": len(annotations) + n, "image_id": image_id, "category_id": c, "bbox": b, "area": b[2] * b[3],
                 "iscrowd": 0, **({"segmentation": _rectangle(b)} if masks else {})} for n, (b, c) in enumerate(rows, 1)
            ]  # fmt: skip
            negative = rng.integers(1, CLASSES + 1, 6).tolist()
            images.append({"id": image_id, "height": SIZE[0], "width": SIZE[1], "file_name": f"{image_id}.jpg",
                           "neg_category_ids": [c for c in negative if c not in classes],
                           "not_exhaustive_category_ids": []})  # fmt: skip
            noise = per_image - 12
            found = np.concatenate([(boxes + rng.normal(0, 3, boxes.shape)).clip(1), _boxes(rng, noise)])
            names = np.concatenate([classes, rng.choice(CLASSES, noise, p=share) + 1])
            scores = np.concatenate([rng.uniform(0.3, 1, 12), rng.uniform(0, 0.7, noise)])
            for box, name, score in zip(found.tolist(), names.tolist(), scores.tolist(), strict=True):
                record = {"image_id": image_id, "category_id": name, "bbox": box, "score": score}
                if masks:
                    record["segmentation"] = _rectangle(box)
                file.write(("[\n" if file.tell() == 0 else ",\n") + json.dumps(record))
        file.write("\n]\n")
    categories = [{"id": c, "name": f"class {c}", "frequency": "fcr"[c % 3]} for c in range(1, CLASSES + 1)]
    truth.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return truth, results


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """xywh float64 [count, 4]."""
    from benchmarks.common import random_boxes

    boxes = random_boxes(rng, count, *SIZE, smallest=16)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _rectangle(box: list[float]) -> dict:
    rle = mask_api.frPyObjects(np.array([box]), *SIZE)[0]
    return {"size": list(SIZE), "counts": rle["counts"].decode()}


def ours(truth: Path, results: Path, protocol: str, iou_type: str = "bbox") -> float:
    """AP, computed as tools/evaluate.py does."""
    from vild.data import datasets
    from vild.data.annotations import check_annotations, read_json
    from vild.data.classes import make_classes, read_split
    from vild.evaluation.protocol import GroundTruth, evaluate
    from vild.evaluation.results import read_results

    document = read_json(truth)
    check_annotations(document, truth)
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
