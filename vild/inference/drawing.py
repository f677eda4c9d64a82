"""Draw detections on images, and arrange images side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image, ImageDraw

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
    labels = [label.replace("$", r"\$") for label in labels]  # matplotlib would read a formula between two
    if splits is None:
        colours = [_colour(c) for c in classes]
    else:
        colours = [COLOURS[splits[c]] for c in classes]
    scale = max(1.0, min(min_side / min(image.shape[:2]), LONGEST_SIDE * min_side / max(image.shape[:2])))
    visualizer = Visualizer(image, scale=scale, instance_mode=ColorMode.SEGMENTATION)
    drawn = visualizer.overlay_instances(
        boxes=found.pred_boxes,
        labels=labels,
        masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
        assigned_colors=colours,
        alpha=0.35,
    )
    return Image.fromarray(drawn.get_image())


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
