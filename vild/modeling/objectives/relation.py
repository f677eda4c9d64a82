"""How the regions of an image lie to each other, rather than where (RKD; Park et al. 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vild.modeling.objectives.regions import RegionBatch

MOST = 64  # regions of an image that are looked at, evenly spread: angles are of triples


def distances(regions: RegionBatch) -> Tensor:
    """Huber loss between the distances of an image's pairs, each over their mean (Park et al. 2019, section 3.2.1).

    Mean over pairs, then over the images that have two regions or more.
    """
    parts = []
    for student, teacher in _images(regions, 2):
        a, b = F.pdist(student.float()), F.pdist(teacher.float())
        parts.append(F.smooth_l1_loss(a / a.mean().clamp(min=1e-6), b / b.mean().clamp(min=1e-6)))
    return torch.stack(parts).mean() if parts else regions.nothing()


def angles(regions: RegionBatch) -> Tensor:
    """Huber loss between the cosines of the angles of an image's triples (Park et al. 2019, section 3.2.2).

    Mean over triples of three different regions, then over the images that have them.
    """
    parts = []
    for student, teacher in _images(regions, 3):
        a, b = _cosines(student.float()), _cosines(teacher.float())
        n = len(a)
        i, j, k = torch.meshgrid(*[torch.arange(n, device=a.device)] * 3, indexing="ij")
        different = (i != j) & (j != k) & (i != k)
        parts.append(F.smooth_l1_loss(a[different], b[different]))
    return torch.stack(parts).mean() if parts else regions.nothing()


def _cosines(x: Tensor) -> Tensor:
    """[n, D] to [n, n, n]: at [j, i, k] the cosine of the angle at j between the directions to i and k."""
    # two regions that coincide have no direction: the gradient of normalising it is 1 / eps, and training would burst
    directions = F.normalize(x[None] - x[:, None], dim=2, eps=1e-3)
    with torch.autocast(x.device.type, enabled=False):
        return directions @ directions.transpose(1, 2)


def _images(regions: RegionBatch, least: int):
    """Student's and teacher's rows of each image that has at least so many."""
    for student, teacher in zip(
        regions.student.split(regions.counts), regions.teacher.split(regions.counts), strict=True
    ):
        if len(student) >= least:
            if len(student) > MOST:
                rows = torch.linspace(0, len(student) - 1, MOST, device=student.device).long()
                student, teacher = student[rows], teacher[rows]
            yield student, teacher


OF_PAIRS = (distances, angles)
