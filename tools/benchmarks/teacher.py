"""The teacher pass, from JPEG files and boxes to a finished store, beside the encoder alone on tensors in memory.

``share_of_encoder`` is the share of the encoder's throughput that is left. ``floor_s`` is the physical limit: the
encoder's FLOPs over the rate of a large matrix product on the same device in the same precision. Medians."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import list_images, random_boxes, row, set_sizes, timed
from vild.evaluation.cost import count_flops
from vild.store.store import StoreWriter
from vild.teacher.clip import PRECISIONS
from vild.teacher.region_pass import Encoder, load_images, write_shards
from vild.teacher.teacher import Teacher, build_teacher

GPU_SIZES = {"num_images": 512, "regions": 300, "batch_size": 2048, "num_workers": 8, "precision": "bf16"}
CPU_SIZES = {"num_images": 8, "regions": 50, "batch_size": 128, "num_workers": 1, "precision": "fp32"}


def run(args: argparse.Namespace) -> Iterator[dict]:
    set_sizes(args, GPU_SIZES, CPU_SIZES)
    teacher = build_teacher(args.teacher, args.pretrained, args.device, precision=args.precision, compile=args.compile)
    with tempfile.TemporaryDirectory() as folder:
        photographs = list_images(args.images) if args.images else write_images(Path(folder), args.num_images)
        files = dict(zip(range(args.num_images), map(str, cycle(photographs)), strict=False))
        rng, scores, regions = np.random.default_rng(0), torch.linspace(1, 0, args.regions), {}
        for i, file in files.items():
            width, height = Image.open(file).size
            regions[i] = torch.from_numpy(random_boxes(rng, args.regions, height, width, smallest=8)).float(), scores
        crops = args.regions * len(files) * 2
        ready = torch.randn(args.batch_size, 3, *teacher.size, device=args.device)

        def encode() -> None:
            for start in range(0, crops, len(ready)):
                teacher.encode_image(ready[: crops - start])

        def teacher_pass() -> None:
            store = Path(tempfile.mkdtemp(dir=folder)) / "store"
            writer = StoreWriter(store, {"fingerprint": teacher.fingerprint, "proposals": "benchmark"}, list(files))
            shards = list(writer.missing())
            images = load_images(teacher, files, regions, list(files), args.num_workers)
            for _ in write_shards(writer, shards, Encoder(teacher, args.batch_size), images, regions):
                pass
            writer.finish()

        baseline_s, ours_s = timed([encode, teacher_pass], args.repeats, summary=statistics.median)
    flops, rate = flops_of(teacher, ready[:1]), matrix_rate(teacher)
    yield row(
        f"{args.teacher} {args.precision} on {args.device}, {len(files)} images x {args.regions} x 2 crops",
        "encoder alone",
        baseline_s,
        ours_s,
        share_of_encoder=baseline_s / ours_s,
        crops_a_second=crops / ours_s,
        encoder_crops_a_second=crops / baseline_s,
        GFLOP_a_crop=flops / 1e9,
        matrix_TFLOP_a_second=rate / 1e12,
        floor_s=crops * flops / rate,
    )


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of 640 x 480 pixels with smooth shades."""
    rng, files = np.random.default_rng(0), [folder / f"{i}.jpg" for i in range(count)]
    for file in files:
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def flops_of(teacher: Teacher, image: torch.Tensor) -> int:
    """FLOPs of one forward pass. (The counter does not see into the fused path of attention.)"""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return count_flops(lambda: teacher.encode_image(image))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def matrix_rate(teacher: Teacher) -> float:
    """FLOP per second of a square matrix product on the teacher's device in its precision."""
    size = 8192 if teacher.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=teacher.device, dtype=PRECISIONS[teacher.precision]) for _ in range(2))
    return 2 * size**3 / timed([lambda: a @ b], 5)[0]
