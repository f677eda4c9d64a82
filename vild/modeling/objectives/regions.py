"""The input of every objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vild.modeling.losses import cosine_logits


@dataclass(frozen=True)
class RegionBatch:
    """The M distilled regions of a step: those of B images in order, on one device.

    Attributes:
        student: unit [M, D], with gradient.
        teacher: unit [M, D], without gradient.
        counts: number of regions of each image; they sum to M.
        words: unit text embeddings [K, D] by the values of ``OVER``: "base", the base names of training; "background",
            the same plus the learned background as the last row; or the path of a vocabulary file.
        temperature: the classifier's, tau.
        student_maps: RoI features [M, C, h, w], with gradient. This and the following four are present only if an
            objective needs them.
        adapted_maps: the same through the learned adapter, [M, T, h, w].
        teacher_maps: the image tower's last feature map [M, T, h, w], without gradient.
        adapted_images: an FPN level over each whole image, adapted, [B, T, h, w], with gradient.
        teacher_images: the image tower's last feature map of each whole image, [B, T, h, w], without gradient.
        weights: this teacher's weight for each region, [M]; None: 1.
        extra: teachers whose distributions over "base" are averaged with this one's: the unit embeddings [M, D_k] and
            unit text embeddings [K, D_k] of each.
        shares: weights in that average of this teacher and the ``extra`` ones, [1 + len(extra), M].
    """

    student: Tensor
    teacher: Tensor
    counts: tuple[int, ...]
    words: Mapping[str, Tensor] = field(default_factory=dict)
    temperature: float = 0.01
    student_maps: Tensor | None = None
    adapted_maps: Tensor | None = None
    teacher_maps: Tensor | None = None
    adapted_images: Tensor | None = None
    teacher_images: Tensor | None = None
    weights: Tensor | None = None
    extra: tuple[tuple[Tensor, Tensor], ...] = ()
    shares: Tensor | None = None

    def logits(self, over: str, temperature: float) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's float32 logits [M, K] over a word list, at tau times ``temperature``. With
        ``extra`` teachers the second is the logarithm of the average distribution."""
        words, scale = self.words[over].float(), self.temperature * temperature
        student = cosine_logits(self.student.float(), words, scale)
        teacher = cosine_logits(self.teacher.float(), words.detach(), scale)
        if self.extra:
            extra = [cosine_logits(rows.float(), texts.float(), scale) for rows, texts in self.extra]
            teacher = average_distributions([teacher, *extra], self.shares)
        return student, teacher

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the M > 0 regions of values [M, ...], summed over all other dimensions and weighted by
        ``weights``."""
        if self.weights is not None:
            values = values.flatten(1).sum(1) if values.dim() > 1 else values
            values = values * self.weights
        return values.sum() / len(values)

    def zero(self) -> Tensor:
        """The value of an objective without regions: 0, connected to everything that is trained."""
        trained = (self.student, self.student_maps, self.adapted_maps)
        return sum(x.sum() for x in trained if x is not None) * 0


def average_distributions(logits: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The logarithm [M, C] of the mean of K teachers' distributions (an ensemble as the teacher; Hinton et al. 2015,
    section 1), weighted by ``shares`` [K, M]."""
    logs = torch.stack([x.log_softmax(1) for x in logits])
    return (logs + shares.log()[:, :, None]).logsumexp(0)
