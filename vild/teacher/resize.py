"""Windows of uint8 images resized to one size, as Pillow resizes them. Pure tensor functions.

Pillow's antialiased resize is two one-dimensional passes with integer weights (22 bits after the point); each pass
rounds half up and clips to 0..255. Since Pillow 13 the columns' pass goes first where the height shrinks by more
than twice as many pixels as the width, else the rows' pass (before: always the rows'). The order matters, because the
values between the passes are rounded and clipped: a fixed order is off by up to 18 grey levels on single pixels.

``resize_matmul`` is exact on any device: two small matrices per window, in batches of windows of similar size.
``resize_windows`` uses it on an accelerator. On a CPU, torch's own uint8 kernel is many times as fast, one pass
after the other; its weights have about 15 bits, so one value in some hundreds is off by one level, two at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
BITS = 22  # of Pillow's weights, after the point
LOW_BITS = 12  # see weights
GROUP_BYTES = 2**28  # memory for resizing one group of windows


class ResizeJob(NamedTuple):
    """A window of ``images[image]``, what it is resized to, and where the output begins in that (negative: with so many
    rows or columns of padding)."""

    image: int
    x0: int
    y0: int
    x1: int
    y1: int
    height: int
    width: int
    top: int
    left: int

    @property
    def columns_first(self) -> bool:
        """Whether Pillow resizes along the columns (the height) before the rows."""
        shrinks = self.y1 - self.y0 - self.height
        return shrinks > 0 and shrinks > 2 * (self.x1 - self.x0 - self.width)


def resize_windows(
    images: Sequence[Tensor], jobs: Sequence[ResizeJob], size: tuple[int, int], interpolation: str, fill: Sequence[int]
) -> Tensor:
    """uint8 images [3, H_i, W_i] of one device to uint8 [len(jobs), 3, *size] there; ``fill``: RGB of the padding."""
    if images and images[0].device.type != "cpu":
        return resize_matmul(images, jobs, size, interpolation, fill)
    out = torch.empty((len(jobs), 3, *size), dtype=torch.uint8)
    # where the output shows only a small part of a long window, the exact way costs less
    wasteful = [n for n, job in enumerate(jobs) if job.height * job.width > 16 * size[0] * size[1]]
    if wasteful:
        out[wasteful] = resize_matmul(images, [jobs[n] for n in wasteful], size, interpolation, fill)
    rest = sorted(set(range(len(jobs))) - set(wasteful))
    channels_last = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]  # the fast layout
    resize = partial(F.interpolate, mode=interpolation, align_corners=False, antialias=True)
    canvas = out.numpy()  # numpy copies in the calling thread: torch would start threads of its own in each

    def work(numbers: Sequence[int]) -> None:
        for n in numbers:
            job = jobs[n]
            crop = channels_last[job.image][None, :, job.y0 : job.y1, job.x0 : job.x1]
            if job.columns_first:  # torch's kernel takes the rows first and skips an axis that keeps its length
                crop = resize(crop, (job.height, crop.shape[3]))
            crop = resize(crop, (job.height, job.width))[0].numpy()
            if crop.shape[1:] != tuple(size):
                canvas[n] = np.reshape(fill, (3, 1, 1))
            source = crop[:, max(job.top, 0) :, max(job.left, 0) :]
            target = canvas[n, :, max(-job.top, 0) :, max(-job.left, 0) :]
            h, w = np.minimum(source.shape[1:], target.shape[1:])
            target[:, :h, :w] = source[:, :h, :w]

    # One thread per crop, not torch's threads within one: these wait for each other after every operation, which on a
    # machine that is not idle costs many times the operation itself.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, (rest[k : k + 8] for k in range(0, len(rest), 8))))
    return out


def resize_matmul(
    images: Sequence[Tensor], jobs: Sequence[ResizeJob], size: tuple[int, int], interpolation: str, fill: Sequence[int]
) -> Tensor:
    """``resize_windows`` by matrix products in float32, equal to Pillow: no loop over windows, bounded memory."""
    device = images[0].device if images else torch.device("cpu")
    out = torch.empty((len(jobs), 3, *size), dtype=torch.uint8, device=device)
    if not jobs:
        return out
    flat = torch.cat([image.reshape(-1) for image in images])
    first = [0, *accumulate(image.numel() for image in images)]
    colour = torch.tensor(fill, dtype=torch.uint8, device=device).view(3, 1, 1)
    groups = list(_groups(jobs, size))
    order = torch.tensor([n for _, members in groups for n in members])
    channels = torch.tensor([(first[job.image], images[job.image][0].numel()) for job in jobs])[order]
    axes = torch.tensor([_axes(job, images[job.image].shape[2]) for job in jobs])[order]
    # All numbers go to the device at once, and no shape is asked back from it: it never has to wait within a call.
    order, channels, on_device = order.to(device), channels.to(device), axes.to(device)
    start = 0
    for columns_first, members in groups:
        group = slice(start, start := start + len(members))
        (p, p_weights, p_inside), (q, q_weights, q_inside) = (
            _prepare(on_device[group, axis], axes[group, axis], side, interpolation)
            for axis, side in enumerate(reversed(size) if columns_first else size)
        )
        channel = channels[group, :1] + torch.arange(3, device=device) * channels[group, 1:]
        pixels = flat[channel[:, :, None, None] + p[:, None, :, None] + q[:, None, None, :]].float()
        with torch.autocast(device.type, enabled=False):
            between = _round(*(torch.einsum("bcpq,boq->bcpo", pixels, part) for part in q_weights))
            crops = _round(*(torch.einsum("bcpo,brp->bcro", between, part) for part in p_weights)).to(torch.uint8)
        crops = torch.where(p_inside[:, None, :, None] & q_inside[:, None, None, :], crops, colour)
        out[order[group]] = crops.transpose(2, 3) if columns_first else crops
    return out


def _groups(jobs: Sequence[ResizeJob], size: tuple[int, int]) -> Iterator[tuple[bool, list[int]]]:
    """Windows to resize together: of one order of the passes, of similar size, within GROUP_BYTES."""
    like = defaultdict(list)
    for n, job in enumerate(jobs):
        h, w = (max(64, 1 << (x - 1).bit_length()) for x in (job.y1 - job.y0, job.x1 - job.x0))
        like[job.columns_first, h, w].append(n)
    for (columns_first, h, w), members in like.items():
        between = h * size[1] if not columns_first else size[0] * w
        # image: index 8, uint8 1, float32 4; products: low, high and their sum; matrices with their scatter index
        cost = 3 * (13 * h * w + 16 * between + 16 * size[0] * size[1]) + 16 * (size[0] * h + size[1] * w)
        step = max(1, GROUP_BYTES // cost)
        yield from ((columns_first, members[k : k + step]) for k in range(0, len(members), step))


def _axes(job: ResizeJob, image_width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both axes of a window, the one that is resized first comes last: index of its first pixel, step between pixels,
    number of pixels, number after resizing, where the output begins."""
    y = (job.y0 * image_width, image_width, job.y1 - job.y0, job.height, job.top)
    x = (job.x0, 1, job.x1 - job.x0, job.width, job.left)
    return (x, y) if job.columns_first else (y, x)


def _prepare(axis: Tensor, on_cpu: Tensor, size: int, interpolation: str) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Of one axis of B windows ([B, 5], see ``_axes``; also on the CPU): indices of the pixels [B, P], the matrices of
    ``weights``, and which of the output's pixels are not padding, bool [B, size]."""
    start, step, n, m, begin = axis.unbind(1)
    pad, count = int(on_cpu[:, 2].max()), count_taps(on_cpu[:, 2], on_cpu[:, 3], interpolation)
    index = torch.minimum(torch.arange(pad, device=axis.device), n[:, None] - 1)
    row = begin[:, None] + torch.arange(size, device=axis.device)
    inside = (row >= 0) & (row < m[:, None])
    return start[:, None] + index * step[:, None], weights(n, m, begin, size, pad, count, interpolation), inside


def _round(high: Tensor, low: Tensor) -> Tensor:
    """Weighted sums in two parts (see ``weights``) to whole grey levels 0..255, float32: half up, as Pillow."""
    low = low.add_(2.0 ** (BITS - 1)).mul_(2.0**-LOW_BITS).floor_()
    return low.add_(high).mul_(2.0 ** (LOW_BITS - BITS)).floor_().clamp_(0, 255)


def count_taps(n: Tensor, m: Tensor, interpolation: str) -> int:
    """How many pixels at most enter one, when n [B] are resized to m [B]."""
    return 2 * int((SUPPORT[interpolation] * (n / m).clamp(min=1)).max().ceil()) + 1


def weights(
    n: Tensor, m: Tensor, start: Tensor, size: int, pad: int, count: int, interpolation: str
) -> tuple[Tensor, Tensor]:
    """Pillow's matrices for resizing n [B] pixels to m [B], of which the rows from ``start`` [B] on are wanted.
    ``count``: see ``count_taps``.

    Returns:
        high, low: float32 [B, size, pad]; the matrix is (high * 2**LOW_BITS + low) / 2**BITS, whole numbers of at most
        11 bits and a sign. Times pixels of 8 bits every product and every sum below 2**24 is exact in float32, which
        22 bits at once are not; nor would TF32 (11 bits), where a user allows it, lose any of a factor.
    """
    n, m, start = n[:, None], m[:, None], start[:, None]
    row = start + torch.arange(size, device=n.device)
    scale = n.double() / m
    stretch = scale.clamp(min=1)
    centre, support = (row + 0.5) * scale, SUPPORT[interpolation] * stretch
    first = (centre - support + 0.5).long().clamp(min=0)
    last = torch.minimum((centre + support + 0.5).long(), n)  # exclusive
    taps = first[:, :, None] + torch.arange(count, device=n.device)
    weight = _kernel((taps - centre[:, :, None] + 0.5) / stretch[:, :, None], interpolation)
    weight = weight * ((taps < last[:, :, None]) & ((row >= 0) & (row < m))[:, :, None])
    weight = weight / weight.sum(2, keepdim=True).clamp(min=1e-12)
    whole = (weight * 2**BITS + torch.copysign(torch.full_like(weight, 0.5), weight)).trunc()
    high = (whole / 2**LOW_BITS).round()
    low = whole - high * 2**LOW_BITS
    zeros = weight.new_zeros((*row.shape, pad), dtype=torch.float32)
    taps = taps.clamp(min=0, max=pad - 1)  # those beyond weigh nothing
    return zeros.scatter_add(2, taps, high.float()), zeros.scatter_add(2, taps, low.float())


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
