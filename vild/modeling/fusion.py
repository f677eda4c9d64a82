"""From logits to detections at test time. Pure functions.

Shapes: R proposals of one picture, C classes of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms


def text_scores(logits: Tensor) -> Tensor:
    """[R, C + 1] (background last) to [R, C]: softmax with the background, whose column is then dropped."""
    return logits.softmax(1)[:, :-1]


def image_scores(logits: Tensor) -> Tensor:
    """[R, C] to [R, C]: softmax over the vocabulary, no background."""
    return logits.softmax(1)


def ensemble_scores(text: Tensor, image: Tensor, novel: Tensor, weight: float = 2 / 3) -> Tensor:
    """Geometric mean of the two heads' scores, both [R, C] (eq. 5).

    text^weight * image^(1 - weight) on base classes, the exponents swapped where ``novel``, bool [C].
    """
    exponent = torch.where(novel, text.new_tensor(1 - weight), text.new_tensor(weight))
    return text**exponent * image ** (1 - exponent)


def best_detections(
    boxes: Tensor,
    scores: Tensor,
    score_threshold: float,
    nms_threshold: float,
    per_image: int,
    pre_nms: int = 20000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-class NMS over class-agnostic boxes, then the best ``per_image``.

    Only the best ``pre_nms`` (box, class) pairs enter NMS; the result is the same as long as ``per_image`` of
    them survive it.

    Args:
        boxes: [R, 4] xyxy.
        scores: [R, C].

    Returns:
        boxes [K, 4], scores [K], classes int64 [K], proposal indices int64 [K], by falling score.
    """
    flat = scores.flatten()
    order = (flat > score_threshold).nonzero()[:, 0]
    if len(order) > pre_nms:
        order = order[flat[order].topk(pre_nms).indices]
    rows, classes = order // scores.shape[1], order % scores.shape[1]
    keep = batched_nms(boxes[rows].float(), flat[order].float(), classes, nms_threshold)[:per_image]
    return boxes[rows[keep]], flat[order[keep]], classes[keep], rows[keep]
