"""The teacher pass from JPEG files and boxes to a finished store, beside the encoder alone on ready-made tensors (the
share of its throughput that is left) and beside the physical floor: the encoder's FLOPs over the rate of a large matrix
product on the same device in the same precision."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from vild.store.store import StoreWriter
from vild.teacher.clip import PRECISIONS
from vild.teacher.region_pass import Encoder, load_images, write_shards
from vild.teacher.teacher import Teacher, build_teacher
from vild.utils.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--teacher", default="ViT-B-32", help="open_clip model name")
    parser.add_argument("--pretrained", default="random")
    parser.add_argument("--images", type=Path, help="a folder of images (default: synthetic JPEGs, 480 x 640)")
    parser.add_argument("--num-images", type=int, default=512 if gpu else 8)
    parser.add_argument("--regions", type=int, default=300 if gpu else 50, help="boxes an image")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16" if gpu else "fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=2048 if gpu else 128, help="crops a batch")
    parser.add_argument("--workers", type=int, default=8 if gpu else 1)
    parser.add_argument("--repeats", type=int, default=3)


def run(args: argparse.Namespace) -> Iterator[dict]:
    teacher = build_teacher(args.teacher, args.pretrained, args.device, precision=args.precision, compile=args.compile)
    with tempfile.TemporaryDirectory() as folder:
        files = _files(args.images, Path(folder), args.num_images)
        rng = np.random.default_rng(0)
        regions = {i: _boxes(rng, Image.open(file).size, args.regions) for i, file in files.items()}
        crops = args.regions * len(files) * 2
        ready = torch.randn(args.batch, 3, *teacher.size, device=args.device)
        encoder_s, pass_s = [], []
        for repeat in range(args.repeats + 1):  # the first of each is a warm-up; the two take turns: machines are noisy
            encoder_s.append(_timed(teacher, lambda: _encode(teacher, ready, crops)))
            store = Path(folder) / f"store{repeat}"
            pass_s.append(_timed(teacher, lambda store=store: _pass(teacher, files, regions, store, args)))
        baseline, ours = float(np.median(encoder_s[1:])), float(np.median(pass_s[1:]))
        flops, rate = flops_of(teacher, ready[:1]), matrix_rate(teacher)
        what = f"{args.teacher} {args.precision} on {args.device}, {len(files)} images x {args.regions} x 2 crops"
        yield {
            "what": what,
            "baseline": "encoder alone", "baseline_s": baseline, "ours_s": ours, "ratio": baseline / ours,
            "share_of_encoder": baseline / ours, "crops_a_second": crops / ours,
            "encoder_crops_a_second": crops / baseline, "GFLOP_a_crop": flops / 1e9,
            "matrix_TFLOP_a_second": rate / 1e12, "floor_s": crops * flops / rate,
        }  # fmt: skip


def _files(images: Path | None, folder: Path, count: int) -> dict[int, str]:
    if images is not None:
        found = sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not found:
            raise UserError(f"--images {images}: no image in it")
        return {i: str(found[i % len(found)]) for i in range(count)}
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    return {i: str(folder / f"{i}.jpg") for i in range(count)}


def _boxes(rng: np.random.Generator, size: tuple[int, int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of all sizes, log-uniform from 8 pixels to the image, and scores."""
    extent = np.exp(rng.uniform(np.log(8), np.log(size), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array(size) - extent)
    return torch.from_numpy(np.concatenate([corner, corner + extent], 1)).float(), torch.linspace(1, 0, count)


def _encode(teacher: Teacher, ready: torch.Tensor, crops: int) -> None:
    for start in range(0, crops, len(ready)):
        teacher.encode_image(ready[: crops - start])


def _pass(teacher: Teacher, files: dict, regions: dict, folder: Path, args: argparse.Namespace) -> None:
    writer = StoreWriter(folder, {"fingerprint": teacher.fingerprint, "proposals": "benchmark"}, sorted(files))
    shards = list(writer.missing())
    images = load_images(files, [i for _, ids in shards for i in ids], args.workers, args.device == "cuda")
    for _ in write_shards(writer, shards, Encoder(teacher, args.batch), images, regions):
        pass
    writer.finish()


def flops_of(teacher: Teacher, image: torch.Tensor) -> int:
    """FLOPs of one forward. (The counter does not see into attention's fused path.)"""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            teacher.encode_image(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def _timed(teacher: Teacher, function) -> float:
    start = time.perf_counter()
    function()
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(teacher: Teacher, size: int = 0) -> float:
    """FLOP a second of a square matrix product on the teacher's device in its precision (the best of five)."""
    size = size or (8192 if teacher.device.type == "cuda" else 2048)
    dtype = PRECISIONS[teacher.precision]
    a, b = (torch.randn(size, size, device=teacher.device, dtype=dtype) for _ in range(2))
    seconds = min(_timed(teacher, lambda: a @ b) for _ in range(5))
    return 2 * size**3 / seconds
