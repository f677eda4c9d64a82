"""The teacher's distribution over a list of words, or its most likely word, as the target."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.objectives.registry import objective
from vild.modeling.schedule import POSITIVE, PROBABILITY


@objective(averages_teachers=True, ranges={"temperature": POSITIVE})
def soft_targets(regions: RegionBatch, *, temperature: float = 1.0, over: str = "base") -> Tensor:
    """T^2 KL(teacher || student) between softmaxes of cosine / (tau T) over words, tau being the classifier's
    temperature (Hinton et al. 2015, section 2). 0 if they agree."""
    student, teacher = regions.logits(over, temperature)
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    return temperature**2 * regions.mean(kl)


@objective(averages_teachers=True, ranges={"confidence": PROBABILITY})
def hard_targets(regions: RegionBatch, *, confidence: float = 0.0, over: str = "base") -> Tensor:
    """Cross-entropy to the teacher's most likely word if its softmax at tau exceeds ``confidence`` (pseudo-labels; Lee
    2013). Mean over all M regions: less confident ones count as 0."""
    student, teacher = regions.logits(over, 1.0)
    probability, label = teacher.softmax(1).max(1)
    confident = probability > confidence
    return regions.mean(F.cross_entropy(student, label, reduction="none") * confident)
