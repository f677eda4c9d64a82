"""A training step with each objective of MODEL.VILD.OBJECTIVES, beside the same step without any.

The baseline is ``[]``: distilled regions pass the head, and nothing is learned from them; ``times_baseline`` is what
the objective itself costs. One detector, one batch of images of noise with eight objects each, the same random draws.
Objectives on feature maps find the teacher's maps (random, as of ViT-B/32) in memory: what the teacher's pass costs is
measured by the verb ``teacher``. Least times."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from detectron2.structures import Instances

from benchmarks.common import CLASSES, build_detector, row, timed
from benchmarks.train_step import build_mapper, describe, train_step, write_data
from vild.modeling.objectives import OBJECTIVES, names_with, parse_objectives
from vild.utils.errors import UserError

MAP = (768, 7, 7)  # channels, height and width of ViT-B/32's last feature map


def run(args: argparse.Namespace) -> Iterator[dict]:
    names = args.objectives or list(OBJECTIVES)
    if unknown := set(names) - set(OBJECTIVES):
        raise UserError(f"--objectives: {min(unknown)} is not one of {', '.join(OBJECTIVES)}")
    every = [{"NAME": name} for name in OBJECTIVES]
    overrides = ["MODEL.VILD.VARIANT", "vild", "MODEL.VILD.OBJECTIVES", every, "MODEL.VILD.MAP_CHANNELS", MAP[0]]
    detector = build_detector(args.config_file, CLASSES, args.device, *overrides).train()
    detector.set_live_teacher(RandomMaps())
    heads = detector.roi_heads
    built = {"roi": heads.adapter, "image": heads.picture_adapter}
    step = train_step(detector, args)
    with tempfile.TemporaryDirectory() as folder:
        records, store = write_data(Path(folder), args)
        mapper = build_mapper(args, store)
        inputs = [mapper(r) for r in records]
    with_maps = [dict(x, distill=Instances(x["distill"].image_size, **x["distill"].get_fields())) for x in inputs]
    for x in with_maps:
        x["distill"].maps = torch.randn(len(x["distill"]), *MAP)

    def step_with(*names: str) -> None:
        objectives = parse_objectives([{"NAME": name} for name in names])
        heads.distillation.objectives = objectives
        needed = {o.function.adapter for o in objectives}
        heads.adapter, heads.picture_adapter = (built[kind] if kind in needed else None for kind in built)
        step(with_maps if names_with(objectives, "needs_maps") else inputs)

    baseline_s, *seconds = timed([step_with, *(partial(step_with, name) for name in names)], args.repeats)
    for name, ours_s in zip(names, seconds, strict=True):
        what = f"step, {name}, {describe(args)}"
        yield row(what, "no objective", baseline_s, ours_s, times_baseline=ours_s / baseline_s)


class RandomMaps:
    """Stands in for the live teacher: returns a map without encoding the image."""

    def __init__(self):
        self.map = torch.randn(MAP)

    def image_map(self, image: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
        return self.map.to(image.device)
