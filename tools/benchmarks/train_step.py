"""A training step with distillation from a store, beside the same detector without ("text"), and beside Detectron2's
Mask R-CNN of the same backbone, RPN and heads, with a classifier of its own.

The variants are "vild", and "ensemble", whose second head is more network, not overhead. The aim for "vild":
``times_baseline`` at most 1.15. A step is forward, backward and the optimiser's step on images of noise with eight
objects each. "step" rows take inputs that the mapper has made; "step and data" rows also read JPEG files, store and
masks through the mapper, in this process. The only augmentation is the flip, so that every region stays.

A distilled region passes the box head as a sampled RoI does: work that grows with --regions but not with the image,
so that the ratio falls as --size grows. ``times_flops`` is the ratio of the FLOPs of convolutions and matrix products,
the floor of ``times_baseline``; ``regions_at_1.15`` is how many regions per image would cost a factor of 1.15. Every
step draws the same RoIs, so that both sides have as many masks. Least times."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.solver import build_optimizer
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from benchmarks.common import CLASSES, build_detector, random_boxes, random_regions, row, timed, write_store
from vild.config import load_config
from vild.data.mapper import ViLDMapper
from vild.evaluation.cost import count_flops
from vild.store.store import EmbeddingStore

AIM = 1.15
OBJECTS = 8  # per image
PLAIN = "Mask R-CNN"
MASK_RCNN = (
    "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
    "MODEL.ROI_HEADS.NUM_CLASSES", CLASSES,
)  # fmt: skip


def run(args: argparse.Namespace) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as folder:
        records, store = write_data(Path(folder), args)
        steps, flops = {}, {}
        for variant in (PLAIN, "text", *args.variants):
            seed_all_rng(0)  # all with the same backbone, RPN and flips, and so the same proposals and RoIs
            overrides = MASK_RCNN if variant == PLAIN else ("MODEL.VILD.VARIANT", variant)
            detector = build_detector(args.config_file, CLASSES, args.device, *overrides)
            if args.channels_last:
                detector = detector.to(memory_format=torch.channels_last)
            mapper = build_mapper(args, store if variant in args.variants else None)
            step, inputs = train_step(detector.train(), args), [mapper(r) for r in records]
            steps["step", variant] = partial(step, inputs)
            if variant != PLAIN:
                steps["step and data", variant] = lambda step=step, mapper=mapper: step([mapper(r) for r in records])
            flops[variant] = count_flops(partial(step, inputs))
        seconds = dict(zip(steps, timed(steps.values(), args.repeats), strict=True))
    for what, baseline in (("step", "text"), ("step and data", "text"), ("step", PLAIN)):
        for variant in args.variants:
            baseline_s, ours_s = seconds[what, baseline], seconds[what, variant]
            extra = ours_s / baseline_s - 1
            measures = {
                "times_baseline": 1 + extra,
                "times_flops": flops[variant] / flops[baseline],
                "baseline_TFLOP": flops[baseline] / 1e12,
                "ours_TFLOP": flops[variant] / 1e12,
                f"regions_at_{AIM}": round(args.regions * (AIM - 1) / extra) if extra > 0 else None,
            }
            yield row(f"{what}, {variant}, {describe(args)}", baseline, baseline_s, ours_s, **measures)


def describe(args: argparse.Namespace) -> str:
    return f"{args.batch_size} x {args.size} px, {args.regions} regions"


def train_step(detector: nn.Module, args: argparse.Namespace) -> Callable[[list[dict]], None]:
    """A function that takes one step of SGD on its inputs, with a learning rate that leaves the weights unchanged."""
    cfg = load_config(args.config_file, ["SOLVER.BASE_LR", 1e-9, "SOLVER.OPTIMIZER", "SGD"])
    optimizer = build_optimizer(cfg, detector)
    amp = args.device.startswith("cuda") and cfg.SOLVER.AMP.ENABLED

    def step(inputs: list[dict]) -> None:
        torch.manual_seed(0)
        with EventStorage(), torch.autocast("cuda", enabled=amp):
            total = sum(detector(inputs).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def build_mapper(args: argparse.Namespace, store: EmbeddingStore | None) -> ViLDMapper:
    overrides = [
        "INPUT.LARGE_SCALE_JITTER.ENABLED", False, "INPUT.CROP.ENABLED", False, "INPUT.MASK_FORMAT", "polygon",
        "INPUT.MIN_SIZE_TRAIN", (args.size,), "INPUT.MAX_SIZE_TRAIN", args.size,
        "MODEL.VILD.DISTILL_PER_IMAGE", args.regions,
    ]  # fmt: skip
    return ViLDMapper.from_config(load_config(args.config_file, overrides), store)


def write_data(folder: Path, args: argparse.Namespace) -> tuple[list[dict], EmbeddingStore]:
    """JPEG files of noise, as records with boxes and rectangular masks of base classes; and their store."""
    rng, size, records = np.random.default_rng(0), args.size, []
    for image_id in range(args.batch_size):
        path = folder / f"{image_id}.jpg"
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
        record = {"file_name": str(path), "height": size, "width": size, "image_id": image_id, "annotations": []}
        for x0, y0, x1, y1 in random_boxes(rng, OBJECTS, size, size, size / 16).tolist():
            box = {"bbox": [x0, y0, x1, y1], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
            mask, base = [[x0, y0, x1, y0, x1, y1, x0, y1]], int(rng.integers(CLASSES // 4)) * 4
            record["annotations"].append({**box, "segmentation": mask, "category_id": base})
        records.append(record)
    regions = partial(random_regions, count=args.regions, size=size)
    return records, write_store(folder / "store", range(args.batch_size), regions)
