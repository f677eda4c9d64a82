"""Features before the embedding (RoI features, or an FPN level), compared with the teacher's last feature map position
by position.

RoI features arrive resized to the teacher's h x w (bilinear, antialiased), the FPN level pooled to it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.objectives.registry import objective


@objective(needs_maps=True, adapter="roi")
def tokens(regions: RegionBatch) -> Tensor:
    """Squared L2 between the adapted RoI feature and the teacher's map, each position a unit vector over channels
    (FitNets' hint loss without its factor 1/2; Romero et al. 2015): 2 - 2 cos, mean over the positions of all
    regions."""
    return _distance(regions.adapted_maps, regions.teacher_maps)


@objective(name="picture_tokens", needs_maps=True, adapter="image", runs_when_empty=True)
def image_tokens(regions: RegionBatch) -> Tensor:
    """As :func:`tokens` for whole images: the coarsest FPN level that RoIs are pooled from, adapted, against the
    teacher's map of the image. Mean over the positions of all images, whatever their regions."""
    return _distance(regions.adapted_images, regions.teacher_images)


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (F.normalize(x.float(), dim=1) for x in (student, teacher))
    return (student - teacher).square().sum(1).mean()


@objective(needs_maps=True)
def attention(regions: RegionBatch) -> Tensor:
    """L2 between attention maps, the sums of squares over channels at each position as a unit vector (activation-based
    attention transfer with p = 2, without its factor beta / 2; Zagoruyko & Komodakis 2017). Mean over regions. The
    paper resizes the maps of squares; here the features are resized before."""
    student, teacher = (
        F.normalize(x.float().square().sum(1).flatten(1), dim=1) for x in (regions.student_maps, regions.teacher_maps)
    )
    return (student - teacher).norm(dim=1).mean()
