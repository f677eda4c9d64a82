"""More teachers than one, each with a space, a store and a vocabulary of its own (``MODEL.VILD.TEACHERS``).

The student gets a projection into each space from the features of the head that is distilled, and learns the same
objectives there. At test a projection is one more image head: eq. 5 of the paper fuses it with the text head. It has a
say only about the classes of its own vocabulary; where others are asked for (the demo's words), the first teacher's
head decides alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vild.errors import UserError
from vild.modeling.objectives import Objective, Regions
from vild.vocabulary import Vocabulary

KEYS = {"STORE", "VOCABULARY", "WEIGHT"}


def check_teachers(entries: Sequence[dict]) -> list[dict]:
    """``MODEL.VILD.TEACHERS``, each with a WEIGHT (1 unless given). UserError for another form."""
    for entry in entries:
        if not isinstance(entry, dict) or not {"STORE", "VOCABULARY"} <= entry.keys() <= KEYS:
            raise UserError(f"MODEL.VILD.TEACHERS: {entry} is not {{STORE, VOCABULARY, WEIGHT}}")
    return [{"WEIGHT": 1.0, **entry} for entry in entries]


class OtherTeachers(nn.Module):
    """Projections of head features [R, F] into the spaces of K further teachers.

    Args:
        vocabularies: one a teacher, all with the names of ``names``.
        weights: of each teacher's losses.
    """

    def __init__(
        self,
        features: int,
        vocabularies: Sequence[Vocabulary],
        weights: Sequence[float],
        names: tuple[str, ...],
        temperature: float,
    ):
        super().__init__()
        for number, vocabulary in enumerate(vocabularies, 1):
            if vocabulary.names != names:
                raise UserError(f"MODEL.VILD.TEACHERS: the vocabulary of teacher {number} names other classes")
        self.names, self.weights, self.temperature = names, tuple(weights), temperature
        self.projections = nn.ModuleList(nn.Linear(features, v.width) for v in vocabularies)
        for number, (projection, vocabulary) in enumerate(zip(self.projections, vocabularies, strict=True)):
            nn.init.normal_(projection.weight, std=0.01)
            nn.init.zeros_(projection.bias)
            self.register_buffer(f"text{number}", vocabulary.embeddings, persistent=False)

    def __len__(self) -> int:
        return len(self.weights)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Unit region embeddings [R, D_k] in each space."""
        return [F.normalize(projection(features).float(), dim=1) for projection in self.projections]

    def losses(
        self,
        features: Tensor,
        targets: Sequence[Tensor],
        counts: tuple[int, ...],
        base: Tensor,
        objectives: Sequence[Objective],
        progress: float,
    ) -> dict[str, Tensor]:
        """Every objective's loss in every further space, ``loss_<name>_<number>``, the first teacher being number 0.

        Args:
            targets: unit [M, D_k] a teacher.
            base: bool [C].
        """
        found = {}
        for number, (student, teacher) in enumerate(zip(self(features), targets, strict=True)):
            words = {"base": self.texts[number][base]}
            regions = Regions(student, teacher, counts, words, self.temperature)
            for objective in objectives:
                value = self.weights[number] * objective(regions, progress)
                found[f"loss_{objective.name}_{number + 1}"] = value
        return found

    @property
    def texts(self) -> list[Tensor]:
        """Text embeddings [C, D_k] in each space."""
        return [self.get_buffer(f"text{number}") for number in range(len(self.weights))]


def build_other_teachers(
    entries: Sequence[dict], features: int, names: tuple[str, ...], temperature: float, objectives: Sequence[Objective]
) -> OtherTeachers | None:
    """The heads of :func:`check_teachers`' entries; None where there are none.

    Raises:
        UserError: an objective over other words than a further teacher has, or a vocabulary of other names.
    """
    if not entries:
        return None
    for objective in objectives:
        if objective.parameters.get("over", "base") != "base":
            raise UserError(f"MODEL.VILD.OBJECTIVES, {objective.name}: with MODEL.VILD.TEACHERS OVER is 'base' alone")
    vocabularies = [Vocabulary.load(e["VOCABULARY"]) for e in entries]
    return OtherTeachers(features, vocabularies, [e["WEIGHT"] for e in entries], names, temperature)
