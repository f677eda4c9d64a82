"""The teacher pass, from JPEG files and boxes to a finished store, beside the encoder alone on tensors in memory.

``share_of_encoder`` is the share of the encoder's throughput that is left. ``floor_s`` is the physical limit: the
encoder's FLOPs over the rate of a large matrix product on the same device in the same precision. Medians."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import interleaved, least, list_images, random_boxes, ratio
from vild.store.store import StoreWriter
from vild.teacher.clip import PRECISIONS
from vild.teacher.region_pass import Encoder, load_images, write_shards
from vild.teacher.teacher import Teacher, build_teacher

SIZES = {"num_images": (512, 8), "regions": (300, 50), "batch_size": (2048, 128), "num_workers": (8, 1),
         "precision": ("bf16", "fp32")}  # defaults on a GPU and on a CPU  # fmt: skip


def run(args: argparse.Namespace) -> Iterator[dict]:
    for name, defaults in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.device == "cpu"])
    teacher = build_teacher(args.teacher, args.pretrained, args.device, precision=args.precision, compile=args.compile)
    with tempfile.TemporaryDirectory() as folder:
        files = _files(args.images, Path(folder), args.num_images)
        rng, scores, regions = np.random.default_rng(0), torch.linspace(1, 0, args.regions), {}
        for i, file in files.items():
            width, height = Image.open(file).size
            regions[i] = torch.from_numpy(random_boxes(rng, args.regions, height, width, smallest=8)).float(), scores
        crops = args.regions * len(files) * 2
        ready = torch.randn(args.batch_size, 3, *teacher.size, device=args.device)
        functions = [
            lambda: _encode(teacher, ready, crops),
            lambda: _pass(teacher, files, regions, Path(tempfile.mkdtemp(dir=folder)) / "store", args),
        ]
        baseline, ours = map(statistics.median, interleaved(functions, args.repeats, args.device))
        flops, rate = flops_of(teacher, ready[:1]), matrix_rate(teacher)
        yield {
            "what": f"{args.teacher} {args.precision} on {args.device}, {len(files)} images x {args.regions} x 2 crops",
            "baseline": "encoder alone", **ratio(baseline, ours), "share_of_encoder": baseline / ours,
            "crops_a_second": crops / ours, "encoder_crops_a_second": crops / baseline, "GFLOP_a_crop": flops / 1e9,
            "matrix_TFLOP_a_second": rate / 1e12, "floor_s": crops * flops / rate,
        }  # fmt: skip


def _files(images: Path | None, folder: Path, count: int) -> dict[int, str]:
    if images is not None:
        found = list_images(images)
        return {i: str(found[i % len(found)]) for i in range(count)}
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return {i: str(folder / f"{i}.jpg") for i in range(count)}


def _encode(teacher: Teacher, ready: torch.Tensor, crops: int) -> None:
    for start in range(0, crops, len(ready)):
        teacher.encode_image(ready[: crops - start])


def _pass(teacher: Teacher, files: dict, regions: dict, folder: Path, args: argparse.Namespace) -> None:
    writer = StoreWriter(folder, {"fingerprint": teacher.fingerprint, "proposals": "benchmark"}, sorted(files))
    shards = list(writer.missing())
    images = load_images(files, [i for _, ids in shards for i in ids], args.num_workers, args.device == "cuda")
    for _ in write_shards(writer, shards, Encoder(teacher, args.batch_size), images, regions):
        pass
    writer.finish()


def flops_of(teacher: Teacher, image: torch.Tensor) -> int:
    """FLOPs of one forward pass. (The counter does not see into the fused path of attention.)"""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            teacher.encode_image(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def matrix_rate(teacher: Teacher) -> float:
    """FLOP per second of a square matrix product on the teacher's device in its precision."""
    size = 8192 if teacher.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=teacher.device, dtype=PRECISIONS[teacher.precision]) for _ in range(2))
    return 2 * size**3 / least([lambda: a @ b], 5, str(teacher.device))[0]
