"""Detectron2's boxes, anchors, pooling and NMS as tensor operations that can be exported in one graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
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


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """xyxy [R, 4] clipped to an image."""
    return torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], 2).flatten(1)


def grid_anchors(generator: nn.Module, level: int, x: Tensor) -> Tensor:
    """Detectron2's anchors [H * W * A, 4] of a feature map [1, F, H, W]."""
    stride = generator.strides[level]
    rows, columns = ((torch.arange(n) + generator.offset) * stride for n in x.shape[2:])
    shifts = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), 2).flatten(0, 1).repeat(1, 2)
    return (shifts[:, None] + list(generator.cell_anchors)[level]).flatten(0, 1)


def pool(pooler: ROIPooler, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """Detectron2's pooling of one image's boxes [R, 4] from a pyramid to [R + 1, F, S, S]. The last row belongs to no
    box and keeps batches from being empty, which the exporter and ONNX runtimes do not always support."""
    rois = F.pad(boxes, (1, 0, 0, 1))  # the image's index, 0, before each
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], rois)
    side = (rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt()
    levels = (pooler.canonical_level + torch.log2(side / pooler.canonical_box_size + 1e-8)).floor()
    levels = levels.clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *pooler.output_size)
    for level, (x, align) in enumerate(zip(maps, pooler.level_poolers, strict=True)):
        here = (levels == level).nonzero()[:, 0]
        pooled = pooled.index_put((here,), align(x, rois[here]))
    return pooled


@nms_by_class.register_fake
def _(boxes, scores, iou, threshold, limit):
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 2), dtype=torch.int64)
