"""Numbers of the config that change during training, and the weights of losses that are such numbers.

``MODEL.VILD.LOSS_WEIGHTS`` multiplies any loss of the detector, after its other weights. With L = alpha L_hard +
beta L_soft, alpha weighting ``loss_text`` and beta ``loss_soft_targets``, training can move from one to the other
(Hinton et al. 2015, section 2; there both losses see the same examples, here one sees the sampled RoIs and the other
the distilled regions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vild.utils.errors import UserError

KEY = "MODEL.VILD.LOSS_WEIGHTS"
SHAPES = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "step": lambda x: float(x >= 1),
}

# Ranges of values: the check, and how a message continues after a value that fails it
Range = tuple[Callable[[float], bool], str]
POSITIVE: Range = (lambda x: x > 0, "not above 0")
NOT_NEGATIVE: Range = (lambda x: 0 <= x < math.inf, "below 0 or not finite")
PROBABILITY: Range = (lambda x: 0 <= x <= 1, "not within 0 and 1")


def check_ranges(values: Mapping[str, float], ranges: Mapping[str, Range]) -> None:
    """UserError for a value of the keys below MODEL.VILD that is not within its range."""
    for name, (fits, wrong) in ranges.items():
        if not fits(values[name]):
            raise UserError(f"MODEL.VILD.{name}: {values[name]} is {wrong}")


@dataclass(frozen=True)
class Schedule:
    """A function of training progress (0 at the start, 1 at the end): ``first`` until ``start``, ``last`` from
    ``stop`` on, interpolated by ``shape`` in between ("step" jumps at ``stop``)."""

    first: float
    last: float
    shape: str = "linear"
    start: float = 0.0
    stop: float = 1.0

    def __call__(self, progress: float) -> float:
        x = min(max((progress - self.start) / (self.stop - self.start), 0.0), 1.0)
        return self.first + (self.last - self.first) * SHAPES[self.shape](x)


def parse_schedule(value: object, where: str, limits: Range | None = None) -> Schedule:
    """A number, or {"FROM": 1.0, "TO": 0.0, "SHAPE": "cosine", "BETWEEN": [0.2, 0.8]}. SHAPE defaults to "linear" and
    BETWEEN to [0, 1]; "step" needs a BETWEEN that ends below 1, because no training step has progress 1.

    Raises:
        UserError: anything else, or a value that leaves its ``limits``; ``where`` names the key.
    """
    schedule = Schedule(float(value), float(value)) if _is_number(value) else _parse_entry(value, where)
    if limits is not None:
        fits, wrong = limits
        if not (fits(schedule.first) and fits(schedule.last)):
            raise UserError(f"{where}: {value} is {wrong}")
    return schedule


def _parse_entry(value: object, where: str) -> Schedule:
    wanted = 'a number or {"FROM": a, "TO": b, "SHAPE": "linear, cosine or step", "BETWEEN": [0, 1]}'
    if not isinstance(value, dict) or not {"FROM", "TO"} <= value.keys() <= {"FROM", "TO", "SHAPE", "BETWEEN"}:
        raise UserError(f"{where}: {value!r} is not {wanted}")
    shape, between = value.get("SHAPE", "linear"), value.get("BETWEEN", (0.0, 1.0))
    numbers = [value["FROM"], value["TO"], *between] if isinstance(between, list | tuple) else [None]
    numbers_fit = len(numbers) == 4 and all(map(_is_number, numbers)) and 0 <= numbers[2] < numbers[3] <= 1
    if not isinstance(shape, str) or shape not in SHAPES or not numbers_fit:
        raise UserError(f"{where}: {value!r} is not {wanted}")
    if shape == "step" and numbers[3] >= 1:
        raise UserError(f'{where}: SHAPE "step" jumps where BETWEEN ends, which must be below 1, not {value}')
    return Schedule(float(numbers[0]), float(numbers[1]), shape, float(numbers[2]), float(numbers[3]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parse_loss_weights(entries: Sequence[dict]) -> dict[str, Schedule]:
    """``MODEL.VILD.LOSS_WEIGHTS`` by loss name.

    Raises:
        UserError: an entry that is not {LOSS, WEIGHT}, a duplicate loss, or a weight that is not a number or schedule
            of numbers >= 0.
    """
    weights: dict[str, Schedule] = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"LOSS", "WEIGHT"} or not isinstance(entry["LOSS"], str):
            raise UserError(f'{KEY}: {entry} is not {{"LOSS": "loss_text", "WEIGHT": a number or a schedule}}')
        if entry["LOSS"] in weights:
            raise UserError(f"{KEY}: duplicate loss '{entry['LOSS']}'")
        weights[entry["LOSS"]] = parse_schedule(entry["WEIGHT"], f"{KEY}, {entry['LOSS']}, WEIGHT", NOT_NEGATIVE)
    return weights


def weigh(losses: Mapping[str, Tensor], weights: Mapping[str, Schedule], progress: float) -> dict[str, Tensor]:
    """All losses, those with an entry in ``weights`` multiplied by it.

    Raises:
        UserError: an entry for a loss that does not exist.
    """
    for name in weights:
        if name not in losses:
            raise UserError(f"{KEY}: '{name}' is not one of {', '.join(sorted(losses))}")
    return {name: weights[name](progress) * value if name in weights else value for name, value in losses.items()}
