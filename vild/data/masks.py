"""Masks in annotation files: polygons (lists of x, y, ...) or RLE ({"size": [H, W], "counts": a list or a string}).

pycocotools takes a missing mask for the box, and polygons of two points for boxes: who reads masks asks here first.
"""

from __future__ import annotations

from pycocotools import mask as mask_api


def has_mask(segmentation: dict | list | None) -> bool:
    """Is there a polygon with an area, or RLE that is not empty?"""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return any(counts[1::2]) if isinstance(counts, list) else bool(mask_api.area(segmentation))
    return bool(usable(segmentation))


def usable(segmentation: dict | list | None) -> dict | list | None:
    """A mask as Detectron2 reads it: RLE compressed, polygons without those that are a point or a line."""
    if isinstance(segmentation, list):
        return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0 and _has_area(p)]
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        rle = mask_api.frPyObjects(segmentation, *segmentation["size"])
        return {"size": segmentation["size"], "counts": rle["counts"].decode()}
    return segmentation


def _has_area(polygon: list[float]) -> bool:
    xs, ys = polygon[::2], polygon[1::2]
    if min(xs) == max(xs) or min(ys) == max(ys):
        return False
    if len(xs) > 4:  # longer ones are lines only along an axis, in practice
        return True
    return sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs))) != 0
