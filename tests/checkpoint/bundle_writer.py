"""Writes TensorFlow checkpoints byte by byte, after LevelDB's table_format.md, Snappy's format_description.txt and
TensorFlow's tensor_bundle.proto; shares no code with the reader."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

TYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "int64": 9, "bool": 10,
         "uint16": 17, "float16": 19, "uint32": 22, "uint64": 23}  # fmt: skip
MAGIC = 0xDB4775248B80FB57
_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def crc(data: bytes) -> int:
    """CRC-32C, byte by byte."""
    register = 0xFFFFFFFF
    for byte in bytes(data):
        register = _TABLE[(register ^ byte) & 255] ^ register >> 8
    return register ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    value = crc(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer: a number, or text with its length."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value % 2**64)


def header(shards: int) -> bytes:
    return field(1, shards) + field(3, field(1, 1))


def entry(kind: int, shape, shard: int, offset: int, size: int, checksum: int) -> bytes:
    dimensions = b"".join(field(2, field(1, side) if side else b"") for side in shape)
    found = field(1, kind) + field(2, dimensions)
    found += b"".join(field(number, value) for number, value in ((3, shard), (4, offset), (5, size)) if value)
    return found + varint(6 << 3 | 5) + struct.pack("<I", checksum)


def block(entries: list[tuple[bytes, bytes]], interval: int = 16) -> bytes:
    """Keys share what they can with the key before, but for one in ``interval``."""
    out, restarts, last = b"", [], b""
    for index, (key, value) in enumerate(entries):
        shared = 0
        if index % interval:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def snap(data: bytes) -> bytes:
    """Snappy: of what occurred before, copies of 4 to 64 bytes; the rest as literals."""
    out, seen, start, at = varint(len(data)), {}, 0, 0

    def literal(piece: bytes) -> bytes:
        length = len(piece) - 1
        if length < 60:
            return bytes([length << 2]) * bool(piece) + piece
        return bytes([61 << 2]) + struct.pack("<H", length) + piece

    while at + 4 <= len(data):
        before = seen.get(data[at : at + 4])
        seen[data[at : at + 4]] = at
        if before is None or at - before > 65535:
            at += 1
            continue
        length = 4
        while length < 64 and at + length < len(data) and data[before + length] == data[at + length]:
            length += 1
        for n in range(start, at, 60_000):
            out += literal(data[n : min(n + 60_000, at)])
        offset = at - before
        if length <= 11 and offset < 2048:
            out += bytes([offset >> 8 << 5 | length - 4 << 2 | 1, offset & 255])
        else:
            out += bytes([length - 1 << 2 | 2]) + struct.pack("<H", offset)
        at += length
        start = at
    for n in range(start, len(data), 60_000):
        out += literal(data[n : n + 60_000])
    return out


def table(blocks: list[tuple[bytes, bytes]], index: bytes | None = None, compress: bool = False) -> bytes:
    """A file of blocks, each with a key not before its last one. ``index``: instead of the block of blocks."""
    out, handles = b"", []

    def add(content: bytes) -> bytes:
        nonlocal out
        stored = (snap(content) + b"\1") if compress else content + b"\0"
        handle = varint(len(out)) + varint(len(stored) - 1)
        out += stored + struct.pack("<I", masked(stored))
        return handle

    handles = [(key, add(content)) for key, content in blocks]
    footer = add(block([])) + add(block(handles, 1) if index is None else index)
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC)


def write_bundle(
    prefix: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    compress: bool = False,
    block_size: int = 4096,
    checksum: Callable[[np.ndarray], int] = masked,
) -> None:
    """The files of a checkpoint, the variables dealt out over the shards.

    Args:
        compress: the index, by Snappy.
        checksum: of a variable; a faster one for large ones.
    """
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    files = [open(f"{prefix}.data-{n:05}-of-{shards:05}", "wb") for n in range(shards)]  # noqa: SIM115
    entries = {b"": header(shards)}
    for n, (name, array) in enumerate(arrays.items()):
        array, file = np.ascontiguousarray(array), files[n % shards]
        place = n % shards, file.tell(), array.nbytes, checksum(array.reshape(-1).view(np.uint8))
        entries[name.encode()] = entry(TYPES[array.dtype.name], np.shape(arrays[name]), *place)
        file.write(array.tobytes())
    for file in files:
        file.close()
    Path(f"{prefix}.index").write_bytes(index_of(entries, compress, block_size))


def index_of(entries: Mapping[bytes, bytes], compress: bool = False, block_size: int = 4096) -> bytes:
    """The file of these keys and values."""
    blocks, now = [], []
    for key, value in sorted(entries.items()):
        now.append((key, value))
        if sum(len(k) + len(v) for k, v in now) >= block_size:
            blocks.append((key, block(now)))
            now = []
    if now:
        blocks.append((now[-1][0], block(now)))
    return table(blocks, compress=compress)


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8).tobytes()
