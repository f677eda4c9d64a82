"""More teachers than one, each with a space, a store and a vocabulary of its own (``MODEL.VILD.TEACHERS``).

By projections: the student gets one into each space from the features of the head that is distilled, and learns the
same objectives there. At test a projection is one more image head, all of which count alike: eq. 5 of the paper fuses
them with the text head. It has a say only about the classes of its own vocabulary. So evaluation fuses; where other
words are asked for, and in the predictor (demo, export), the first teacher's head decides alone.

By average: the student has nothing more; it imitates the mean of the teachers' distributions over the base names. At
test there is nothing to fuse.

In training each teacher counts by a fixed weight, or of each region by how sure it is (``objectives/opinions.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.modeling.losses import cosine_logits
from vild.modeling.objectives import Objective, RegionBatch, of_maps, of_opinions, of_pairs
from vild.modeling.objectives.opinions import shares
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

KEYS = {"STORE", "VOCABULARY", "WEIGHT"}
BY, WEIGHTS = ("projections", "average"), ("fixed", "confidence")


def check_teachers(entries: Sequence[dict]) -> list[dict]:
    """``MODEL.VILD.TEACHERS``, each with a WEIGHT (1 unless given). UserError for another form."""
    for entry in entries:
        if not isinstance(entry, dict) or not {"STORE", "VOCABULARY"} <= entry.keys() <= KEYS:
            raise UserError(f"MODEL.VILD.TEACHERS: {entry} is not {{STORE, VOCABULARY, WEIGHT}}")
        weight = entry.get("WEIGHT", 1.0)
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"MODEL.VILD.TEACHERS: WEIGHT {weight} is no number from 0 on")
    return [{"WEIGHT": 1.0, **entry} for entry in entries]


class OtherTeachers(nn.Module):
    """K further teachers, with projections of head features [R, F] into their spaces unless they are averaged.

    Args:
        vocabularies: one a teacher, all with the names of ``names``.
        weights: of each teacher, the first one's being 1.
        temperature: of the classifier, tau.
        by, weighted: see BY and WEIGHTS.
    """

    def __init__(
        self,
        features: int,
        vocabularies: Sequence[Vocabulary],
        weights: Sequence[float],
        names: tuple[str, ...],
        temperature: float,
        by: str = "projections",
        weighted: str = "fixed",
    ):
        super().__init__()
        for number, vocabulary in enumerate(vocabularies, 1):
            if vocabulary.names != names:
                raise UserError(f"MODEL.VILD.TEACHERS: the vocabulary of teacher {number} names other classes")
        self.names, self.weights, self.temperature = names, tuple(weights), temperature
        self.fingerprints = [vocabulary.fingerprint for vocabulary in vocabularies]
        self.averaged, self.by_confidence = by == "average", weighted == "confidence"
        self.projections = nn.ModuleList()
        for number, vocabulary in enumerate(vocabularies):
            self.register_buffer(f"text{number}", vocabulary.embeddings, persistent=False)
            if not self.averaged:
                self.projections.append(projection := nn.Linear(features, vocabulary.width))
                nn.init.normal_(projection.weight, std=0.01)
                nn.init.zeros_(projection.bias)

    def __len__(self) -> int:
        return len(self.weights)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Unit region embeddings [R, D_k] in each space; none where the teachers are averaged."""
        return [F.normalize(projection(features).float(), dim=1) for projection in self.projections]

    def losses(
        self,
        first: RegionBatch,
        features: Tensor,
        targets: Sequence[Tensor],
        base: Tensor,
        objectives: Sequence[Objective],
        progress: float,
    ) -> dict[str, Tensor]:
        """Every objective's loss by all teachers: ``loss_<name>`` by the first or by their average,
        ``loss_<name>_<number>`` in every further space.

        Args:
            first: what the objectives see of the first teacher.
            features: [M, F], of the head that is distilled.
            targets: unit [M, D_k] a further teacher.
            base: bool [C].
        """
        words, parts = [text[base] for text in self.texts], None
        if self.averaged or self.by_confidence:
            parts = self._shares(first, targets, words)
        if self.averaged:
            joint = replace(first, others=tuple(zip(targets, words, strict=True)), shares=parts)
            return {f"loss_{o.name}": o(joint, progress) for o in objectives}
        if self.by_confidence:
            first = replace(first, weights=parts[0])
        found = {f"loss_{o.name}": o(first, progress) for o in objectives}
        for number, student in enumerate(self(features)):
            regions = RegionBatch(student, targets[number], first.counts, {"base": words[number]}, self.temperature)
            scale = self.weights[number]
            if self.by_confidence:
                regions, scale = replace(regions, weights=parts[number + 1]), 1.0
            for objective in objectives:
                found[f"loss_{objective.name}_{number + 1}"] = scale * objective(regions, progress)
        return found

    @torch.no_grad()
    def _shares(self, first: RegionBatch, targets: Sequence[Tensor], words: Sequence[Tensor]) -> Tensor:
        """See :func:`shares`, over the base names at tau."""
        pairs = zip([first.teacher, *targets], [first.words["base"], *words], strict=True)
        with torch.autocast(first.teacher.device.type, enabled=False):
            logits = [cosine_logits(rows.float(), texts.float(), self.temperature) for rows, texts in pairs]
        return shares(logits, (1.0, *self.weights), self.by_confidence)

    @property
    def texts(self) -> list[Tensor]:
        """Text embeddings [C, D_k] in each space."""
        return [self.get_buffer(f"text{number}") for number in range(len(self.weights))]


def build_other_teachers(
    entries: Sequence[dict],
    features: int,
    names: tuple[str, ...],
    temperature: float,
    objectives: Sequence[Objective],
    by: str,
    weighted: str,
) -> OtherTeachers | None:
    """The further teachers of :func:`check_teachers`' entries; None where there are none.

    Raises:
        UserError: see :func:`check_several`; or a vocabulary of other names.
    """
    check_several(entries, objectives, by, weighted)
    if not entries:
        return None
    vocabularies = [Vocabulary.load(e["VOCABULARY"]) for e in entries]
    return OtherTeachers(features, vocabularies, [e["WEIGHT"] for e in entries], names, temperature, by, weighted)


def check_several(entries: Sequence[dict], objectives: Sequence[Objective], by: str, weighted: str) -> None:
    """UserError for objectives over other words than a further teacher has, that cannot be averaged or weighted, or
    that leave a projection anywhere in its space."""
    key = "MODEL.VILD.SEVERAL_TEACHERS"
    for name, value, known in (("BY", by, BY), ("WEIGHTS", weighted, WEIGHTS)):
        if value not in known:
            raise UserError(f"{key}.{name}: '{value}' is not one of {', '.join(known)}")
    if not entries:
        return
    for objective in objectives:
        if objective.parameters.get("over", "base") != "base":
            raise UserError(f"MODEL.VILD.OBJECTIVES, {objective.name}: with MODEL.VILD.TEACHERS OVER is 'base' alone")
    if by == "average" and not of_opinions(objectives):
        raise UserError(f"{key}.BY is 'average', but MODEL.VILD.OBJECTIVES has neither soft_targets nor hard_targets")
    if by == "projections" and weighted == "confidence" and (pairs := of_pairs(objectives)):
        raise UserError(f"{key}.WEIGHTS is 'confidence', of a region; MODEL.VILD.OBJECTIVES has '{pairs[0]}' of pairs")
    if by == "projections":  # each is fused at test as if it had learned where an embedding lies
        if any(entry["WEIGHT"] == 0 for entry in entries):
            raise UserError("MODEL.VILD.TEACHERS: a WEIGHT of 0 trains no projection; leave that teacher out")
        if len(of_pairs(objectives) + of_maps(objectives)) == len(objectives):
            names = [o.name for o in objectives]
            raise UserError(
                f"MODEL.VILD.TEACHERS: {names} of MODEL.VILD.OBJECTIVES do not say where an embedding lies in a "
                "further teacher's space; add one that does, {'NAME': 'l1'} say"
            )
