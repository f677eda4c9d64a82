"""Recall of proposals, against Detectron2's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, Instances

from vild.data import datasets
from vild.evaluation.evaluator import ground_truth_boxes
from vild.evaluation.recall import ProposalRecallEvaluator, average_recall, best_overlaps, covered


def test_proposal_recall(world):
    evaluator = ProposalRecallEvaluator("glyphs_val", per_image=100)
    classes = datasets.get_classes("glyphs_val")
    for image_id, (boxes, labels) in ground_truth_boxes("glyphs_val").items():
        novel = boxes[[classes.splits[c] == "novel" for c in labels]]
        instances = Instances((128, 128), proposal_boxes=Boxes(novel))
        evaluator.process([{"image_id": image_id}], [{"proposals": instances}])
    values = evaluator.evaluate()["proposals"]
    assert values["recall50@100_novel"] == values["AR@100_novel"] == 100 and values["recall50@100_base"] < 30


def test_average_recall_is_detectron2s(world):
    """Against the function behind Detectron2's AR, over several images."""
    generator = torch.Generator().manual_seed(0)
    images, annotations, mine = [], {}, []
    for image_id in range(20):
        boxes = torch.rand(image_id % 7, 4, generator=generator) * 60
        boxes[:, 2:] += boxes[:, :2] + 4
        noise = torch.rand(30, 4, generator=generator) * 60
        noise[:, 2:] += noise[:, :2] + 4
        proposals = torch.cat([boxes + torch.randn(boxes.shape, generator=generator), noise])
        logits = torch.linspace(5, -5, len(proposals))
        instances = Instances((128, 128), proposal_boxes=Boxes(proposals), objectness_logits=logits)
        images.append({"image_id": image_id, "proposals": instances})
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        annotations[image_id] = [{"bbox": b, "iscrowd": 0, "area": b[2] * b[3]} for b in xywh]
        mine.append(best_overlaps(boxes, proposals[:12]))
    api = SimpleNamespace(getAnnIds=lambda imgIds: imgIds, loadAnns=lambda i: annotations[i])
    expected = _evaluate_box_proposals(images, api, limit=12)["ar"]
    assert 20 < 100 * expected < 90
    assert average_recall(torch.cat(mine)) == pytest.approx(100 * float(expected), abs=1e-4)
    assert np.isnan(average_recall(torch.zeros(0)))


def test_a_proposal_finds_one_box_only():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    assert best_overlaps(boxes, boxes[:1]).tolist() == [1, 0]
    assert covered(boxes, boxes[:1], 0.5).tolist() == [True, True]
