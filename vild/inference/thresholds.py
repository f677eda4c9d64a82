"""Score thresholds: one for all words (``THRESHOLD`` by default) and those of single words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vild.modeling.classifier import ClassSet
from vild.utils.command_line import THRESHOLD
from vild.utils.errors import UserError


def fraction(value: object, what: str) -> float:
    """A number within 0 and 1, of Python, NumPy or PyTorch; UserError for anything else."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not 0 <= number <= 1:
        shown = repr(value) if isinstance(value, str | bytes) else value
        raise UserError(f"{what} {shown}: must be a number between 0 and 1")
    return number


def parse_thresholds(pairs: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Parse "kite=0.3" strings to scores by name; UserError for another form or a name not in ``names``."""
    found = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"threshold '{pair}': write NAME=SCORE, for example kite=0.3") from None
        if name.strip() not in names:
            raise UserError(f"threshold '{pair}': '{name.strip()}' is not in the vocabulary")
    return found


def of_single_words(thresholds: Mapping[str, float] | None, names: Sequence[str]) -> Tensor | None:
    """[C], -1 for a word without one; None if no word has one. UserError for a wrong one or an unknown word."""
    if thresholds is not None and not isinstance(thresholds, Mapping):
        raise UserError(f"thresholds: {thresholds!r} is not a dict such as {{'kite': 0.3}}")
    own = {}
    for name, score in (thresholds or {}).items():
        if name not in names:
            raise UserError(f"thresholds: '{name}' is not in the vocabulary")
        own[name] = fraction(score, f"thresholds: '{name}' has")
    return torch.tensor([own.get(name, -1.0) for name in names]) if own else None


def above(classes: ClassSet, threshold: float | None, own: Tensor | None, least: float) -> ClassSet:
    """The classes with the thresholds of a call.

    Args:
        threshold: of the call. None: ``own``, and ``THRESHOLD`` for a word without one.
        own: see :func:`of_single_words`.
        least: the lowest score that the detector reports at all.
    """
    threshold = None if threshold is None else fraction(threshold, "threshold")
    least = max(THRESHOLD if threshold is None else threshold, least)
    if own is None:
        return replace(classes, least=least)
    own = torch.where(own < 0, least, own.clamp(min=threshold or 0))
    return replace(classes, thresholds=own.to(classes.text.device), least=own.min().item())
