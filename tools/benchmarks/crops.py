"""Crops: boxes of all sizes and shapes to CLIP's input, beside what is done elsewhere.

Baselines: PIL's crop and resize with CLIP's own preprocessing, crop by crop; and torchvision's roi_align at sampling
ratio 2, which does not antialias. Pixels are compared with PIL's before normalisation: ``worst_crop_share_over_2``,
the worst crop's share of pixels off by more than 2/255, ``max_abs_diff_255``, and ``min_cosine`` of the embeddings.
Medians are reported; all use ``--threads``, of which PIL's loop needs one."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.functional import normalize, pil_to_tensor, to_tensor

from benchmarks.common import list_images, min_cosine, random_boxes, row, set_sizes, timed
from vild.teacher.crops import SCALES, enlarge, normalise, to_pixels
from vild.teacher.teacher import Teacher, build_teacher

Batch = tuple[list[Tensor], list[Tensor]]  # images uint8 [3, H_i, W_i], and the boxes float [N_i, 4] of each


GPU_SIZES = {"boxes": 2000, "at_once": 2048, "embedded": 100}
CPU_SIZES = {"boxes": 400, "at_once": 256, "embedded": 20}


def run(args: argparse.Namespace) -> Iterator[dict]:
    set_sizes(args, GPU_SIZES, CPU_SIZES)
    if args.threads:
        torch.set_num_threads(args.threads)
    teacher = build_teacher(args.teacher, args.pretrained, args.device)
    batches = make_batches(args)
    reference = "PIL and CLIP's preprocessing"
    ways = {reference: pil, "roi_align, sampling ratio 2": aligned, "ours": ours}
    embedded = torch.zeros(args.boxes, dtype=torch.bool)
    embedded[torch.linspace(0, args.boxes - 1, min(args.embedded, args.boxes)).long()] = True
    errors, rows = {name: [] for name in ways}, {name: [] for name in ways}
    for batch, chosen in zip(batches, embedded.split([sum(map(len, b)) for _, b in batches]), strict=True):
        crops = {name: way(*batch, teacher) for name, way in ways.items()}
        for name, found in crops.items():
            errors[name].append(difference(pixels(found, teacher), pixels(crops[reference], teacher)))
            rows[name].append(embed(teacher, found[chosen]))

    def accuracy(name: str) -> dict[str, float]:
        share, largest = torch.cat(errors[name]).amax(0).tolist()
        cosine = min_cosine(torch.cat(rows[name]), torch.cat(rows[reference]))
        return {"worst_crop_share_over_2": share, "max_abs_diff_255": round(largest, 3), "min_cosine": cosine}

    ready = torch.randn(embedded.sum(), len(SCALES), 3, *teacher.size, device=args.device)
    functions = [*(partial(crop_all, way, batches, teacher) for way in ways.values()), partial(embed, teacher, ready)]
    *baselines_s, ours_s, encoder_s = timed(functions, args.repeats, summary=statistics.median)
    crops_per_s, encoded_per_s = len(SCALES) * args.boxes / ours_s, len(SCALES) * len(ready) / encoder_s
    what = f"{len(SCALES) * args.boxes} crops of {sum(len(images) for images, _ in batches)} images, {args.device}"
    for name, baseline_s in zip(ways, baselines_s, strict=False):
        theirs = {f"baseline_{key}": value for key, value in accuracy(name).items()}
        speeds = {"crops_per_s": crops_per_s, "share_of_encoder": encoded_per_s / crops_per_s}
        yield row(what, name, baseline_s, ours_s, **speeds, **accuracy("ours"), **theirs)


def make_batches(args: argparse.Namespace) -> list[Batch]:
    """About ``--at-once`` boxes per batch, spread evenly over the images."""
    rng = np.random.default_rng(0)
    if args.images:
        files = list_images(args.images)[: args.boxes]
        images = [pil_to_tensor(Image.open(file).convert("RGB")) for file in files]
    else:
        images = [synthetic_scene(rng) for _ in range(min(8, args.boxes))]
    counts = [len(share) for share in np.array_split(np.arange(args.boxes), len(images))]
    boxes = [boxes_of_all_shapes(rng, n, *p.shape[1:]) for p, n in zip(images, counts, strict=True)]
    step = max(1, args.at_once * len(images) // args.boxes)
    return [(images[i : i + step], boxes[i : i + step]) for i in range(0, len(images), step)]


def crop_all(way: Callable, batches: list[Batch], teacher: Teacher) -> None:
    for batch in batches:
        way(*batch, teacher)


def pil(images: list[Tensor], boxes: list[Tensor], teacher: Teacher) -> Tensor:
    """Normalised crops [N, 2, 3, h, w] on the teacher's device, as of the other ways."""
    mode, crops = Image.Resampling[teacher.interpolation.upper()], []
    for image, of_image in zip(images, boxes, strict=True):
        opened = Image.fromarray(image.permute(1, 2, 0).numpy())
        for window in windows(image, of_image).tolist():
            crop = opened.crop(window).resize(teacher.size[::-1], mode)
            crops.append(normalize(to_tensor(crop), teacher.mean, teacher.std))
    return torch.stack(crops).view(-1, len(SCALES), 3, *teacher.size).to(teacher.device)


def aligned(images: list[Tensor], boxes: list[Tensor], teacher: Teacher) -> Tensor:
    crops = []
    for image, of_image in zip(images, boxes, strict=True):
        normalised = normalise(image.to(teacher.device)[None], teacher.mean, teacher.std)
        rois = windows(image, of_image).to(normalised)
        crops.append(roi_align(normalised, [rois], teacher.size, sampling_ratio=2, aligned=True))
    return torch.cat(crops).view(-1, len(SCALES), 3, *teacher.size)


def ours(images: list[Tensor], boxes: list[Tensor], teacher: Teacher) -> Tensor:
    return normalise(teacher.cut(images, boxes), teacher.mean, teacher.std)


def windows(image: Tensor, boxes: Tensor) -> Tensor:
    """int64 [N * 2, 4]: what each box covers at both scales."""
    return torch.stack([to_pixels(enlarge(boxes, s), *image.shape[1:]) for s in SCALES], 1).flatten(0, 1)


def pixels(crops: Tensor, teacher: Teacher) -> Tensor:
    """Normalised crops [N, S, 3, h, w] to grey levels, float [N * S, 3, h, w] in 0..255."""
    mean, std = (torch.tensor(v, device=crops.device).view(3, 1, 1) for v in (teacher.mean, teacher.std))
    return ((crops * std + mean) * 255).flatten(0, 1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """[N, 2]: of each crop, the share of pixels with a channel off by more than two levels, and the largest error."""
    worst = (a - b).abs().amax(1)  # of the channels; normalising there and back costs some 1e-4
    return torch.stack([(worst > 2.01).float().mean((1, 2)), worst.amax((1, 2))], 1).cpu()


def embed(teacher: Teacher, crops: Tensor) -> Tensor:
    return torch.cat([teacher.encode_image(part) for part in crops.flatten(0, 1).split(64)])


def synthetic_scene(rng: np.random.Generator, height: int = 480, width: int = 640) -> Tensor:
    """uint8 RGB [3, H, W] with what resizing can get wrong: shades, edges, and texture down to single pixels."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 12))).float()
    scene = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0]
    for x0, y0, x1, y1 in to_pixels(boxes_of_all_shapes(rng, 40, height, width), height, width).tolist():
        texture = torch.from_numpy(rng.normal(0, rng.choice([0, 20, 80]), (3, y1 - y0, x1 - x0))).float()
        scene[:, y0:y1, x0:x1] = torch.from_numpy(rng.uniform(0, 255, (3, 1, 1))).float() + texture
    return scene.round().clamp(0, 255).to(torch.uint8)


def boxes_of_all_shapes(rng: np.random.Generator, count: int, height: int, width: int) -> Tensor:
    return torch.from_numpy(random_boxes(rng, count, height, width, smallest=2)).float()
