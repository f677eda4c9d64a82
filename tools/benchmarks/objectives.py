"""A training step with each objective of MODEL.VILD.OBJECTIVES beside the same step with none (``[]``: the distilled
regions pass the head, nothing is learned of them).

One detector, one batch, the same draws: --batch images of noise with eight objects each and --regions distilled
regions an image, everything of a step but the data. ``times_baseline`` is what the objective itself costs. Those of
feature maps find the teacher's (random, of ViT-B/32's shape) ready: what its pass costs is the verb ``teacher``'s."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.structures import Instances

from benchmarks.inference import CLASSES, add_common_arguments, build_detector, interleaved
from benchmarks.train_step import build_mapper, train_step, write_images, write_store
from vild.modeling.objectives import OBJECTIVES, names_with, parse_objectives

NAMES = list(OBJECTIVES)
MAP = (768, 7, 7)  # channels, height and width of ViT-B/32's last feature map


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--objectives", nargs="+", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--batch", type=int, default=2, help="images a step (2)")
    parser.add_argument("--regions", type=int, default=300, help="distilled regions an image (300)")


def run(args: argparse.Namespace) -> Iterator[dict]:
    every = [{"NAME": name} for name in NAMES]
    overrides = ["MODEL.VILD.VARIANT", "vild", "MODEL.VILD.OBJECTIVES", every, "MODEL.VILD.MAP_CHANNELS", MAP[0]]
    detector = build_detector(args.config_file, CLASSES, args.device, overrides).train()
    detector.set_live_teacher(RandomMaps())
    heads = detector.roi_heads
    built = {"roi": heads.adapter, "image": heads.picture_adapter}
    step = train_step(detector, args)
    with tempfile.TemporaryDirectory() as folder:
        records = write_images(Path(folder), args.batch, args.size)
        store = write_store(Path(folder) / "store", args.batch, args.size, args.regions)
        mapper = build_mapper(args, store)
        inputs = [mapper(r) for r in records]
    with_maps = [dict(x, distill=Instances(x["distill"].image_size, **x["distill"].get_fields())) for x in inputs]
    for x in with_maps:
        x["distill"].maps = torch.randn(len(x["distill"]), *MAP)

    def step_with(entries: list[dict]) -> None:
        torch.manual_seed(0)
        objectives = parse_objectives(entries)
        heads.distillation.objectives = objectives
        needed = {o.function.adapter for o in objectives}
        heads.adapter, heads.picture_adapter = (built[kind] if kind in needed else None for kind in built)
        step(with_maps if names_with(objectives, "needs_maps") else inputs)

    settings = [[], *([{"NAME": name}] for name in args.objectives)]
    baseline_s, *seconds = interleaved(
        [lambda entries=entries: step_with(entries) for entries in settings], args.repeats, args.device
    )
    for name, ours_s in zip(args.objectives, seconds, strict=True):
        yield {
            "what": f"step, {name}, {args.batch} x {args.size} px, {args.regions} regions", "baseline": "no objective",
            "baseline_s": baseline_s, "ours_s": ours_s, "ratio": baseline_s / ours_s,
            "times_baseline": ours_s / baseline_s,
        }  # fmt: skip


class RandomMaps:
    """In the live teacher's place: a map for an image, and no pass."""

    def __init__(self):
        self.map = torch.randn(MAP)

    def image_map(self, image: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
        return self.map.to(image.device)
