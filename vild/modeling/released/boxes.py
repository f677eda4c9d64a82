"""Boxes that include their last pixel: from x1 to x2 the width is x2 - x1 + 1."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor


def _grown(boxes: Tensor, by: int) -> Tensor:
    """xyxy [..., 4] with the lower right corner moved by ``by`` pixels."""
    return boxes + boxes.new_tensor([0, 0, by, by])


class ReleasedBoxTransform(Box2BoxTransform):
    """Detectron2's box coding with inclusive widths: +1 before, -1 after. A decoded side can be as small as -1."""

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        return super().get_deltas(_grown(src_boxes, 1), _grown(target_boxes, 1))

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """[R, 4] and [R, 4] to [R, 4]."""
        return _grown(super().apply_deltas(deltas, _grown(boxes, 1)), -1)


def upright(boxes: Tensor) -> Tensor:
    """xyxy [R, 4] with the corners in order, also where decoding left a negative side. TensorFlow 1's
    NonMaxSuppressionV4 reads boxes like this."""
    return torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)


def clip(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """xyxy [..., 4] clipped to the pixels of an image, the last one at size - 1."""
    height, width = image_size
    return boxes.clamp(min=0).minimum(boxes.new_tensor([width - 1, height - 1, width - 1, height - 1]))
