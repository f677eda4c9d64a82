"""Region embeddings and the open-vocabulary classifier over them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.modeling.losses import cosine_logits
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

LOGITS_AT_ONCE = 2**22  # 16 MiB
CLIP_TEMPERATURE = 0.01

logger = logging.getLogger(__name__)


class RegionEmbedding(nn.Module):
    """Box head, linear layer into the teacher's space, L2 normalisation: RoI features to unit float32 [R, D]."""

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
class ClassSet:
    """The classes of one call of the detector. Immutable, so that calls with different classes can run in parallel.

    Attributes:
        text: unit float32 [C, D], on the detector's device.
        base: bool [C].
        names: of the C classes.
        shown: only the first ``shown`` classes are detected; the others take part in the softmax.
        thresholds: float32 [shown], the score that a detection of each must exceed; None: ``least`` for all.
        least: the smallest of ``thresholds``; None: SCORE_THRESH_TEST.
    """

    text: Tensor
    base: Tensor
    names: tuple[str, ...]
    shown: int
    thresholds: Tensor | None = None
    least: float | None = None


class TextClassifier(nn.Module):
    """Cosine to the vocabulary's text embeddings and to a learned background, over a temperature (paper, eq. 2).

    The text embeddings are not parameters: they change with the vocabulary, not in training.
    """

    text: Tensor
    base: Tensor
    base_rows: Tensor

    def __init__(self, vocabulary: Vocabulary, temperature: float, bias: float = 0.0, test_temperature: float = 0.0):
        """
        Args:
            temperature: of the softmax in training and, unless there is a ``test_temperature``, at test.
            bias: added to the logits of the classes, not to the background's.
        """
        super().__init__()
        self.temperature, self.bias, self.test_temperature = temperature, bias, test_temperature or temperature
        self.background = nn.Parameter(torch.empty(1, vocabulary.width).normal_(std=0.01))
        self.register_buffer("text", vocabulary.embeddings, persistent=False)
        self.register_buffer("base", vocabulary.mask("base"), persistent=False)
        # selecting by the mask would wait for the GPU
        self.register_buffer("base_rows", self.base.nonzero()[:, 0], persistent=False)
        self.vocabulary = vocabulary

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Replace the classes. UserError if the embedding width differs."""
        classes = self.class_set([vocabulary])
        self.text, self.base, self.vocabulary = classes.text, classes.base, vocabulary
        self.base_rows = self.base.nonzero()[:, 0]

    def class_set(self, vocabularies: Sequence[Vocabulary]) -> ClassSet:
        """The classes of one call, the first vocabulary's being detected. UserError if the embedding width differs."""
        for width in (v.width for v in vocabularies):
            if width != self.vocabulary.width:
                raise UserError(f"vocabulary: embedding width is {width}, the detector's is {self.vocabulary.width}")
        device = self.text.device
        return ClassSet(
            torch.cat([v.embeddings for v in vocabularies]).to(device),
            torch.cat([v.mask("base") for v in vocabularies]).to(device),
            tuple(name for v in vocabularies for name in v.names),
            len(vocabularies[0]),
        )

    @property
    def current_classes(self) -> ClassSet:
        """The classes of the current vocabulary."""
        return ClassSet(self.text, self.base, self.vocabulary.names, len(self.text))

    def matrix(self, text: Tensor) -> Tensor:
        """Text embeddings [C, D] with the background appended: unit [C + 1, D]."""
        return torch.cat([text, F.normalize(self.background.float(), dim=1)])

    def forward(self, embeddings: Tensor) -> Tensor:
        """Unit [R, D] to logits [R, C + 1] over the current vocabulary, background last; in training."""
        return self.logits(embeddings, self.matrix(self.text), self.temperature)

    def logits(self, embeddings: Tensor, matrix: Tensor, temperature: float) -> Tensor:
        """Unit [R, D] and the result [C + 1, D] of :meth:`matrix` to logits [R, C + 1]."""
        logits = cosine_logits(embeddings, matrix, temperature)
        if self.bias:
            logits[:, :-1] += self.bias
        return logits

    def blocks(self, heads: Sequence[Tensor], text: Tensor, extra: Sequence[Tensor] = ()) -> Iterator[list[Tensor]]:
        """Logits of each head at test, for successive blocks of regions: with a large vocabulary a block has at most
        LOGITS_AT_ONCE floats per head.

        Args:
            heads: unit embeddings [R, D] of the detector's own heads, then [R, D_k] in extra teachers' spaces.
            text: [C, D] of the classes; the own heads' logits [r, C + 1] have the background last.
            extra: [C, D_k] of the classes in the extra teachers' spaces; their logits are [r, C].
        """
        matrix, own = self.matrix(text), len(heads) - len(extra)
        step = max(LOGITS_AT_ONCE // len(matrix), 1)
        for first in range(0, max(len(heads[0]), 1), step):
            block = [head[first : first + step] for head in heads]
            logits = [self.logits(x, matrix, self.test_temperature) for x in block[:own]]
            others = zip(block[own:], extra, strict=True)
            yield logits + [cosine_logits(x, classes, self.test_temperature) for x, classes in others]


def softmax_settings(temperature: float, vocabulary: Vocabulary) -> tuple[float, float]:
    """Temperature and bias of the classifier for ``MODEL.VILD.TEMPERATURE``: a number is used as it is, without a bias;
    0 means those of the vocabulary's teacher. Where the vocabulary does not record them (a file of an older version, an
    imported matrix), CLIP's 0.01 is used and a warning logged."""
    if temperature:
        return temperature, 0.0
    if vocabulary.logit_scale is None:
        logger.warning(
            "the vocabulary does not record its teacher's logit scale: temperature %s, CLIP's "
            "(MODEL.VILD.TEMPERATURE sets another)", CLIP_TEMPERATURE,
        )  # fmt: skip
        return CLIP_TEMPERATURE, 0.0
    return 1 / vocabulary.logit_scale, vocabulary.logit_bias
