"""What the objectives look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vild.modeling.losses import cosine_logits
from vild.modeling.objectives.opinions import mean_opinion


@dataclass(frozen=True)
class RegionBatch:
    """The M distilled regions of a step, of B images one after the other, on one device.

    Attributes:
        student: unit [M, D], with gradient.
        teacher: unit [M, D], without.
        counts: how many regions each image has; they sum to M.
        words: unit text embeddings [K, D] by what ``OVER`` may say: "base", the base names of training; "background",
            the same and, last, the learned background; or the path of a vocabulary file (a large list of concepts).
        temperature: of the classifier, tau.
        student_maps: RoI features [M, C, h, w], with gradient; they and the next two only for objectives of maps.
        adapted_maps: the same through the learned adapter, [M, T, h, w]; None without ``tokens``.
        teacher_maps: the image tower's last feature map [M, T, h, w], without gradient.
        adapted_images: a level of the FPN over each whole image, adapted, [B, T, h, w], with gradient.
        teacher_images: the image tower's last feature map of each whole image, [B, T, h, w], without.
        weights: how much this teacher counts of each region, [M]; None: 1.
        others: further teachers whose opinion over "base" is averaged with this one's, each its unit embeddings
            [M, D_k] and its unit text embeddings [K, D_k].
        shares: of this and the other teachers in the mean, [1 + others, M].
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
    others: tuple[tuple[Tensor, Tensor], ...] = ()
    shares: Tensor | None = None

    def logits(self, over: str, temperature: float) -> tuple[Tensor, Tensor]:
        """Student's and teacher's (or teachers') float32 logits [M, K] over a word list, at tau times
        ``temperature``."""
        with torch.autocast(self.student.device.type, enabled=False):  # see TextClassifier
            words, scale = self.words[over].float(), self.temperature * temperature
            student = cosine_logits(self.student.float(), words, scale)
            teacher = cosine_logits(self.teacher.float(), words.detach(), scale)
            if self.others:
                others = [cosine_logits(rows.float(), texts.float(), scale) for rows, texts in self.others]
                teacher = mean_opinion([teacher, *others], self.shares)
        return student, teacher

    def mean(self, values: Tensor) -> Tensor:
        """The mean over regions, M > 0, of values [M, ...] in sum over what follows, each times its weight."""
        if self.weights is not None:
            values = values.flatten(1).sum(1) if values.dim() > 1 else values
            values = values * self.weights
        return values.sum() / len(values)

    def nothing(self) -> Tensor:
        """The value of an objective without regions: 0, with a gradient to all that is trained."""
        trained = (self.student, self.student_maps, self.adapted_maps)
        return sum(x.sum() for x in trained if x is not None) * 0
