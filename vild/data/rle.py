"""Validation of COCO's run-length encoding for pycocotools, which reads beyond the end of a truncated string and in
older versions writes beyond the end of the mask."""

from __future__ import annotations


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


def check_end(counts: str) -> None:
    """ValueError for a string truncated within a number, which C code would read beyond. (For millions of detections
    :func:`fits` is too slow.)"""
    if counts and (not counts.isascii() or ord(counts[-1]) - 48 & 32):
        raise ValueError("truncated run lengths")


def fits(counts: str | list[int], height: int, width: int) -> bool:
    """Do run lengths (a list or a compressed string) add up to a mask of this size?"""
    if not isinstance(counts, list | str):
        raise ValueError("neither a list nor a string")
    lengths = [int(n) for n in counts] if isinstance(counts, list) else run_lengths(counts)
    return min(lengths, default=0) >= 0 and sum(lengths) == height * width
