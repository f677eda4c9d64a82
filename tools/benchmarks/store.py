"""The store: one image's record read at random, beside per-image ``.pth`` files read with ``torch.load``.

In float16 and int8, from the page cache and with every file dropped from it; the bytes beside the embeddings' alone.
"as stored" is what ``torch.load`` gives and ``EmbeddingStore.read``; "float32 unit rows", what training uses, adds
the same conversion to both. The baseline is in the store's own dtype, with the same tensors. The physical limit:
``record_copied_in_s``, a record's bytes over the measured rate of a large copy in memory (what is in the processor's
caches can be read faster)."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vild.store.shards import DTYPES, minimum_size, pack, plan_size, unpack
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter

LVIS_IMAGES = 100_170  # of LVIS v1 train
PER_IMAGE = 300  # proposals that the paper distils
SHARD_IMAGES = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--regions", type=int, default=PER_IMAGE, help="an image")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--scratch", help="a folder with some GB to spare (default: the system's)")


def run(args: argparse.Namespace) -> Iterator[dict]:
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            yield from compare(Path(folder), dtype, args.num_images, args.regions, args.width)
    regions = LVIS_IMAGES * PER_IMAGE
    for dtype in DTYPES:
        minimum, size = minimum_size(regions, 512, dtype), plan_size([PER_IMAGE] * LVIS_IMAGES, 512, dtype)
        yield {"what": f"LVIS train, {PER_IMAGE} an image, 512-d {dtype}: by arithmetic", "baseline": None,
               "bytes": size, "minimum_bytes": minimum, "share_over_minimum": size / minimum - 1}  # fmt: skip


def compare(folder: Path, dtype: str, images: int, regions: int, width: int) -> Iterator[dict]:
    """Write both, read both."""

    def original(image_id: int) -> StoredRegions:
        generator = torch.Generator().manual_seed(image_id)
        embeddings = F.normalize(torch.randn(regions, width, generator=generator), dim=1)
        boxes = torch.rand(regions, 4, generator=generator) * 300
        boxes[:, 2:] += boxes[:, :2]
        return StoredRegions(boxes, embeddings, torch.rand(regions, generator=generator))

    ids = np.random.default_rng(0).permutation(images).tolist()
    plan = {"fingerprint": {"name": "synthetic", "pretrained": "", "weights": "", "width": width}}
    writer = StoreWriter(folder / "store", plan, ids, SHARD_IMAGES, dtype=dtype)
    for index, _ in writer.missing():
        writer.write_shard(index, original)
    writer.finish()
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

    store = EmbeddingStore(folder / "store")
    rows = [(store[i].embeddings, load_units(i), original(i).embeddings) for i in ids[:100]]
    store = EmbeddingStore(folder / "store")  # that one has mapped its shards
    shards = [path for path in store.folder.iterdir() if path.suffix == ".safetensors"]
    size = sum(path.stat().st_size for path in shards)
    minimum = minimum_size(images * regions, width, dtype)
    accuracy = {
        "record_copied_in_s": size / images / copy_rate(),
        "bytes": size, "minimum_bytes": minimum, "share_over_minimum": size / minimum - 1,
        "max_abs_diff": max(float((mine - theirs).abs().max()) for mine, theirs, _ in rows),
        "min_cosine": min(float((mine * first).sum(1).min()) for mine, _, first in rows),
    }  # fmt: skip
    for what, theirs, mine in (
        ("as stored", load, EmbeddingStore.read),
        ("float32 unit rows", load_units, EmbeddingStore.__getitem__),
    ):
        for state, files in (("cached", []), ("not cached", [*shards, *(folder / "pth").iterdir()])):
            # opened each time: pages that a process has mapped stay in the cache
            openers = (lambda theirs=theirs: theirs), (lambda mine=mine: partial(mine, EmbeddingStore(store.folder)))
            baseline_s, ours_s = time_reads(openers, ids, files)
            yield {
                "what": f"{dtype}, {state}, {what}: one record of {regions}", "baseline": "torch.load of a .pth",
                "baseline_s": baseline_s, "ours_s": ours_s, "ratio": baseline_s / ours_s, **accuracy,
            }  # fmt: skip


def copy_rate(size: int = 2**28, repeats: int = 5) -> float:
    """Bytes a second that this machine copies in memory (the best of a few)."""
    source, target, best = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return size / best


def time_reads(
    openers: Sequence[Callable[[], Callable]], ids: list[int], drop: list[Path], rounds: int = 3
) -> list[float]:
    """Mean seconds of a read by each way in its best round, over all ids in another random order each round.

    Args:
        openers: give the function that reads an id; called, untimed, before each round. The ways take turns.
        drop: files to drop from the page cache after that.
    """
    best, rng = [float("inf")] * len(openers), np.random.default_rng(1)
    for _ in range(rounds):
        order = rng.permutation(ids).tolist()
        for n, opener in enumerate(openers):
            read = opener()
            for path in drop:
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
            start = time.perf_counter()
            for image_id in order:
                read(image_id)
            best[n] = min(best[n], (time.perf_counter() - start) / len(order))
            del read
    return best
