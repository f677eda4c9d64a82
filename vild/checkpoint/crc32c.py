"""CRC-32C (Castagnoli) in NumPy, without a loop over bytes.

A CRC is the remainder of the data, read as a polynomial over bits, after division by a polynomial P. Adding a multiple
of P does not change it. The 32nd power of a multiple is one too, with exponents 32 times as large: a multiple with four
terms thus clears a word of the data by XORing it onto three words behind it.
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # P, bits reversed
FOLD = (5685, 1362, 426, 0)  # the exponents of a multiple of P; the first gap is how many words are cleared at once
PIECE = 1 << 17  # words that are folded together; they fit into a processor's cache
LEAD = 0x641F6454  # the word that takes the register from 0 to CRC-32C's initial value, 0xffffffff


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """The checksum as LevelDB and TensorFlow store it: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes | np.ndarray) -> int:
    """The checksum of bytes, or of the bytes of a contiguous array."""
    data = np.frombuffer(data, np.uint8)
    odd = len(data) % 4
    front = bytes(-odd % 4) + LEAD.to_bytes(4, "little") + data[:odd].tobytes()  # leading zeros change nothing
    left, words = np.frombuffer(front, "<u4"), data[odd:].view("<u4")
    for start in range(0, len(words), PIECE):
        left = _fold(np.concatenate([left, words[start : start + PIECE]]))
    return _register(left) ^ 0xFFFFFFFF


def _fold(words: np.ndarray) -> np.ndarray:
    """At most ``FOLD[0]`` words with the same remainder as ``words``, which are overwritten."""
    far, *near = FOLD
    cleared = max(len(words) - far, 0)
    for start in range(0, cleared, far - near[0]):
        top = words[start : min(start + far - near[0], cleared)]
        for exponent in near:
            words[start + far - exponent :][: len(top)] ^= top
    return words[cleared:]


def _register(words: np.ndarray) -> int:
    """The register after these words, starting from 0: each, advanced by the words behind it, XORed. The first half is
    advanced onto the second, again and again."""
    level = (len(words) - 1).bit_length()
    words = np.concatenate([np.zeros((1 << level) - len(words), "<u4"), words])
    while level:
        level -= 1
        words = _advance(words[: 1 << level], level) ^ words[1 << level :]
    return int(_advance(words, 0)[0])


def _advance(registers: np.ndarray, level: int) -> np.ndarray:
    """Registers after 2**level words of zeros."""
    tables = _tables(level)
    return np.bitwise_xor.reduce([tables[n][registers.view(np.uint8)[n::4]] for n in range(4)])


@functools.cache
def _tables(level: int) -> np.ndarray:
    """uint32 [4, 256]: what each value of each byte of a register becomes after 2**level words of zeros."""
    bits = np.uint32(1) << np.arange(32, dtype="<u4")
    if level:
        bits = _advance(_advance(bits, level - 1), level - 1)
    else:
        for _ in range(32):
            bits = (bits >> 1) ^ np.where(bits & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    tables = np.zeros((4, 1), "<u4")
    for n in range(8):
        tables = np.concatenate([tables, tables ^ bits[n::8, None]], 1)
    return tables
