"""Draw detections on images, and arrange images side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from detectron2.structures import Instances
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vild.inference.labels import place_labels

COLOURS = {"base": (0.25, 0.55, 1.0), "novel": (1.0, 0.55, 0.1), "": (0.25, 0.8, 0.4)}
WRONG = (150, 20, 20)  # behind the label of a wrong detection
MIN_SIDE = 640
LONGEST_SIDE = 4  # in units of min_side: 3 x 3000 pixels would be enlarged to 640 x 640,000
GAP = 8  # pixels between images


def draw(
    image: np.ndarray,
    found: Instances,
    names: Sequence[str],
    splits: Sequence[str] | None = None,
    min_side: int = MIN_SIDE,
    right: Sequence[bool | None] | None = None,
) -> Image.Image:
    """Draw boxes, masks, names and scores. A label for which there is no room is left out.

    Args:
        image: uint8 [H, W, 3], RGB.
        found: has ``pred_boxes``, ``pred_classes`` and, optionally, ``scores`` and ``pred_masks``.
        splits: "base", "novel" or "" per name, which selects the colour (None: a colour for each name).
        min_side: enlarge smaller images to this side, so that labels are readable, with the longer side at most
            LONGEST_SIDE times as long.
        right: mark each detection as right (✓), wrong (✗) or neither (None).
    """
    scale = max(1.0, min(min_side / min(image.shape[:2]), LONGEST_SIDE * min_side / max(image.shape[:2])))
    canvas = Image.fromarray(image)
    canvas = canvas.resize([round(scale * side) for side in canvas.size], Image.Resampling.BICUBIC)
    classes = found.pred_classes.tolist()
    scores = found.scores.tolist() if found.has("scores") else [None] * len(found)
    marks = [{True: "✓ ", False: "✗ ", None: ""}[good] for good in right or [None] * len(found)]
    labels = [mark + names[c] + ("" if s is None else f" {s:.2f}")
              for c, s, mark in zip(classes, scores, marks, strict=True)]  # fmt: skip
    colours = [_bytes(_colour(c) if splits is None else COLOURS[splits[c]]) for c in classes]
    boxes = (found.pred_boxes.tensor * scale).tolist()
    line = max(2, round(min(canvas.size) / 180))
    if found.has("pred_masks"):
        for mask, colour in zip(found.pred_masks.numpy(), colours, strict=True):
            _fill(canvas, mask, colour)
    pen = ImageDraw.Draw(canvas)
    for box, colour in reversed([*zip(boxes, colours, strict=True)]):  # the best on top
        pen.rectangle(box, outline=colour, width=line)
    fills = [WRONG if mark == "✗ " else (20, 20, 20) for mark in marks]
    _write_labels(canvas, boxes, labels, colours, fills)
    return canvas


def _fill(canvas: Image.Image, mask: np.ndarray, colour: tuple[int, ...]) -> None:
    """Tint a mask [H, W] of the image, with an outline."""
    mask = Image.fromarray(mask.astype(np.uint8) * 255).resize(canvas.size, Image.Resampling.BILINEAR)
    mask = mask.point(lambda value: 255 * (value > 127))
    if (extent := mask.getbbox()) is None:
        return
    mask = mask.crop(extent)
    inner = mask.filter(ImageFilter.MinFilter(3))
    canvas.paste(colour, extent[:2], mask.point(lambda value: value * 0.3))
    canvas.paste(colour, extent[:2], Image.fromarray(np.asarray(mask) - np.asarray(inner)))


def _write_labels(canvas: Image.Image, boxes, labels: Sequence[str], colours, fills) -> None:
    font = _font(round(min(max(min(canvas.size) / 27, 12), 24)))
    pen = ImageDraw.Draw(canvas)
    labels = [_fitting(label, font, canvas.width - 8) for label in labels]
    extents = [pen.textbbox((0, 0), label, font) for label in labels]
    sizes = [(right - left + 7, bottom - top + 6) for left, top, right, bottom in extents]
    places = place_labels(boxes, sizes, canvas.size)
    for box, place, colour in zip(boxes, places, colours, strict=True):
        if place is not None:  # a line from a label to its box, of no length where they touch
            start = [min(max(place[i], box[i]), box[i + 2]) for i in (0, 1)]
            pen.line([*start, *(min(max(start[i], place[i]), place[i + 2]) for i in (0, 1))], fill=colour, width=2)
    for place, label, extent, colour, fill in zip(places, labels, extents, colours, fills, strict=True):
        if place is not None:
            pen.rectangle(place, fill=fill, outline=colour)
            pen.text((place[0] + 4 - extent[0], place[1] + 3 - extent[1]), label, fill="white", font=font)


def _fitting(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The label on one line, its end replaced by "…" where it would be wider."""
    label = " ".join(label.split())
    if font.getlength(label) <= width:
        return label
    count = next((n for n in range(len(label) - 1, 0, -1) if font.getlength(label[:n] + "…") <= width), 0)
    return label[:count] + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def _colour(index: int) -> tuple[float, float, float]:
    """A bright colour; successive indices are a golden ratio of the hue circle apart."""
    return colorsys.hsv_to_rgb((0.58 + index * 0.618034) % 1, 0.75, 1.0)


def _bytes(colour: Sequence[float]) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colour)


def side_by_side(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], captions: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Arrange images of equal size in a grid with a title above each column and, optionally, a caption below each."""
    width, height = rows[0][0].size
    band, foot = 36, 28 if captions else 0
    across, down = width + GAP, height + foot + GAP
    sheet = Image.new("RGB", (across * len(titles) - GAP, band + down * len(rows) - GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((across * column + width / 2, band / 2), title, fill="black", anchor="mm", font=_font(20))
        for row, images in enumerate(rows):
            sheet.paste(images[column], (across * column, band + down * row))
            if captions:
                middle = (across * column + width / 2, band + down * row + height + foot / 2)
                pen.text(middle, captions[row][column], fill=(60, 60, 60), anchor="mm", font=_font(16))
    return sheet
