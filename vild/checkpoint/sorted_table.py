"""LevelDB's sorted string table, the format of the index of a TensorFlow checkpoint.

The file is a sequence of blocks and a footer of 48 bytes, which tells where the block of blocks is. A block holds keys
and values in order; a key gives the number of bytes that it shares with the key before it, and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from vild.checkpoint.crc32c import masked_crc32c

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
FOOTER, TRAILER = 48, 5  # bytes; a block's trailer is its compression and its checksum
NONE, SNAPPY = 0, 1  # kinds of compression
MOST = 1 << 22  # bytes of a file, of its blocks unpacked, of its keys and values; 1,000 variables take some 0.1 MB
OVERHEAD = 64  # bytes that an entry counts for besides its key and value


class Cursor:
    """Reads bytes in order; ValueError beyond the end. True while there are more."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"{count:,} bytes are expected where {len(self.data) - self.at:,} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        """An unsigned little-endian number of ``size`` bytes."""
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        """A number of up to 64 bits, in groups of 7, the lowest first."""
        value = 0
        for shift in range(0, 64, 7):
            byte = self.number(1)
            value |= (byte & 127) << shift
            if byte < 128 and value < 1 << 64:
                return value
        raise ValueError("a number has more than 64 bits")


def read_table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table.

    Raises:
        ValueError: it is none, or it is damaged, or larger than MOST.
    """
    if len(content) < FOOTER or not content.endswith(MAGIC):
        raise ValueError("the magic number at its end is missing")
    footer = Cursor(content[-FOOTER:])
    footer.varint(), footer.varint()  # where the filters are, which TensorFlow does not write
    blocks, last, unpacked, listed = _block(content, footer), None, 0, 0
    for _, handle in _entries(blocks):
        block = _block(content, Cursor(handle))
        unpacked += len(block)
        for key, value in _entries(block):
            listed += len(key) + len(value) + OVERHEAD
            if last is not None and key <= last:
                raise ValueError("its keys are not in order")
            if max(unpacked, listed) > MOST:
                raise ValueError(f"its content has more than {MOST:,} bytes")
            yield key, value
            last = key


def _block(content: bytes, handle: Cursor) -> bytes:
    """The block at the offset and of the size that ``handle`` gives."""
    offset, size = handle.varint(), handle.varint()
    if offset + size + TRAILER + FOOTER > len(content):
        raise ValueError("a block lies beyond its end")
    block, trailer = content[offset : offset + size], Cursor(content[offset + size : offset + size + TRAILER])
    compression, checksum = trailer.number(1), trailer.number(4)
    if masked_crc32c(content[offset : offset + size + 1]) != checksum:
        raise ValueError(f"the checksum of the block at byte {offset:,} is wrong")
    if compression not in (NONE, SNAPPY):
        raise ValueError(f"the block at byte {offset:,} has compression {compression}, not none or Snappy")
    return unsnap(block) if compression == SNAPPY else block


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    restarts = 4 + 4 * int.from_bytes(block[-4:], "little")  # where keys share nothing: for searching, at the end
    if restarts > len(block):
        raise ValueError("a block is too short")
    cursor, key = Cursor(block[: len(block) - restarts]), b""
    while cursor:
        shared, own, length = cursor.varint(), cursor.varint(), cursor.varint()
        if shared > len(key):
            raise ValueError("a key shares more bytes than the key before it has")
        key = key[:shared] + cursor.take(own)
        yield key, cursor.take(length)


def unsnap(data: bytes) -> bytes:
    """Decompress Snappy: literal bytes, and copies of bytes that have been written before.

    Raises:
        ValueError: it is damaged, or larger than MOST.
    """
    cursor, made = Cursor(data), bytearray()
    size = cursor.varint()
    while cursor and len(made) <= size <= MOST:
        tag = cursor.number(1)
        kind, length = tag & 3, tag >> 2
        if kind == 0:
            length = cursor.number(length - 59) if length >= 60 else length
            made += cursor.take(length + 1)
            continue
        if kind == 1:
            offset, length = (tag >> 5 << 8) + cursor.number(1), 4 + (length & 7)
        else:
            offset, length = cursor.number(2 if kind == 2 else 4), length + 1
        if not 0 < offset <= len(made):
            raise ValueError("a Snappy block copies from before its start")
        source = made[len(made) - offset :][:length]
        made += (source * -(-length // len(source)))[:length]  # a copy may overlap what it writes
    if len(made) != size:
        raise ValueError(f"a Snappy block does not have the {size:,} bytes that it announces")
    return bytes(made)
