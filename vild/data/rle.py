"""Validation of COCO's run-length encoding for pycocotools, which reads beyond the end of a truncated string and in
older versions writes beyond the end of the mask."""

from __future__ import annotations

import numpy as np

_LONGEST_NUMBER = 7  # characters of five bits each: no mask of 2^31 pixels needs more


def run_lengths(counts: str) -> np.ndarray:
    """Decode a compressed string into run lengths, int64; ValueError if it is invalid.

    A character has five bits and a continuation bit; from the fourth number on, a number is the difference to the last
    but one.
    """
    bits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(bits):
        return bits
    last = bits & 32 == 0  # of its number
    if bits.min() < 0 or bits.max() > 63 or not last[-1]:
        raise ValueError("not run lengths, or truncated")
    stops = last.nonzero()[0]
    starts = np.concatenate([[0], stops[:-1] + 1])
    place = np.arange(len(bits)) - np.repeat(starts, stops - starts + 1)
    if place.max() >= _LONGEST_NUMBER:
        raise ValueError("a run length of more than 2^31")
    values = np.add.reduceat((bits & 31) << 5 * place, starts)
    values[bits[stops] & 16 > 0] -= 1 << 5 * (place[stops[bits[stops] & 16 > 0]] + 1)
    for first in (1, 2):  # neither the first number is a difference, nor is any relative to it
        values[first::2] = values[first::2].cumsum()
    return values


def check_end(counts: str) -> None:
    """ValueError for a string truncated within a number, which C code would read beyond. (For millions of detections
    :func:`fits` is too slow.)"""
    if counts and (not counts.isascii() or ord(counts[-1]) - 48 & 32):
        raise ValueError("truncated run lengths")


def fits(counts: str | list[int], height: int, width: int) -> bool:
    """Do run lengths (a list or a compressed string) add up to a mask of this size?"""
    if not isinstance(counts, list | str):
        raise ValueError("neither a list nor a string")
    lengths = np.array(counts, np.int64) if isinstance(counts, list) else run_lengths(counts)
    return bool((lengths >= 0).all()) and int(lengths.sum()) == height * width
