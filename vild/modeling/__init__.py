"""The detector. Importing this package registers its parts with Detectron2."""

from vild.modeling import backbone, rcnn, roi_heads, timm_backbone

__all__ = ["backbone", "rcnn", "roi_heads", "timm_backbone"]
