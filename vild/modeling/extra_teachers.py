"""Extra teachers beside the first, each with its own space, store and vocabulary (``MODEL.VILD.TEACHERS``).

By projections: the student's distilled head gets one more projection per teacher, into that teacher's space, and learns
the same objectives there. At test the projections are further image heads, all with the same weight, and eq. 5 of the
paper fuses them with the text head. A projection can only score the classes of its own vocabulary. Evaluation therefore
fuses; for other words, and in the predictor (demo, export), the first teacher's head decides alone.

By average: the student has no further layers; it imitates the mean of the teachers' distributions over the base names,
and nothing is fused at test.

In training each teacher has a fixed weight, or one per region that grows with its confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.modeling.losses import cosine_logits
from vild.modeling.objectives import OBJECTIVES, Objective, RegionBatch, names_with
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

KEY, RULES = "MODEL.VILD.TEACHERS", "MODEL.VILD.SEVERAL_TEACHERS"
KEYS, BY, WEIGHTS = {"STORE", "VOCABULARY", "WEIGHT"}, ("projections", "average"), ("fixed", "confidence")
MIN_CONFIDENCE = 1e-3  # teachers with no confidence at all share by their weights


def check_teachers(entries: Sequence[dict]) -> list[dict]:
    """The entries of ``MODEL.VILD.TEACHERS``, {STORE, VOCABULARY, WEIGHT} each, with WEIGHT defaulting to 1.

    Raises:
        UserError: an entry of another form.
    """
    for entry in entries:
        if not isinstance(entry, dict) or not {"STORE", "VOCABULARY"} <= entry.keys() <= KEYS:
            raise UserError(f"{KEY}: {entry} is not {{STORE, VOCABULARY, WEIGHT}}")
        weight = entry.get("WEIGHT", 1.0)
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"{KEY}: WEIGHT {weight} is not a number >= 0")
    return [{"WEIGHT": 1.0, **entry} for entry in entries]


def check_several(entries: Sequence[dict], objectives: Sequence[Objective], by: str, weighted: str) -> None:
    """UserError if these teachers cannot teach the objectives by the rules of ``MODEL.VILD.SEVERAL_TEACHERS``."""
    for name, value, known in (("BY", by, BY), ("WEIGHTS", weighted, WEIGHTS)):
        if value not in known:
            raise UserError(f"{RULES}.{name}: '{value}' is not one of {', '.join(known)}")
    if not entries:
        return
    for objective in objectives:
        if objective.parameters.get("over", "base") != "base":
            raise UserError(f"MODEL.VILD.OBJECTIVES, {objective.name}: with {KEY} OVER can only be 'base'")
    if by == "average":
        if not names_with(objectives, "averages_teachers"):
            able = " or ".join(name for name, function in OBJECTIVES.items() if function.averages_teachers)
            raise UserError(f"{RULES}.BY: 'average' needs {able} in MODEL.VILD.OBJECTIVES")
        return
    pairwise = names_with(objectives, "pairwise")
    if weighted == "confidence" and pairwise:
        raise UserError(
            f"{RULES}.WEIGHTS: 'confidence' weights single regions, but '{pairwise[0]}' of MODEL.VILD.OBJECTIVES "
            "compares pairs"
        )
    # every projection is fused at test, so each must have learned where in the space an embedding belongs
    if any(entry["WEIGHT"] == 0 for entry in entries):
        raise UserError(f"{KEY}: a WEIGHT of 0 trains no projection; leave that teacher out")
    if len(pairwise + names_with(objectives, "needs_maps")) == len(objectives):
        raise UserError(
            f"{KEY}: {[o.name for o in objectives]} of MODEL.VILD.OBJECTIVES do not train the projection into an extra "
            "teacher's space; add an objective that does, such as {'NAME': 'l1'}"
        )


def confidence(logits: Tensor) -> Tensor:
    """1 - H / log C [M], with H the entropy of the softmax of logits [M, C]: 1 if one word has all the probability,
    MIN_CONFIDENCE if it is uniform. Weighting teachers by the entropy of their predictions: Kwon et al. 2020 ("Adaptive
    Knowledge Distillation Based on Entropy"). CA-MKD (Zhang et al. 2022) uses labels, which proposals do not have."""
    log = logits.log_softmax(1)
    entropy = -(log.exp() * log).sum(1)
    return (1 - entropy / math.log(max(logits.shape[1], 2))).clamp(MIN_CONFIDENCE, 1)


def region_shares(logits: Sequence[Tensor], weights: Sequence[float], by_confidence: bool) -> Tensor:
    """The share [K, M] of each of K teachers in each of M regions, summing to 1 over the teachers: proportional to the
    teacher's weight or, ``by_confidence``, to weight times :func:`confidence`."""
    counts = logits[0].new_tensor(weights)[:, None].expand(-1, len(logits[0]))
    if by_confidence:
        counts = counts * torch.stack([confidence(x) for x in logits])
    return counts / counts.sum(0)


class ExtraTeachers(nn.Module):
    """K extra teachers; unless they are averaged, with a projection of head features [R, F] into each one's space.

    Args:
        features: F.
        vocabularies: one per teacher, all of the same ``names``.
        weights: one per teacher, relative to the first teacher's 1.
        temperature: the classifier's, tau.
        by, weighted: one of ``BY`` and one of ``WEIGHTS``.
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
                raise UserError(f"{KEY}: the vocabulary of teacher {number} has other class names")
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

    @classmethod
    def from_config(
        cls, cfg, features: int, names: tuple[str, ...], objectives: Sequence[Objective], temperature: float
    ) -> ExtraTeachers | None:
        """None if the config has no extra teachers.

        Raises:
            UserError: see :func:`check_teachers` and :func:`check_several`; or a vocabulary of other names.
        """
        keys = cfg.MODEL.VILD
        entries = check_teachers(keys.TEACHERS) if keys.VARIANT != "text" else []
        rules = keys.SEVERAL_TEACHERS.BY, keys.SEVERAL_TEACHERS.WEIGHTS
        check_several(entries, objectives, *rules)
        if not entries:
            return None
        vocabularies = [Vocabulary.load(e["VOCABULARY"]) for e in entries]
        return cls(features, vocabularies, [e["WEIGHT"] for e in entries], names, temperature, *rules)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def texts(self) -> list[Tensor]:
        """Text embeddings [C, D_k] in each space."""
        return [self.get_buffer(f"text{number}") for number in range(len(self.weights))]

    def forward(self, features: Tensor) -> list[Tensor]:
        """Unit region embeddings [R, D_k] in each space; an empty list if the teachers are averaged."""
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
        """The losses of all teachers: ``loss_<name>`` from the first one or from their average, and
        ``loss_<name>_<number>`` in the space of each extra one.

        Args:
            first: the regions with the first teacher's embeddings.
            features: [M, F], of the distilled head.
            targets: unit [M, D_k] of each extra teacher.
            base: indices of the base classes, int64 [B].
        """
        words, shares = [text[base] for text in self.texts], None
        if self.averaged or self.by_confidence:
            shares = self._shares(first, targets, words)
        if self.averaged:
            first = replace(first, extra=tuple(zip(targets, words, strict=True)), shares=shares)
        elif self.by_confidence:
            first = replace(first, weights=shares[0])
        losses = {f"loss_{o.name}": o(first, progress) for o in objectives}
        for number, student in enumerate(self(features)):
            regions = RegionBatch(student, targets[number], first.counts, {"base": words[number]}, self.temperature)
            scale = self.weights[number]
            if self.by_confidence:
                regions, scale = replace(regions, weights=shares[number + 1]), 1.0
            for objective in objectives:
                losses[f"loss_{objective.name}_{number + 1}"] = scale * objective(regions, progress)
        return losses

    @torch.no_grad()
    def _shares(self, first: RegionBatch, targets: Sequence[Tensor], words: Sequence[Tensor]) -> Tensor:
        """:func:`region_shares` over the base names at tau."""
        pairs = zip([first.teacher, *targets], [first.words["base"], *words], strict=True)
        logits = [cosine_logits(rows.float(), texts.float(), self.temperature) for rows, texts in pairs]
        return region_shares(logits, (1.0, *self.weights), self.by_confidence)
