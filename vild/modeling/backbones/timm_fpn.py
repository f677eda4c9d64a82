"""Any convolutional classifier of timm as the backbone (timm is a dependency of open_clip)."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import BatchNormAct2d, GroupNormAct, convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn

from vild.modeling.backbones import with_fpn
from vild.utils.errors import UserError

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TimmFeatures(Backbone):
    """A timm model without its head: images [N, C, H, W] to some of ``res2`` to ``res5``, named by stride as in a
    ResNet. Layers behind the last of them are dropped.

    Weights are random; published ones are loaded by MODEL.WEIGHTS (``vild/checkpoint/timm_weights.py``).

    Args:
        norm: what its BatchNorms become, see :func:`with_norm`.
    """

    def __init__(self, name: str, in_channels: int, norm: str, features: Sequence[str] = tuple(STRIDES)):
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"MODEL.VILD.TIMM_BACKBONE: timm has no model '{name}'")
        self.name = name
        with torch.device("meta"):
            known = timm.create_model(name, features_only=True).feature_info
        strides = known.reduction()
        if not {STRIDES[f] for f in features} <= set(strides):
            raise UserError(f"MODEL.VILD.TIMM_BACKBONE: '{name}' has features of strides {strides}, not 4, 8, 16, 32")
        published = timm.get_pretrained_cfg(name)
        if published is not None and published.fixed_input_size:  # Swin for example
            raise UserError(f"MODEL.VILD.TIMM_BACKBONE: '{name}' only takes images of one size")
        stages = [known.out_indices[strides.index(STRIDES[f])] for f in features]
        body = timm.create_model(name, features_only=True, in_chans=in_channels, out_indices=stages)
        if hasattr(body, "blocks"):  # the EfficientNet family would keep and run all stages
            body.blocks = body.blocks[: int(body.feature_info.module_name()[-1].split(".")[1]) + 1]
        self.channels = dict(zip(features, body.feature_info.channels(), strict=True))
        self.body = with_norm(body, norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.channels, self.body(x), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f: ShapeSpec(channels=c, stride=STRIDES[f]) for f, c in self.channels.items()}


def with_norm(body: nn.Module, norm: str) -> nn.Module:
    """A timm model whose BatchNorms stay ("BN") or become synchronised ("SyncBN"), constant ("FrozenBN", for weights
    trained with BatchNorm) or GroupNorms ("GN", for training from scratch or weights trained with them). Their weights
    are kept; other norms (ConvNeXt's LayerNorms) stay as they are."""
    changes = {
        "BN": lambda body: body,
        "SyncBN": convert_sync_batchnorm,
        "FrozenBN": freeze_batch_norm_2d,
        "GN": _group_norms,
    }
    if norm not in changes:
        raise UserError(f"MODEL.RESNETS.NORM: '{norm}' is not one of {', '.join(changes)} (a timm backbone)")
    return changes[norm](body)


def _group_norms(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.BatchNorm2d):
        for name, child in module.named_children():
            setattr(module, name, _group_norms(child))
        return module
    channels = module.num_features
    # 32 groups (Wu and He 2018), but at least 8 channels each: statistics of fewer say little in a narrow layer
    groups = next(g for g in range(max(1, min(32, channels // 8)), 0, -1) if channels % g == 0)
    if isinstance(module, BatchNormAct2d):
        norm = GroupNormAct(channels, groups)
        norm.drop, norm.act = module.drop, module.act
    else:
        norm = nn.GroupNorm(groups, channels)
    norm.load_state_dict({"weight": module.weight, "bias": module.bias})
    return norm


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape):
    """FPN over FPN.IN_FEATURES of MODEL.VILD.TIMM_BACKBONE, with one more level pooled from the last. RESNETS.NORM sets
    what the backbone's BatchNorms become."""
    features = cfg.MODEL.FPN.IN_FEATURES
    if not features or not set(features) <= set(STRIDES):
        raise UserError(f"MODEL.FPN.IN_FEATURES: {list(features)} are not some of {', '.join(STRIDES)}")
    body = TimmFeatures(cfg.MODEL.VILD.TIMM_BACKBONE, input_shape.channels, cfg.MODEL.RESNETS.NORM, features)
    return with_fpn(cfg, body, features)
