"""One training step in a folder, to be computed again: ``python -m vild.dump FOLDER`` prints its losses.

``weights.pth`` is a checkpoint of the weights before the step, with the vocabulary (running statistics of a BatchNorm
in training have seen the step already), ``config.yaml`` the config, ``step.pth`` the inputs of one rank, iteration and
rank, ``step.json`` what people want to know of it. The store is not needed, a live teacher is. With SyncBN, whose
statistics are of all ranks, the losses are those of this rank's pictures alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from vild.checkpoint import VildCheckpointer, write_checkpoint
from vild.config import load_config
from vild.errors import Failure, UserError, one_line_errors
from vild.files import write_json, write_text
from vild.untrusted import parse_json, read_bytes, refused_as

FIELDS = ("file_name", "image_id", "height", "width", "image", "window", "instances", "distill")


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seed torch (RoI sampling draws from it) as every training step of the run does."""
    torch.manual_seed((max(seed, 0) << 32) + (iteration << 8) + rank)


def pack(value):
    """Detectron2's structures as plain values and tensors, which are loaded without running code."""
    match value:
        case Instances():
            return {"Instances": list(value.image_size), "fields": {k: pack(v) for k, v in value.get_fields().items()}}
        case Boxes():
            return {"Boxes": value.tensor}
        case BitMasks():
            return {"BitMasks": value.tensor}
        case PolygonMasks():
            return {"PolygonMasks": [[torch.as_tensor(p) for p in polygons] for polygons in value.polygons]}
    return value


def unpack(value):
    """What :func:`pack` was given."""
    match value:
        case {"Instances": size, "fields": fields}:
            return Instances(tuple(size), **{k: unpack(v) for k, v in fields.items()})
        case {"Boxes": tensor}:
            return Boxes(tensor)
        case {"BitMasks": tensor}:
            return BitMasks(tensor)
        case {"PolygonMasks": polygons}:
            return PolygonMasks([[p.numpy() for p in of_one] for of_one in polygons])
    return value


def write_dump(
    folder: Path, cfg, model: nn.Module, inputs: list[dict], losses: dict[str, Tensor], iteration: int, rank: int
) -> None:
    """Write a step. ``model``: with the weights before it; ``inputs``: what the model was given."""
    checkpointer = VildCheckpointer(getattr(model, "module", model))
    content = {key: part.state_dict() for key, part in checkpointer.checkpointables.items()}
    write_checkpoint(folder / "weights.pth", {"model": checkpointer.model.state_dict(), **content})
    packed = [{k: pack(x[k]) for k in FIELDS if k in x} for x in inputs]
    write_checkpoint(folder / "step.pth", {"inputs": packed, "iteration": iteration, "rank": rank})
    write_text(folder / "config.yaml", cfg.dump())
    values = {name: str(value.item()) for name, value in losses.items()}  # JSON knows no NaN
    pictures = [str(x["file_name"]) for x in inputs]
    write_json(folder / "step.json", {"iteration": iteration, "rank": rank, "losses": values, "pictures": pictures})


def replay(folder: str | Path, *overrides: object) -> dict[str, Tensor]:
    """The losses of a dumped step, by name, computed again: on the same machine to the last bit.

    Args:
        overrides: of its config, KEY, VALUE, ...

    Raises:
        UserError: no dump lies there.
        FloatingPointError: the RPN's boxes are not finite, as in the step itself.
    """
    from vild.engine import Trainer  # which looks out for what is dumped
    from vild.teaching import open_live_teacher, open_store, set_helpers

    folder = Path(folder)
    if not (folder / "step.json").is_file():
        raise UserError(f"{folder} holds no step: step.json does not exist")
    weights = str(folder / "weights.pth")
    cfg = load_config(str(folder / "config.yaml"), ["MODEL.VILD.VOCABULARY", weights, *overrides])
    model = Trainer.build_model(cfg)
    VildCheckpointer(model).load(weights, checkpointables=[])
    live = cfg.MODEL.VILD.DISTILL_FROM != "store"
    set_helpers(model, cfg, open_live_teacher(cfg, open_store(cfg)) if live else None)
    with refused_as(f"{folder / 'step.pth'}: is not a step's"):
        step = torch.load(folder / "step.pth", weights_only=True)
        inputs = [{key: unpack(value) for key, value in x.items()} for x in step["inputs"]]
        seed_step(cfg.SEED, step["iteration"], step["rank"])
    with EventStorage(step["iteration"]), torch.autocast(cfg.MODEL.DEVICE, enabled=cfg.SOLVER.AMP.ENABLED):
        return model.train()(inputs)


@one_line_errors
def main() -> None:
    if len(sys.argv) < 2:
        raise UserError("usage: python -m vild.dump FOLDER [KEY VALUE ...]")
    try:
        losses = replay(sys.argv[1], *sys.argv[2:])
    except FloatingPointError as error:  # Detectron2's, of the RPN's boxes: there are no losses then
        raise Failure(str(error)) from error
    told = Path(sys.argv[1]) / "step.json"
    with refused_as(f"{told}: is not a step's"):
        before = dict(parse_json(read_bytes(told))["losses"])
    for name, value in losses.items():
        print(f"{name}: {value.item()} (was {before.get(name)})")


if __name__ == "__main__":
    main()
