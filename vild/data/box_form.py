"""Are boxes what they are said to be, x, y, width, height in pixels? Files of corners or of relative coordinates have
the same form, and train and score badly without an error."""

from __future__ import annotations

import numpy as np

SAMPLE = 10_000  # boxes looked at, evenly spread over a file
EXPECTED = "x, y, width, height in pixels are expected"


def spread(count: int) -> slice:
    """Which of ``count`` boxes to look at."""
    return slice(0, count, max(1, count // SAMPLE))


def doubt(boxes: np.ndarray, sizes: np.ndarray) -> str:
    """Why some boxes are hardly xywh in pixels; "" if nothing speaks against it.

    Args:
        boxes: float64 [N, 4].
        sizes: [N, 2], height and width of each box's image.
    """
    if len(boxes) and (boxes[:, 2:] <= 1).all():
        looks = "they look like relative coordinates; " if (boxes <= 1).all() else ""
        return f"all boxes are at most a pixel wide and high, first {_shown(boxes[0])}: {looks}{EXPECTED}"
    limits = sizes[:, ::-1] + 1
    leaves = (boxes[:, :2] + boxes[:, 2:] > limits).any(1)
    if leaves.sum() * 2 <= len(boxes):
        return ""
    corners = (boxes[:, 2:] >= boxes[:, :2]).all() and (boxes[:, 2:] <= limits).all()
    looks = "they look like corners (x0, y0, x1, y1); " if corners else ""
    share = f"{leaves.sum()} of {len(boxes)} boxes reach more than a pixel beyond their image"
    return f"{share}, first {_shown(boxes[leaves][0])}: {looks}{EXPECTED}"


def _shown(box: np.ndarray) -> str:
    return f"[{', '.join(f'{v:g}' for v in box)}]"
