"""Small annotation files in the official forms: all categories under their official names and ids, few images."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

COCO_NAMES = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
LVIS_NAMES = {c["id"]: c["name"] for c in LVIS_CATEGORIES}
LVIS_FREQUENCIES = {c["id"]: c["frequency"] for c in LVIS_CATEGORIES}


def annotation(number: int, image_id: int, category_id: int, **more) -> dict:
    box = [4.0, 6.5, 20.0, 10.25]
    polygon = [[4.0, 6.5, 24.0, 6.5, 24.0, 16.75]]
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": box, "area": 102.5,
        "segmentation": polygon, **more,
    }  # fmt: skip


def url(part: str, image_id: int) -> str:
    return f"http://images.cocodataset.org/{part}2017/{image_id:012}.jpg"


def lvis_document(images: dict[int, list[int]], part: str = "train", val2017: tuple[int, ...] = ()) -> dict:
    """LVIS v1's form: ``images`` gives each image id its annotations' category ids."""
    return {
        "info": {"version": "v1"},
        "images": [
            {
                "id": i, "height": 60, "width": 80, "coco_url": url("val" if i in val2017 else part, i),
                "neg_category_ids": [1], "not_exhaustive_category_ids": [],
            }
            for i in images
        ],
        "categories": [
            {"id": c["id"], "name": c["name"], "frequency": c["frequency"], "synonyms": c["synonyms"]}
            for c in LVIS_CATEGORIES
        ],
        "annotations": _annotations(images),
    }  # fmt: skip


def coco_document(images: dict[int, list[int]], part: str) -> dict:
    """COCO 2017's form; images carry file name and URL; the last annotation of the file is a crowd."""
    annotations = _annotations(images)
    annotations[-1].update(iscrowd=1, segmentation={"size": [60, 80], "counts": [100, 4700]})
    return {
        "info": {"year": 2017},
        "images": [
            {"id": i, "height": 60, "width": 80, "file_name": f"{i:012}.jpg", "coco_url": url(part, i)} for i in images
        ],
        "categories": [{"id": i, "name": n, "supercategory": "x"} for i, n in COCO_NAMES.items()],
        "annotations": [{"iscrowd": 0, **a} for a in annotations],
    }


def _annotations(images: dict[int, list[int]]) -> list[dict]:
    pairs = [(i, c) for i, categories in images.items() for c in categories]
    return [annotation(n, i, c) for n, (i, c) in enumerate(pairs, 1)]


def write(path: Path, document: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path
