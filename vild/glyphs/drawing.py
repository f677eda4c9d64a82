"""The built-in world ("Glyphs"): images of pictographs, so that everything runs on a fresh machine.

``glyphs.json`` defines the classes: name, synonyms, LVIS frequency, and code points in the DejaVu Sans font that
matplotlib ships. Frequent and common classes are base, rare ones novel. A *scene* has several objects that vary in
colour, texture, rotation and scale, with occlusion and clutter. A *captioned image* has one object; the teacher is
trained on these, as CLIP was trained on captions of everything, without boxes.

Pure functions of a seed, without Detectron2 and torch.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SCENE_SIZE = 128
CAPTIONED_SIZE = 80
FILLS = ("flat", "flat", "gradient", "stripes")
VAL_ONLY_FILLS = ("dots", "rings")  # no training scene has these
SAMPLING_WEIGHT = {"f": 3.0, "c": 2.0, "r": 2.0}  # rare: never annotated, not seldom drawn


@dataclass(frozen=True)
class Glyph:
    """A class. ``frequency`` as in LVIS: f(requent), c(ommon) or r(are)."""

    name: str
    synonyms: tuple[str, ...]
    frequency: str
    code_points: tuple[str, ...]


@functools.cache
def table() -> tuple[Glyph, ...]:
    """All classes, in the order of their category ids (from 1)."""
    rows = json.loads((Path(__file__).parent / "glyphs.json").read_text())
    return tuple(Glyph(r["name"], tuple(r["synonyms"]), r["frequency"], tuple(r["code_points"])) for r in rows)


@dataclass(frozen=True)
class Placed:
    """An object in a scene: index into ``table()`` and visible mask, bool [H, W]."""

    index: int
    mask: np.ndarray

    @property
    def box(self) -> tuple[float, float, float, float]:
        """xyxy in absolute pixels around the visible mask."""
        return tuple(map(float, Image.fromarray(self.mask).getbbox()))


# --- drawing one object -----------------------------------------------------------------------------------


@functools.cache
def _silhouette_and_ink(code_point: str) -> tuple[Image.Image, Image.Image]:
    """A glyph's filled silhouette and its ink, both 8-bit masks, cropped to the ink."""
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), 96)
    ink = Image.new("L", (192, 192))
    ImageDraw.Draw(ink).text((96, 96), chr(int(code_point, 16)), fill=255, font=font, anchor="mm")
    ink = ink.crop(ink.getbbox())
    ink = Image.fromarray(np.pad(np.asarray(ink), 6))
    outside = ink.point(lambda v: 255 if v > 40 else 0).filter(ImageFilter.MaxFilter(5))
    ImageDraw.floodfill(outside, (0, 0), 128)
    silhouette = outside.point(lambda v: 0 if v == 128 else 255).filter(ImageFilter.MinFilter(3))
    return silhouette, ink


def _fill(rng: np.random.Generator, kind: str, size: tuple[int, int], colour: np.ndarray) -> np.ndarray:
    """A surface [h, w, 3] in two similar colours, float."""
    h, w = size
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 9)
    along = np.cos(angle) * x + np.sin(angle) * y
    other = np.clip(colour + rng.uniform(-40, 40, 3), 0, 255)
    if kind == "flat":
        t = np.zeros((h, w), np.float32)
    elif kind == "gradient":
        t = (along - along.min()) / (np.ptp(along) + 1e-6)
    elif kind == "stripes":
        t = (np.sin(2 * np.pi * along / period) > 0).astype(np.float32)
    elif kind == "dots":
        t = (np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period) > 0.2).astype(np.float32)
    else:  # rings
        t = (np.sin(2 * np.pi * np.hypot(x - w / 2, y - h / 2) / period) > 0).astype(np.float32)
    return colour + t[..., None] * (other - colour)


def _draw(canvas: np.ndarray, rng: np.random.Generator, glyph: Glyph, size: float, centre, fills) -> np.ndarray:
    """Paint an object around a point (x, y) onto ``canvas`` (float [H, W, 3], in place); its mask, bool [H, W]."""
    silhouette, ink = _silhouette_and_ink(str(rng.choice(glyph.code_points)))
    scale = size / max(silhouette.size)
    stretch = rng.uniform(0.95, 1.05)
    shape = max(6, round(silhouette.width * scale * stretch)), max(6, round(silhouette.height * scale))
    angle = rng.uniform(-10, 10)
    alphas = []
    for image in (silhouette, ink):
        image = image.resize(shape, Image.Resampling.BILINEAR)
        image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        alphas.append(np.asarray(image, np.float32) / 255)
    body, strokes = alphas
    h, w = body.shape
    top, left = round(centre[1] - h / 2), round(centre[0] - w / 2)
    ys = slice(max(top, 0), min(top + h, canvas.shape[0]))
    xs = slice(max(left, 0), min(left + w, canvas.shape[1]))
    mask = np.zeros(canvas.shape[:2], bool)
    if ys.start >= ys.stop or xs.start >= xs.stop:
        return mask
    inner = slice(ys.start - top, ys.stop - top), slice(xs.start - left, xs.stop - left)

    surface = _fill(rng, str(rng.choice(fills)), (h, w), rng.uniform(120, 255, 3))
    painted = surface + strokes[..., None] * (rng.uniform(0, 100, 3) - surface)  # dark ink on bright paper
    alpha = body[inner][..., None]
    canvas[ys, xs] += alpha * (painted[inner] - canvas[ys, xs])
    mask[ys, xs] = body[inner] > 0.5
    return mask


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A soft gradient with noise and clutter (lines, ellipses), float [size, size, 3]."""
    coarse = rng.uniform(40, 170, (3, 3, 1)) + rng.uniform(-30, 30, (3, 3, 3))
    coarse = np.clip(coarse, 0, 255).astype(np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 6)):
        x, y, dx, dy = *rng.uniform(0, size, 2), *rng.uniform(-size / 3, size / 3, 2)
        colour = tuple(int(c) for c in rng.uniform(40, 215, 3))
        width = int(rng.integers(1, 4))
        ends = [min(x, x + dx), min(y, y + dy), max(x, x + dx), max(y, y + dy)]
        kind = rng.integers(0, 4)
        if kind == 0:
            draw.line([x, y, x + dx, y + dy], fill=colour, width=width)
        elif kind == 1:
            draw.ellipse(ends, outline=colour, width=width)
        elif kind == 2:
            draw.arc(ends, *sorted(rng.uniform(0, 360, 2)), fill=colour, width=width)
        else:
            draw.rectangle(ends, outline=colour, width=width)
    return np.asarray(image, np.float32) + rng.normal(0, 6, (size, size, 3))


# --- images ---------------------------------------------------------------------------------------------


def scene(seed: int, index: int, *, novel: bool = True, uniform: bool = False, val_styles: bool = False):
    """A scene of at most 11 objects, none close to the centre of another.

    Args:
        seed, index: determine the image.
        novel: whether novel objects occur (without: a control, a detector that never saw novel regions).
        uniform: draw all classes equally often (for evaluation), not by ``SAMPLING_WEIGHT``.
        val_styles: also draw with ``VAL_ONLY_FILLS``.

    Returns:
        image uint8 [128, 128, 3] RGB, list of :class:`Placed` (those at least 40 % visible).
    """
    rng = np.random.default_rng([seed, index])
    glyphs = table()
    weight = np.array([1.0 if uniform else SAMPLING_WEIGHT[g.frequency] for g in glyphs])
    if not novel:
        weight *= [g.frequency != "r" for g in glyphs]
    fills = FILLS + VAL_ONLY_FILLS if val_styles else FILLS
    canvas = _background(rng, SCENE_SIZE)
    drawn: list[tuple[int, np.ndarray]] = []
    for _ in range(rng.integers(5, 12)):
        size = float(np.exp(rng.uniform(np.log(26), np.log(54))))
        which = int(rng.choice(len(glyphs), p=weight / weight.sum()))
        centre = tuple(rng.uniform(0.4 * size, SCENE_SIZE - 0.4 * size, 2))
        taken = [np.argwhere(mask).mean(0)[::-1] for _, mask in drawn]
        if any(np.hypot(*(np.array(centre) - t)) < 0.5 * size for t in taken):
            continue
        mask = _draw(canvas, rng, glyphs[which], size, centre, fills)
        if mask.any():
            drawn.append((which, mask))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    placed, covered = [], np.zeros(canvas.shape[:2], bool)
    for which, mask in reversed(drawn):  # later objects lie on top
        visible = mask & ~covered
        if visible.sum() >= 0.4 * mask.sum() and visible.sum() >= 40:
            placed.append(Placed(which, visible))
        covered |= mask
    return image, placed[::-1]


def captioned(seed: int, index: int, *, background: bool = False):
    """An image of one object (with ``background`` of none), like a web image with a caption.

    Other objects may reach into the corners, as in crops of proposals.

    Returns:
        image uint8 [80, 80, 3] RGB, index into ``table()`` (-1: no object), box xyxy of the object.
    """
    rng = np.random.default_rng([seed, 7, index])
    glyphs = table()
    canvas = _background(rng, CAPTIONED_SIZE)
    fills = FILLS + VAL_ONLY_FILLS
    middle = CAPTIONED_SIZE / 2
    for _ in range(rng.integers(0, 3)):
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(30, 42)
        centre = middle + reach * np.cos(angle), middle + reach * np.sin(angle)
        _draw(canvas, rng, glyphs[rng.integers(len(glyphs))], rng.uniform(18, 40), centre, fills)
    which, box = -1, (middle - 16.0, middle - 16.0, middle + 16.0, middle + 16.0)
    if not background:
        which = index % len(glyphs)
        size = float(np.exp(rng.uniform(np.log(24), np.log(54))))
        mask = _draw(canvas, rng, glyphs[which], size, (middle, middle), fills)
        box = Placed(which, mask).box
    return np.clip(canvas, 0, 255).astype(np.uint8), which, box
