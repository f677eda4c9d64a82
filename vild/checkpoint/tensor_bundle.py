"""The variables of a TensorFlow checkpoint or SavedModel, read without TensorFlow.

PREFIX.index is a sorted table of a header and an entry for each variable (protocol buffers: BundleHeaderProto and
BundleEntryProto in tensorflow/core/protobuf/tensor_bundle.proto); PREFIX.data-00000-of-00001 and so on hold the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vild.checkpoint.crc32c import masked_crc32c
from vild.checkpoint.sorted_table import MOST, Cursor, read_table
from vild.utils.untrusted import read_bytes, refused_as

MOST_TENSOR = 1 << 31  # bytes
MOST_DIMENSIONS = 32
VERSION = 1  # of the format, up to which this reader knows it
VARINT, FIXED64, TEXT, FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
# of TensorFlow's DataType: what is read, as NumPy names it, and what is not
READ = {1: "f4", 2: "f8", 3: "i4", 4: "u1", 5: "i2", 6: "i1", 9: "i8", 17: "u2", 19: "f2", 22: "u4", 23: "u8"}
NOT_READ = {7: "string", 8: "complex64", 10: "bool", 14: "bfloat16", 18: "complex128", 20: "resource", 21: "variant"}


@dataclass(frozen=True)
class Entry:
    """Where a variable is. ``sliced``: in several parts, which have entries of their own."""

    type: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool


class TensorBundle(Mapping[str, np.ndarray]):
    """The variables by name; each is read and checked when it is looked up.

    Args:
        prefix: of the files' names, such as ``model.ckpt-180000`` or a SavedModel's ``variables/variables``.

    Raises:
        UserError: the index cannot be read, or is damaged. On looking up a variable: it is damaged, in parts, or of a
            type other than real numbers.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = Path(prefix)
        index = self.prefix.with_name(f"{self.prefix.name}.index")
        with refused_as(f"{index}: not the index of a TensorFlow checkpoint"):
            entries = dict(read_table(read_bytes(index, MOST)))
            self.shards = _read_header(entries.pop(b"", b""))
            # keys that begin with a zero are the parts of sliced variables
            self.entries = {key.decode(): _read_entry(v) for key, v in entries.items() if not key.startswith(b"\0")}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own would read the variable

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        path = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05}-of-{self.shards:05}")
        with refused_as(f"{path}: the variable '{name}' cannot be read"):
            if entry.sliced:
                raise ValueError("it is partitioned into slices")
            if entry.type not in READ:
                raise ValueError(f"its type is {NOT_READ.get(entry.type, f'number {entry.type}')}")
            dtype = np.dtype(READ[entry.type]).newbyteorder("<")
            if entry.size != dtype.itemsize * math.prod(entry.shape):
                raise ValueError(f"its {entry.size:,} bytes cannot be {dtype} of shape {list(entry.shape)}")
            if entry.shard >= self.shards:
                raise ValueError(f"the checkpoint has {self.shards} shards")
            data = _read_range(path, entry.offset, entry.size)
            if masked_crc32c(data) != entry.checksum:
                raise ValueError("its checksum is wrong")
            return data.view(dtype).reshape(entry.shape)


def _read_range(path: Path, offset: int, size: int) -> np.ndarray:
    """uint8 [size]."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        length = file.seek(0, 2)
        if offset + size > length:
            raise ValueError(f"it ends at byte {offset + size:,}, the file at {length:,}")
        if size > MOST_TENSOR:
            raise ValueError(f"it has more than {MOST_TENSOR:,} bytes")
        file.seek(offset)
        return np.fromfile(file, np.uint8, size)


def _read_header(message: bytes) -> int:
    """The number of shards."""
    header = _fields(message, {1: VARINT, 2: VARINT, 3: TEXT})
    shards = header.get(1, 0)
    if not 0 < shards < 100_000:
        raise ValueError("its header is missing or gives no number of shards")
    if header.get(2, 0):
        raise ValueError("it was written on a big-endian machine")
    needed = _fields(header.get(3, b""), {2: VARINT}).get(2, 0)
    if needed > VERSION:
        raise ValueError(f"it needs a reader of version {needed}, not {VERSION}")
    return shards


def _read_entry(message: bytes) -> Entry:
    entry = _fields(message, {1: VARINT, 2: TEXT, 3: VARINT, 4: VARINT, 5: VARINT, 6: FIXED32, 7: TEXT})
    dimensions = [value for number, wire, value in _values(entry.get(2, b"")) if (number, wire) == (2, TEXT)]
    if len(dimensions) > MOST_DIMENSIONS:
        raise ValueError(f"a variable has {len(dimensions):,} dimensions")
    shape = tuple(_fields(dimension, {1: VARINT}).get(1, 0) for dimension in dimensions)
    kind, shard, offset, size, checksum = (entry.get(field, 0) for field in (1, 3, 4, 5, 6))
    return Entry(kind, shape, shard, offset, size, checksum, sliced=7 in entry)


def _fields(message: bytes, wires: dict[int, int]) -> dict[int, int | bytes]:
    """The values of a message by field number, of those in ``wires``, which gives their wire types. Of a repeated field
    the last. A negative number becomes one beyond 2^63."""
    found = {}
    for number, wire, value in _values(message):
        if wires.get(number, wire) != wire:
            raise ValueError(f"field {number} of a message has wire type {wire}, not {wires[number]}")
        found[number] = value
    return {number: found[number] for number in wires if number in found}


def _values(message: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Field number, wire type and value of everything in a message."""
    cursor = Cursor(message)
    while cursor:
        number, wire = divmod(cursor.varint(), 8)
        if wire == VARINT:
            yield number, wire, cursor.varint()
        elif wire in (FIXED64, FIXED32):
            yield number, wire, cursor.number(8 if wire == FIXED64 else 4)
        elif wire == TEXT:
            yield number, wire, cursor.take(cursor.varint())
        else:
            raise ValueError(f"a message has wire type {wire}")
