"""Region embeddings and the open-vocabulary classifier over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.errors import UserError
from vild.modeling.losses import cosine_logits
from vild.vocabulary import Vocabulary

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
        if vocabulary.width != self.vocabulary.width:
            raise UserError(
                f"vocabulary: its embeddings are {vocabulary.width} wide, the detector's {self.vocabulary.width}"
            )
        self.text = vocabulary.embeddings.to(self.text.device)
        self.base = vocabulary.mask("base").to(self.text.device)
        self.vocabulary = vocabulary

    def classes(self) -> Tensor:
        """The text embeddings and, last, the background's: unit [C + 1, D]."""
        return torch.cat([self.text, F.normalize(self.background.float(), dim=1)])

    def forward(self, embeddings: Tensor) -> Tensor:
        """Unit [R, D] to logits [R, C + 1], background last."""
        return self._logits(embeddings, self.classes())

    def blocks(self, embeddings: Tensor) -> Iterator[list[Tensor]]:
        """Unit [H, R, D] of H heads to each head's logits [r, C + 1] of successive regions, so that a large
        vocabulary takes LOGITS_AT_ONCE floats a head and no more."""
        classes = self.classes()
        for block in embeddings.split(max(LOGITS_AT_ONCE // len(classes), 1), dim=1):
            yield [self._logits(head, classes) for head in block]

    def _logits(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        # over a temperature of 0.01, a half-precision cosine would be off by some hundredths of a logit
        with torch.autocast(embeddings.device.type, enabled=False):
            return cosine_logits(embeddings.float(), classes, self.temperature)
