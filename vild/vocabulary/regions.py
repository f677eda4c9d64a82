"""Classes by example: regions of images in place of words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vild.vocabulary.prompts import clean_name
from vild.vocabulary.words import check_names

SURE = 0.95


@dataclass(frozen=True)
class Gap:
    """From the teacher's embedding e of a region to that of a word for it: normalised ``word + slope (e - image)``.

    A teacher's image and text embeddings lie apart (the modality gap, Liang et al. 2022): any two images are nearer to
    each other than an image to its word. Beside words an example would take every region. ``Gap.fit`` learns from names
    that have both, the base names, what of an embedding is the gap.

    Attributes:
        image, word: mean embeddings of the regions and of their words, [D].
        slope: least squares; the nearer to 0 the less a region says about its word.
        near: the cosine that SURE of the regions exceed with their own word: a region as near to a word is one of it.
    """

    image: tuple[float, ...]
    word: tuple[float, ...]
    slope: float
    near: float

    @classmethod
    def fit(cls, regions: Tensor, words: Tensor) -> Gap | None:
        """From N regions and the word of each, both unit [N, D]. None if the regions say nothing about their words."""
        image, word = regions.double().mean(0), words.double().mean(0)
        apart = regions - image
        slope = ((apart * (words - word)).sum() / apart.square().sum().clamp(min=1e-12)).item()
        if slope <= 0:
            return None
        gap = cls(tuple(image.tolist()), tuple(word.tolist()), slope, 1.0)
        return replace(gap, near=(gap.as_words(regions) * words).sum(1).quantile(1 - SURE).item())

    def as_words(self, regions: Tensor) -> Tensor:
        """Embeddings [N, D] of regions to unit float32 [N, D] to be used as text embeddings."""
        image, word = (torch.tensor(values, dtype=torch.float64) for values in (self.image, self.word))
        return F.normalize(word + self.slope * (regions.double() - image), dim=1).float()

    def state(self) -> dict:
        """Plain values, for a checkpoint."""
        return {"image": list(self.image), "word": list(self.word), "slope": self.slope, "near": self.near}

    @classmethod
    def from_state(cls, state: dict, width: int | None = None) -> Gap:
        """Inverse of :meth:`state`; ValueError, TypeError or KeyError for something else, or a D not ``width``."""
        image, word = (tuple(map(float, state[key])) for key in ("image", "word"))
        slope, near = float(state["slope"]), float(state["near"])
        if not all(map(math.isfinite, (*image, *word, slope, near))) or slope <= 0:
            raise ValueError("the gap between regions and words is not finite, or its slope not above 0")
        if {len(image), len(word)} != {width or len(image)}:
            raise ValueError(f"the gap between regions and words has width {len(image)}, the detector {width}")
        return cls(image, word, slope, near)


def encode_examples(
    teacher, names: Sequence[str], images: Sequence[Tensor], boxes: Tensor, gap: Gap | None
) -> tuple[tuple[str, ...], Tensor, tuple[str, ...]]:
    """``Vocabulary.from_regions``, whose arguments these are: names, embeddings and ``made_of`` of the classes."""
    numbers: dict[str, int] = {}  # of the distinct names, but for case and "_", in the order in which they first occur
    group = [numbers.setdefault(clean_name(name), len(numbers)) for name in names]
    found = tuple(names[group.index(number)] for number in numbers.values())
    check_names(found, "examples")
    regions = teacher.encode_batch(images, list(boxes.split(1))).cpu().double()
    sums = regions.new_zeros(len(found), teacher.width).index_add(0, torch.tensor(group), regions)
    rows = F.normalize(sums, dim=1).float()
    counts = [group.count(number) for number in range(len(found))]
    made_of = tuple(f"{count} example region{'s' * (count > 1)}" for count in counts)
    return found, rows if gap is None else gap.as_words(rows), made_of
