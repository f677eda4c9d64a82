"""Masks in annotation files: polygons (lists of x, y, ...) or RLE ({"size": [H, W], "counts": a list or a string}).

pycocotools takes a missing mask for the box, and polygons of two points for boxes: who reads masks asks here first.
"""

from __future__ import annotations

from pycocotools import mask as mask_api


def has_mask(segmentation: dict | list | None) -> bool:
    """Is there a polygon of at least three points, or RLE that is not empty?"""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return any(counts[1::2]) if isinstance(counts, list) else bool(mask_api.area(segmentation))
    return bool(usable(segmentation))


def usable(segmentation: dict | list | None) -> dict | list | None:
    """A mask as Detectron2 reads it: RLE compressed, polygons without those of fewer than three points."""
    if isinstance(segmentation, list):
        return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        rle = mask_api.frPyObjects(segmentation, *segmentation["size"])
        return {"size": segmentation["size"], "counts": rle["counts"].decode()}
    return segmentation
