"""Detect ground truth among proposals by comparing them with the full annotations of the same images.

A detector's boxes differ from the true ones by pixels in each of four coordinates; pasted ground truth is equal to file
precision. A novel box is *met* if a proposal equals it within ``EXACT`` in every coordinate. By chance, this
happens to about (EXACT / NEAR)^4 = 1e-8 of the boxes met within ``NEAR`` (an error density that is smooth over NEAR is
uniform in a four-dimensional cube), so a single hit among thousands is significant. Two causes of chance hits are
accounted for: coordinates clipped to the image's edge (only boxes clear of the edges are measured) and rounded
coordinates (EXACT becomes half a grid step, NEAR two). Ground truth perturbed by a pixel or more cannot be
distinguished from a good detector's boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor
from torchvision.ops import box_convert

from vild.data.datasets import Classes
from vild.data.provenance import CLEAN, LEAK, UNKNOWN

EXACT, NEAR = 0.01, 1.0  # pixels
CHANCE = 1e-3  # significance level: hits less probable than this by chance are a leak
GRIDS = (1.0, 0.5, 0.25, 0.2, 0.1, 0.05)  # common roundings, in pixels; finer ones are below EXACT
SAME_COUNT = 5  # minimum number of images for judging by numbers of proposals equal to those of annotated boxes


@dataclass(frozen=True)
class ImageTruth:
    """An image's annotated boxes, float64 [*, 4] xyxy, and its size in pixels."""

    base: Tensor
    novel: Tensor
    height: int
    width: int


@dataclass(frozen=True)
class Met:
    """How close proposals are to G annotated boxes: Chebyshev distance to the nearest proposal, float64 [G] pixels (inf
    without proposals), and largest IoU [G]."""

    distance: Tensor
    iou: Tensor


@dataclass(frozen=True)
class Measured:
    """Measurements over a data set.

    Attributes:
        novel, base: see :class:`Met`.
        grid: the step to which all proposals are rounded (0: not rounded).
        images: number of images with novel boxes.
        same_count: of these, the number with as many proposals as novel boxes, or as all boxes.
        varied: the number of proposals per image is not constant.
        outside: number of images with proposals that are not among the annotated ones.
    """

    novel: Met
    base: Met
    grid: float
    same_count: int
    images: int
    varied: bool
    outside: int = 0


def truth_by_image(document: dict, classes: Classes) -> dict[int, ImageTruth]:
    """The boxes of an annotation file (COCO or LVIS style) without crowds and empty boxes."""
    marks = dict(zip(classes.ids, classes.splits, strict=True))
    rows = {i["id"]: {"base": [], "novel": []} for i in document["images"]}
    for a in document["annotations"]:
        mark = marks.get(a["category_id"])
        if mark and min(a["bbox"][2:]) > 0 and not a.get("iscrowd", 0):
            rows[a["image_id"]][mark].append(a["bbox"])
    return {
        i["id"]: ImageTruth(xyxy(rows[i["id"]]["base"]), xyxy(rows[i["id"]]["novel"]), i["height"], i["width"])
        for i in document["images"]
    }


def xyxy(boxes: list[list[float]]) -> Tensor:
    """Boxes in xywh as corners, float64 [N, 4]."""
    return box_convert(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), "xywh", "xyxy")


def distances(truth: Tensor, found: Tensor) -> Tensor:
    """Distance (:class:`Met`) of each true box [G, 4] to the nearest of the boxes found [P, 4]: [G]."""
    if len(found) == 0:
        return torch.full((len(truth),), math.inf, dtype=torch.float64)
    return (truth[:, None] - found.double()[None]).abs().amax(2).amin(1)


def measure_boxes(found: Iterable[tuple[int, Tensor]], truth: dict[int, ImageTruth], edges: bool = False) -> Measured:
    """Compare boxes [N, 4] by image with the full annotations.

    Novel boxes equal to a base box are ignored; so are boxes at the image's edges unless ``edges`` (for boxes that are
    not clipped: annotations).
    """
    rows: dict[str, list] = {"novel": [], "base": []}
    grids, same_count, counts, outside = set(GRIDS), 0, [], 0
    for image_id, boxes in found:
        if image_id not in truth:
            outside += len(boxes) > 0
            continue
        t = truth[image_id]
        if len(t.novel):
            counts.append(len(boxes))
            same_count += len(boxes) in (len(t.novel), len(t.novel) + len(t.base))
        limit = torch.tensor([t.width, t.height] * 2) - 1
        for mark, mine in (("novel", t.novel[distances(t.novel, t.base) > EXACT]), ("base", t.base)):
            clear = mine if edges else mine[((mine >= 1) & (mine <= limit)).all(1)]
            iou = pairwise_iou(Boxes(clear.float()), Boxes(boxes.float()))
            rows[mark].append((distances(clear, boxes), iou.amax(1) if len(boxes) else iou.sum(1)))
        grids = {g for g in grids if ((boxes / g - (boxes / g).round()).abs() * g < 1e-3).all()}
    nothing = (torch.zeros(0), torch.zeros(0))
    met = {mark: Met(*(torch.cat(c) for c in zip(nothing, *row, strict=True))) for mark, row in rows.items()}
    return Measured(
        met["novel"], met["base"], max(grids, default=0.0), same_count, len(counts), len(set(counts)) > 1, outside
    )


def chance_of(hits: int, expected: float) -> float:
    """Upper bound (Chernoff) of the probability of at least ``hits`` for a Poisson variable of mean ``expected``."""
    if hits <= expected:
        return 1.0
    return math.exp(hits - expected - hits * math.log(hits / expected)) if expected > 0 else 0.0


def judge_boxes(m: Measured) -> tuple[str, str]:
    """Verdict and evidence on proposals: is ground truth of novel objects among them?"""
    total = len(m.novel.distance)
    beside = f"; {m.outside} of its images are not among those with full annotations" if m.outside else ""
    if m.images == 0:
        return UNKNOWN, f"none of its images has an annotated novel object{beside}"
    exact, near = max(EXACT, m.grid / 2), max(NEAR, 2 * m.grid)
    hits, around = (int((m.novel.distance <= limit).sum()) for limit in (exact, near))
    of_base = int((m.base.distance <= exact).sum())
    expected = around * (exact / near) ** 4
    chance = chance_of(hits, expected)
    iou_novel, iou_base = (int((met.iou >= 0.99).sum()) for met in (m.novel, m.base))
    evidence = (
        f"{hits} of {total} novel boxes clear of the edges met within {exact:g} px (base: {of_base} of "
        f"{len(m.base.distance)}), {expected:.2g} expected by chance (of {around} met within {near:g} px): probability "
        f"{chance:.1g}, a leak below {CHANCE:g}; IoU >= 0.99: {iou_novel} novel, {iou_base} base; "
        f"as many boxes as annotated in {m.same_count} of {m.images} images with novel objects"
    )
    if m.grid:
        evidence += f"; coordinates rounded to {m.grid:g} px"
    counted = m.varied and m.images >= SAME_COUNT and m.same_count >= 0.95 * m.images
    if chance < CHANCE or counted:
        return LEAK, evidence
    return (CLEAN if total and not beside else UNKNOWN), evidence + beside
