"""Validation of COCO's run-length encoding for pycocotools, which reads beyond the end of a truncated string and in
older versions writes beyond the end of the mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def run_lengths(counts: str) -> list[int]:
    """Decode a compressed string into run lengths; ValueError if it is invalid.

    A character has five bits and a continuation bit; from the fourth number on, a number is the difference to the last
    but one.
    """
    lengths, value, shift = [], 0, 0
    for bits in (ord(character) - 48 for character in counts):
        if not 0 <= bits < 64 or shift > 30:  # no mask of 2^31 pixels needs more than seven characters
            raise ValueError("not run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("truncated run lengths")
    return lengths


def fits(counts: str | list[int], height: int, width: int) -> bool:
    """Do run lengths (a list or a compressed string) add up to a mask of this size?"""
    if not isinstance(counts, list | str):
        raise ValueError("neither a list nor a string")
    lengths = [int(n) for n in counts] if isinstance(counts, list) else run_lengths(counts)
    return min(lengths, default=0) >= 0 and sum(lengths) == height * width


def fit_many(counts: Sequence[bytes], pixels: np.ndarray) -> np.ndarray:
    """:func:`fits` of many compressed strings at once, for the millions of masks in a results file.

    Args:
        counts: N compressed strings.
        pixels: int64 [N], height times width of each mask.

    Returns:
        bool [N]. False too for a string that :func:`run_lengths` refuses.
    """
    size = np.fromiter(map(len, counts), np.int64, len(counts))
    good = pixels == 0  # of empty strings
    some, stop = np.flatnonzero(size), np.cumsum(size[size > 0])
    if not len(some):
        return good
    bits = np.frombuffer(b"".join(counts), np.uint8) - np.uint8(48)  # below 48 wraps around, to more than 63
    more = bits & 32 != 0
    valid = np.logical_and.reduceat(bits < 64, stop - size[some]) & ~more[stop - 1]
    more[stop - 1] = False  # a truncated number ends with its string
    last = np.flatnonzero(~more)
    first = np.append(0, last[:-1] + 1)
    length = last - first + 1  # characters of each number
    values = (bits[first] & 31).astype(np.int64)
    for k in range(1, min(length.max(), 7)):
        longer = np.flatnonzero(length > k)
        values[longer] += (bits[first[longer] + k] & 31).astype(np.int64) << 5 * k
    values -= (bits[last] & 16 != 0) * (1 << 5 * np.minimum(length, 7))
    begin = np.searchsorted(first, stop - size[some])  # a string's first number
    valid &= (np.maximum.reduceat(length, begin) <= 7) & (values[begin] >= 0)

    # From the fourth on, a number is the difference to the last but one. So the lengths of every other run of a string
    # are running sums: of all strings' numbers in even places and of those in odd places, less where the string begins
    total = values[begin].copy()
    for odd in (0, 1):
        sums = np.cumsum(values[odd::2])
        start = (begin + (begin % 2 != odd) - odd) // 2
        count = np.diff(start, append=len(sums))
        there, sums = count > 0, np.append(sums, 0)  # one more, where the last string's may begin that has none
        before = np.where(begin % 2 == odd, sums[start], np.where(start > 0, sums[start - 1], 0))
        total += np.where(there, np.add.reduceat(sums, start) - before * count, 0)
        sums[-1] = np.iinfo(np.int64).max
        valid &= ~there | (np.minimum.reduceat(sums, start) >= before)
    good[some] = valid & (total == pixels[some])
    return good
