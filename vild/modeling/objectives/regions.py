"""What the objectives look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vild.modeling.losses import cosine_logits


@dataclass(frozen=True)
class Regions:
    """The M distilled regions of a step, of B pictures one after the other, on one device.

    Attributes:
        student: unit [M, D], with gradient.
        teacher: unit [M, D], without.
        counts: how many regions each picture has; they sum to M.
        words: unit text embeddings [K, D] by what ``OVER`` may say: "base", the base names of training; "background",
            the same and, last, the learned background; or the path of a vocabulary file (a large list of concepts).
        temperature: of the classifier, tau.
        student_maps: RoI features [M, C, h, w], with gradient; they and the next two only for objectives of maps.
        adapted_maps: the same through the learned adapter, [M, T, h, w]; None without ``tokens``.
        teacher_maps: the image tower's last feature map [M, T, h, w], without gradient.
    """

    student: Tensor
    teacher: Tensor
    counts: tuple[int, ...]
    words: Mapping[str, Tensor] = field(default_factory=dict)
    temperature: float = 0.01
    student_maps: Tensor | None = None
    adapted_maps: Tensor | None = None
    teacher_maps: Tensor | None = None

    def logits(self, over: str, temperature: float) -> tuple[Tensor, Tensor]:
        """Student's and teacher's float32 logits [M, K] over a word list, at tau times ``temperature``."""
        with torch.autocast(self.student.device.type, enabled=False):  # see TextClassifier
            words, scale = self.words[over].float(), self.temperature * temperature
            student = cosine_logits(self.student.float(), words, scale)
            teacher = cosine_logits(self.teacher.float(), words.detach(), scale)
        return student, teacher

    def nothing(self) -> Tensor:
        """The value of an objective without regions: 0, with a gradient to all that is trained."""
        trained = (self.student, self.student_maps, self.adapted_maps)
        return sum(x.sum() for x in trained if x is not None) * 0
