"""Detectron2's pooling and NMS as tensor operations that can be exported in one graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import batched_nms


@torch.library.custom_op("vild::nms_by_class", mutates_args=())
def nms_by_class(boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> Tensor:
    """NMS per class over the same boxes, as ONNX's NonMaxSuppression.

    Args:
        boxes: [R, 4] xyxy.
        scores: [C, R]; scores must exceed ``threshold``.
        limit: maximum number needed of each class.

    Returns:
        int64 [K, 2], class and box of the detections that are kept, in any order.
    """
    classes, rows = (scores > threshold).nonzero(as_tuple=True)
    keep = batched_nms(boxes[rows].double(), scores[classes, rows].double(), classes, iou)
    return torch.stack([classes, rows], 1)[keep]


def pool(pooler: ROIPooler, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """Detectron2's pooling of one image's boxes [R, 4] from a pyramid to [R + 1, F, S, S]. The last row belongs to no
    box and keeps batches from being empty, which the exporter and ONNX runtimes do not always support."""
    rois = F.pad(boxes, (1, 0, 0, 1))  # the image's index, 0, before each
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], rois)
    bounds = pooler.min_level, pooler.max_level
    levels = assign_boxes_to_levels([Boxes(rois[:, 1:])], *bounds, pooler.canonical_box_size, pooler.canonical_level)
    pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *pooler.output_size)
    for level, (x, align) in enumerate(zip(maps, pooler.level_poolers, strict=True)):
        here = (levels == level).nonzero()[:, 0]
        pooled = pooled.index_put((here,), align(x, rois[here]))
    return pooled


@nms_by_class.register_fake
def _(boxes, scores, iou, threshold, limit):
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 2), dtype=torch.int64)
