"""One shard of an embedding store: packing of rows, checking what a file contains, mapping it.

A shard is a safetensors file. The library checks the header against the file's size before the file is mapped: an
access beyond the end of a truncated file would kill the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.untrusted import open_tensors

DTYPES = {"float16": torch.float16, "int8": torch.int8}  # of embeddings
BOX_BYTES = 16 + 4  # box and score, float32
SCALE_BYTES = {"float16": 0, "int8": 4}
ROW_TENSORS = ("boxes", "embeddings", "scales", "scores")
Rows = tuple[Tensor, Tensor, Tensor | None, Tensor]  # these; scales are None for float16


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
    row = minimum_size(1, width, dtype) + SCALE_BYTES[dtype] + BOX_BYTES
    return int(np.sum(counts, dtype=np.int64)) * row + len(counts) * 16  # an id and an offset per image


def minimum_size(regions: int, width: int, dtype: str) -> int:
    """Bytes of the embeddings alone."""
    return regions * width * DTYPES[dtype].itemsize


@dataclass(frozen=True)
class Head:
    """What a shard contains: its image ids, their offsets, the width D of its embeddings."""

    path: Path
    image_ids: np.ndarray  # int64 [I]
    offsets: np.ndarray  # int64 [I + 1]
    width: int

    @property
    def counts(self) -> np.ndarray:
        """Number of regions of each image, int64 [I]."""
        return np.diff(self.offsets)


def read_head(path: Path, dtype: str) -> Head:
    """Read and check a shard's head; UserError if it is missing, truncated, or not a shard of this dtype."""
    try:
        with open_tensors(path, "np") as file:  # opens several times as fast as "pt"
            return _read_head(path, file, dtype)
    except Exception as error:
        raise broken(path, error.strerror if isinstance(error, OSError) else error) from error


def broken(path: Path, reason: object) -> UserError:
    """The error for a shard that is not as it was written."""
    advice = f"'tools/inspect_store.py {path.parent} --repair' removes broken shards, then build again"
    return UserError(f"store {path.parent}: {path.name} is broken ({reason}); {advice}")


def check_sum(path: Path, found: str, listed: str | None) -> None:
    """UserError if the manifest lists another checksum (None: it lists none yet)."""
    if listed and found != listed:
        raise broken(path, f"its checksum is {found[:16]}..., the manifest says {listed[:16]}...")


def _read_head(path: Path, file, dtype: str) -> Head:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    (images,), (rows, width) = found["image_ids"][1], found["embeddings"][1]
    expected = {
        "image_ids": ("I64", [images]),
        "offsets": ("I64", [images + 1]),
        "boxes": ("F32", [rows, 4]),
        "embeddings": ({"float16": "F16", "int8": "I8"}[dtype], [rows, width]),
        "scores": ("F32", [rows]),
    }
    if dtype == "int8":
        expected["scales"] = ("F32", [rows])
    if found != expected:
        raise ValueError(f"it contains {found}, expected {expected}"[:500])
    ids, offsets = file.get_tensor("image_ids"), file.get_tensor("offsets")
    # not by differences, which can overflow
    if offsets[0] != 0 or offsets[-1] != rows or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets do not increase from 0 to {rows}")
    return Head(path, ids, offsets, width)


def map_rows(head: Head) -> Rows:
    """All rows of a shard, as views of the memory-mapped file (private, read on demand). No file descriptor stays open,
    so threads and forked processes share nothing.

    Raises:
        UserError: the file is not the one that ``head`` was read from.
    """
    try:
        with open_tensors(head.path) as file:
            present = file.keys()
            rows = tuple(file.get_tensor(name) if name in present else None for name in ROW_TENSORS)
        if len(rows[0]) != head.offsets[-1]:
            raise ValueError(f"it has {len(rows[0])} rows")
    except Exception as error:
        where = f"store {head.path.parent}: {head.path.name}"
        raise UserError(f"{where} has disappeared or shrunk since the store was opened") from error
    return rows


def select(rows: Rows, start: int, stop: int) -> Rows:
    """Rows start:stop, without copying."""
    return tuple(t if t is None else t[start:stop] for t in rows)
