"""ViLD's losses (arXiv 2104.13921, section 3). Pure functions.

Shapes: R sampled RoIs, M distilled regions, C classes of the vocabulary, D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from torch import Tensor


def cosine_logits(embeddings: Tensor, text: Tensor, temperature: float) -> Tensor:
    """cos(region, text) / temperature, for unit [R, D] and unit [C, D]: [R, C] (eq. 2)."""
    # at a temperature of 0.01, half-precision cosines would change logits by some hundredths
    with torch.autocast(embeddings.device.type, enabled=False):
        return (embeddings @ text.T).div_(temperature)


def text_loss(logits: Tensor, labels: Tensor, trained: Tensor, unlabelled: Tensor | None = None) -> Tensor:
    """Softmax cross-entropy over base classes and background (eq. 2). Scalar, mean over RoIs.

    What lies under no annotation may be one of the ``unlabelled`` classes: its loss is -log of the sum of the
    probabilities of these and of the background ("unbiased" cross-entropy; Cermelli et al. 2020, eq. 3).

    Args:
        logits: [R, C + 1], background last.
        labels: int64 [R]; C is background.
        trained: bool [C]; the other (novel) classes are left out of the denominator, as in the paper. The
            released code multiplies their logits by 0 instead, which leaves e^0 of each in it.
        unlabelled: bool [C], the trained classes whose objects the training set does not annotate (None: none).
    """
    if len(labels) == 0:
        return logits.sum() * 0
    keep = torch.cat([trained, trained.new_ones(1)])
    logits = logits.masked_fill(~keep, float("-inf"))
    if unlabelled is None:
        return F.cross_entropy(logits, labels)
    rest = torch.cat([unlabelled, unlabelled.new_ones(1)])
    nothing = logits.masked_fill(~rest, float("-inf")).logsumexp(1)
    own = logits.gather(1, labels[:, None])[:, 0]
    return (logits.logsumexp(1) - torch.where(labels == len(unlabelled), nothing, own)).mean()


def image_loss(embeddings: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """L1 between unit region embeddings and unit teacher embeddings, both [M, D] (eq. 3).

    Summed over D, mean over regions, each times its weight [M] (None: 1). Scalar.
    """
    if len(targets) == 0:
        return embeddings.sum() * 0
    distances = (embeddings - targets).abs().sum(1)
    return (distances if weights is None else distances * weights).mean()


def box_loss(
    deltas: Tensor, boxes: Tensor, matched: Tensor, foreground: Tensor, transform: Box2BoxTransform, beta: float
) -> Tensor:
    """(Smooth) L1 on the deltas of the foreground RoIs, divided by the number of all RoIs (Detectron2's convention).

    Args:
        deltas, boxes, matched: [R, 4]; the boxes of RoIs and ground truth as xyxy.
        foreground: bool [R].
        beta: where L2 changes to L1; 0 is L1.
    """
    rows = foreground.nonzero()[:, 0]
    loss = _dense_box_regression_loss(
        [boxes[rows]], transform, [deltas[rows][None].float()], [matched[rows]], ..., "smooth_l1", beta
    )
    return loss / max(len(deltas), 1)


def base_accuracy(logits: Tensor, labels: Tensor, base: Tensor) -> float | None:
    """Accuracy of the best base class over foreground RoIs; None without any. Arguments as :func:`text_loss`."""
    foreground = labels < len(base)
    best = logits[:, :-1].masked_fill(~base, float("-inf")).argmax(1)
    count, right = torch.stack([foreground.sum(), (foreground & (best == labels)).sum()]).tolist()  # one wait
    return right / count if count else None
