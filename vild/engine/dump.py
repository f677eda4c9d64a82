"""Dump a training step to a folder; ``python -m vild.engine.replay FOLDER`` computes it again and prints its losses.

``weights.pth`` is a checkpoint with the weights before the step (the running statistics of BatchNorms in training
already include it) and the vocabulary; ``config.yaml`` the config; ``step.pth`` one rank's inputs (of one part of the
step, with ``SOLVER.ACCUMULATE``), iteration, rank and part; ``step.json`` a summary for people. Replaying needs no
store (with DISTILL_FROM "mixed" its crop mode), but a live teacher. With SyncBN, whose statistics are over all ranks,
the losses are those of this rank's images alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor, nn

from vild.checkpoint.checkpointer import VildCheckpointer, write_checkpoint
from vild.utils.files import write_json, write_text

FIELDS = ("file_name", "image_id", "height", "width", "image", "window", "instances", "distill", "distill_only")


def pack(value):
    """Turn Detectron2's structures into plain values and tensors, which load without running code."""
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
    """The inverse of :func:`pack`."""
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
    folder: Path, cfg, model: nn.Module, inputs: list[dict], losses: dict[str, Tensor], iteration: int, rank: int,
    part: int,
) -> None:  # fmt: skip
    """Write a step. ``model``: with the weights before it; ``inputs``: what the model was given in a ``part`` of the
    step (``SOLVER.ACCUMULATE``)."""
    write_checkpoint(folder / "weights.pth", VildCheckpointer(model).content())
    packed = [{k: pack(x[k]) for k in FIELDS if k in x} for x in inputs]
    write_checkpoint(folder / "step.pth", {"inputs": packed, "iteration": iteration, "rank": rank, "part": part})
    write_text(folder / "config.yaml", cfg.dump())
    values = {name: str(value.item()) for name, value in losses.items()}  # JSON knows no NaN
    images = [str(x["file_name"]) for x in inputs]
    write_json(folder / "step.json", {"iteration": iteration, "rank": rank, "losses": values, "pictures": images})
