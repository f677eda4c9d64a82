"""Masks encoded on their device: byte for byte pycocotools' encoding."""

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api

from vild.evaluation import encode_masks as module
from vild.evaluation.encode_masks import encode_by_boundaries, encode_masks
from vild.evaluation.evaluator import coco_records


def by_pycocotools(masks):
    rles = [mask_api.encode(np.array(mask, order="F", dtype=np.uint8)) for mask in masks.numpy()]
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles]


def shapes(height, width):
    """Nothing, everything, single pixels at the ends, noise, stripes, blobs."""
    rng = np.random.default_rng(0)
    masks = np.zeros((12, height, width), bool)
    masks[1] = True
    masks[2, 0, 0] = masks[3, -1, -1] = masks[4, 0] = True
    masks[5, :, 0] = masks[6, :, ::2] = masks[7, ::2] = True
    for n in range(8, 10):
        masks[n] = rng.random((height, width)) < 0.5
    y, x = np.mgrid[:height, :width]
    masks[10] = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (height / 3) ** 2
    masks[11] = ~masks[10]
    return torch.from_numpy(masks)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (64, 3), (300, 211)])
@pytest.mark.parametrize("chunk", [1, 2**28])
def test_equals_pycocotools(size, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    masks = shapes(*size)
    expected = by_pycocotools(masks)
    assert encode_by_boundaries(masks) == expected and encode_masks(masks) == expected
    assert encode_by_boundaries(masks[:0]) == encode_masks(masks[:0]) == []


@pytest.mark.parametrize("encode", [encode_masks, encode_by_boundaries])
def test_records_equal_detectron2s(encode, monkeypatch):
    masks = shapes(20, 30)
    boxes = Boxes(torch.arange(48.0).view(12, 4))
    found = Instances((20, 30), pred_boxes=boxes, scores=torch.rand(12), pred_classes=torch.arange(12))
    monkeypatch.setattr("vild.evaluation.evaluator.encode_masks", encode)
    assert coco_records(found, 7) == instances_to_coco_json(found, 7)
    found.pred_masks = masks
    assert coco_records(found, 7) == instances_to_coco_json(found, 7) and found.has("pred_masks")
    assert coco_records(found[:0], 7) == []
