"""A small residual FPN for the built-in world, trained from scratch in minutes on a CPU."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem


@BACKBONE_REGISTRY.register()
def build_small_resnet_fpn_backbone(cfg, input_shape):
    """Two BasicBlocks per stage; widths double from RESNETS.RES2_OUT_CHANNELS; FPN over RESNETS.OUT_FEATURES."""
    norm, out_features = cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.OUT_FEATURES
    width = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    channels = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=channels, norm=norm)
    stages = []
    for index in range(max(int(f[3:]) for f in out_features) - 1):
        stride = 1 if index == 0 else 2
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                2,
                stride_per_block=[stride, 1],
                in_channels=channels,
                out_channels=width,
                norm=norm,
            )
        )
        channels, width = width, width * 2
    top_block = LastLevelMaxPool()
    top_block.in_feature = out_features[-1].replace("res", "p")  # the default is for four stages
    return FPN(
        bottom_up=ResNet(stem, stages, out_features=out_features),
        in_features=out_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
