"""Boxes whose last pixel belongs to them: from x1 to x2 they are x2 - x1 + 1 wide."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


def _grown(boxes: Tensor, by: int) -> Tensor:
    """xyxy [..., 4] with the lower right corner moved by so many pixels."""
    return boxes + boxes.new_tensor([0, 0, by, by])


class ReleasedBoxTransform(Box2BoxTransform):
    """Detectron2's box coding with the old widths, +1 in and -1 out. A decoded box may so be as thin as -1."""

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        return super().get_deltas(_grown(src_boxes, 1), _grown(target_boxes, 1))

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """[R, 4] and [R, 4] to [R, 4]."""
        return _grown(super().apply_deltas(deltas, _grown(boxes, 1)), -1)


def upright(boxes: Tensor) -> Tensor:
    """xyxy [R, 4] with the corners in order: where decoding left a box thinner than nothing, they are not.
    TensorFlow 1's NonMaxSuppressionV4 reads each box so."""
    return torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)


def clip(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """xyxy [..., 4] within the pixels of an image, the last of which is at size - 1."""
    height, width = image_size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width - 1, height - 1, width - 1, height - 1]))
