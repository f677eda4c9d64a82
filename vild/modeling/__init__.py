"""The detector. Importing this package registers its parts with Detectron2."""

from vild.modeling import backbone, rcnn, roi_heads

__all__ = ["backbone", "rcnn", "roi_heads"]
