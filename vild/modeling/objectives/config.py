"""``MODEL.VILD.OBJECTIVES``: a list of {NAME, WEIGHT, parameters ...} becomes :class:`Objective` instances."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.objectives.registry import OBJECTIVES, ObjectiveFunction
from vild.modeling.schedule import NOT_NEGATIVE, Range, Schedule, parse_schedule
from vild.utils.errors import UserError
from vild.utils.fingerprint import check_same_teacher
from vild.vocabulary.prompts import clean_name
from vild.vocabulary.vocabulary import Vocabulary

KEY = "MODEL.VILD.OBJECTIVES"


@dataclass(frozen=True)
class Objective:
    """One entry of ``MODEL.VILD.OBJECTIVES``. Weight and numeric parameters are schedules."""

    name: str
    weight: Schedule
    parameters: dict[str, Schedule | str]

    @property
    def function(self) -> ObjectiveFunction:
        return OBJECTIVES[self.name]

    def __call__(self, regions: RegionBatch, progress: float) -> Tensor:
        """The weighted loss at a training progress of 0 to 1."""
        values = {key: v if isinstance(v, str) else v(progress) for key, v in self.parameters.items()}
        return self.weight(progress) * self.function(regions, **values)


def parse_objectives(entries: Sequence[dict]) -> list[Objective]:
    """The objectives of a config.

    Raises:
        UserError: an unknown or duplicate NAME, an unknown parameter, or a value that is not a number or schedule
            within its range.
    """
    objectives: list[Objective] = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("NAME"), str):
            raise UserError(f"{KEY}: {entry} has no NAME")
        name, rest = entry["NAME"], {k: v for k, v in entry.items() if k not in ("NAME", "WEIGHT")}
        if name not in OBJECTIVES:
            raise UserError(f"{KEY}: '{name}' is not one of {', '.join(OBJECTIVES)}")
        if name in (o.name for o in objectives):
            raise UserError(f"{KEY}: duplicate objective '{name}'")
        function, where = OBJECTIVES[name], f"{KEY}, {name}"
        known = {p.name.upper(): p for p in function.parameters}
        for key in rest:
            if key not in known:
                raise UserError(f"{where}: '{key}' is not one of {', '.join(['WEIGHT', *known])}")
        parameters = {
            known[k].name: _parse_value(v, known[k], function.ranges.get(known[k].name), f"{where}, {k}")
            for k, v in rest.items()
        }
        weight = parse_schedule(entry.get("WEIGHT", 1.0), f"{where}, WEIGHT", NOT_NEGATIVE)
        objectives.append(Objective(name, weight, parameters))
    return objectives


def _parse_value(value: object, parameter: inspect.Parameter, limits: Range | None, where: str) -> Schedule | str:
    """Text if the parameter's default is text, else a schedule."""
    if isinstance(parameter.default, str):
        if not isinstance(value, str):
            raise UserError(f"{where}: {value} is not text")
        return value
    return parse_schedule(value, where, limits)


def names_with(objectives: Sequence[Objective], trait: str) -> list[str]:
    """The names of the objectives with a trait of :class:`ObjectiveFunction`, "pairwise" for example."""
    return [o.name for o in objectives if getattr(o.function, trait)]


def word_lists(objectives: Sequence[Objective]) -> list[str]:
    """The vocabulary files that ``OVER`` names."""
    lists = {str(o.parameters.get("over", "base")) for o in objectives}
    return sorted(lists - {"base", "background"})


def load_word_lists(objectives: Sequence[Objective], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The text embeddings [K, D] of :func:`word_lists`, by file.

    Raises:
        UserError: a list whose teacher is not that of ``vocabulary``, or that contains one of its novel names, which
            training must not see.
    """
    marks = zip(vocabulary.names, vocabulary.splits, strict=True)
    novel = {clean_name(name) for name, mark in marks if mark == "novel"}
    loaded = {}
    for path in word_lists(objectives):
        words = Vocabulary.load(path)
        if known := [name for name in words.names if clean_name(name) in novel]:
            raise UserError(f"{KEY}: OVER {path} contains '{known[0]}', a novel name of the vocabulary")
        check_same_teacher(words.fingerprint, f"vocabulary {path}", vocabulary.fingerprint, "the config's vocabulary")
        loaded[path] = words.embeddings
    return loaded
