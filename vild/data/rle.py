"""COCO's run lengths, checked before C code walks along them (pycocotools reads past the end of a text that is cut off,
and older versions write past the end of a mask)."""

from __future__ import annotations

import numpy as np

_LONGEST_NUMBER = 7  # characters of five bits each: no mask of 2^31 pixels needs more


def run_lengths(counts: str) -> np.ndarray:
    """The numbers that a compressed text stands for, int64: five bits a character, of which a sixth says that more
    follow; from the fourth number on the difference to the last but one. ValueError for what is no such text."""
    bits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(bits):
        return bits
    last = bits & 32 == 0  # of its number
    if bits.min() < 0 or bits.max() > 63 or not last[-1]:
        raise ValueError("no run lengths, or cut off")
    stops = last.nonzero()[0]
    starts = np.concatenate([[0], stops[:-1] + 1])
    place = np.arange(len(bits)) - np.repeat(starts, stops - starts + 1)
    if place.max() >= _LONGEST_NUMBER:
        raise ValueError("a run length of more than 2^31")
    values = np.add.reduceat((bits & 31) << 5 * place, starts)
    values[bits[stops] & 16 > 0] -= 1 << 5 * (place[stops[bits[stops] & 16 > 0]] + 1)
    for first in (1, 2):  # the first number of all is no difference, nor one that others build on
        values[first::2] = values[first::2].cumsum()
    return values


def check_end(counts: str) -> None:
    """ValueError for a text that is cut off within a number, which C code would go on reading: what millions of
    detections are asked, for which :func:`fits` is too slow."""
    if counts and (not counts.isascii() or ord(counts[-1]) - 48 & 32):
        raise ValueError("run lengths that are cut off")


def fits(counts: str | list[int], height: int, width: int) -> bool:
    """Do run lengths (a list, or compressed) make a mask of this size?"""
    if not isinstance(counts, list | str):
        raise ValueError("neither a list nor a text")
    lengths = np.array(counts, np.int64) if isinstance(counts, list) else run_lengths(counts)
    return bool((lengths >= 0).all()) and int(lengths.sum()) == height * width
