"""Recall of class-agnostic proposals, on base and novel objects."""

from __future__ import annotations

import itertools
import logging

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor
from torchvision.ops import box_iou

from vild.data import datasets
from vild.data.unreadable import REASON, gather_unreadable
from vild.evaluation.evaluator import IMAGES, as_table, ground_truth_boxes

logger = logging.getLogger(__name__)

RECALL_LIMITS = (100, 300, 1000)


class ProposalRecallEvaluator(DatasetEvaluator):
    """Recall of proposals on base and novel ground truth: AR@100, 300 and 1000 (IoU 0.5 to 0.95), and recall at
    IoU 0.5 of the top ``per_image``, those that are distilled."""

    def __init__(self, name: str, per_image: int):
        self.name, self.per_image = name, per_image
        self.classes = datasets.get_classes(name)
        self.truth = ground_truth_boxes(name)
        self.reset()

    def reset(self):
        self.rows: list[tuple[int, tuple[float, ...]]] = []
        self.unreadable: dict[str, str] = {}

    def process(self, inputs, outputs):
        for given, output in zip(inputs, outputs, strict=True):
            self.unreadable |= given.get(REASON, {})
            boxes = output["proposals"].proposal_boxes.tensor.cpu()
            self.add(given["image_id"], boxes[:0] if REASON in given else boxes)

    def add(self, image_id: int, proposals: Tensor) -> None:
        """Add an image's proposals, [N, 4] xyxy, sorted by descending score."""
        boxes, classes = self.truth[image_id]
        overlaps = [best_overlaps(boxes, proposals[:limit]).tolist() for limit in RECALL_LIMITS]
        hits = covered(boxes, proposals[: self.per_image], 0.5).tolist()
        self.rows += zip(classes, zip(*overlaps, hits, strict=True), strict=True)

    def evaluate(self):
        comm.synchronize()
        rows = list(itertools.chain.from_iterable(comm.gather(self.rows, dst=0)))
        unreadable = gather_unreadable(self.unreadable, self.name, None)
        if not comm.is_main_process():
            return {}
        result = {}
        for mark in ("base", "novel"):
            found = torch.tensor([row for c, row in rows if self.classes.splits[c] == mark])
            *overlaps, hits = found.reshape(-1, len(RECALL_LIMITS) + 1).T
            for limit, column in zip(RECALL_LIMITS, overlaps, strict=True):
                result[f"AR@{limit}_{mark}"] = average_recall(column)
            result[f"recall50@{self.per_image}_{mark}"] = 100 * float(hits.mean())
        logger.info("%s\n%s", self.name, as_table({"proposals": result}))
        return {"proposals": result} | ({IMAGES: {REASON: float(unreadable)}} if unreadable else {})


def best_overlaps(boxes: Tensor, proposals: Tensor) -> Tensor:
    """IoU of each ground-truth box with its proposal, one-to-one: the pair with the highest IoU is matched first, then
    the next of what is left (as Detectron2 computes proposal recall).

    Args:
        boxes: [G, 4] xyxy.
        proposals: [N, 4] xyxy.

    Returns:
        float32 [G]; 0 for an unmatched box.
    """
    result = torch.zeros(len(boxes))
    overlaps = box_iou(boxes, proposals)
    for _ in range(min(overlaps.shape)):
        box, proposal = divmod(int(overlaps.argmax()), len(proposals))
        result[box] = overlaps[box, proposal].clamp(min=0)
        overlaps[box] = overlaps[:, proposal] = -1
    return result


def average_recall(overlaps: Tensor) -> float:
    """Recall in percent, mean over the IoU thresholds 0.5, 0.55 ... 0.95; NaN without a box.

    Args:
        overlaps: [G], of :func:`best_overlaps`.
    """
    thresholds = torch.linspace(0.5, 0.95, 10)
    return 100 * float((overlaps[:, None] >= thresholds - 1e-6).float().mean()) if len(overlaps) else float("nan")


def covered(boxes: Tensor, proposals: Tensor, threshold: float) -> Tensor:
    """bool [G]: which ground-truth boxes [G, 4] have a proposal [N, 4] with an IoU of at least ``threshold``."""
    if len(boxes) == 0 or len(proposals) == 0:
        return torch.zeros(len(boxes), dtype=torch.bool)
    return box_iou(boxes, proposals).max(1).values >= threshold
