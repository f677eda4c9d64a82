"""Merging stores of one teacher."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from vild.store.manifest import MANIFEST, hash_ids, read_manifest
from vild.store.multi import REGIONS
from vild.store.shards import check_sum
from vild.store.store import EmbeddingStore
from vild.utils.errors import UserError
from vild.utils.files import cannot_write, sha256, write_json
from vild.utils.fingerprint import describe, same_regions

# The keys of a plan in which parts may differ: which images and which proposals. All others define the embeddings.
PER_PART = {*REGIONS, "dropped", "pictures", "images", "image_ids_sha", "shard_pictures"}


def merge(folders: Sequence[Path], output: Path) -> dict:
    """Copy the shards of complete stores into a new store; returns its manifest.

    Where the plans differ, the merged plan lists all values; the provenance is {"merged": [one per part]}.

    Raises:
        UserError: a part is unfinished or broken, ``output`` exists, or two parts differ in teacher, crop rule or dtype
            or share an image.
    """
    if output.exists():
        raise UserError(f"store {output}: the folder exists; merge into a new one")
    parts = [EmbeddingStore(folder) for folder in folders]
    for a, b in combinations(parts, 2):
        check_mergeable(a, b)
    plans, manifests = [part.plan for part in parts], [read_manifest(folder) for folder in folders]
    plan = {key: value for key, value in plans[0].items() if key not in PER_PART}
    for key in sorted({key for p in plans for key in p} & PER_PART):
        values = [v for p in plans for v in (p[key] if "merged" in p and isinstance(p[key], list) else [p.get(key)])]
        plan[key] = values[0] if all(v == values[0] for v in values) else values
    ids = [i for part in parts for i in part.ids_in_file_order()]
    plan |= {"images": len(ids), "image_ids_sha": hash_ids(ids), "merged": [str(folder) for folder in folders]}

    partial, shards = output.with_name(output.name + ".partial"), []
    origins = [part.provenance for part in parts]
    whole = {"plan": plan, "provenance": {"merged": origins} if any(origins) else None, "complete": True}
    shutil.rmtree(partial, ignore_errors=True)  # from a merge that was killed
    try:
        with cannot_write(output):
            partial.mkdir(parents=True)
            for folder, manifest in zip(folders, manifests, strict=True):
                for shard in manifest["shards"]:
                    name = f"shard-{len(shards):05d}.safetensors"
                    with open(folder / shard["file"], "rb") as file, open(partial / name, "wb") as copy:
                        shutil.copyfileobj(file, copy)
                        copy.flush()
                        os.fsync(copy.fileno())
                    check_sum(folder / shard["file"], sha256(partial / name), shard["sha256"])
                    shards.append({**shard, "file": name})
            whole |= {"regions": sum(shard["regions"] for shard in shards), "shards": shards}
            if unreadable := [i for manifest in manifests for i in manifest.get("unreadable", [])]:
                whole["unreadable"] = unreadable
            write_json(partial / MANIFEST, whole)
            os.rename(partial, output)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return whole


def check_mergeable(a: EmbeddingStore, b: EmbeddingStore) -> None:
    """UserError unless two stores have the same kind of embeddings and no image in common."""
    if not same_regions(a.fingerprint, b.fingerprint):
        teachers = f"{describe(a.fingerprint)}, store {b.folder} of {describe(b.fingerprint)}"
        raise UserError(f"store {a.folder} is of teacher {teachers}: they cannot be merged")
    for key in sorted((a.plan.keys() | b.plan.keys()) - PER_PART - {"fingerprint", "merged"}):
        if a.plan.get(key) != b.plan.get(key):
            values = f"{a.plan.get(key)}, store {b.folder} has {b.plan.get(key)}"
            raise UserError(f"store {a.folder} has {key} = {values}: they cannot be merged")
    if len(both := np.intersect1d(a.image_ids, b.image_ids)):
        raise UserError(f"store {a.folder} and store {b.folder} both have image_id {both[0]}: they cannot be merged")
