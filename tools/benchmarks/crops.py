"""Crops: boxes of all sizes and shapes to CLIP's input, beside what is done elsewhere.

Baselines: PIL's crop and resize with CLIP's own preprocessing, crop by crop; and torchvision's roi_align at sampling
ratio 2, which does not antialias. Pixels are compared with PIL's before normalisation: ``worst_crop_share_over_2``,
the worst crop's share of pixels off by more than 2/255, ``max_abs_diff_255``, and ``min_cosine`` of the embeddings.
Medians are reported; all use ``--threads``, of which PIL's loop needs one."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.functional import normalize, to_tensor

from benchmarks.common import interleaved, list_images, min_cosine, random_boxes, ratio
from vild.teacher.crops import SCALES, crop_batch, enlarge, normalise, to_pixels
from vild.teacher.teacher import Teacher, build_teacher


def run(args: argparse.Namespace) -> Iterator[dict]:
    if args.threads:
        torch.set_num_threads(args.threads)
    teacher = build_teacher(args.teacher, args.pretrained, args.device)
    rng = np.random.default_rng(0)
    if args.images:
        images = [Image.open(file).convert("RGB") for file in list_images(args.images)[: args.boxes]]
        images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    else:
        images = [synthetic_scene(rng) for _ in range(min(8, args.boxes))]
    counts = [len(share) for share in np.array_split(np.arange(args.boxes), len(images))]
    boxes = [boxes_of_all_shapes(rng, n, *p.shape[1:]) for p, n in zip(images, counts, strict=True)]
    at_once = args.at_once or (256 if args.device == "cpu" else 2048)
    images_per_call = max(1, at_once * len(images) // args.boxes)
    starts = range(0, len(images), images_per_call)
    work = [(images[i : i + images_per_call], boxes[i : i + images_per_call]) for i in starts]

    embedded = np.linspace(0, args.boxes - 1, min(args.embedded, args.boxes)).astype(int)
    baselines = {"PIL and CLIP's preprocessing": pil_chain, "roi_align, sampling ratio 2": by_roi_align}
    ways = {**baselines, "ours": ours}
    errors, chosen, first = {name: [] for name in ways}, {name: [] for name in ways}, 0
    for batch in work:
        crops = {name: way(*batch, teacher) for name, way in ways.items()}
        count = len(crops["ours"])
        for name, found in crops.items():
            errors[name].append(
                difference(pixels(found, teacher), pixels(crops["PIL and CLIP's preprocessing"], teacher))
            )
            chosen[name].append(found[embedded[(embedded >= first) & (embedded < first + count)] - first])
        first += count
    chosen = {name: torch.cat(found) for name, found in chosen.items()}
    embeddings = {name: embed(teacher, found) for name, found in chosen.items()}

    def run_way(way) -> None:
        for batch in work:
            way(*batch, teacher)

    functions = [*(lambda way=way: run_way(way) for way in ways.values()), lambda: embed(teacher, chosen["ours"])]
    *baseline_s, ours_s, encoder_s = map(statistics.median, interleaved(functions, args.repeats, args.device))

    def accuracy(name: str) -> dict[str, float]:
        worst = torch.cat(errors[name])
        return {
            "worst_crop_share_over_2": worst[:, 0].max().item(),
            "max_abs_diff_255": round(worst[:, 1].max().item(), 3),
            "min_cosine": min_cosine(embeddings[name], embeddings["PIL and CLIP's preprocessing"]),
        }

    crops = len(SCALES) * args.boxes
    for name, seconds in zip(baselines, baseline_s, strict=True):
        yield {
            "what": f"{crops} crops of {len(images)} images, {args.device}", "baseline": name,
            **ratio(seconds, ours_s), "crops_per_s": crops / ours_s,
            "share_of_encoder": ours_s / crops / (encoder_s / (len(SCALES) * len(embedded))), **accuracy("ours"),
            **{f"baseline_{key}": value for key, value in accuracy(name).items()},
        }  # fmt: skip


def pil_chain(images: list[Tensor], boxes: list[Tensor], teacher: Teacher) -> Tensor:
    """Normalised crops [N, 2, 3, h, w] on the teacher's device, as of the other ways."""
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
