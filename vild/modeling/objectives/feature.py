"""The region embedding compared with the teacher's: distances between unit vectors, summed over D."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vild.modeling.losses import image_loss
from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.objectives.registry import objective
from vild.modeling.schedule import NOT_NEGATIVE


@objective()
def l1(regions: RegionBatch) -> Tensor:
    """ViLD's image loss (Gu et al. 2022, eq. 3)."""
    return image_loss(regions.student, regions.teacher, regions.weights)


@objective(ranges={"beta": NOT_NEGATIVE})
def smooth_l1(regions: RegionBatch, *, beta: float = 0.05) -> Tensor:
    """L1 that is quadratic below ``beta`` (Huber 1964, divided by beta). Entries of a unit vector are of the order of
    1 / sqrt(D)."""
    return regions.mean(F.smooth_l1_loss(regions.student, regions.teacher, beta=beta, reduction="none").sum(1))


@objective()
def squared(regions: RegionBatch) -> Tensor:
    """Squared L2 (FitNets' hint loss without its factor 1/2; Romero et al. 2015); 2 - 2 cos for unit vectors."""
    return regions.mean((regions.student - regions.teacher).square().sum(1))


@objective()
def cosine(regions: RegionBatch) -> Tensor:
    """1 - cos."""
    return regions.mean(1 - (regions.student * regions.teacher).sum(1))
