"""Detectron2's RoI pooler with box coordinates in float32."""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn


class PreciseROIAlign(ROIAlign):
    """RoIAlign of half-precision features at float32 boxes. Detectron2's rounds the boxes to the features' type: beyond
    512 pixels to 0.5 pixels in float16, to 4 pixels in bfloat16."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Features [N, C, H, W] and rois [R, 5] to [R, C, h, w] of the features' type, computed in float32."""
        wide = torch.promote_types(input.dtype, torch.float32)
        return super().forward(input.to(wide), rois).to(input.dtype)


def make_precise(pooler: ROIPooler) -> ROIPooler:
    """Replace a pooler's RoIAligns, in place. They have no weights."""
    pooler.level_poolers = nn.ModuleList(
        PreciseROIAlign(each.output_size, each.spatial_scale, each.sampling_ratio, each.aligned)
        if isinstance(each, ROIAlign) else each for each in pooler.level_poolers
    )  # fmt: skip
    return pooler
