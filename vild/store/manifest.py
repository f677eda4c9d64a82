"""A store's manifest: the plan (which must be the same for a run to resume), the provenance of the proposals and, once
the store is complete, every shard with its number of regions and checksum."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vild.store.shards import DTYPES
from vild.utils.errors import UserError
from vild.utils.fingerprint import check_fingerprint
from vild.utils.untrusted import parse_json, read_bytes, refused_as

MANIFEST = "manifest.json"
_SHARD = re.compile(r"shard-\d{5,}\.safetensors", re.ASCII)  # no other path: --repair deletes broken shards


def read_manifest(folder: Path) -> dict:
    """Read and check the manifest of a complete or unfinished store; UserError if there is none or it is invalid."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"store {folder}: {path} does not exist; tools/build_teacher_store.py makes a store")
    with refused_as(f"store {folder}: {MANIFEST} is not a store's"):
        manifest = parse_json(read_bytes(path))
        _check(manifest)
    return manifest


def _check(manifest: dict) -> None:
    """ValueError, KeyError, TypeError or AttributeError unless a manifest has the form in which they are written."""
    plan, shards = manifest["plan"], manifest["shards"]
    if plan["dtype"] not in DTYPES or not isinstance(shards, list) or not isinstance(manifest["complete"], bool):
        raise ValueError(f"dtype {plan['dtype']}, complete {manifest['complete']}, shards {shards}"[:200])
    check_fingerprint(plan["fingerprint"])
    if type(plan["images"]) is not int or not isinstance(plan["image_ids_sha"], str):
        raise ValueError("the plan's images or image_ids_sha have the wrong type")
    dropped = plan.get("dropped")
    for part in dropped if isinstance(dropped, list) else [dropped]:  # a merged store lists those of its parts
        if part is not None and not all(type(n) is int for n in part.values()):
            raise ValueError("the plan's dropped are not numbers")
    for shard in shards:
        if not isinstance(shard["file"], str) or not _SHARD.fullmatch(shard["file"]):
            raise ValueError(f"invalid shard name {shard['file']}"[:200])
        if type(shard["regions"]) is not int or not isinstance(shard["sha256"], str):
            raise ValueError(f"{shard['file']}: {shard}"[:200])
    if len({shard["file"] for shard in shards}) < len(shards):
        raise ValueError("duplicate shard")
    unreadable = manifest.get("unreadable", [])
    if not isinstance(unreadable, list) or not all(type(i) is int for i in unreadable):
        raise ValueError("unreadable is not a list of image ids")
    if not isinstance(manifest.get("provenance"), dict | None):
        raise ValueError("the provenance is not an object")


def unfinished(plan: dict, provenance: dict | None) -> dict:
    """The manifest of a store that is still being written."""
    return {"plan": plan, "provenance": provenance, "complete": False, "shards": []}


def hash_ids(image_ids: Sequence[int]) -> str:
    """16 hex digits of the SHA-256 of image ids in their order."""
    return hashlib.sha256(np.asarray(image_ids, np.int64).tobytes()).hexdigest()[:16]
