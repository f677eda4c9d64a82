"""Size and duration of a store before it is built: bytes by arithmetic, seconds from a timed sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from vild.store.shards import plan_size
from vild.utils.errors import count_of

SAMPLE = 64  # images
SAMPLE_SECONDS = 20.0  # a slow device stops earlier


def describe_work(
    counts: Mapping[int, int],
    width: int,
    dtype: str,
    compute: Callable[[Sequence[int]], object] | None = None,
    to_do: Sequence[int] | None = None,
) -> str:
    """Size and estimated duration of a store, in one line.

    Args:
        counts: number of regions by image_id.
        width, dtype: of the embeddings.
        compute: computes the embeddings of some images and returns once they are there (a GPU may be behind); timed on
            a sample. None: no estimate of the duration.
        to_do: the images still to do (default: all).
    """
    total = sum(counts.values())
    regions = f"{total / 1e6:.1f} M regions" if total >= 1e6 else count_of(total, "region")
    text = f"{count_of(len(counts), 'image')}, {regions}: "
    text += f"{_bytes(plan_size(list(counts.values()), width, dtype))} as {dtype}"
    to_do = list(counts if to_do is None else to_do)
    if len(to_do) < len(counts):
        text += f"; still to do: {count_of(len(to_do), 'image')}"
    if compute is None or not any(counts[i] for i in to_do):
        return text
    images, seconds, share = time_sample(counts, compute, to_do)
    sample_time, total_time = _duration(seconds), _duration(seconds / share)
    return f"{text}; a sample of {images} took {sample_time}: about {total_time} on this device"


def time_sample(
    counts: Mapping[int, int], compute: Callable[[Sequence[int]], object], to_do: Sequence[int]
) -> tuple[int, float, float]:
    """Time ``compute`` on images spread evenly over ``to_do``: at most 64 and 2 % of them, about 20 seconds.

    Returns:
        number of images, seconds, their share of all regions to do (0 to 1).
    """
    with_regions = [i for i in to_do if counts[i]]
    size = min(SAMPLE, max(1, len(with_regions) // 50))
    sample = [with_regions[(2 * n + 1) * len(with_regions) // (2 * size)] for n in range(size)]
    start = time.perf_counter()
    compute(sample[:1])  # warm-up: kernel selection, memory
    if (first := time.perf_counter() - start) > SAMPLE_SECONDS or size == 1:
        done, seconds = 1, first
    else:
        done, seconds, start = 0, 0.0, time.perf_counter()
        while done < size and 2 * seconds < SAMPLE_SECONDS:  # each piece is as long as all before it
            piece = sample[done : max(2 * done, 1)]
            compute(piece)
            done += len(piece)
            seconds = time.perf_counter() - start
    regions = sum(counts[i] for i in sample[:done])
    return done, seconds, regions / sum(counts[i] for i in with_regions)


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
