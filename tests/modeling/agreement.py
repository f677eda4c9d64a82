"""Comparison with a reference in NumPy."""

import numpy as np


def agrees(mine, theirs, tolerance=1e-4) -> bool:
    """Within a share of the reference's standard deviation."""
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    return mine.shape == theirs.shape and bool(np.abs(mine - theirs).max() <= tolerance * theirs.std())
