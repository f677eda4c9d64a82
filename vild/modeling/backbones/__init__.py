"""Backbones beside Detectron2's own, each with an FPN."""

from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool


def with_fpn(cfg, bottom_up: Backbone, features: list[str]) -> FPN:
    """An FPN over these features, with one more level pooled from the last."""
    top_block = LastLevelMaxPool()
    top_block.in_feature = features[-1].replace("res", "p")  # the default is for four stages
    return FPN(bottom_up, features, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM, top_block, cfg.MODEL.FPN.FUSE_TYPE)
