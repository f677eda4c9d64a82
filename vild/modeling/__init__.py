"""The detector. Importing this package registers its parts with Detectron2."""

from vild.modeling import backbone, rcnn, released, roi_heads, timm_backbone

__all__ = ["backbone", "rcnn", "released", "roi_heads", "timm_backbone"]
