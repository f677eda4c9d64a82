"""The teacher's opinion over a list of words, imitated: its distribution, or its best word."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vild.modeling.objectives.regions import RegionBatch


def soft_targets(regions: RegionBatch, *, temperature: float = 1.0, over: str = "base") -> Tensor:
    """T^2 KL(teacher || student) between softmaxes over words (Hinton et al. 2015, section 2).

    Both are softmaxes of cosine / (tau T), tau being the classifier's temperature. 0 where they agree.
    """
    if not len(regions.student):
        return regions.nothing()
    student, teacher = regions.logits(over, temperature)
    kl = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    return temperature**2 * regions.mean(kl)


def hard_targets(regions: RegionBatch, *, confidence: float = 0.0, over: str = "base") -> Tensor:
    """Cross-entropy to the teacher's best word, where its softmax at tau gives it more than ``confidence`` (pseudo
    labels; Lee 2013). Mean over all M regions, so that the unsure ones weigh nothing."""
    if not len(regions.student):
        return regions.nothing()
    student, teacher = regions.logits(over, 1.0)
    probability, label = teacher.softmax(1).max(1)
    sure = probability > confidence
    return regions.mean(F.cross_entropy(student, label, reduction="none") * sure)


OF_OPINIONS = (soft_targets, hard_targets)
