"""Where the labels of boxes go: within the image, over no other label, and over as few other boxes as possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FARTHEST = 6  # times its height that a label is moved from its box
AWAY, COVERED = 0.5, 1.0  # costs: of a distance of a label's height, and of a label that covers other boxes


def place_labels(
    boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[float, float]], canvas: tuple[int, int]
) -> list[tuple[int, int, int, int] | None]:
    """Place a label of (width, height) for each box (xyxy), the first ones first: at its box or, if there is no room,
    near it. None: it would have no place on the canvas (width, height).

    Returns:
        xyxy in whole pixels, with both ends.
    """
    rectangles, taken, result = np.array(boxes, float).reshape(-1, 4), np.zeros((0, 4)), []
    for number, size in enumerate(sizes):
        width, height = map(round, size)
        limits = canvas[0] - 1 - width, canvas[1] - 1 - height
        if min(limits) < 0:
            result.append(None)
            continue
        box, others = rectangles[number], np.delete(rectangles, number, 0)
        for corners in (_at(box, width, height), _around(box, width, height)):
            corners = corners.round().clip(0, limits)
            places = np.hstack([corners, corners + np.array([width, height])])
            cost = np.arange(len(places)) * 0.05 if len(places) <= 12 else np.zeros(len(places))
            far = _distance(places, box) / height
            cost += AWAY * far + COVERED * _overlaps(places, others).sum(1) / (width * height)
            cost += COVERED * 0.5 * _overlaps(places, box[None])[:, 0] / (width * height)
            cost[(_overlaps(places, taken, 1) > 0).any(1) | (far > FARTHEST)] = np.inf
            best = int(cost.argmin())
            if np.isfinite(cost[best]):
                break
        if not np.isfinite(cost[best]):
            result.append(None)
            continue
        taken = np.concatenate([taken, places[best : best + 1]])
        result.append(tuple(map(int, places[best])))
    return result


def _at(box: np.ndarray, width: int, height: int) -> np.ndarray:
    """Left upper corners of a label at a box: above, below, within and beside it, the best first."""
    x0, y0, x1, y1 = box
    beside = [(x, y) for y in (y0 - height, y1, y0, y1 - height) for x in (x0, x1 - width)]
    return np.array([*beside, (x1, y0), (x0 - width, y0), (x1, y1 - height), (x0 - width, y1 - height)])


def _around(box: np.ndarray, width: int, height: int) -> np.ndarray:
    """Corners on a grid around a box."""
    x = np.arange(box[0] - width - FARTHEST * height, box[2] + FARTHEST * height + 1, max(height, 1))
    y = np.arange(box[1] - (FARTHEST + 1) * height, box[3] + FARTHEST * height + 1, max(height / 2, 1))
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def _overlaps(a: np.ndarray, b: np.ndarray, gap: int = 0) -> np.ndarray:
    """[A, B], the area that two rectangles share, each a having ``gap`` more pixels on every side."""
    low = np.maximum(a[:, None, :2] - gap, b[None, :, :2])
    high = np.minimum(a[:, None, 2:] + gap, b[None, :, 2:])
    return (high - low).clip(0).prod(2)


def _distance(a: np.ndarray, box: np.ndarray) -> np.ndarray:
    """[A], of the nearest points of each rectangle and the box."""
    gaps = np.maximum(box[:2] - a[:, 2:], a[:, :2] - box[2:]).clip(0)
    return np.hypot(gaps[:, 0], gaps[:, 1])
