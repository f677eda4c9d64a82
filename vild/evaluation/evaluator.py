"""Detectron2 evaluators: open-vocabulary AP (LVIS or COCO protocol, through hotcoco) and proposal recall."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os

import hotcoco
import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from tabulate import tabulate

from vild.data import datasets
from vild.evaluation.metrics import covered, summarize

logger = logging.getLogger(__name__)

METRICS_FILE = "vild_metrics.json"


class OpenVocabularyEvaluator(DatasetEvaluator):
    """AP over base, novel and all classes of a data set, by its protocol.

    Args:
        name: a data set of ``vild.data.datasets``.
        output_dir: where ``coco_instances_results.json`` goes (None: nowhere).
        masks: also evaluate masks.
    """

    def __init__(self, name: str, output_dir: str | None, masks: bool):
        self.name, self.output_dir = name, output_dir
        self.iou_types = ("bbox", "segm") if masks else ("bbox",)
        self.classes = datasets.get_classes(name)
        self.reset()

    def reset(self):
        self.results: list[dict] = []

    def process(self, inputs, outputs):
        for given, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            for result in instances_to_coco_json(instances, given["image_id"]):
                result["category_id"] = self.classes.ids[result["category_id"]]
                self.results.append(result)

    def evaluate(self):
        comm.synchronize()
        gathered = comm.gather(self.results, dst=0)
        if not comm.is_main_process():
            return {}
        results = list(itertools.chain.from_iterable(gathered))
        if self.output_dir:
            os.makedirs(self.output_dir, exist_ok=True)
            with open(os.path.join(self.output_dir, "coco_instances_results.json"), "w") as file:
                json.dump(results, file)
        return evaluate_results(self.name, results, self.iou_types)


def evaluate_results(name: str, results: list[dict], iou_types: tuple[str, ...]) -> dict:
    """Score COCO-form results against a data set: {"bbox": {metric: percent}, "segm": ...}; NaN for a
    group of which no class has ground truth."""
    entry, classes = datasets.get_entry(name), datasets.get_classes(name)
    truth = hotcoco.COCO(_without_other_classes(datasets.read_annotations(name), set(classes.ids)))
    metrics = {}
    for iou_type in iou_types:
        if results:
            lvis = entry.protocol == "lvis"
            run = hotcoco.COCOeval(truth, truth.load_res(results), iou_type, lvis_style=lvis)
            run.evaluate()
            run.accumulate()
            precision = np.asarray(run.eval["precision"])
            assert precision.shape[2] == len(classes.ids)
        else:
            logger.warning("%s: there is not a single detection", name)
            present = {a["category_id"] for a in datasets.read_annotations(name)["annotations"]}
            precision = np.where([i in present for i in classes.ids], 0.0, -1.0)[None, None, :, None, None]
        metrics[iou_type] = summarize(precision, classes.splits, classes.frequencies)
    logger.info("%s (%s protocol, %d classes)\n%s", name, entry.protocol, len(classes.ids), as_table(metrics))
    return metrics


def _without_other_classes(document: dict, ids: set[int]) -> dict:
    """The annotation document restricted to the classes of the split, as COCO form wants it."""
    return {
        **document,
        "categories": [c for c in document["categories"] if c["id"] in ids],
        "annotations": [{"iscrowd": 0, **a} for a in document["annotations"] if a["category_id"] in ids],
    }


def as_table(metrics: dict[str, dict[str, float]]) -> str:
    """Rows: box, mask; columns: metrics in percent; "-" where there is no ground truth."""
    columns = list(next(iter(metrics.values())))
    rows = [
        [iou_type, *("-" if math.isnan(m[c]) else f"{m[c]:.2f}" for c in columns)] for iou_type, m in metrics.items()
    ]
    return tabulate(rows, headers=["", *columns], tablefmt="pipe", stralign="right")


def write_metrics(output_dir: str, results: dict[str, dict]) -> str:
    """``inference/vild_metrics.json``: flat {"<data set>/<kind>/<metric>": percent or null}; returns its path."""
    flat = {
        f"{name}/{kind}/{metric}": None if math.isnan(value) else value
        for name, kinds in results.items()
        for kind, values in kinds.items()
        for metric, value in values.items()
    }
    path = os.path.join(output_dir, "inference", METRICS_FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "w") as file:
        json.dump(flat, file, indent=1)
    os.replace(f"{path}.tmp", path)
    return path


class ProposalRecallEvaluator(DatasetEvaluator):
    """Share of ground-truth boxes that a picture's best proposals cover at IoU 0.5, for base and novel."""

    def __init__(self, name: str, per_image: int):
        self.name, self.per_image = name, per_image
        self.classes = datasets.get_classes(name)
        self.truth = ground_truth_boxes(name)
        self.reset()

    def reset(self):
        self.hits: list[tuple[int, bool]] = []

    def process(self, inputs, outputs):
        for given, output in zip(inputs, outputs, strict=True):
            proposals = output["proposals"].proposal_boxes.tensor[: self.per_image].cpu()
            boxes, classes = self.truth[given["image_id"]]
            self.hits += zip(classes, covered(boxes, proposals, 0.5).tolist(), strict=True)

    def evaluate(self):
        comm.synchronize()
        hits = list(itertools.chain.from_iterable(comm.gather(self.hits, dst=0)))
        if not comm.is_main_process():
            return {}
        result = {}
        for mark in ("base", "novel"):
            values = [hit for c, hit in hits if self.classes.splits[c] == mark]
            key = f"recall50@{self.per_image}_{mark}"
            result[key] = 100 * sum(values) / len(values) if values else float("nan")
        logger.info("%s\n%s", self.name, as_table({"proposals": result}))
        return {"proposals": result}


def ground_truth_boxes(name: str) -> dict[int, tuple[torch.Tensor, list[int]]]:
    """image_id to boxes float32 [G, 4] xyxy and contiguous classes."""
    truth = {}
    for record in datasets.load_dicts(name):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        truth[record["image_id"]] = boxes, [a["category_id"] for a in record["annotations"]]
    return truth
