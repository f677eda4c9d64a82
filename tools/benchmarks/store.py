"""The store: reading one image's record at random, beside per-image ``.pth`` files read with ``torch.load``.

In float16 and int8, from the page cache and with every file dropped from it. "as stored" is what ``torch.load`` and
``EmbeddingStore.read`` return; "float32 unit rows", which training uses, adds the same conversion to both. The
baseline has the same tensors in the same dtype. ``share_over_minimum``: bytes beyond those of the embeddings alone.
``record_copied_in_s`` is the physical limit: a record's bytes over the measured rate of a large copy in memory (what
is in the processor's caches can be read faster)."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import min_cosine, random_regions, row, timed, write_store
from vild.store.shards import DTYPES, minimum_size, pack, plan_size, unpack
from vild.store.store import EmbeddingStore

LVIS_IMAGES = 100_170  # of LVIS v1 train
PER_IMAGE = 300  # proposals that the paper distils
ROUNDS = 3


def run(args: argparse.Namespace) -> Iterator[dict]:
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            yield from compare(Path(folder), dtype, args.num_images, args.regions, args.width)
    for dtype in DTYPES:
        size = plan_size([PER_IMAGE] * LVIS_IMAGES, 512, dtype)
        what = f"LVIS train, {PER_IMAGE} per image, 512-d {dtype}: by arithmetic"
        yield {"what": what, "baseline": None, **sizes(size, minimum_size(LVIS_IMAGES * PER_IMAGE, 512, dtype))}


def sizes(size: int, minimum: int) -> dict[str, float]:
    return {"bytes": size, "minimum_bytes": minimum, "share_over_minimum": size / minimum - 1}


def compare(folder: Path, dtype: str, images: int, regions: int, width: int) -> Iterator[dict]:
    """Write the same records in both forms, and read them."""

    def original(image_id: int):
        return random_regions(image_id, regions, width=width)

    rng = np.random.default_rng(0)
    ids = rng.permutation(images).tolist()
    store = write_store(folder / "store", ids, original, width, shard_images=200, dtype=dtype)
    (folder / "pth").mkdir()
    for image_id in ids:
        r = original(image_id)
        record = {"boxes": r.boxes, "scores": r.scores, **pack(r.embeddings, dtype)}
        torch.save(record, folder / "pth" / f"{image_id}.pth")
    os.sync()  # pages that are not on the disk yet cannot be dropped from the cache

    def load(image_id: int) -> dict[str, Tensor]:
        return torch.load(folder / "pth" / f"{image_id}.pth", weights_only=True)

    def load_units(image_id: int) -> Tensor:
        record = load(image_id)
        return unpack(record["embeddings"], record.get("scales"))

    rows = [(store[i].embeddings, load_units(i), original(i).embeddings) for i in ids[:100]]
    shards = list((folder / "store").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    measures = {
        "record_copied_in_s": size / images / copy_rate(),
        **sizes(size, minimum_size(images * regions, width, dtype)),
        "max_abs_diff": max(float((mine - theirs).abs().max()) for mine, theirs, _ in rows),
        "min_cosine": min(min_cosine(mine, first) for mine, _, first in rows),
    }
    order = ids

    def setup(uncached: list[Path]) -> None:
        """Opens the store anew: pages that a process has mapped stay in the cache."""
        nonlocal store, order
        store, order = EmbeddingStore(folder / "store"), rng.permutation(ids).tolist()
        drop_from_cache(uncached)

    def read_all(read: Callable[[int], object]) -> None:
        for image_id in order:
            read(image_id)

    readers = {"as stored": (load, lambda i: store.read(i)), "float32 unit rows": (load_units, lambda i: store[i])}
    for what, pair in readers.items():
        for state, uncached in (("cached", []), ("not cached", [*shards, *(folder / "pth").iterdir()])):
            seconds = timed([partial(read_all, read) for read in pair], ROUNDS, partial(setup, uncached))
            name = f"{dtype}, {state}, {what}: one record of {regions}"
            yield row(name, "torch.load of a .pth", *(s / images for s in seconds), **measures)


def drop_from_cache(files: list[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_rate(size: int = 2**28) -> float:
    """Bytes per second that this machine copies in memory."""
    source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    return size / timed([lambda: target.copy_(source)], 5)[0]
