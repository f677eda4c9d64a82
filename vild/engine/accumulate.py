"""Gradient accumulation (``SOLVER.ACCUMULATE``): a step whose batch passes the model in parts, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from vild.utils.errors import UserError


def check_parts(images: int, parts: int) -> None:
    """UserError unless every process can divide its share of a step's images into equal parts."""
    world = comm.get_world_size()
    if images < 1:
        raise UserError(f"SOLVER.IMS_PER_BATCH: {images} is less than 1")
    if parts < 1 or images % (world * parts):
        raise UserError(
            f"SOLVER.ACCUMULATE: {parts} parts of SOLVER.IMS_PER_BATCH {images} on {world} processes are not "
            "whole numbers of images"
        )


def run_step(trainer: SimpleTrainer, parts: int, before_part: Callable[[int], None]) -> None:
    """Detectron2's ``run_step`` (of ``SimpleTrainer`` or ``AMPTrainer``), in equal parts of its batch.

    Gradients and logged losses are means over the parts, as they are over the processes of a job: each loss is a mean
    over its part, and so are the statistics of BatchNorms.

    Args:
        before_part: called with 0 ... parts - 1.
    """
    model, optimizer = trainer.model, trainer.optimizer
    scaler = getattr(trainer, "grad_scaler", None)  # AMPTrainer's
    start = time.perf_counter()
    data = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start
    size, logged = len(data) // parts, {}
    optimizer.zero_grad()
    for part in range(parts):
        before_part(part)
        summed_later = isinstance(model, DistributedDataParallel) and part < parts - 1
        with model.no_sync() if summed_later else nullcontext():
            with torch.autocast("cuda", trainer.precision) if scaler else nullcontext():
                losses = {k: v / parts for k, v in model(data[part * size : (part + 1) * size]).items()}
                total = sum(losses.values())
            (scaler.scale(total) if scaler else total).backward()
        for name, value in losses.items():
            logged[name] = logged.get(name, 0) + value.detach()
    trainer.after_backward()
    trainer._write_metrics(logged, data_time)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
