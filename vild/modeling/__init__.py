"""The detector. Detectron2 finds a config's parts by name in its registries; :func:`register_parts` fills them."""

from importlib import import_module

from detectron2 import modeling
from torch import nn

from vild.modeling import rcnn, roi_heads

# Modules that only some configs need, by the names that they register
OPTIONAL_PARTS = {
    "build_small_resnet_fpn_backbone": "backbones.small_resnet",
    "build_timm_fpn_backbone": "backbones.timm_fpn",
    "build_released_resnet_fpn_backbone": "released.backbone",
    "ReleasedRCNN": "released.rcnn",
    "ReleasedRPN": "released.rpn",
    "ReleasedRPNHead": "released.rpn",
    "ReleasedROIHeads": "released.roi_heads",
}


def register_parts(cfg) -> None:
    """Import the modules that register what the config names; Detectron2's builders need this before."""
    keys = cfg.MODEL
    for name in (
        keys.META_ARCHITECTURE, keys.BACKBONE.NAME, keys.PROPOSAL_GENERATOR.NAME, keys.RPN.HEAD_NAME,
        keys.ROI_HEADS.NAME,
    ):  # fmt: skip
        if name in OPTIONAL_PARTS:
            import_module(f"{__name__}.{OPTIONAL_PARTS[name]}")


def build_model(cfg) -> nn.Module:
    """Detectron2's ``build_model``, of any config of vild."""
    register_parts(cfg)
    return modeling.build_model(cfg)


def build_backbone(cfg, input_shape=None) -> modeling.Backbone:
    """Detectron2's ``build_backbone``, of any config of vild."""
    register_parts(cfg)
    return modeling.build_backbone(cfg, input_shape)


__all__ = ["build_backbone", "build_model", "rcnn", "register_parts", "roi_heads"]
