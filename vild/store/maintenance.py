"""Summary, verification and repair of a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from vild.store.manifest import MANIFEST, hash_ids, read_manifest, unfinished
from vild.store.shards import Head, broken, check_sum, map_rows, minimum_size, read_head, select
from vild.utils.errors import UserError, count_of
from vild.utils.files import sha256, write_json
from vild.utils.fingerprint import describe

UNIT_TOLERANCE = 1e-3  # allowed error of a row's length; rounding to float16 gives 5e-4 at most
ROWS = 8192  # checked at once


def shard_paths(folder: Path, manifest: dict) -> list[Path]:
    """The shards that a complete store lists, or those that an unfinished one has so far."""
    if manifest["complete"]:
        return [folder / shard["file"] for shard in manifest["shards"]]
    return sorted(folder.glob("shard-*.safetensors"))


def summarise(folder: Path) -> str:
    """A few lines: teacher, dtype, images, regions, bytes (and the overhead over the embeddings), histogram."""
    manifest = read_manifest(folder)
    plan, paths = manifest["plan"], shard_paths(folder, manifest)
    heads = [read_head(path, plan["dtype"]) for path in paths]
    counts = np.concatenate([np.zeros(0, np.int64), *(head.counts for head in heads)])
    regions, size = int(counts.sum()), sum(path.stat().st_size for path in paths)
    minimum = minimum_size(regions, plan["fingerprint"].get("width", 0), plan["dtype"])
    share = f", {100 * (size / minimum - 1):.2f} % over its embeddings alone" if minimum else ""
    done = "complete" if manifest["complete"] else f"unfinished, {len(counts):,} of {plan['images']:,} images"
    lines = [
        f"store {folder}: {done}",
        f"teacher     {describe(plan['fingerprint'])}",
        f"embeddings  {plan['dtype']}",
        f"images      {len(counts):,} in {count_of(len(paths), 'shard')}",
        f"regions     {regions:,}",
        f"bytes       {size:,}{share}",
    ]
    for dropped in plan["dropped"] if isinstance(plan.get("dropped"), list) else [plan.get("dropped")]:
        if dropped:  # a merged store lists those of its parts
            lines.append("dropped     " + ", ".join(f"{n:,} by {rule}" for rule, n in dropped.items()))
    if unreadable := manifest.get("unreadable"):
        listed = f"{unreadable[0]}{', ...' if len(unreadable) > 1 else ''}"
        lines.append(f"unreadable  {count_of(len(unreadable), 'image')} without regions: image_id {listed}")
    return "\n".join(lines + list(histogram(counts)))


def histogram(counts: np.ndarray, bars: int = 8) -> Iterator[str]:
    """Histogram of the number of regions per image, as lines of text; images without regions get their own line."""
    if not len(counts):
        return
    step = max(1, -(-int(counts.max()) // bars))
    groups = -(-counts // step)  # 0; 1 to step; step + 1 to 2 step; ...
    for group, images in enumerate(np.bincount(groups).tolist()):
        low, high = (group - 1) * step + 1, group * step
        span = "0" if group == 0 else f"{low}" if low == high else f"{low}-{high}"
        yield f"{span:>9} regions: {count_of(images, 'image')} {'#' * round(40 * images / len(counts))}".rstrip()


def verify(folder: Path) -> Iterator[tuple[Path | None, str]]:
    """Yield what is wrong with a store: (the broken shard or None, a line). Reads every byte.

    A shard must have the manifest's checksum (once the store is complete), finite embeddings of unit length and finite
    boxes with ordered corners; a complete store must have the images of its plan.
    """
    manifest = read_manifest(folder)
    plan, paths = manifest["plan"], shard_paths(folder, manifest)
    listed = {shard["file"]: shard for shard in manifest["shards"]}
    heads = []
    for path in paths:
        try:
            head = read_head(path, plan["dtype"])
            if expected := listed.get(path.name, {}).get("sha256"):
                check_sum(path, sha256(path), expected)
            if reason := check_rows(head):
                raise broken(path, reason)
            heads.append(head)
        except UserError as error:
            yield path, str(error)
    if manifest["complete"] and len(heads) == len(paths):
        ids = [i for head in heads for i in head.image_ids.tolist()]
        if hash_ids(ids) != plan["image_ids_sha"]:
            yield None, f"store {folder}: its shards do not have the images of its plan in their order"


def check_rows(head: Head) -> str | None:
    """The first invalid number of a shard, with its image_id; None if all are valid."""
    mapped, total = map_rows(head), int(head.offsets[-1])
    for start in range(0, total, ROWS):
        boxes, rows, scales, scores = select(mapped, start, start + ROWS)
        lengths = torch.linalg.vector_norm(rows.float(), dim=1) * (1 if scales is None else scales)
        for what, good in (
            ("a non-finite box", boxes.isfinite().all(1)),
            ("a box with corners out of order", (boxes[:, 2:] >= boxes[:, :2]).all(1)),
            ("a non-finite score", scores.isfinite()),
            ("an embedding that is not of unit length", (lengths - 1).abs() <= UNIT_TOLERANCE),  # also false for NaN
        ):
            if not good.all():
                row = start + int((~good).nonzero()[0])
                image = head.image_ids[np.searchsorted(head.offsets, row, "right") - 1]
                return f"image_id {image} has {what}"
    return None


def repair(folder: Path) -> list[str]:
    """Delete broken shards and mark the store unfinished, so that the command that built it recomputes only those.

    Returns:
        one line per broken shard.

    Raises:
        UserError: not repairable: a merged store, or one with other images than its plan.
    """
    manifest, found = read_manifest(folder), list(verify(folder))
    if not found:
        return []
    if "merged" in manifest["plan"]:
        parts = ", ".join(manifest["plan"]["merged"])
        raise UserError(f"{found[0][1].partition(';')[0]}; it was merged from {parts}: repair those and merge again")
    if lines := [line for path, line in found if path is None]:
        raise UserError(f"{lines[0]}; build it again from scratch")
    for path, _ in found:  # before the manifest: its checksums still reveal the others if this is killed
        path.unlink(missing_ok=True)
    write_json(folder / MANIFEST, unfinished(manifest["plan"], manifest.get("provenance")))
    return [line for _, line in found]


def coverage(folder: Path, image_ids: Sequence[int]) -> tuple[list[int], int]:
    """Which images of a data set are missing from a store, and how many it has without any region."""
    manifest = read_manifest(folder)
    counts: dict[int, int] = {}
    for path in shard_paths(folder, manifest):
        head = read_head(path, manifest["plan"]["dtype"])
        counts |= zip(head.image_ids.tolist(), head.counts.tolist(), strict=True)
    return sorted(set(image_ids) - counts.keys()), sum(counts.get(i) == 0 for i in image_ids)
