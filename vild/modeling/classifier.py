"""Region embeddings and the open-vocabulary classifier over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.modeling.losses import cosine_logits
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

LOGITS_AT_ONCE = 2**22  # 16 MiB


class RegionEmbedding(nn.Module):
    """Box head, then a linear layer into the teacher's space, then L2: RoI features to unit float32 [R, D]."""

    def __init__(self, head: nn.Module, width: int):
        super().__init__()
        self.head = head
        shape = head.output_shape
        self.projection = nn.Linear(shape.channels * (shape.height or 1) * (shape.width or 1), width)
        nn.init.normal_(self.projection.weight, std=0.01)
        nn.init.zeros_(self.projection.bias)

    def forward(self, roi_features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the region embeddings and the head's features [R, F] (for box regression)."""
        features = self.head(roi_features).flatten(1)
        return F.normalize(self.projection(features).float(), dim=1), features


@dataclass(frozen=True)
class Offered:
    """What one call of the detector looks for. It never changes, so calls with different ones can run side by side.

    Attributes:
        text: unit float32 [C, D], on the detector's device.
        base: bool [C].
        names: of the C classes.
        shown: only the first so many are detected; the others take part in the softmax.
        thresholds: float32 [shown], the score above which each is reported; None: the config's SCORE_THRESH_TEST.
        least: the smallest of them.
    """

    text: Tensor
    base: Tensor
    names: tuple[str, ...]
    shown: int
    thresholds: Tensor | None = None
    least: float | None = None


class TextClassifier(nn.Module):
    """Cosine to the vocabulary's text embeddings over a temperature, and a learned background (paper, eq. 2).

    The text embeddings are frozen and no parameter: they change with the vocabulary, not with training.
    """

    text: Tensor
    base: Tensor

    def __init__(self, vocabulary: Vocabulary, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.background = nn.Parameter(torch.empty(1, vocabulary.width).normal_(std=0.01))
        self.register_buffer("text", vocabulary.embeddings, persistent=False)
        self.register_buffer("base", vocabulary.mask("base"), persistent=False)
        self.vocabulary = vocabulary

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Swap the classes. UserError if the embedding width differs."""
        offered = self.offer([vocabulary])
        self.text, self.base, self.vocabulary = offered.text, offered.base, vocabulary

    def offer(self, vocabularies: Sequence[Vocabulary], thresholds: Sequence[float] | None = None) -> Offered:
        """Vocabularies for one call, of which the first is detected. UserError if the embedding width differs."""
        for width in (v.width for v in vocabularies):
            if width != self.vocabulary.width:
                raise UserError(f"vocabulary: its embeddings are {width} wide, the detector's {self.vocabulary.width}")
        device = self.text.device
        return Offered(
            torch.cat([v.embeddings for v in vocabularies]).to(device),
            torch.cat([v.mask("base") for v in vocabularies]).to(device),
            tuple(name for v in vocabularies for name in v.names),
            len(vocabularies[0]),
            None if thresholds is None else torch.tensor(thresholds, dtype=torch.float32, device=device),
            None if thresholds is None else min(thresholds),
        )

    @property
    def offered(self) -> Offered:
        """The present vocabulary."""
        return Offered(self.text, self.base, self.vocabulary.names, len(self.text))

    def matrix(self, text: Tensor) -> Tensor:
        """Text embeddings [C, D] and, last, the background's: unit [C + 1, D]."""
        return torch.cat([text, F.normalize(self.background.float(), dim=1)])

    def forward(self, embeddings: Tensor) -> Tensor:
        """Unit [R, D] to logits [R, C + 1] over the present vocabulary, background last."""
        return self._logits(embeddings, self.matrix(self.text))

    def blocks(self, heads: Sequence[Tensor], texts: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Each head's unit embeddings [R, D] and the rows [K, D] it is compared with to its logits [r, K] of successive
        regions, so that a large vocabulary takes LOGITS_AT_ONCE floats a head and no more."""
        step = max(LOGITS_AT_ONCE // max(map(len, texts)), 1)
        for first in range(0, max(len(heads[0]), 1), step):
            yield [self._logits(h[first : first + step], t) for h, t in zip(heads, texts, strict=True)]

    def _logits(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        # over a temperature of 0.01, a half-precision cosine would be off by some hundredths of a logit
        with torch.autocast(embeddings.device.type, enabled=False):
            return cosine_logits(embeddings.float(), classes, self.temperature)
