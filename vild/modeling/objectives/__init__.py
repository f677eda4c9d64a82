"""What a region can learn from the teacher: one small function an objective, chosen and weighted by config.

``MODEL.VILD.OBJECTIVES`` is a list of {NAME, WEIGHT, parameters ...}; their sum, times ``DISTILL_WEIGHT``, is the
distillation loss; each is logged as ``loss_<NAME>``. Any number may be a schedule (``schedule.py``). ViLD's own is
``[{"NAME": "l1"}]``. How to add one: CONTRIBUTING.md.

Functions take :class:`RegionBatch` and keyword parameters and give a scalar, the mean over regions (or pairs);
no region gives 0 with a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vild.modeling.objectives import contrast, feature, intermediate, relation, targets
from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.objectives.schedule import Schedule, parse_schedule, parse_weight
from vild.utils.errors import UserError
from vild.utils.fingerprint import check_same_teacher
from vild.vocabulary.prompts import clean_name
from vild.vocabulary.vocabulary import Vocabulary

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "l1": feature.l1,
    "smooth_l1": feature.smooth_l1,
    "squared": feature.squared,
    "cosine": feature.cosine,
    "soft_targets": targets.soft_targets,
    "hard_targets": targets.hard_targets,
    "distances": relation.distances,
    "angles": relation.angles,
    "contrast": contrast.contrast,
    "tokens": intermediate.tokens,
    "attention": intermediate.attention,
    "picture_tokens": intermediate.picture_tokens,
}

# What a number may be, at both ends of its schedule, by the parameter's name
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x > 0, "not above 0"),
    "beta": (lambda x: x >= 0, "below 0"),
    "confidence": (lambda x: 0 <= x <= 1, "not within 0 and 1"),
}


@dataclass(frozen=True)
class Objective:
    """One entry of ``MODEL.VILD.OBJECTIVES``; parameters and weight by progress, 0 to 1."""

    name: str
    weight: Schedule
    parameters: dict[str, Schedule | str]

    def __call__(self, regions: RegionBatch, progress: float) -> Tensor:
        values = {key: v if isinstance(v, str) else v(progress) for key, v in self.parameters.items()}
        return self.weight(progress) * OBJECTIVES[self.name](regions, **values)


def parse_objectives(entries: Sequence[dict]) -> list[Objective]:
    """The config's list, checked.

    Raises:
        UserError: an unknown name or parameter, a name twice, or a value that is neither a number nor a schedule, or
            out of its range.
    """
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("NAME"), str):
            raise UserError(f"MODEL.VILD.OBJECTIVES: {entry} has no NAME")
        name, rest = entry["NAME"], {k: v for k, v in entry.items() if k not in ("NAME", "WEIGHT")}
        where = f"MODEL.VILD.OBJECTIVES, {name}"
        if name not in OBJECTIVES:
            raise UserError(f"MODEL.VILD.OBJECTIVES: '{name}' is not one of {', '.join(OBJECTIVES)}")
        if name in (o.name for o in found):
            raise UserError(f"{where}: it stands there twice")
        known = {p.name.upper(): p for p in inspect.signature(OBJECTIVES[name]).parameters.values()}
        del known["REGIONS"]
        for key in rest:
            if key not in known:
                raise UserError(f"{where}: '{key}' is not one of WEIGHT, {', '.join(known)}")
        parameters = {known[k].name: _value(v, known[k], f"{where}, {k}") for k, v in rest.items()}
        found.append(Objective(name, parse_weight(entry.get("WEIGHT", 1.0), f"{where}, WEIGHT"), parameters))
    return found


def _value(value: object, parameter: inspect.Parameter, where: str) -> Schedule | str:
    """Text where the parameter's default is text, else a number or a schedule."""
    if not isinstance(parameter.default, str):
        schedule = parse_schedule(value, where)
        if parameter.name in RANGES:
            fits, wrong = RANGES[parameter.name]
            if not (fits(schedule.first) and fits(schedule.last)):
                raise UserError(f"{where}: {value} is {wrong}")
        return schedule
    if not isinstance(value, str):
        raise UserError(f"{where}: {value} is not text")
    return value


def word_lists(objectives: Sequence[Objective]) -> list[str]:
    """What ``OVER`` names besides the training vocabulary: vocabulary files."""
    lists = {str(o.parameters.get("over", "base")) for o in objectives}
    return sorted(lists - {"base", "background"})


def load_concepts(objectives: Sequence[Objective], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The text embeddings [K, D] of their word lists, by file.

    Raises:
        UserError: a list of another teacher than ``vocabulary``, or with one of its novel names, which training must
            not know.
    """
    marks = zip(vocabulary.names, vocabulary.splits, strict=True)
    novel = {clean_name(name) for name, mark in marks if mark == "novel"}
    found = {}
    for path in word_lists(objectives):
        words = Vocabulary.load(path)
        if known := [name for name in words.names if clean_name(name) in novel]:
            raise UserError(f"MODEL.VILD.OBJECTIVES: OVER {path} has '{known[0]}', a novel name of the vocabulary")
        check_same_teacher(words.fingerprint, f"vocabulary {path}", vocabulary.fingerprint, "the config's vocabulary")
        found[path] = words.embeddings
    return found


def of_maps(objectives: Sequence[Objective]) -> list[str]:
    """The names of those that look at feature maps, which only a live teacher has."""
    return [o.name for o in objectives if OBJECTIVES[o.name] in intermediate.OF_MAPS]


def adapters(objectives: Sequence[Objective]) -> dict[str, bool]:
    """Do they look through the adapter of RoI features ("adapter"), through that of images ("picture_adapter")?"""
    through = {"adapter": intermediate.OF_ADAPTER, "picture_adapter": intermediate.OF_IMAGE_ADAPTER}
    return {key: any(OBJECTIVES[o.name] in group for o in objectives) for key, group in through.items()}


def of_pairs(objectives: Sequence[Objective]) -> list[str]:
    """The names of those that are no mean over regions."""
    return [o.name for o in objectives if OBJECTIVES[o.name] in relation.OF_PAIRS]


def of_opinions(objectives: Sequence[Objective]) -> list[str]:
    """The names of those that imitate what the teacher says of words."""
    return [o.name for o in objectives if OBJECTIVES[o.name] in targets.OF_OPINIONS]


__all__ = [
    "OBJECTIVES",
    "Objective",
    "Regions",
    "adapters",
    "load_concepts",
    "of_maps",
    "of_opinions",
    "of_pairs",
    "parse_objectives",
    "word_lists",
]
