"""What lies before the embedding: the RoI feature, or a level of the FPN, beside the teacher's last feature map,
position by position.

The RoI feature comes resized to the teacher's h x w (bilinear, antialiased), the level pooled to it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vild.modeling.objectives.regions import RegionBatch


def tokens(regions: RegionBatch) -> Tensor:
    """Squared L2 between the adapted RoI feature and the teacher's map, at each position as unit vectors over channels
    (FitNets' hints, without its 1/2; Romero et al. 2015): 2 - 2 cos, mean over the positions of all regions."""
    if not len(regions.student):
        return regions.nothing()
    return _apart(regions.adapted_maps, regions.teacher_maps)


def picture_tokens(regions: RegionBatch) -> Tensor:
    """As :func:`tokens`, of the whole images: the coarsest level of the FPN that RoIs are pooled from, adapted,
    beside the teacher's map of the image. Mean over the positions of all images, whatever their regions."""
    return _apart(regions.adapted_images, regions.teacher_images)


def _apart(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (F.normalize(x.float(), dim=1) for x in (student, teacher))
    return (student - teacher).square().sum(1).mean()


def attention(regions: RegionBatch) -> Tensor:
    """L2 between where the two look: unit maps of each position's sum of squares over channels, of the RoI feature
    itself (activation-based attention transfer with p = 2, without its beta / 2; Zagoruyko & Komodakis 2017). Mean over
    regions. (The feature comes resized, as :func:`tokens` wants it; the paper resizes the maps of squares.)"""
    if not len(regions.student):
        return regions.nothing()
    student, teacher = (
        F.normalize(x.float().square().sum(1).flatten(1), dim=1) for x in (regions.student_maps, regions.teacher_maps)
    )
    return (student - teacher).norm(dim=1).mean()


OF_MAPS = (tokens, attention, picture_tokens)
OF_ADAPTER, OF_IMAGE_ADAPTER = (tokens,), (picture_tokens,)
