"""Examples: regions of images that stand for a class, with its word or instead of it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vild.inference.image_input import ImageInput, as_array
from vild.utils.errors import UserError
from vild.vocabulary.words import SEPARATORS, check_length

Box = Sequence[float]  # xyxy in pixels of the image (turned upright by its EXIF tag)
Examples = Mapping[str, Sequence[tuple[ImageInput, Box]]]  # of each name
FORM = re.compile(r"(.+):([^:,=]+),([^:,=]+),([^:,=]+),([^:,=]+)=(.*)", re.DOTALL)


def parse_examples(given: Sequence[str]) -> dict[str, list[tuple[str, Box]]]:
    """Parse "photo.jpg:10,20,80,90=kite" strings. UserError for another form, and as :func:`read_examples`."""
    found: dict[str, list[tuple[str, Box]]] = {}
    for text in given:
        parts = FORM.fullmatch(text)
        if parts is None:
            raise UserError(f"example '{text}': write IMAGE:X0,Y0,X1,Y1=NAME, for example photo.jpg:10,20,80,90=kite")
        path, *corners, name = parts.groups()
        found.setdefault(name.strip(), []).append((path, corners))
    read_examples(found)
    return found


def read_examples(examples: Examples) -> tuple[list[str], list[Tensor], Tensor]:
    """Read and check them.

    Returns:
        of N regions the names, the images, uint8 RGB [3, H, W], and the boxes, float32 [N, 4].

    Raises:
        UserError: a name without a region or that is not one name; an image that cannot be read; a box that has no
            area or is not within its image.
    """
    if not isinstance(examples, Mapping):
        raise UserError(f"examples: {examples!r:.60} is not a dict such as {{'kite': [('a.jpg', (10, 20, 80, 90))]}}")
    names, images, boxes = [], [], []
    for name, regions in examples.items():
        _check_name(name)
        if isinstance(regions, str) or not isinstance(regions, Sequence) or not regions:
            raise UserError(f"examples: '{name}' has no list of regions, (image, (x0, y0, x1, y1)) each")
        for region in regions:
            if not isinstance(region, Sequence) or isinstance(region, str) or len(region) != 2:
                raise UserError(f"examples: a region of '{name}' is not (image, (x0, y0, x1, y1))")
            image, box = region
            if isinstance(image, np.ndarray):
                raise UserError(f"examples: an image of '{name}' is an array; give a file, PIL image or RGB tensor")
            pixels = as_array(image, "RGB")
            where = f"example of '{name}'" + (f" in {image}" if isinstance(image, str | os.PathLike) else "")
            boxes.append(check_box(box, *pixels.shape[:2], where))
            images.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
            names.append(" ".join(name.split()))
    return names, images, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def check_box(box: Box, height: int, width: int, where: str) -> list[float]:
    """Its corners as numbers; UserError unless it has an area within the image."""
    try:
        corners = [float(value) for value in box]
    except (TypeError, ValueError):
        corners = []
    shown = ",".join(map(str, box))[:60] if isinstance(box, list | tuple) else str(box)[:60]
    if len(corners) != 4 or not all(map(math.isfinite, corners)):
        raise UserError(f"{where}: box {shown} is not four numbers X0,Y0,X1,Y1")
    x0, y0, x1, y1 = corners
    if x0 > x1 or y0 > y1:
        raise UserError(f"{where}: box {shown} has its corners in the wrong order: X0,Y0 is the upper left one")
    if x0 == x1 or y0 == y1:
        raise UserError(f"{where}: box {shown} has no area")
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise UserError(f"{where}: box {shown} is not within the image, which has {width} x {height} pixels")
    return corners


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise UserError("examples: one has no name")
    if "|" in name or SEPARATORS.search(name) or not name.isprintable():
        raise UserError(f"examples: {name!r} is not one name: leave out '|', ',' and ';'")
    check_length(name, "examples")
