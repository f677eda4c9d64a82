"""Windows of uint8 images resized to one size, as Pillow resizes them. Pure tensor functions.

Pillow's antialiased resize is two one-dimensional passes with integer weights (22 bits after the point); each pass
rounds half up and clips to 0..255. Since Pillow 13 the columns' pass goes first where the height shrinks by more
than twice as many pixels as the width, else the rows' pass (before: always the rows'). The order matters, because the
values between the passes are rounded and clipped: a fixed order is off by up to 18 grey levels on single pixels.

On an accelerator ``resize_windows`` is exact (vild.teacher.resize_exact.py). On a CPU, torch's own uint8 kernel is
many times as fast, one pass after the other; its weights have about 15 bits, so one value in some hundreds is off by
one level, two at most.

A *job* is an int64 row of JOB: which image, the window in it, the (height, width) that the window is resized to, and
where the output begins in that (negative: with so many rows or columns of padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vild.teacher.resize_exact import GROUP_BYTES, columns_first, resize_matmul


def resize_windows(
    images: Sequence[Tensor],
    jobs: Tensor,
    size: tuple[int, int],
    interpolation: str,
    fill: Sequence[int],
    device: torch.device | str = "cpu",
    memory: int = GROUP_BYTES,
) -> Tensor:
    """Resize the windows ``jobs`` [N, 9] of uint8 images [3, H_i, W_i] (on the CPU, or on ``device``) there.

    Args:
        fill: RGB of the padding.
        memory: bytes for resizing one group of windows on an accelerator.

    Returns:
        uint8 [N, 3, *size] on ``device``
    """
    if torch.device(device).type != "cpu":
        return resize_matmul(images, jobs, size, interpolation, fill, device, memory)
    out = torch.empty((len(jobs), 3, *size), dtype=torch.uint8)
    # where the output shows only a small part of a long window, the exact way costs less
    wasteful = jobs[:, 5] * jobs[:, 6] > 16 * size[0] * size[1]
    if wasteful.any():
        out[wasteful] = resize_matmul(images, jobs[wasteful], size, interpolation, fill)
    rest = (~wasteful).nonzero()[:, 0].tolist()
    channels_last = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]  # the fast layout
    resize = partial(F.interpolate, mode=interpolation, align_corners=False, antialias=True)
    canvas = out.numpy()  # numpy copies in the calling thread: torch would start threads of its own in each
    rows, heights_first = jobs.tolist(), columns_first(jobs.numpy()).tolist()

    def work(numbers: Sequence[int]) -> None:
        for n in numbers:
            image, x0, y0, x1, y1, height, width, top, left = rows[n]
            crop = channels_last[image][None, :, y0:y1, x0:x1]
            if heights_first[n]:  # torch's kernel takes the rows first and skips an axis that keeps its length
                crop = resize(crop, (height, crop.shape[3]))
            crop = resize(crop, (height, width))[0].numpy()
            if crop.shape[1:] != tuple(size):
                canvas[n] = np.reshape(fill, (3, 1, 1))
            source = crop[:, max(top, 0) :, max(left, 0) :]
            target = canvas[n, :, max(-top, 0) :, max(-left, 0) :]
            h, w = np.minimum(source.shape[1:], target.shape[1:])
            target[:, :h, :w] = source[:, :h, :w]

    # One thread per crop, not torch's threads within one: these wait for each other after every operation, which on a
    # machine that is not idle costs many times the operation itself.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, (rest[k : k + 8] for k in range(0, len(rest), 8))))
    return out
