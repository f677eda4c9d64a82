"""A store's manifest: its plan (what must be equal for a run to go on), where its proposals are from, and, once it is
complete, every shard with its number of regions and its checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vild.errors import UserError
from vild.files import write_json
from vild.teacher.shards import DTYPES

MANIFEST = "manifest.json"


def write_manifest(folder: Path, manifest: dict) -> None:
    """Whole or not at all."""
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict:
    """A store's manifest, of a finished or unfinished one; UserError if there is none that can be read."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"store {folder}: {path} does not exist; tools/build_teacher_store.py makes a store")
    try:
        manifest = json.loads(path.read_text())
        if manifest["plan"]["dtype"] not in DTYPES or not isinstance(manifest["shards"], list):
            raise ValueError(f"dtype {manifest['plan']['dtype']}, shards {manifest['shards']}"[:200])
        manifest["complete"], manifest["plan"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"store {folder}: {MANIFEST} is not a store's ({type(error).__name__}: {error})") from error
    return manifest


def unfinished(plan: dict, provenance: dict | None) -> dict:
    """The manifest of a store that is still being written."""
    return {"plan": plan, "provenance": provenance, "complete": False, "shards": []}


def hash_ids(image_ids: Sequence[int]) -> str:
    """Which pictures, and in which order (16 hex digits)."""
    return hashlib.sha256(np.asarray(image_ids, np.int64).tobytes()).hexdigest()[:16]
