"""Crops: boxes of all sizes and shapes to CLIP's input, beside what people do today.

Baselines: PIL's crop and resize and CLIP's own preprocessing, crop by crop; and torchvision's roi_align at sampling
ratio 2, which does not antialias. Pixels are compared before normalisation, with PIL's: ``worst_crop_share_over_2``,
the worst crop's share of pixels off by more than 2/255, ``max_abs_diff_255``, and ``min_cosine`` of the embeddings.
Baselines and ours take turns, medians are reported; both use ``--threads``, of which PIL's loop has use for one."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.functional import normalize, to_tensor

from vild.teacher.crops import SCALES, crop_batch, enlarge, normalise, to_pixels
from vild.teacher.teacher import Teacher, build_teacher
from vild.utils.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, help="a folder of photographs (default: made-up scenes)")
    parser.add_argument("--boxes", type=int, default=2000, help="in all; each is cropped at 1x and at 1.5x")
    parser.add_argument("--at-once", type=int, help="boxes a call (default: 2048 on a GPU, 256 on a CPU)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--teacher", default="ViT-B-32", help="open_clip model name, or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="random", help="open_clip tag or file of weights, or 'random'")
    parser.add_argument(
        "--embedded", type=int, default=100, help="boxes of which embeddings are compared, evenly taken"
    )


def run(args: argparse.Namespace) -> Iterator[dict]:
    if args.threads:
        torch.set_num_threads(args.threads)
    teacher = build_teacher(args.teacher, args.pretrained, args.device)
    rng = np.random.default_rng(0)
    images = read_images(args.images) if args.images else [made_up(rng) for _ in range(8)]
    images = images[: args.boxes]
    share = np.array_split(np.arange(args.boxes), len(images))
    boxes = [boxes_of_all_shapes(rng, len(s), *p.shape[1:]) for p, s in zip(images, share, strict=True)]
    at_once = args.at_once or (256 if args.device == "cpu" else 2048)
    per_call = max(1, at_once * len(images) // args.boxes)  # images
    starts = range(0, len(images), per_call)
    work = [(images[i : i + per_call], boxes[i : i + per_call]) for i in starts]
    ways = {"PIL and CLIP's preprocessing": pil_chain, "roi_align, sampling ratio 2": by_roi_align, "ours": ours}
    seconds = {name: [] for name in ways}
    for way in ways.values():  # threads and memory, once
        way(*work[0], teacher)
    seconds["the encoder itself"] = []
    wrong = {name: [] for name in ways}
    chosen = set(np.linspace(0, args.boxes - 1, min(args.embedded, args.boxes)).astype(int).tolist())
    cosines = {name: [] for name in ways}
    for repeat in range(args.repeats):
        spent = dict.fromkeys(seconds, 0.0)
        first = 0
        for some, of_each in work:
            crops = {}
            for name, way in ways.items():
                crops[name], took = timed(way, args.device, some, of_each, teacher)
                spent[name] += took
            if repeat == 0:
                count = sum(map(len, of_each))
                rows = [n - first for n in range(first, first + count) if n in chosen]
                first += count
                truth = pixels(crops["PIL and CLIP's preprocessing"], teacher)
                expected = embed(teacher, crops["PIL and CLIP's preprocessing"][rows])
                for name in ways:
                    wrong[name].append(difference(pixels(crops[name], teacher), truth))
                    got, took = timed(embed, args.device, teacher, crops[name][rows])
                    cosines[name].append((got * expected).sum(1))
                    spent["the encoder itself"] += took / len(ways)
        for name, took in spent.items():
            seconds[name].append(took)
    crops = 2 * args.boxes
    ours_s = statistics.median(seconds["ours"])
    for name in list(ways)[:2]:
        took = statistics.median(seconds[name])
        yield {
            "what": f"{crops} crops of {len(images)} images, {args.device}", "baseline": name, "baseline_s": took,
            "ours_s": ours_s, "ratio": took / ours_s, "crops_per_s": crops / ours_s,
            "share_of_encoder": ours_s / crops / (seconds["the encoder itself"][0] / (2 * len(chosen))),
            **accuracy(wrong["ours"], cosines["ours"]),
            **{f"baseline_{key}": value for key, value in accuracy(wrong[name], cosines[name]).items()},
        }  # fmt: skip


def accuracy(wrong: list[Tensor], cosines: list[Tensor]) -> dict[str, float]:
    wrong = torch.cat(wrong)
    return {
        "worst_crop_share_over_2": wrong[:, 0].max().item(),
        "max_abs_diff_255": round(wrong[:, 1].max().item(), 3),
        "min_cosine": torch.cat(cosines).min().item(),
    }


def pil_chain(images: list[Tensor], boxes: list[Tensor], teacher: Teacher) -> Tensor:
    """Normalised [N, 2, 3, h, w], as the other ways; on the teacher's device."""
    mode, crops = Image.Resampling[teacher.interpolation.upper()], []
    for image, of_image in zip(images, boxes, strict=True):
        opened = Image.fromarray(image.permute(1, 2, 0).numpy())
        for window in windows(image, of_image).tolist():
            crop = opened.crop(window).resize(teacher.size[::-1], mode)
            crops.append(normalize(to_tensor(crop), teacher.mean, teacher.std))
    return torch.stack(crops).view(-1, len(SCALES), 3, *teacher.size).to(teacher.device)


def by_roi_align(images: list[Tensor], boxes: list[Tensor], teacher: Teacher) -> Tensor:
    crops = []
    for image, of_image in zip(images, boxes, strict=True):
        normalised = normalise(image.to(teacher.device)[None], teacher.mean, teacher.std)
        rois = windows(image, of_image).to(normalised)
        crops.append(roi_align(normalised, [rois], teacher.size, sampling_ratio=2, aligned=True))
    return torch.cat(crops).view(-1, len(SCALES), 3, *teacher.size)


def ours(images: list[Tensor], boxes: list[Tensor], teacher: Teacher) -> Tensor:
    images = [image.to(teacher.device) for image in images]
    crops = crop_batch(images, boxes, teacher.size, teacher.mean, teacher.interpolation)
    return normalise(crops, teacher.mean, teacher.std)


def windows(image: Tensor, boxes: Tensor) -> Tensor:
    """int64 [N * 2, 4]: what each box covers at both scales."""
    return torch.stack([to_pixels(enlarge(boxes, s), *image.shape[1:]) for s in SCALES], 1).flatten(0, 1)


def pixels(crops: Tensor, teacher: Teacher) -> Tensor:
    """Normalised crops [N, S, 3, h, w] to grey levels, float [N * S, 3, h, w] in 0..255."""
    mean, std = (torch.tensor(v, device=crops.device).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    return ((crops * std + mean) * 255).flatten(0, 1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """[N, 2] of each crop: the share of its pixels of which a channel is off by more than two levels, and the most."""
    worst = (a - b).abs().amax(1)  # of the channels; normalising there and back costs some 1e-4
    return torch.stack([(worst > 2.01).float().mean((1, 2)), worst.amax((1, 2))], 1).cpu()


def embed(teacher: Teacher, crops: Tensor) -> Tensor:
    crops = crops.flatten(0, 1)
    return torch.cat([teacher.encode_image(part) for part in crops.split(64)]) if len(crops) else crops.new_zeros(0, 1)


def timed(function: Callable[..., Tensor], device: str, *args: object) -> tuple[Tensor, float]:
    start = time.perf_counter()
    value = function(*args)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return value, time.perf_counter() - start


def read_images(folder: Path) -> list[Tensor]:
    """uint8 RGB [3, H, W] of every image in the folder."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not files:
        raise UserError(f"--images {folder}: no folder with {', '.join(SUFFIXES)} files")
    return [torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) for f in files]


def made_up(rng: np.random.Generator, height: int = 480, width: int = 640) -> Tensor:
    """A scene with what resizing can get wrong: shades, edges and texture down to single pixels."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 12))).float()
    scene = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
    for x0, y0, x1, y1 in to_pixels(boxes_of_all_shapes(rng, 40, height, width), height, width).tolist():
        texture = torch.from_numpy(rng.normal(0, rng.choice([0, 20, 80]), (3, y1 - y0, x1 - x0))).float()
        scene[:, y0:y1, x0:x1] = torch.from_numpy(rng.uniform(0, 255, (3, 1, 1))).float() + texture
    return scene.round().clamp(0, 255).to(torch.uint8)


def boxes_of_all_shapes(rng: np.random.Generator, count: int, height: int, width: int) -> Tensor:
    """float [count, 4]: sides log-uniform from 2 px to the image's, independent of each other (so long and thin
    ones, too), every fourth at a border."""
    sides = np.exp(rng.uniform(np.log(2), np.log([width, height]), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2))
    corner[::4] = corner[::4].round()
    corner *= np.array([width, height]) - sides
    return torch.from_numpy(np.concatenate([corner, corner + sides], 1)).float()
