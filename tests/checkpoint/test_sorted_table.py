"""What a table of a TensorFlow checkpoint is packed with: Snappy, and numbers of 64 bits."""

import pytest

from tests.checkpoint import bundle_writer as writer
from tests.checkpoint.bundle_writer import random_bytes
from vild.checkpoint.sorted_table import Cursor, unsnap


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"\x00", b""),
        (b"\x03\x08abc", b"abc"),
        (b"\x0a\x04ab\x11\x02", b"ababababab"[:10]),  # one copy of 8 bytes, 2 back: it overlaps what it writes
        (b"\x08\x0cabcd\x0e\x04\x00", b"abcdabcd"),
        (b"\x08\x0cabcd\x0f\x04\x00\x00\x00", b"abcdabcd"),
        (b"\x46\xf0\x41" + b"x" * 66 + b"\x01\x42", b"x" * 70),
    ],
)
def test_snappy_by_hand(stream, expected):
    assert unsnap(stream) == expected


@pytest.mark.parametrize("data", [b"", random_bytes(70_000), b"abcdefg" * 9000, random_bytes(300) * 20 + b"z"])
def test_snappy_of_another_writer(data):
    assert unsnap(writer.snap(data)) == data
    assert len(data) < 1000 or len(set(data)) > 99 or len(writer.snap(data)) < len(data) / 10


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"", "1 bytes are expected where 0 are left"),
        (b"\x04\x0cabc", "4 bytes are expected where 3"),
        (b"\x04\x08abc", "does not have the 4 bytes"),
        (b"\x02\x08abc", "does not have the 2 bytes"),
        (b"\x08\x0cabcd\x01\x05", "copies from before its start"),
        (b"\x08\x0cabcd\x01\x00", "copies from before its start"),
        (b"\x08\x0cabcd\x0e\x04", "2 bytes are expected where 1"),
        (b"\xff\xff\xff\xff\x7f\x08abc", "does not have the 34,359,738,367 bytes"),
        (b"\xff" * 10 + b"\x01", "more than 64 bits"),
    ],
)
def test_broken_snappy(stream, reason):
    with pytest.raises(ValueError, match=reason):
        unsnap(stream)


def test_a_number_of_64_bits():
    assert Cursor(b"\xff" * 9 + b"\x01").varint() == 2**64 - 1
    with pytest.raises(ValueError, match="more than 64 bits"):
        Cursor(b"\xff" * 9 + b"\x02").varint()
