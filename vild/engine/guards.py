"""Stop a training on a signal (after the current step) or on a loss that is not finite (before the weights change).

In every step all ranks exchange what they have seen, so that they stop together and none waits for another that left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from vild.utils import signals
from vild.utils.errors import Failure
from vild.utils.signals import Ended


def not_finite_part(parts: Sequence[dict[str, Tensor]]) -> tuple[int, dict[str, float]]:
    """The first part of a step that has losses that are NaN or infinite, and these by name; 0 and {} if none has."""
    values = torch.stack([value.float() for losses in parts for value in losses.values()]).tolist()  # one transfer
    rest = iter(values)
    for part, losses in enumerate(parts):
        bad = {name: value for name, value in zip(losses, rest, strict=False) if not math.isfinite(value)}
        if bad:
            return part, bad
    return 0, {}


class TrainingGuard(HookBase):
    """Register it last: it stops the training after all other hooks of the step.

    Costs one exchange of a few bytes over gloo per step: the gradients of all ranks have just been summed. On a GPU the
    host waits for the backward pass here; acting a step later would save that, but weights that are no longer finite
    could reach a checkpoint.
    """

    agreed = False  # whether all ranks stop after this step

    def __init__(self):
        self._number: int | None = None
        # of the current step: inputs and losses of its parts (SOLVER.ACCUMULATE)
        self._parts: list[tuple[list[dict], dict[str, Tensor]]] = []
        self._handles: list = []

    def before_train(self):
        model = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(self._remember_inputs),
            model.register_forward_hook(self._remember_losses),
        ]
        exchange = HookBase()
        exchange.after_backward = self._exchange
        self.trainer._trainer.register_hooks([exchange])  # only the inner trainer calls after_backward

    def after_train(self):
        for handle in self._handles:
            handle.remove()

    def _remember_inputs(self, model: nn.Module, given: tuple) -> None:
        if model.training:
            self._parts.append((given[0], {}))

    def _remember_losses(self, model: nn.Module, given: tuple, losses: dict[str, Tensor]) -> None:
        if model.training:
            self._parts[-1][1].update({name: value.detach() for name, value in losses.items()})

    def _exchange(self) -> None:
        """Exchange losses and signals, between the backward pass and the optimizer's step."""
        part, bad = not_finite_part([losses for _, losses in self._parts])
        everyone = comm.all_gather((signals.pending(), bool(bad)))
        self._number = next((number for number, _ in everyone if number is not None), None)
        if not any(is_bad for _, is_bad in everyone):
            self._parts = []
            return
        try:
            if not bad:  # another rank reports it
                raise SystemExit(1)
            raise self.failure(", ".join(f"{name} is {value}" for name, value in bad.items()), part)
        finally:
            comm.synchronize()  # the launcher ends all ranks when one leaves

    def failure(self, what: str, part: int | None = None) -> Failure:
        """Dump the current step (of its parts the last that began, unless ``part`` says which), and return the error
        to raise."""
        from vild.engine.dump import write_dump

        cfg, iteration, rank = self.trainer.cfg, self.trainer.iter, comm.get_rank()
        several = f"_rank{rank}" if comm.get_world_size() > 1 else ""
        folder = Path(cfg.OUTPUT_DIR) / f"nan_{iteration:07d}{several}"
        part = len(self._parts) - 1 if part is None else part
        inputs, losses = self._parts[part]
        write_dump(folder, cfg, self.trainer.model, inputs, losses, iteration, rank, part)
        images = ", ".join(str(x["file_name"]) for x in inputs)
        return Failure(
            f"step {iteration}: {what}; images {images}; compute it again: python -m vild.engine.replay {folder}"
        )

    def after_step(self):
        # a single process acts on its own signal at once; ranks act on what they exchanged in this step
        number = signals.pending() if comm.get_world_size() == 1 else self._number
        if number is not None:
            self.agreed = True
            raise Ended(number)


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seed torch (RoI sampling draws from it) as every training step of the run does."""
    torch.manual_seed((max(seed, 0) << 32) + (iteration << 8) + rank)
