"""ResNet and FPN with the padding of TensorFlow's "SAME" at strided windows: for an even size and stride 2, one pixel
on the right and below only. (Detectron2 pads both sides, which samples other pixels.)"""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicStem, build_resnet_backbone
from torch import Tensor, nn

PADDING = (0, 1, 0, 1)  # left, right, top, bottom


class ReleasedStem(BasicStem):
    """7x7 convolution (padded on both sides), then a 3x3 max-pool of stride 2, padded with -inf on one side."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.pad(F.relu_(self.conv1(x)), PADDING, value=float("-inf")), 3, stride=2)


class ReleasedP6(nn.Module):
    """P6: a strided convolution over P5 before its BatchNorm, without a ReLU."""

    num_levels, in_feature = 1, "p5"

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, kernel_size=3, stride=2)
        weight_init.c2_xavier_fill(self.conv)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(F.pad(x, PADDING))]


class ReleasedFPN(FPN):
    """Convolutions with biases, and one BatchNorm per level at the very end (none on the lateral convolutions)."""

    def __init__(self, bottom_up: nn.Module, in_features: list[str], out_channels: int, norm: str):
        super().__init__(bottom_up, in_features, out_channels, norm="", top_block=ReleasedP6(out_channels))
        self.norms = nn.ModuleDict({name: get_norm(norm, out_channels) for name in self._out_features})

    @property
    def size_divisibility(self) -> int:
        return 64  # every strided window then sees an even size

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self.norms[name](feature) for name, feature in super().forward(x).items()}


@BACKBONE_REGISTRY.register()
def build_released_resnet_fpn_backbone(cfg, input_shape):
    """Detectron2's ResNet with the released stem, and the released FPN: P2 to P6."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    resnet = cfg.MODEL.RESNETS
    bottom_up.stem = ReleasedStem(input_shape.channels, resnet.STEM_OUT_CHANNELS, resnet.NORM)
    bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
    return ReleasedFPN(bottom_up, cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM)
