"""A small residual FPN for the built-in world, trained from scratch in minutes on a CPU."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

from vild.modeling.backbones import with_fpn


@BACKBONE_REGISTRY.register()
def build_small_resnet_fpn_backbone(cfg, input_shape):
    """Two BasicBlocks per stage; widths double from RESNETS.RES2_OUT_CHANNELS; FPN over RESNETS.OUT_FEATURES."""
    norm, out_features = cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.OUT_FEATURES
    width = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    channels = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=channels, norm=norm)
    stages = []
    for index in range(max(int(f[3:]) for f in out_features) - 1):
        strides = [1 if index == 0 else 2, 1]
        stage = {"stride_per_block": strides, "in_channels": channels, "out_channels": width, "norm": norm}
        stages.append(ResNet.make_stage(BasicBlock, 2, **stage))
        channels, width = width, width * 2
    return with_fpn(cfg, ResNet(stem, stages, out_features=out_features), out_features)
