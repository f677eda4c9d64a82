"""Further weights of a detector's losses, by name, as functions of progress (``MODEL.VILD.LOSS_WEIGHTS``).

What else weighs a loss stays as it is: this multiplies the result. So L = alpha L_hard + beta L_soft, with alpha of
``loss_text`` and beta of ``loss_soft_targets``, can move from one to the other (Hinton et al. 2015, section 2; there
both are of the same examples, here one is of the sampled RoIs and one of the distilled regions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vild.modeling.objectives.schedule import Schedule, parse_weight
from vild.utils.errors import UserError

KEY = "MODEL.VILD.LOSS_WEIGHTS"


def parse_loss_weights(entries: Sequence[dict]) -> dict[str, Schedule]:
    """The config's list, checked; by name.

    Raises:
        UserError: an entry that is not {LOSS, WEIGHT}, a loss twice, or a weight that is neither a number nor a
            schedule, or below 0.
    """
    found: dict[str, Schedule] = {}
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"LOSS", "WEIGHT"} or not isinstance(entry["LOSS"], str):
            raise UserError(f'{KEY}: {entry} is not {{"LOSS": "loss_text", "WEIGHT": a number or a schedule}}')
        if entry["LOSS"] in found:
            raise UserError(f"{KEY}, {entry['LOSS']}: it stands there twice")
        found[entry["LOSS"]] = parse_weight(entry["WEIGHT"], f"{KEY}, {entry['LOSS']}, WEIGHT")
    return found


def weigh(losses: Mapping[str, Tensor], weights: Mapping[str, Schedule], progress: float) -> dict[str, Tensor]:
    """The losses, those that are named times their weights.

    Raises:
        UserError: there is no such loss.
    """
    for name in weights:
        if name not in losses:
            raise UserError(f"{KEY}: '{name}' is not one of {', '.join(sorted(losses))}")
    return {name: weights[name](progress) * value if name in weights else value for name, value in losses.items()}
