"""Any convolutional classifier of timm as a student's backbone (open_clip brings timm)."""

from __future__ import annotations

import timm
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from timm.layers import convert_sync_batchnorm
from torch import Tensor

from vild.errors import UserError

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TimmFeatures(Backbone):
    """A timm model without its head: pictures [N, C, H, W] to ``res2`` to ``res5``, named as a ResNet's by stride.

    Its weights are random; those that timm publishes come as any others do, through MODEL.WEIGHTS.
    """

    def __init__(self, name: str, in_channels: int, sync_batch_norm: bool):
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"MODEL.VILD.TIMM_BACKBONE: timm has no model '{name}'")
        body = timm.create_model(name, pretrained=False, features_only=True, in_chans=in_channels)
        strides, channels = body.feature_info.reduction(), body.feature_info.channels()
        if not set(STRIDES.values()) <= set(strides):
            raise UserError(f"MODEL.VILD.TIMM_BACKBONE: '{name}' has features of strides {strides}, not 4, 8, 16, 32")
        self.body = convert_sync_batchnorm(body) if sync_batch_norm else body
        self.index = {f: strides.index(s) for f, s in STRIDES.items()}
        self.channels = {f: channels[i] for f, i in self.index.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        return {f: maps[i] for f, i in self.index.items()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f: ShapeSpec(channels=self.channels[f], stride=s) for f, s in STRIDES.items()}


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape):
    """FPN (P2 to P6) over MODEL.VILD.TIMM_BACKBONE; its BatchNorms are synchronised if RESNETS.NORM is SyncBN."""
    sync = cfg.MODEL.RESNETS.NORM == "SyncBN"
    return FPN(
        bottom_up=TimmFeatures(cfg.MODEL.VILD.TIMM_BACKBONE, input_shape.channels, sync),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
