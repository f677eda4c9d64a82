"""The region embedding itself beside the teacher's: distances between unit vectors, summed over D."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vild.modeling.losses import image_loss
from vild.modeling.objectives.regions import RegionBatch


def l1(regions: RegionBatch) -> Tensor:
    """ViLD's image loss (Gu et al. 2022, eq. 3)."""
    return image_loss(regions.student, regions.teacher, regions.weights)


def smooth_l1(regions: RegionBatch, *, beta: float = 0.05) -> Tensor:
    """L1 that is quadratic below ``beta`` (Huber 1964, divided by beta); a unit vector's entries are of size
    1 / sqrt(D)."""
    if not len(regions.student):
        return regions.nothing()
    return regions.mean(F.smooth_l1_loss(regions.student, regions.teacher, beta=beta, reduction="none").sum(1))


def squared(regions: RegionBatch) -> Tensor:
    """Squared L2 (that of FitNets' hints, without its 1/2; Romero et al. 2015); of unit vectors 2 - 2 cos."""
    if not len(regions.student):
        return regions.nothing()
    return regions.mean((regions.student - regions.teacher).square().sum(1))


def cosine(regions: RegionBatch) -> Tensor:
    """1 - cos."""
    if not len(regions.student):
        return regions.nothing()
    return regions.mean(1 - (regions.student * regions.teacher).sum(1))
