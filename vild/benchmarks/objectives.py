"""A training step with each objective of MODEL.VILD.OBJECTIVES beside the same step with none (``[]``: the distilled
regions pass the head, nothing is learned of them). Those of feature maps need a live teacher and are not here.

One detector, one batch, the same draws: --batch pictures of noise with eight objects each and --regions distilled
regions a picture, everything of a step but the data. ``times_baseline`` is what the objective itself costs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from vild.benchmarks.inference import CLASSES, add_common_arguments, build_detector, interleaved
from vild.benchmarks.train_step import build_mapper, train_step, write_pictures, write_store
from vild.modeling.objectives import OBJECTIVES, parse_objectives
from vild.modeling.objectives.intermediate import OF_MAPS

NAMES = [name for name, function in OBJECTIVES.items() if function not in OF_MAPS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--objectives", nargs="+", default=NAMES, choices=NAMES, metavar="NAME")
    parser.add_argument("--batch", type=int, default=2, help="pictures a step (2)")
    parser.add_argument("--regions", type=int, default=300, help="distilled regions a picture (300)")


def run(args: argparse.Namespace) -> Iterator[dict]:
    overrides = ["MODEL.VILD.VARIANT", "vild", "MODEL.VILD.OBJECTIVES", []]
    detector = build_detector(args.config_file, CLASSES, args.device, overrides).train()
    step = train_step(detector, args)
    with tempfile.TemporaryDirectory() as folder:
        records = write_pictures(Path(folder), args.batch, args.size)
        store = write_store(Path(folder) / "store", args.batch, args.size, args.regions)
        mapper = build_mapper(args, store)
        inputs = [mapper(r) for r in records]

    def step_with(entries: list[dict]) -> None:
        torch.manual_seed(0)
        detector.roi_heads.objectives = parse_objectives(entries)
        step(inputs)

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
