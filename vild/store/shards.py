"""One shard of an embedding store: packing of rows, reading the head, mapping the file.

A shard is a safetensors file: eight bytes with the length of a JSON header, the header, the tensors. The header is
read here and checked against the file's size, so that opening a shard takes one small read and a truncated file is
reported before it is mapped (an access beyond its end would kill the process).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.untrusted import parse_json

DTYPES = {"float16": torch.float16, "int8": torch.int8}  # of embeddings
BOX_BYTES = 16 + 4  # box and score, float32
SCALE_BYTES = {"float16": 0, "int8": 4}
_ITEM = {"I64": 8, "F32": 4, "F16": 2, "I8": 1}
ROW_TENSORS = ("boxes", "embeddings", "scales", "scores")
_TYPES = {"image_ids": "I64", "offsets": "I64", "boxes": "F32", "scores": "F32", "scales": "F32"}
_HEADER_LIMIT = 1 << 16  # ours have about 500 bytes
_FIRST_READ = 1 << 14  # the header and the tables of 200 images, which safetensors puts first as the widest numbers


def pack(embeddings: Tensor, dtype: str) -> dict[str, Tensor]:
    """Convert unit float [N, D] to a shard's ``embeddings``: float16, or int8 with ``scales`` float32 [N].

    An int8 row is round(127 * row / max |row|); its scale is 1 / its length, so row * scale has unit length.
    """
    if dtype == "float16":
        return {"embeddings": embeddings.half().contiguous()}
    rows = embeddings.float()
    largest = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    rows = (rows / largest * 127).round().to(torch.int8)
    # a non-zero row has a length of at least 127
    return {"embeddings": rows, "scales": torch.linalg.vector_norm(rows.float(), dim=1).clamp(min=1).reciprocal()}


def unpack(rows: Tensor, scales: Tensor | None) -> Tensor:
    """The inverse of :func:`pack`: unit float32 [N, D]."""
    rows = rows.to(torch.float32, copy=True)
    if scales is None:
        scales = torch.linalg.vector_norm(rows, dim=1).clamp(min=1e-12).reciprocal()
    return rows.mul_(scales[:, None])


def plan_size(counts: np.ndarray | list[int], width: int, dtype: str) -> int:
    """Bytes of a store with these numbers of regions per image, without headers (about 600 bytes per shard)."""
    row = width * torch.empty(0, dtype=DTYPES[dtype]).itemsize + SCALE_BYTES[dtype] + BOX_BYTES
    return int(np.sum(counts, dtype=np.int64)) * row + len(counts) * 16  # an id and an offset per image


def minimum_size(regions: int, width: int, dtype: str) -> int:
    """Bytes of the embeddings alone."""
    return regions * width * torch.empty(0, dtype=DTYPES[dtype]).itemsize


@dataclass(frozen=True)
class Head:
    """The head of a shard: image ids and offsets, (first byte, shape) of each tensor, the file's size in bytes."""

    path: Path
    image_ids: np.ndarray  # int64 [I]
    offsets: np.ndarray  # int64 [I + 1]
    places: dict[str, tuple[int, tuple[int, ...]]]
    size: int
    dtype: str


def read_head(path: Path, dtype: str) -> Head:
    """Read and check a shard's head; UserError if it is missing, truncated, or not a shard of this dtype."""
    try:
        return _read_head(path, dtype)
    except (OSError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise broken(path, reason) from error


def broken(path: Path, reason: object) -> UserError:
    """The error for a shard that is not as it was written."""
    advice = f"'tools/inspect_store.py {path.parent} --repair' removes broken shards, then build again"
    return UserError(f"store {path.parent}: {path.name} is broken ({reason}); {advice}")


def check_sum(path: Path, found: str, listed: str | None) -> None:
    """UserError if the manifest lists another checksum (None: it lists none yet)."""
    if listed and found != listed:
        raise broken(path, f"its checksum is {found[:16]}..., the manifest says {listed[:16]}...")


def _read_head(path: Path, dtype: str) -> Head:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(_FIRST_READ)
        start = 8 + int.from_bytes(first[:8], "little")
        if len(first) < 8 or start > min(size, _HEADER_LIMIT):
            raise ValueError(f"a header of {start - 8} bytes in a file of {size}")
        if start > len(first):
            first += os.pread(file.fileno(), start - len(first), len(first))
        header = parse_json(first[8:start])
        if not isinstance(header, dict):
            raise ValueError(f"its header is {type(header).__name__}")
        header.pop("__metadata__", None)
        types = {**_TYPES, "embeddings": {"float16": "F16", "int8": "I8"}[dtype]}
        if dtype == "float16":
            types.pop("scales")
        if header.keys() != types.keys():
            raise ValueError(f"tensors {sorted(header)}, not {sorted(types)}")
        places, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(type(n) is int and n >= 0 for n in (begin, stop, *shape)):
                raise ValueError(f"{name}: shape {shape} at bytes {begin} to {stop}"[:200])
            if entry["dtype"] != types[name] or begin != end or stop - begin != math.prod(shape) * _ITEM[types[name]]:
                raise ValueError(f"{name}: {entry['dtype']} {list(shape)} at bytes {begin} to {stop}")
            if (start + begin) % _ITEM[types[name]]:
                raise ValueError(f"{name} begins at byte {start + begin}, not a multiple of {_ITEM[types[name]]}")
            places[name], end = (start + begin, shape), stop
        if start + end != size:
            raise ValueError(f"{size} bytes, expected {start + end}")

        def table(name: str) -> np.ndarray:
            place, (count,) = places[name]
            have = first[place : place + 8 * count]
            if len(have) < 8 * count:
                have = os.pread(file.fileno(), 8 * count, place)
            return np.frombuffer(have, "<i8", count)

        ids, offsets = table("image_ids"), table("offsets")
    rows, width = places["embeddings"][1]
    shapes = {"offsets": (len(ids) + 1,), "boxes": (rows, 4), "scores": (rows,), "scales": (rows,)}
    for name, shape in shapes.items():
        if name in places and places[name][1] != shape:
            raise ValueError(f"{name} is {list(places[name][1])} beside embeddings [{rows}, {width}]")
    # not by differences, which can overflow
    if offsets[0] != 0 or offsets[-1] != rows or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets do not increase from 0 to {rows}")
    return Head(path, ids, offsets, places, size, dtype)


class MappedShard:
    """A shard's tensors as views of the memory-mapped file (private, read on demand). No file descriptor stays open, so
    threads and forked processes share nothing.

    Raises:
        UserError: the file cannot be mapped, or is shorter than ``head`` says.
    """

    def __init__(self, head: Head):
        try:
            storage = torch.UntypedStorage.from_file(str(head.path), False, head.size)
        except RuntimeError as error:
            where = f"store {head.path.parent}: {head.path.name}"
            raise UserError(f"{where} has disappeared or shrunk since the store was opened") from error
        bytes_ = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.tensors = {}
        for name, (place, shape) in head.places.items():
            if name in ROW_TENSORS:
                dtype = torch.float32 if name != "embeddings" else DTYPES[head.dtype]
                stop = place + math.prod(shape) * dtype.itemsize
                self.tensors[name] = bytes_[place:stop].view(dtype).view(shape)

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Rows start:stop of boxes, embeddings, scales (None for float16) and scores, without copying."""
        return tuple(t if t is None else t[start:stop] for t in map(self.tensors.get, ROW_TENSORS))
