"""Pillow's resize as matrix products in float32, equal to the last bit, for an accelerator.

Two small matrices per window, in groups of windows of similar size. A call sends one block of bytes to the device
(images, and the numbers of all jobs) and asks nothing back, so the host never waits; what depends on numbers only, as
the weights, is made for all groups at once, since an accelerator's time goes into the number of operations there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}
BITS = 22  # of Pillow's weights, after the point
LOW_BITS = 12  # see find_weights
GROUP_BYTES = 2**28  # memory for resizing one group of windows

# columns of a job (vild/teacher/resize.py)
JOB = ("image", "x0", "y0", "x1", "y1", "height", "width", "top", "left")


def resize_matmul(
    images: Sequence[Tensor],
    jobs: Tensor,
    size: tuple[int, int],
    interpolation: str,
    fill: Sequence[int],
    device: torch.device | str = "cpu",
    memory: int = GROUP_BYTES,
) -> Tensor:
    """As :func:`~vild.teacher.resize.resize_windows`: no loop over windows, in bounded memory."""
    device = torch.device(device)
    out = torch.empty((len(jobs), 3, *size), dtype=torch.uint8, device=device)
    if not len(jobs):
        return out
    jobs = jobs.numpy()
    axes, first = _axes(jobs, images), columns_first(jobs)
    n, m, begin = axes[..., 2], axes[..., 3], axes[..., 4]
    taps = count_taps(n, m, interpolation)
    sides = np.where(first[:, None], size[::-1], size)
    padded = ((begin < 0) | (begin + sides > m)).any(1)
    order, groups = _group(first, n, taps.max(1), size, memory)
    pixels, table = _upload(images, np.concatenate([order[:, None], axes.reshape(-1, 10)[order]], 1), device)
    first, n, taps, padded = first[order], n[order], taps[order], padded[order]
    order, axes = table[:, 0], table[:, 1:].unflatten(1, (2, 5))
    count = torch.arange(max(n.max(), taps.max(), *size), device=device)
    for start, stop, of_round in _rounds(groups, taps.max(1), size, memory):
        begins, weights = find_weights(*axes[start:stop, :, 2:].unbind(2), count, max(size), taps[start:stop].max(),
                                       interpolation)  # fmt: skip
        for a, b in of_round:
            here, turned = slice(a - start, b - start), first[a]
            index, matrices, inside = [], [], []
            for axis, side in enumerate(reversed(size) if turned else size):
                at, step, length, resized, begin = axes[a:b, axis].unbind(1)
                longest, most = int(n[a:b, axis].max()), taps[a:b, axis].max()
                offsets = torch.minimum(count[:longest], length[:, None] - 1)
                index.append(at[:, None] + offsets * step[:, None])
                matrices.append(spread(begins[here, axis, :side], weights[here, axis, :, :side, :most], count, longest))
                if padded[a:b].any():
                    row = begin[:, None] + count[:side]
                    inside.append((row >= 0) & (row < resized[:, None]))
            crops = _resize(pixels[index[0][:, :, None] + index[1][:, None]], *matrices)
            if inside:
                kept = inside[0][:, None, :, None] & inside[1][:, None, None, :]
                crops = torch.where(kept, crops, constant(tuple(fill), torch.uint8, device))
            out[order[a:b]] = crops.transpose(2, 3) if turned else crops
    return out


def columns_first(jobs: np.ndarray) -> np.ndarray:
    """Whether Pillow resizes along the columns (the height) before the rows, bool [N]."""
    _, x0, y0, x1, y1, height, width, _, _ = jobs.T
    shrinks = y1 - y0 - height
    return (shrinks > 0) & (shrinks > 2 * (x1 - x0 - width))


def count_taps(n: np.ndarray, m: np.ndarray, interpolation: str) -> np.ndarray:
    """How many pixels at most enter one, when n are resized to m."""
    return 2 * np.ceil(SUPPORT[interpolation] * np.maximum(n / m, 1)).astype(int) + 1


@lru_cache(64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A constant per channel [C, 1, 1], sent to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).to(device).view(-1, 1, 1)


def _axes(jobs: np.ndarray, images: Sequence[Tensor]) -> np.ndarray:
    """Both axes of each window, int64 [N, 2, 5]; the one that is resized first comes last. Index of its first pixel
    (the sum of both axes' is the window's), step between pixels, number of pixels, number after resizing, where the
    output begins."""
    image, x0, y0, x1, y1, height, width, top, left = jobs.T
    pixels = np.array([i.shape[1] * i.shape[2] for i in images])
    stride = np.array([i.shape[2] for i in images])[image]
    y = np.stack([(pixels.cumsum() - pixels)[image] + y0 * stride, stride, y1 - y0, height, top], 1)
    x = np.stack([x0, np.ones_like(x0), x1 - x0, width, left], 1)
    turned = columns_first(jobs)[:, None, None]
    return np.where(turned, np.stack([x, y], 1), np.stack([y, x], 1))


def _group(
    first: np.ndarray, n: np.ndarray, taps: np.ndarray, size: tuple[int, int], memory: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Windows to resize together: of one order of the passes, of similar size, within ``memory``.

    Returns:
        the order in which groups follow each other [N], and the (start, stop) of each in that.
    """
    p, q = (2 ** np.ceil(np.log2(np.maximum(n, 64))).astype(int)).T
    keys, sort = np.stack([p, q, first], 1), np.lexsort((first, q, p))
    changes = (keys[sort][1:] != keys[sort][:-1]).any(1).nonzero()[0] + 1
    groups = []
    for start, stop in zip([0, *changes], [*changes, len(sort)], strict=True):
        p, q, turned = keys[sort[start]].tolist()
        r, o = size[::-1] if turned else size
        # pixels: index 8, uint8 3, float32 12; products, high and low; matrices with their scatter index
        cost = 23 * p * q + 24 * o * p + 27 * o * r + 8 * (o * q + r * p)
        cost += _weights_cost(taps[sort[start:stop]].max(), size)
        step = max(1, memory // cost)
        groups += [(at, min(at + step, stop)) for at in range(start, stop, step)]
    return sort, groups


def _weights_cost(taps: int, size: tuple[int, int]) -> int:
    """Bytes for a window's weights while they are made."""
    return 2 * max(size) * taps * 64


def _rounds(
    groups: list[tuple[int, int]], taps: np.ndarray, size: tuple[int, int], memory: int
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Groups whose weights are made together, within ``memory``: (start, stop, groups)."""
    members: list[tuple[int, int]] = []
    for start, stop in groups:
        begin = members[0][0] if members else start
        if members and (stop - begin) * _weights_cost(taps[begin:stop].max(), size) > memory:
            yield begin, start, members
            members = []
        members.append((start, stop))
    yield members[0][0], members[-1][1], members


def _upload(images: Sequence[Tensor], table: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels of all images, uint8 [sum of H_i * W_i, 3], and the table, on the device: one transfer, which the host
    does not wait for, if the images are not there yet."""
    interleaved = [image.permute(1, 2, 0) for image in images]
    if device.type == "cpu" or images[0].device.type != "cpu":
        return torch.cat([image.reshape(-1, 3) for image in interleaved]), torch.from_numpy(table).to(device)
    at, total = table.nbytes, table.nbytes + sum(image.numel() for image in images)
    block = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    block[:at].view(torch.int64).copy_(torch.from_numpy(table).view(-1))
    for image in interleaved:
        block[at : (at := at + image.numel())].view(image.shape).copy_(image)
    block = block.to(device, non_blocking=True)
    return block[table.nbytes :].view(-1, 3), block[: table.nbytes].view(torch.int64).view(table.shape)


def find_weights(
    n: Tensor, m: Tensor, start: Tensor, count: Tensor, side: int, taps: int, interpolation: str
) -> tuple[Tensor, Tensor]:
    """Pillow's weights for resizing n [...] pixels to m [...], of which the rows from ``start`` [...] on are wanted.

    Args:
        count: 0, 1, 2, ... on the device.
        side: how many rows.
        taps: see ``count_taps``.

    Returns:
        begins: int64 [..., side], the first pixel that enters a row;
        weights: float32 [..., 2, side, taps] of it and those that follow, in two parts, high and low. A weight is
        (high * 2**LOW_BITS + low) / 2**BITS, both whole numbers of at most 11 bits and a sign. Times pixels of 8 bits
        every product and every sum below 2**24 is exact in float32, which 22 bits at once are not; nor would TF32
        (11 bits), where a user allows it, lose any of a factor.
    """
    n, m, start = n[..., None], m[..., None], start[..., None]
    row = start + count[:side]
    scale = n.double() / m
    stretch = scale.clamp(min=1)
    centre, support = (row + 0.5) * scale, SUPPORT[interpolation] * stretch
    begins = (centre - support + 0.5).long().clamp(min=0)
    end = torch.minimum((centre + support + 0.5).long(), n)  # exclusive
    tap = begins[..., None] + count[:taps]
    weight = _kernel((tap - centre[..., None] + 0.5) / stretch[..., None], interpolation)
    weight = weight * ((tap < end[..., None]) & ((row >= 0) & (row < m))[..., None])
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
    whole = (weight * 2**BITS).add_(torch.copysign(weight.new_full((), 0.5), weight)).trunc_()
    high = (whole / 2**LOW_BITS).round_()
    low = whole - high * 2**LOW_BITS
    return begins, torch.stack([high, low], -3).float()


def spread(begins: Tensor, weights: Tensor, count: Tensor, longest: int) -> Tensor:
    """Matrices float32 [B, 2, side, longest] of the weights of one axis ([B, side] and [B, 2, side, taps])."""
    tap = (begins[..., None] + count[: weights.shape[3]]).clamp_(max=longest - 1)  # those beyond weigh nothing
    matrix = weights.new_zeros((*weights.shape[:3], longest))
    return matrix.scatter_add_(3, tap[:, None].expand(weights.shape), weights)


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _resize(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """uint8 [B, P, Q, 3] to uint8 [B, 3, R, O] by matrices [B, 2, R, P] and [B, 2, O, Q]."""
    b, p, q, _ = pixels.shape
    pixels = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    between = _one_pass(columns, pixels.view(b, 3 * p, q))
    crops = _one_pass(rows, between.view(b, -1, p))  # [B, R, O * 3]
    return crops.to(torch.uint8).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def _one_pass(matrix: Tensor, lines: Tensor) -> Tensor:
    """[B, 2, O, Q] and lines of pixels [B, L, Q] to whole grey levels [B, O, L]: half up and clipped, as Pillow."""
    b, _, o, _ = matrix.shape
    sums = lines.new_empty((b, 2 * o, lines.shape[1]))
    torch.bmm(matrix.flatten(1, 2), lines.transpose(1, 2), out=sums)  # autocast leaves out= alone
    high, low = sums.unflatten(1, (2, o)).unbind(1)
    low.add_(2.0 ** (BITS - 1)).mul_(2.0**-LOW_BITS).floor_()
    return low.add_(high).mul_(2.0 ** (LOW_BITS - BITS)).floor_().clamp_(0, 255)
