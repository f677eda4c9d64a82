"""What is to be shown on a GPU: each check measures, and says whether what was expected holds."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmark import make_benchmark_parser
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from experiments.glyphs import GlyphsRun
from experiments.runner import TOOLS
from PIL import Image

from benchmarks import teacher as teacher_pass
from benchmarks import train_step
from benchmarks.common import CLASSES, build_detector, timed
from benchmarks.crops import boxes_of_all_shapes, synthetic_scene
from benchmarks.inference import spread_scores
from benchmarks.launches import Launches, NoTower, planned_images
from vild.engine.live_targets import LiveTargets
from vild.evaluation.evaluator import coco_records
from vild.modeling.objectives import OBJECTIVES
from vild.teacher.crops import plan_crops
from vild.teacher.region_pass import Encoder, PlannedImage, encode_images
from vild.teacher.resize_exact import resize_matmul
from vild.teacher.teacher import build_teacher

Found = tuple[bool, dict]  # whether it holds, and what was measured


@dataclass(frozen=True)
class Settings:
    """``tiny``: sizes for a CPU in seconds, whose speeds say nothing. ``configs``: the folder of the detectors'."""

    device: str
    tiny: bool
    folder: Path
    teacher: str = "ViT-B-32"
    configs: str = "LVIS"
    images: Path | None = None

    def config(self, variant: str) -> str:
        return f"{self.configs}/{variant}.yaml"

    def flags(self, verb: str, *words: object) -> Namespace:
        """The flags of a benchmark."""
        words = [verb, "--device", self.device, "--repeats", 1 if self.tiny else 3, *words]
        return make_benchmark_parser().parse_args([str(word) for word in words])


@dataclass(frozen=True)
class Check:
    name: str
    expected: str
    run: Callable[[Settings], Found]


def crops(s: Settings) -> Found:
    rng, worst, count = np.random.default_rng(0), 0, 10 if s.tiny else 300
    for interpolation in ("bicubic", "bilinear"):
        for _ in range(1 if s.tiny else 4):
            image = synthetic_scene(rng)
            jobs = plan_crops(boxes_of_all_shapes(rng, count, *image.shape[1:]), *image.shape[1:], (224, 224))
            of_image = torch.cat([torch.zeros(len(jobs), 1, dtype=torch.int64), jobs], 1)
            ours = resize_matmul([image], of_image, (224, 224), interpolation, (0, 0, 0), s.device).cpu().int()
            opened, how = Image.fromarray(image.permute(1, 2, 0).numpy()), Image.Resampling[interpolation.upper()]
            pil = [np.asarray(opened.crop(w).resize((224, 224), how)) for w in jobs[:, :4].tolist()]
            worst = max(worst, (ours - torch.from_numpy(np.stack(pil)).permute(0, 3, 1, 2)).abs().max().item())
    return worst == 0, {"max_abs_diff": worst}


def run_pass(s: Settings, compile: bool) -> Found:
    words = ["--teacher", s.teacher, *(["--images", s.images] if s.images else [])]
    words += ["--num-images", 2, "--regions", 3, "--num-workers", 1] if s.tiny else ["--num-images", 200]
    row = next(teacher_pass.run(s.flags("teacher", *words, *(["--compile"] if compile else []))))
    keys = ("crops_a_second", "encoder_crops_a_second", "share_of_encoder", "matrix_TFLOP_a_second")
    return row["crops_a_second"] >= (27_000 if compile else 21_000), {key: row[key] for key in keys}


def launches(s: Settings) -> Found:
    """Of the pass but for its encoder, beyond the first batch."""
    cuda, regions, count = s.device.startswith("cuda"), 300, 4 if s.tiny else 32
    teacher = NoTower(s.device if cuda else "meta")

    def encode(images: Iterable[PlannedImage]) -> None:
        for _ in encode_images(Encoder(teacher, 2048), images):
            pass

    encode(planned_images(teacher, 4, regions))
    images, batches = list(planned_images(teacher, count, regions)), -(-count * regions * 2 // 2048)
    if cuda:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        with waits() as found, profiler:
            encode(images)
        names = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        started, waited = sum(not n.startswith(("Memcpy", "Memset")) for n in names), len(found)
    else:
        with Launches() as counter:
            encode(images)
        started, waited = counter.launches, counter.transfers
    measures = {"launches_an_image": started / count, "waits_a_batch": waited / batches}
    return started / count <= 600 and waited <= batches, measures


@contextmanager
def waits() -> Iterator[list]:
    """The warnings of ``torch.cuda.set_sync_debug_mode``: of each time the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found.clear()  # that the mode itself is a prototype
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found[:] = [w for w in found if "synchronizing" in str(w.message)]


def empty_step(s: Settings, variant: str, foreground: bool) -> Found:
    args = s.flags("train-step", "--size", 96 if s.tiny else 640, "--regions", 8)
    args.config_file = s.config(variant)
    records, store = train_step.write_data(s.folder, args)
    for record in records:
        record["annotations"] *= foreground
    mapper = train_step.build_mapper(args, store)
    inputs = [mapper(record) for record in records]
    for x in inputs if foreground else ():
        x["distill"] = x["distill"][:0]
    detector = build_detector(args.config_file, CLASSES, s.device, "MODEL.VILD.VARIANT", variant).train()
    train_step.train_step(detector, args)(inputs)
    finite = all(p.grad is None or p.grad.isfinite().all().item() for p in detector.parameters())
    return finite, {"gradients": "finite" if finite else "not finite"}


def train(s: Settings, batch: int, regions: int = 300, *more: str) -> Found:
    size, regions, batch = (64, 8, 1) if s.tiny else (1024, regions, batch)
    words = ("--size", size, "--regions", regions, "--batch-size", batch, "--variants", "vild", *more)
    args = s.flags("train-step", *words)
    args.config_file = s.config("vild")
    if s.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    step, with_data, of_mask_rcnn = train_step.run(args)
    measures = {key: step[key] for key in ("baseline_s", "ours_s", "times_baseline", "times_flops")}
    measures["ours_with_data_s"] = with_data["ours_s"]
    measures |= {f"{key}_of_mask_rcnn": of_mask_rcnn[key] for key in ("times_baseline", "times_flops")}
    if s.device.startswith("cuda"):
        measures["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return step["times_baseline"] <= 1.05 * step["times_flops"], measures


def world(s: Settings) -> Found:
    """Trains with every objective that a store serves, kills it, and continues."""
    run = GlyphsRun(s.folder / "world", smoke=True)
    objectives = [{"NAME": name} for name, each in OBJECTIVES.items() if not each.needs_maps]
    overrides = ("MODEL.VILD.OBJECTIVES", objectives, "SOLVER.AMP.ENABLED", s.device.startswith("cuda"))
    steps = ("SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.MAX_ITER", 10 if s.tiny else 60)
    stage = run.detector("every", "vild", *overrides, *steps)
    run.run(run.store(), run.vocabulary())
    command, silent = [sys.executable, str(TOOLS / stage.command[0]), *stage.command[1:]], subprocess.DEVNULL
    killed = subprocess.Popen(command, stdout=silent, stderr=silent, env={**os.environ, **run.environment})
    first, limit = stage.output / "last_checkpoint", time.monotonic() + 200
    while not first.exists() and killed.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    run.run(stage)
    metrics = run.read_metrics(stage.name)
    return killed.returncode == -signal.SIGKILL, {"objectives": len(objectives), "bbox/AP": metrics["bbox/AP"]}


def evaluation(s: Settings) -> Found:
    height, width = (96, 128) if s.tiny else (800, 1216)
    detector = build_detector(s.config("vild"), CLASSES, s.device, "TEST.DETECTIONS_PER_IMAGE", 300).eval()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    spread_scores(detector, image)
    inputs = [{"image": image, "height": height, "width": width}]
    with torch.inference_mode():
        (found,) = detector.inference(inputs, do_postprocess=False)
        pasted = detector_postprocess(found, height, width)
        steps = [
            partial(detector.inference, inputs, do_postprocess=False),
            partial(detector_postprocess, found, height, width),
            partial(coco_records, pasted, 1),
        ]
        forward_s, paste_s, encode_s = timed(steps, 1 if s.tiny else 5, summary=statistics.median)
    measures = {"forward_s": forward_s, "paste_s": paste_s, "encode_s": encode_s, "masks": len(pasted)}
    return encode_s <= forward_s, measures


def live(s: Settings) -> Found:
    size, regions, seconds, images = (96, 3, {}, 1) if s.tiny else (1024, 300, {}, 2)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator).to(s.device)
    boxes = boxes_of_all_shapes(np.random.default_rng(0), regions, size, size).to(s.device)
    proposals = Instances((size, size), proposal_boxes=Boxes(boxes))
    batch = [image] * images, [(0, 0, size, size)] * images, [proposals] * images
    for precision in ("fp32", "bf16"):
        teacher = build_teacher(s.teacher, "random", s.device, precision=precision)
        targets = LiveTargets(teacher.encode_batch, image_format="RGB", per_image=regions, min_visible=0.0)
        seconds[precision] = timed([partial(targets, *batch)], 1 if s.tiny else 3)[0] / images
    return seconds["bf16"] <= seconds["fp32"] / 2, {f"{p}_s_an_image": t for p, t in seconds.items()}


STEP = "at most 1.05 times its ratio of FLOPs to the same detector without distillation"
CHECKS = [
    Check("crops", "equal to Pillow: largest difference 0", crops),
    Check("launches", "at most 600 kernels an image of 300 regions, one wait a batch, encoder not counted", launches),
    Check("pass", "200 images: 21,000 crops a second on an H100", partial(run_pass, compile=False)),
    Check("no-foreground", "a step without objects works", partial(empty_step, variant="vild", foreground=False)),
    Check(
        "no-regions", "a step of an ensemble without distilled regions works",
        partial(empty_step, variant="ensemble", foreground=True),
    ),
    Check("train-2", STEP, lambda s: train(s, 2)),
    Check("train-8", STEP, lambda s: train(s, 8)),
    Check("train-16", STEP, lambda s: train(s, 16)),
    Check("train-2-regions-50", STEP, lambda s: train(s, 2, 50)),
    Check("train-2-regions-1000", STEP, lambda s: train(s, 2, 1000)),
    Check("train-8-channels-last", STEP, lambda s: train(s, 8, 300, "--channels-last")),
    Check("evaluation", "encoding 300 masks takes no longer than the network", evaluation),
    Check("live", "in bf16 at most half of fp32's time", live),
    Check("pass-compiled", "27,000 crops a second on an H100", partial(run_pass, compile=True)),
    Check("world", "every objective with mixed precision; killed, it continues", world),
]  # fmt: skip
