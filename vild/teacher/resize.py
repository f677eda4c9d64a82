"""Windows of uint8 images resized to one size, as Pillow resizes them. Pure tensor functions.

Pillow's antialiased resize is two one-dimensional passes with integer weights (22 bits after the point); each pass
rounds half up and clips to 0..255. Since Pillow 13 the columns' pass goes first where the height shrinks by more
than twice as many pixels as the width, else the rows' pass (before: always the rows'). The order shows, because the
values between the passes are rounded and clipped: a fixed one is off by up to 18 grey levels on single pixels.

``resize_matmul`` is exact on any device: per window two small matrices, windows of like size multiplied together.
``resize_windows`` takes it on an accelerator. On a CPU, torch's own uint8 kernel is many times as fast, one pass
after the other; its weights have about 15 bits, so one value in some hundreds is a level off, two at the very most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
BITS = 22  # of Pillow's weights, after the point
LOW_BITS = 12  # see weights
GROUP_BYTES = 2**28  # what one group of windows may take while it is resized


class ResizeJob(NamedTuple):
    """``image``'s window, resized to height x width, of which the canvas shows what begins at top, left (negative:
    that many rows or columns of the canvas come before it and are filled)."""

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
        """Does Pillow resize along the columns (the height) before the rows?"""
        shrinks = self.y1 - self.y0 - self.height
        return shrinks > 0 and shrinks > 2 * (self.x1 - self.x0 - self.width)


def resize_windows(
    images: Sequence[Tensor], jobs: Sequence[ResizeJob], size: tuple[int, int], interpolation: str, fill: Sequence[int]
) -> Tensor:
    """uint8 images [3, H_i, W_i] of one device to uint8 [len(jobs), 3, *size] there; ``fill``: RGB of the padding."""
    if images and images[0].device.type != "cpu":
        return resize_matmul(images, jobs, size, interpolation, fill)
    out = torch.empty((len(jobs), 3, *size), dtype=torch.uint8)
    # Of a very long window only a small part may be shown: there the exact way costs less.
    wasteful = [n for n, job in enumerate(jobs) if job.height * job.width > 16 * size[0] * size[1]]
    if wasteful:
        out[wasteful] = resize_matmul(images, [jobs[n] for n in wasteful], size, interpolation, fill)
    rest = sorted(set(range(len(jobs))) - set(wasteful))
    channels_last = [p.permute(1, 2, 0).contiguous().permute(2, 0, 1) for p in images]  # the fast layout
    canvas = out.numpy()  # numpy copies in the calling thread: torch would start threads of its own in each

    def work(n: int) -> None:
        job = jobs[n]
        crop = _resize_uint8(channels_last[job.image][:, job.y0 : job.y1, job.x0 : job.x1], job, interpolation)
        if tuple(crop.shape[1:]) == tuple(size):
            canvas[n] = crop.numpy()
        else:
            canvas[n] = np.reshape(fill, (3, 1, 1))
            (to_y, from_y), (to_x, from_x) = (
                _overlap(start, part, whole)
                for start, part, whole in zip((job.top, job.left), crop.shape[1:], size, strict=True)
            )
            canvas[n][:, to_y, to_x] = crop[:, from_y, from_x].numpy()

    for_each(work, rest)
    return out


def for_each(work: Callable[[int], None], numbers: Sequence[int]) -> None:
    """Call a function that frees the interpreter's lock for every number, on as many threads as torch may take.

    One thread a crop, not torch's threads within one: these wait for each other after every operation, which on a
    machine that is not idle costs many times the operation itself.
    """
    threads = min(torch.get_num_threads(), len(numbers))
    if threads < 2:
        for n in numbers:
            work(n)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda k: [work(n) for n in numbers[k : k + 8]], range(0, len(numbers), 8)))


def _resize_uint8(crop: Tensor, job: ResizeJob, interpolation: str) -> Tensor:
    crop = crop[None]
    passes = [(job.height, crop.shape[3])] * job.columns_first + [(job.height, job.width)]
    for size in passes:  # torch's kernel takes the rows first and leaves out an axis that keeps its length
        crop = F.interpolate(crop, size, mode=interpolation, align_corners=False, antialias=True)
    return crop[0]


def _overlap(start: int, part: int, whole: int) -> tuple[slice, slice]:
    """Where a part of that length lies on the canvas, and which of its pixels these are."""
    low, high = max(-start, 0), min(part - start, whole)
    return slice(low, high), slice(low + start, high + start)


def resize_matmul(
    images: Sequence[Tensor], jobs: Sequence[ResizeJob], size: tuple[int, int], interpolation: str, fill: Sequence[int]
) -> Tensor:
    """``resize_windows`` by matrix products in float32, equal to Pillow: no loop over windows, bounded memory."""
    device = images[0].device if images else torch.device("cpu")
    out = torch.empty((len(jobs), 3, *size), dtype=torch.uint8, device=device)
    if not jobs:
        return out
    flat = torch.cat([p.reshape(-1) for p in images])
    first, heights, widths = [0], [p.shape[1] for p in images], [p.shape[2] for p in images]
    for height, width in zip(heights, widths, strict=True):
        first.append(first[-1] + 3 * height * width)
    shape = torch.tensor([(first[j.image], heights[j.image], widths[j.image]) for j in jobs])
    groups = list(_groups(jobs, size))
    order = torch.tensor([n for _, members in groups for n in members])
    table = torch.cat([shape, torch.tensor(jobs)[:, 1:]], 1)[order]
    # All numbers go to the device at once, and no shape is asked back from it: it never has to wait within a call.
    on_device, to = table.to(device), order.to(device)
    colour = torch.tensor(fill, dtype=torch.uint8, device=device).view(3, 1, 1)
    padded, start = any(j.top < 0 or j.left < 0 for j in jobs), 0
    for columns_first, members in groups:
        group = slice(start, start := start + len(members))
        sides = [
            (int(n.max()), count_taps(n, m, interpolation))
            for n, m in ((table[group, 6] - table[group, 4], table[group, 7]),
                         (table[group, 5] - table[group, 3], table[group, 8]))
        ]  # fmt: skip
        out[to[group]] = _resize_group(
            flat, on_device[group], columns_first, sides, size, interpolation, colour if padded else None
        )
    return out


def _groups(jobs: Sequence[ResizeJob], size: tuple[int, int]) -> Iterator[tuple[bool, list[int]]]:
    """Windows that go through one pair of products: of one order, of like size, within GROUP_BYTES."""
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


def _resize_group(
    flat: Tensor,
    jobs: Tensor,
    columns_first: bool,
    sides: Sequence[tuple[int, int]],
    size: tuple[int, int],
    interpolation: str,
    colour: Tensor | None,
) -> Tensor:
    """``flat``: the images' bytes; jobs [B, 11]: offset of the image, its height and width, then ResizeJob's numbers;
    ``sides``: of the windows' heights and widths the greatest, and how many taps they take."""
    offset, image_h, image_w, x0, y0, x1, y1, height, width, top, left = jobs.unbind(1)
    y = (y0, y1 - y0, image_w, height, top, size[0], *sides[0])
    x = (x0, x1 - x0, torch.ones_like(x0), width, left, size[1], *sides[1])
    # q is the axis that is resized first; it lies last
    (p0, p, p_step, *p_out, p_pad, p_taps), (q0, q, q_step, *q_out, q_pad, q_taps) = (x, y) if columns_first else (y, x)
    index = [
        (start[:, None] + torch.minimum(torch.arange(pad, device=flat.device), n[:, None] - 1)) * step[:, None]
        for start, n, step, pad in ((p0, p, p_step, p_pad), (q0, q, q_step, q_pad))
    ]
    plane = offset[:, None] + torch.arange(3, device=flat.device) * (image_h * image_w)[:, None]
    pixels = flat[plane[:, :, None, None] + index[0][:, None, :, None] + index[1][:, None, None, :]].float()
    q_weights = weights(q, *q_out, q_pad, q_taps, interpolation)
    p_weights = weights(p, *p_out, p_pad, p_taps, interpolation)
    with torch.autocast(flat.device.type, enabled=False):
        between = _round(*(torch.einsum("bcpq,boq->bcpo", pixels, part) for part in q_weights))
        out = _round(*(torch.einsum("bcpo,brp->bcro", between, part) for part in p_weights)).to(torch.uint8)
    if columns_first:
        out = out.transpose(2, 3)
    if colour is not None:
        (y_in, x_in) = (
            ((i := torch.arange(n, device=flat.device) + start[:, None]) >= 0) & (i < length[:, None])
            for start, length, n in ((top, height, size[0]), (left, width, size[1]))
        )
        out = torch.where(y_in[:, None, :, None] & x_in[:, None, None, :], out, colour)
    return out


def _round(high: Tensor, low: Tensor) -> Tensor:
    """Weighted sums in two parts to whole grey levels 0..255 (float32): half up, as Pillow."""
    low = low.add_(2.0 ** (BITS - 1)).mul_(2.0**-LOW_BITS).floor_()
    return low.add_(high).mul_(2.0 ** (LOW_BITS - BITS)).floor_().clamp_(0, 255)


def count_taps(n: Tensor, m: Tensor, interpolation: str) -> int:
    """The most pixels that enter one, when n [B] are resized to m [B]."""
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
