"""The relations between an image's regions, instead of their positions in the space (RKD; Park et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.objectives.registry import objective

MAX_REGIONS = 64  # of an image, evenly spaced: the number of triples grows with the cube


@objective(pairwise=True)
def distances(regions: RegionBatch) -> Tensor:
    """Huber loss between the distances of an image's pairs, relative to their mean (Park et al. 2019, section 3.2.1).

    Mean over pairs, then over the images with two or more regions.
    """
    parts = []
    for student, teacher in _images(regions, 2):
        a, b = F.pdist(student.float()), F.pdist(teacher.float())
        parts.append(F.smooth_l1_loss(a / a.mean().clamp(min=1e-6), b / b.mean().clamp(min=1e-6)))
    return torch.stack(parts).mean() if parts else regions.zero()


@objective(pairwise=True)
def angles(regions: RegionBatch) -> Tensor:
    """Huber loss between the cosines of the angles of an image's triples (Park et al. 2019, section 3.2.2).

    Mean over triples of three different regions, then over the images that have some.
    """
    parts = []
    for student, teacher in _images(regions, 3):
        a, b = _cosines(student.float()), _cosines(teacher.float())
        n = len(a)
        i, j, k = torch.meshgrid(*[torch.arange(n, device=a.device)] * 3, indexing="ij")
        different = (i != j) & (j != k) & (i != k)  # n (n - 1) (n - 2) triples; selecting them would wait for the GPU
        parts.append((F.smooth_l1_loss(a, b, reduction="none") * different).sum() / (n * (n - 1) * (n - 2)))
    return torch.stack(parts).mean() if parts else regions.zero()


def _cosines(x: Tensor) -> Tensor:
    """[n, D] to [n, n, n]: at [j, i, k] the cosine of the angle at j between the directions to i and k."""
    # coinciding regions have no direction: the gradient of normalising it is 1 / eps, so a tiny eps would explode
    directions = F.normalize(x[None] - x[:, None], dim=2, eps=1e-3)
    with torch.autocast(x.device.type, enabled=False):
        return directions @ directions.transpose(1, 2)


def _images(regions: RegionBatch, minimum: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The student's and the teacher's rows of each image with at least ``minimum`` regions."""
    per_image = zip(regions.student.split(regions.counts), regions.teacher.split(regions.counts), strict=True)
    for student, teacher in per_image:
        if len(student) >= minimum:
            if len(student) > MAX_REGIONS:
                rows = torch.linspace(0, len(student) - 1, MAX_REGIONS, device=student.device).long()
                student, teacher = student[rows], teacher[rows]
            yield student, teacher
