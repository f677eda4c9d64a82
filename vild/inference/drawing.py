"""Draw detections on images, and arrange images side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_api

COLOURS = {"base": (0.25, 0.55, 1.0), "novel": (1.0, 0.55, 0.1), "": (0.25, 0.8, 0.4)}
LONGEST_SIDE = 4  # in units of min_side: 3 x 3000 pixels would be enlarged to 480 x 480,000


def draw(
    image: np.ndarray,
    found: Instances,
    names: Sequence[str],
    splits: Sequence[str] | None = None,
    min_side: int = 480,
) -> Image.Image:
    """Draw boxes, masks, names and scores.

    Args:
        image: uint8 [H, W, 3], RGB.
        found: has ``pred_boxes``, ``pred_classes`` and, optionally, ``scores`` and ``pred_masks``.
        splits: "base", "novel" or "" per name, which selects the colour (None: a colour for each name).
        min_side: enlarge smaller images to this side, so that labels are readable, with the longer side at most
            LONGEST_SIDE times as long.
    """
    classes = found.pred_classes.tolist()
    scores = found.scores.tolist() if found.has("scores") else [None] * len(found)
    labels = [names[c] + ("" if s is None else f" {s:.2f}") for c, s in zip(classes, scores, strict=True)]
    if splits is None:
        colours = [_colour(c) for c in classes]
    else:
        colours = [COLOURS[splits[c]] for c in classes]
    scale = max(1.0, min(min_side / min(image.shape[:2]), LONGEST_SIDE * min_side / max(image.shape[:2])))
    masks = found.pred_masks.numpy() if found.has("pred_masks") else None
    if masks is not None and image.shape[1] == 2:  # Detectron2 takes arrays with two columns for polygons
        masks = [mask_api.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    visualizer = Visualizer(image, scale=scale, instance_mode=ColorMode.SEGMENTATION)
    drawn = visualizer.overlay_instances(
        boxes=found.pred_boxes,
        masks=masks,
        assigned_colors=colours,
        alpha=0.35,
    )
    canvas = Image.fromarray(drawn.get_image())
    _write_labels(canvas, (found.pred_boxes.tensor * scale).tolist(), labels, colours)
    return canvas


def _write_labels(
    canvas: Image.Image, boxes: Sequence[Sequence[float]], labels: Sequence[str], colours: Sequence[tuple]
) -> None:
    size = round(min(max(min(canvas.size) / 32, 11), 24))
    font = ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
    pen = ImageDraw.Draw(canvas)
    extents = [pen.textbbox((0, 0), label, font) for label in labels]
    sizes = [(right - left + 6, bottom - top + 4) for left, top, right, bottom in extents]
    for place, label, extent, colour in zip(
        place_labels(boxes, sizes, canvas.size), labels, extents, colours, strict=True
    ):
        pen.rectangle(place, fill=(20, 20, 20), outline=tuple(round(255 * part) for part in colour))
        pen.text((place[0] + 3 - extent[0], place[1] + 2 - extent[1]), label, fill="white", font=font)


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[float, float]], canvas: tuple[int, int]
) -> list[tuple[float, float, float, float]]:
    """Where to write a label of (width, height) for each box (xyxy): at a corner of it, within the canvas (width,
    height) and, where there is room, over no label before it."""
    taken: list[tuple[float, float, float, float]] = []
    for (x0, y0, x1, y1), (width, height) in zip(boxes, sizes, strict=True):
        places = []
        for y in (y0 - height, y1, y0, y1 - height):
            for x in (x0, x1 - width):
                left, top = max(min(x, canvas[0] - width - 1), 0), max(min(y, canvas[1] - height - 1), 0)
                places.append((left, top, left + width, top + height))
        taken.append(min(places, key=lambda place: sum(_overlap(place, other) for other in taken)))
    return taken


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _colour(index: int) -> tuple[float, float, float]:
    """A bright colour; successive indices are a golden ratio of the hue circle apart."""
    return colorsys.hsv_to_rgb((0.58 + index * 0.618034) % 1, 0.75, 1.0)


def side_by_side(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Arrange images of equal size in a grid with a title above each column."""
    width, height = rows[0][0].size
    band = 28
    sheet = Image.new("RGB", (width * len(titles), band + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((width * (column + 0.5), band / 2), title, fill="black", anchor="mm", font_size=20)
        for row, images in enumerate(rows):
            sheet.paste(images[column], (width * column, band + height * row))
    return sheet
