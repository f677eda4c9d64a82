"""The quickstart's report: a short page, an image, and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_api
from tabulate import tabulate

from vild.data import datasets
from vild.inference.drawing import draw, side_by_side
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.files import write_image, write_json, write_text
from vild.utils.images import read_image


def table(rows: dict[str, dict[str, float | None]], columns: Sequence[str]) -> str:
    """A Markdown table of metrics, one decimal; "-" for what is not there."""
    cells = [
        [name, *("-" if values.get(c) is None else f"{values[c]:.1f}" for c in columns)]
        for name, values in rows.items()
    ]
    return tabulate(cells, headers=["", *(c.replace("bbox/", "box ").replace("segm/", "mask ") for c in columns)],
                    tablefmt="pipe", disable_numparse=True)  # fmt: skip


def ground_truth(record: dict) -> Instances:
    """A record's annotations as ``Instances``, to be drawn."""
    boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    result = Instances(
        (record["height"], record["width"]),
        pred_boxes=Boxes(boxes),
        pred_classes=torch.tensor([a["category_id"] for a in record["annotations"]], dtype=torch.int64),
    )
    if record["annotations"] and all(a.get("segmentation") for a in record["annotations"]):
        masks = [_mask(a["segmentation"], record) for a in record["annotations"]]
        result.pred_masks = torch.from_numpy(np.stack(masks))
    return result


def _mask(segmentation: list | dict, record: dict) -> np.ndarray:
    """bool [H, W] of polygons or RLE."""
    rle = segmentation
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        rle = mask_api.frPyObjects(segmentation, record["height"], record["width"])
        rle = mask_api.merge(rle) if isinstance(rle, list) else rle
    return mask_api.decode(rle).astype(bool)


def comparison(detectors: dict[str, OpenVocabularyDetector], name: str, count: int, threshold: float) -> Image.Image:
    """Scenes with novel objects: ground truth beside what each detector finds above a threshold.

    The scenes are the first ``count`` of the data set with two or more novel objects: not chosen by result.
    """
    classes = datasets.get_classes(name)
    rows = []
    for record in datasets.load_dicts(name):
        if sum(classes.splits[a["category_id"]] == "novel" for a in record["annotations"]) < 2:
            continue
        image = read_image(record["file_name"], "RGB")
        row = [draw(image, ground_truth(record), classes.names, classes.splits, 400)]
        for detector in detectors.values():
            found = detector(read_image(record["file_name"], detector.cfg.INPUT.FORMAT))
            found = found[found.scores >= threshold]
            row.append(draw(image, found, classes.names, classes.splits, 400))
        rows.append(row)
        if len(rows) == count:
            break
    return side_by_side(rows, ["ground truth", *detectors])


def write_report(folder: Path, document: dict, columns: Sequence[str], text: str, image: Image.Image) -> Path:
    """``report.json``, ``report.md`` and ``report.png`` in ``folder``; returns the page's path."""
    write_image(folder / "report.png", image)
    write_json(folder / "report.json", document)
    detectors = {k: v for k, v in document.items() if k not in ("gauges", "seconds")}
    gauges = {
        name: {k: v for k, v in values.items() if k in ("base", "novel")} for name, values in document["gauges"].items()
    }
    seconds = [[stage, f"{value:.0f}"] for stage, value in document["seconds"].items()]
    page = "\n\n".join(
        [
            "# ViLD on the built-in world",
            text,
            table(detectors, columns),
            "![ground truth, ViLD-text and ViLD; base names blue, novel names orange](report.png)",
            "Gauges on the same images (percent; the cosine as it is):",
            tabulate(
                [[name, *("-" if v is None else f"{v:.3g}" for v in (g["base"], g["novel"]))]
                 for name, g in gauges.items()],
                headers=["", "base", "novel"], tablefmt="pipe", disable_numparse=True,
            ),
            "Time, seconds (some stages ran side by side):",
            tabulate(seconds, headers=["stage", "s"], tablefmt="pipe", disable_numparse=True),
        ]
    )  # fmt: skip
    path = folder / "report.md"
    write_text(path, page + "\n")
    return path
