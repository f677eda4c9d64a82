"""What several teachers say of the same regions over the same words: how sure each is, and all of them together.

Shapes: K teachers, M regions, C words. Nothing here carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1e-3  # the certainty of a teacher who knows nothing: several of them share by their weights


def certainty(logits: Tensor) -> Tensor:
    """1 - H / log C, H being the entropy of the softmax of logits [M, C]: 1 where one word has it all, LEAST where all
    are alike. [M]. By the entropy of their predictions teachers are weighted in Kwon et al. 2020 ("Adaptive Knowledge
    Distillation Based on Entropy"); CA-MKD (Zhang et al. 2022) does so by labels, which a proposal does not have."""
    log = logits.log_softmax(1)
    entropy = -(log.exp() * log).sum(1)
    return (1 - entropy / math.log(max(logits.shape[1], 2))).clamp(LEAST, 1)


def shares(logits: Sequence[Tensor], weights: Sequence[float], by_confidence: bool) -> Tensor:
    """How much each teacher counts of each region, [K, M], 1 in sum over the teachers: its weight or, by confidence,
    weight times certainty."""
    counts = logits[0].new_tensor(weights)[:, None].expand(-1, len(logits[0]))
    if by_confidence:
        counts = counts * torch.stack([certainty(x) for x in logits])
    return counts / counts.sum(0)


def mean_opinion(logits: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The logarithm [M, C] of the teachers' mean distribution (an ensemble as teacher: Hinton et al. 2015, section 1),
    weighted by ``shares`` [K, M]."""
    logs = torch.stack([x.log_softmax(1) for x in logits])
    return (logs + shares.log()[:, :, None]).logsumexp(0)
