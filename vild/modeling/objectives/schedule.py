"""A number that changes during training: a function of progress, 0 at the start and 1 at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vild.utils.errors import UserError

SHAPES = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "step": lambda x: float(x >= 1),
}


@dataclass(frozen=True)
class Schedule:
    """``first`` until ``start``, ``last`` from ``stop`` on, between them by ``shape`` ("step": nothing between)."""

    first: float
    last: float
    shape: str = "linear"
    start: float = 0.0
    stop: float = 1.0

    def __call__(self, progress: float) -> float:
        x = min(max((progress - self.start) / (self.stop - self.start), 0.0), 1.0)
        return self.first + (self.last - self.first) * SHAPES[self.shape](x)


def parse_schedule(value: object, where: str) -> Schedule:
    """A number, or {"FROM": 1.0, "TO": 0.0, "SHAPE": "cosine", "BETWEEN": [0.2, 0.8]} (SHAPE "linear" and BETWEEN
    [0, 1] unless given; "step" needs a BETWEEN that ends below 1, where no step of a training lies).

    Raises:
        UserError: anything else; ``where`` names the key.
    """
    if _is_number(value):
        return Schedule(float(value), float(value))
    wanted = 'a number or {"FROM": a, "TO": b, "SHAPE": "linear, cosine or step", "BETWEEN": [0, 1]}'
    if not isinstance(value, dict) or not {"FROM", "TO"} <= value.keys() <= {"FROM", "TO", "SHAPE", "BETWEEN"}:
        raise UserError(f"{where}: {value!r} is not {wanted}")
    shape, between = value.get("SHAPE", "linear"), value.get("BETWEEN", (0.0, 1.0))
    numbers = [value["FROM"], value["TO"], *between] if isinstance(between, list | tuple) else [None]
    numbers_fit = len(numbers) == 4 and all(map(_is_number, numbers)) and 0 <= numbers[2] < numbers[3] <= 1
    if not isinstance(shape, str) or shape not in SHAPES or not numbers_fit:
        raise UserError(f"{where}: {value!r} is not {wanted}")
    if shape == "step" and numbers[3] >= 1:
        raise UserError(f'{where}: SHAPE "step" changes where BETWEEN ends; give BETWEEN, its end below 1, not {value}')
    return Schedule(float(numbers[0]), float(numbers[1]), shape, float(numbers[2]), float(numbers[3]))


def parse_weight(value: object, where: str) -> Schedule:
    """As :func:`parse_schedule`, of a weight: UserError where it falls below 0."""
    schedule = parse_schedule(value, where)
    if min(schedule.first, schedule.last) < 0:
        raise UserError(f"{where}: {value} is below 0")
    return schedule


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
