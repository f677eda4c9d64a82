"""The checksum of TensorFlow's checkpoints."""

import numpy as np
import pytest

from tests.checkpoint import bundle_writer as writer
from tests.checkpoint.bundle_writer import random_bytes
from vild.checkpoint import crc32c as checksums
from vild.checkpoint.crc32c import crc32c, masked_crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, B.4, and the check value of the catalogue of CRCs
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_published_checksums(data, expected):
    assert crc32c(data) == expected == writer.crc(data)


@pytest.mark.parametrize("length", [*range(1, 10), 4 * checksums.FOLD[0] + 1, 60_000, 4 * checksums.PIECE + 7])
def test_a_checksum_is_that_of_byte_after_byte(length):
    data = random_bytes(length)
    assert crc32c(data) == writer.crc(data)
    assert masked_crc32c(np.frombuffer(data, np.uint8)) == writer.masked(data)
    assert data == random_bytes(length)
