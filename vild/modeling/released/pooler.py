"""RoIAlign with one bilinear sample at the centre of each bin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import roi_align


def assign_levels(boxes: Tensor, lowest: int, highest: int) -> Tensor:
    """xyxy [R, 4] to the level that each is pooled from, int64 [R]: side 224 gives level 4, each doubling one more.

    Includes P6. Empty boxes are pooled from the lowest level, and so are those with one negative side, whose square
    root is NaN.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    level = (torch.log(side / 224) / math.log(2)).floor() + 4
    return level.nan_to_num(nan=lowest).clamp(lowest, highest).long()


class ReleasedPooler(nn.Module):
    """RoIAlign with one sample per bin, without Detectron2's half-pixel shift and without a minimum size.

    torchvision's ``aligned=True`` samples half a pixel of the feature map up and left of the released code, so boxes
    are moved by half a stride. ``aligned=False`` would widen boxes to at least one pixel.

    Args:
        output_size: bins per side.
        strides: of the feature maps, each twice the previous one.
    """

    def __init__(self, output_size: int, strides: Sequence[int]):
        super().__init__()
        self.output_size, self.strides = (output_size, output_size), tuple(strides)
        self.lowest, self.highest = int(math.log2(strides[0])), int(math.log2(strides[-1]))

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Feature maps [N, C, H_l, W_l] and the boxes of N images to [sum of R, C, output_size, output_size]."""
        return self.pool(x, convert_boxes_to_pooler_format(box_lists))

    def pool(self, x: list[Tensor], rois: Tensor) -> Tensor:
        """As :meth:`forward`, for rois [R, 5]: image, x1, y1, x2, y2."""
        levels = assign_levels(rois[:, 1:], self.lowest, self.highest)
        pooled = x[0].new_zeros(rois.shape[0], x[0].shape[1], *self.output_size)
        for level, (feature, stride) in enumerate(zip(x, self.strides, strict=True), self.lowest):
            here = (levels == level).nonzero()[:, 0]
            pooled = pooled.index_put((here,), self.pool_level(feature, rois[here], stride).to(pooled.dtype))
        return pooled

    def pool_level(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        """One level: rois [R, 5] to [R, C, output_size, output_size]."""
        moved = rois + rois.new_tensor([0, 1, 1, 1, 1]) * (stride / 2)
        # half precision would resolve the far corner of an image to half a pixel only
        return roi_align(feature.float(), moved, self.output_size, 1 / stride, sampling_ratio=1, aligned=True)
