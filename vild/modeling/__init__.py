"""The detector. Importing this package registers its parts with Detectron2; build it with ``build_model(cfg)`` from
here, so that they are registered."""

from detectron2.modeling import build_model

from vild.modeling import rcnn, released, roi_heads
from vild.modeling.backbones import small_resnet, timm_fpn

__all__ = ["build_model", "rcnn", "released", "roi_heads", "small_resnet", "timm_fpn"]
