"""Compute a dumped training step again: ``python -m vild.engine.replay FOLDER`` prints its losses beside those of the
training."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.engine.dump import unpack
from vild.engine.guards import seed_step
from vild.engine.sources import attach_sources, open_live_teacher, open_store, parse_distillation
from vild.engine.trainer import Trainer
from vild.utils.errors import Failure, UserError, one_line_errors
from vild.utils.untrusted import parse_json, read_bytes, refused_as


def replay(folder: str | Path, *overrides: object) -> dict[str, Tensor]:
    """The losses of a dumped step, by name, computed again: on the same machine to the last bit.

    Args:
        overrides: of its config, KEY, VALUE, ...

    Raises:
        UserError: no dump lies there.
        FloatingPointError: the RPN's boxes are not finite, as in the step itself.
    """
    folder = Path(folder)
    if not (folder / "step.json").is_file():
        raise UserError(f"{folder} contains no step: step.json does not exist")
    weights = str(folder / "weights.pth")
    cfg = load_config(str(folder / "config.yaml"), ["MODEL.VILD.VOCABULARY", weights, *overrides])
    model = Trainer.build_model(cfg)
    VildCheckpointer(model).load(weights, checkpointables=[])
    live_teacher = open_live_teacher(cfg, open_store(cfg)) if parse_distillation(cfg).uses_live_teacher else None
    attach_sources(model, cfg, live_teacher)
    with refused_as(f"{folder / 'step.pth'}: is not a step's"):
        step = torch.load(folder / "step.pth", weights_only=True)
        inputs = [{key: unpack(value) for key, value in x.items()} for x in step["inputs"]]
        seed_step(cfg.SEED, step["iteration"] * cfg.SOLVER.ACCUMULATE + step.get("part", 0), step["rank"])
    autocast = torch.autocast(model.device.type, enabled=cfg.SOLVER.AMP.ENABLED)
    with EventStorage(step["iteration"]), autocast:
        return model.train()(inputs)


@one_line_errors
def main() -> None:
    if len(sys.argv) < 2:
        raise UserError("usage: python -m vild.engine.replay FOLDER [KEY VALUE ...]")
    try:
        losses = replay(sys.argv[1], *sys.argv[2:])
    except FloatingPointError as error:  # Detectron2's, of the RPN's boxes: there are no losses then
        raise Failure(str(error)) from error
    path = Path(sys.argv[1]) / "step.json"
    with refused_as(f"{path}: is not a step's"):
        before = dict(parse_json(read_bytes(path))["losses"])
    for name, value in losses.items():
        print(f"{name}: {value.item()} (was {before.get(name)})")


if __name__ == "__main__":
    main()
