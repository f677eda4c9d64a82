"""The embedding store: the teacher's region embeddings on disk, read by the detector's data mapper.

A folder with ``manifest.json`` and ``shard-00000.safetensors`` ... Each shard holds, for some pictures,
``image_ids`` int64 [I], ``offsets`` int64 [I + 1], ``boxes`` float32 [N, 4] (xyxy, absolute pixels of the
original picture), ``embeddings`` float16 [N, D] and ``scores`` float32 [N]. Rows offsets[i]:offsets[i + 1]
belong to picture i. A shard appears by rename, whole or not at all; the manifest is complete once it lists
every shard with its checksum. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vild.errors import UserError
from vild.teacher.clip import describe, same_teacher

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Regions:
    """One picture's rows: boxes float32 [N, 4] xyxy, embeddings float32 [N, D] unit, scores float32 [N]."""

    boxes: Tensor
    embeddings: Tensor
    scores: Tensor


def _write_json(path: Path, document: dict) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(document, indent=1))
    os.replace(aside, path)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else (hashlib.sha256(file.read()).hexdigest())
        )


class StoreWriter:
    """Write a store shard by shard; a run that was killed goes on after its last whole shard.

    Args:
        folder: the store.
        plan: what must be equal for a run to go on: teacher fingerprint, crop rule, hash of the proposals.
        image_ids: all pictures, in the order in which they are written.
        shard_pictures: pictures a shard.

    Raises:
        UserError: the folder holds a store of another plan.
    """

    def __init__(self, folder: str | Path, plan: dict, image_ids: list[int], shard_pictures: int = 200):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        ids_hash = hashlib.sha256(np.asarray(image_ids, np.int64).tobytes()).hexdigest()[:16]
        self.plan = {**plan, "dtype": "float16", "images": len(image_ids), "image_ids_sha": ids_hash}
        self.plan["shard_pictures"] = shard_pictures
        manifest = self.folder / MANIFEST
        if manifest.exists():
            known = json.loads(manifest.read_text())["plan"]
            differ = [k for k in {**known, **self.plan} if known.get(k) != self.plan.get(k)]
            if "fingerprint" in differ and same_teacher(known["fingerprint"], self.plan["fingerprint"]):
                differ.remove("fingerprint")  # the same weights from another place
                self.plan["fingerprint"] = known["fingerprint"]
            if differ:
                key = differ[0]
                old, new = known.get(key), self.plan.get(key)
                if key == "fingerprint":
                    old, new = describe(old), describe(new)
                raise UserError(f"store {self.folder}: it was begun with {key} = {old}, now it is {new}")
        else:
            _write_json(manifest, {"plan": self.plan, "complete": False, "shards": []})
        self.chunks = [image_ids[i : i + shard_pictures] for i in range(0, len(image_ids), shard_pictures)]

    def shard_path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def missing(self) -> Iterator[tuple[int, list[int]]]:
        """Shards still to write: (index, image ids)."""
        for index, ids in enumerate(self.chunks):
            if not self.shard_path(index).exists():
                yield index, ids

    def write_shard(self, index: int, regions: Callable[[int], Regions]) -> None:
        """Compute ``regions(image_id)`` for every picture of the shard and write it."""
        ids = self.chunks[index]
        rows = [regions(i) for i in ids]
        counts = torch.tensor([len(r.boxes) for r in rows])
        tensors = {
            "image_ids": torch.tensor(ids, dtype=torch.int64),
            "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            "boxes": torch.cat([r.boxes for r in rows]).float().contiguous(),
            "embeddings": torch.cat([r.embeddings for r in rows]).half().cpu().contiguous(),
            "scores": torch.cat([r.scores for r in rows]).float().contiguous(),
        }
        aside = self.shard_path(index).with_suffix(".tmp")
        save_file(tensors, aside)
        os.replace(aside, self.shard_path(index))

    def finish(self) -> dict:
        """Write the complete manifest, with checksums and counts; returns it."""
        shards, total = [], 0
        for index in range(len(self.chunks)):
            path = self.shard_path(index)
            with safe_open(path, "pt") as file:
                count = file.get_slice("boxes").get_shape()[0]
            total += count
            shards.append({"file": path.name, "regions": count, "sha256": _checksum(path)})
        manifest = {"plan": self.plan, "complete": True, "regions": total, "shards": shards}
        _write_json(self.folder / MANIFEST, manifest)
        return manifest


class EmbeddingStore:
    """Random access by picture. Files are mapped, not read; safe to use from data loader workers.

    Raises:
        UserError: the folder is no store, or an unfinished one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise UserError(f"store {folder}: {path} does not exist; tools/build_teacher_store.py makes a store")
        manifest = json.loads(path.read_text())
        if not manifest["complete"]:
            raise UserError(f"store {folder}: it is unfinished; run tools/build_teacher_store.py again")
        self.plan = manifest["plan"]
        self.fingerprint: dict = self.plan["fingerprint"]
        self.files = [self.folder / s["file"] for s in manifest["shards"]]
        self._where: dict[int, tuple[int, int, int]] = {}
        for index, file_name in enumerate(self.files):
            if not file_name.is_file():
                raise UserError(f"store {folder}: {file_name.name} is listed in {MANIFEST} but missing")
            try:
                with safe_open(file_name, "np") as file:
                    ids, offsets = file.get_tensor("image_ids").tolist(), file.get_tensor("offsets").tolist()
            except SafetensorError as error:
                raise UserError(
                    f"store {folder}: {file_name.name} is broken ({error}); remove it and build again"
                ) from error
            for i, image_id in enumerate(ids):
                self._where[image_id] = (index, offsets[i], offsets[i + 1])
        self._open: dict[tuple[int, int], object] = {}

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._where)

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._where

    def __getitem__(self, image_id: int) -> Regions:
        """A picture's regions, in the order of its proposals.

        Raises:
            UserError: the store does not know the picture.
        """
        if image_id not in self._where:
            raise UserError(f"store {self.folder}: image_id {image_id} is not in it; it was built for other data")
        index, start, stop = self._where[image_id]
        key = (os.getpid(), index)  # a handle per process: forked workers must not share one
        if key not in self._open:
            self._open[key] = safe_open(self.files[index], "pt")
        read = self._open[key].get_slice
        return Regions(
            read("boxes")[start:stop],
            torch.nn.functional.normalize(read("embeddings")[start:stop].float(), dim=1),
            read("scores")[start:stop],
        )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def check_teacher(self, fingerprint: dict, where: str) -> None:
        """UserError unless ``fingerprint`` (that of ``where``) is this store's teacher."""
        if not same_teacher(self.fingerprint, fingerprint):
            mine, other = describe(self.fingerprint), describe(fingerprint)
            raise UserError(f"store {self.folder} is of teacher {mine}, but {where} is of teacher {other}")
