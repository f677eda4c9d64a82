"""What a store will cost, said before it is begun: bytes by arithmetic, seconds from a sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from vild.store.shards import plan_size

SAMPLE = 64  # images
SAMPLE_SECONDS = 20.0  # a slow device gets a smaller sample


def describe_work(
    counts: Mapping[int, int],
    width: int,
    dtype: str,
    compute: Callable[[Sequence[int]], object] | None = None,
    to_do: Sequence[int] | None = None,
) -> str:
    """Size and time of a store in one line.

    Args:
        counts: regions of each image, by image_id.
        width, dtype: of the embeddings.
        compute: does a store's work on some images, from file to embeddings, and throws the result away; it is timed
            on a sample (None: no time is told).
        to_do: the images still to do (default: all).
    """
    text = f"{len(counts):,} images, {_count(sum(counts.values()))} regions: "
    text += f"{_bytes(plan_size(list(counts.values()), width, dtype))} as {dtype}"
    to_do = list(counts if to_do is None else to_do)
    if len(to_do) < len(counts):
        text += f"; {len(to_do):,} images are still to do"
    if compute is None or not any(counts[i] for i in to_do):
        return text
    images, seconds, share = time_sample(counts, compute, to_do)
    took, all_takes = _duration(seconds), _duration(seconds / share)
    return f"{text}; a sample of {images} took {took}: about {all_takes} on this device"


def time_sample(
    counts: Mapping[int, int], compute: Callable[[Sequence[int]], object], to_do: Sequence[int]
) -> tuple[int, float, float]:
    """Time ``compute`` on images spread evenly over ``to_do``: at most 64 and a fiftieth of them, some 20 seconds.

    Returns:
        images computed, seconds they took, their share of all the regions to do (0 to 1).
    """
    with_regions = [i for i in to_do if counts[i]]
    size = min(SAMPLE, max(1, len(with_regions) // 50))
    sample = [with_regions[(2 * n + 1) * len(with_regions) // (2 * size)] for n in range(size)]
    start = time.perf_counter()
    compute(sample[:1])  # the first one pays for what is done once: kernels chosen, memory reserved
    if (first := time.perf_counter() - start) > SAMPLE_SECONDS or size == 1:
        done, seconds = 1, first
    else:
        done, seconds, start = 0, 0.0, time.perf_counter()
        while done < size and 2 * seconds < SAMPLE_SECONDS:  # a piece is as long as all before it
            piece = sample[done : max(2 * done, 1)]
            compute(piece)
            done += len(piece)
            seconds = time.perf_counter() - start
    regions = sum(counts[i] for i in sample[:done])
    return done, seconds, regions / sum(counts[i] for i in with_regions)


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
