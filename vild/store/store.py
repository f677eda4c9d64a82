"""The embedding store: the teacher's region embeddings on disk, read by the detector's data mapper.

A folder with ``manifest.json`` and ``shard-00000.safetensors`` ... Each shard contains, for some images,
``image_ids`` int64 [I], ``offsets`` int64 [I + 1], ``boxes`` float32 [N, 4] (xyxy, absolute pixels of the
original image), ``embeddings`` float16 [N, D], or int8 with ``scales`` float32 [N], and ``scores`` float32 [N].
Rows offsets[i]:offsets[i + 1] belong to image i. Shards are written atomically; the manifest is complete once it lists
every shard with its checksum. No pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vild.store.manifest import MANIFEST, hash_ids, read_manifest, unfinished
from vild.store.shards import Head, Rows, check_sum, map_rows, pack, read_head, select, unpack
from vild.utils.errors import UserError
from vild.utils.files import cannot_write, sha256, write_json, write_tensors
from vild.utils.fingerprint import check_same_teacher, describe, same_regions

MAPPED_SHARDS = 1024  # mapped at once by a process; beyond that, all are released first


@dataclass(frozen=True)
class StoredRegions:
    """One image's rows: boxes float32 [N, 4] xyxy in pixels, embeddings float32 [N, D] unit length, scores float32 [N].
    ``others``: the embeddings [N, D_k] of extra teachers (``multi.py``)."""

    boxes: Tensor
    embeddings: Tensor
    scores: Tensor
    others: tuple[Tensor, ...] = ()


class StoreWriter:
    """Write a store shard by shard. A killed run resumes after its last complete shard; a complete store is left as it
    is.

    Args:
        folder: the store.
        plan: what must be the same for a run to resume: teacher fingerprint, crop rule, hash of the proposals.
        image_ids: all images, in the order in which they are written.
        shard_images: images per shard.
        provenance: where the proposals come from (not part of the plan, which has their hash).
        dtype: of the embeddings, "float16" or "int8".

    Attributes:
        complete: the store was complete when it was opened: every shard is listed and present.

    Raises:
        UserError: the folder has a store of another plan, or shards without a manifest.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: dict,
        image_ids: list[int],
        shard_images: int = 200,
        provenance: dict | None = None,
        dtype: str = "float16",
    ):
        self.folder = Path(folder)
        with cannot_write(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.plan = {**plan, "dtype": dtype, "images": len(image_ids), "image_ids_sha": hash_ids(image_ids)}
        self.plan["shard_pictures"] = shard_images
        self.provenance = provenance
        self.chunks = [image_ids[i : i + shard_images] for i in range(0, len(image_ids), shard_images)]
        self.complete = False
        self._sums: dict[str, str] = {}  # the manifest's checksums, which finish() compares with the files
        if (self.folder / MANIFEST).exists():
            self._resume(read_manifest(self.folder))
        elif any(self.folder.glob("shard-*.safetensors")):
            raise UserError(f"store {self.folder}: it has shards but no {MANIFEST}; choose another folder")
        else:
            write_json(self.folder / MANIFEST, unfinished(self.plan, provenance))

    def _resume(self, manifest: dict) -> None:
        known = manifest["plan"]
        differ = [k for k in {**known, **self.plan} if known.get(k) != self.plan.get(k)]
        if "fingerprint" in differ and same_regions(known["fingerprint"], self.plan["fingerprint"]):
            differ.remove("fingerprint")  # the same weights from another location
            self.plan["fingerprint"] = known["fingerprint"]
        if differ:
            key = differ[0]
            old, new = (describe(p[key]) if key == "fingerprint" else p.get(key) for p in (known, self.plan))
            raise UserError(f"store {self.folder}: it was begun with {key} = {old}, now it is {new}")
        listed = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
        self._sums = {name: checksum for name, checksum in listed.items() if (self.folder / name).exists()}
        self.complete = manifest["complete"] and not any(self.missing())

    def shard_path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def missing(self) -> Iterator[tuple[int, list[int]]]:
        """Shards still to write: (index, image ids)."""
        for index, ids in enumerate(self.chunks):
            if not self.shard_path(index).exists():
                yield index, ids

    def write_shard(self, index: int, regions: Callable[[int], StoredRegions]) -> None:
        """Compute ``regions(image_id)`` for every image of a shard and write it.

        Raises:
            UserError: an image's embeddings are not finite; the manifest has disappeared.
        """
        ids = self.chunks[index]
        rows = [regions(i) for i in ids]
        for image_id, r in zip(ids, rows, strict=True):
            if not torch.isfinite(r.embeddings).all():
                raise UserError(f"store {self.folder}: the teacher's embeddings of image_id {image_id} are not finite")
        counts = torch.tensor([len(r.boxes) for r in rows])
        tensors = {
            "image_ids": torch.tensor(ids, dtype=torch.int64),
            "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
            "boxes": torch.cat([r.boxes for r in rows]).float().contiguous(),
            **pack(torch.cat([r.embeddings for r in rows]).cpu(), self.plan["dtype"]),
            "scores": torch.cat([r.scores for r in rows]).float().contiguous(),
        }
        if not (self.folder / MANIFEST).exists():  # renamed or unmounted: do not start another store in its place
            raise UserError(f"store {self.folder}: {MANIFEST} has disappeared while the store was being written")
        write_tensors(self.shard_path(index), tensors)

    def finish(self, counts_planned: dict[int, int] | None = None) -> dict:
        """Compute checksums and counts from the shards and write the complete manifest; returns it. A store that was
        complete already keeps its manifest.

        Args:
            counts_planned: number of proposals by image_id. Images that have some but no region in the shards could
                not be read (``--unreadable skip``); the manifest lists them under "unreadable".

        Raises:
            UserError: a shard's checksum is not the one that the manifest listed.
        """
        heads = [read_head(self.shard_path(index), self.plan["dtype"]) for index in range(len(self.chunks))]
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(sha256, [head.path for head in heads]))
        shards = []
        for head, checksum in zip(heads, sums, strict=True):
            check_sum(head.path, checksum, self._sums.get(head.path.name))
            shards.append({"file": head.path.name, "regions": int(head.offsets[-1]), "sha256": checksum})
        manifest = {"plan": self.plan, "provenance": self.provenance, "complete": True}
        manifest |= {"regions": sum(shard["regions"] for shard in shards), "shards": shards}
        empty = [i for head in heads for i in head.image_ids[head.counts == 0].tolist()]
        if unreadable := [i for i in empty if (counts_planned or {}).get(i)]:
            manifest["unreadable"] = unreadable
        if self.complete:
            manifest = read_manifest(self.folder)
        write_json(self.folder / MANIFEST, manifest)
        return manifest


class EmbeddingStore:
    """Random access to a complete store by image_id. The files are memory-mapped, with no lock and no open descriptor:
    safe in data loader workers, forked or spawned.

    Opening a store reads the head of every shard only; ``tools/inspect_store.py --verify`` compares checksums.

    Raises:
        UserError: not a store, unfinished, or a shard is missing or truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if not manifest["complete"]:
            raise UserError(f"store {folder}: it is unfinished; run tools/build_teacher_store.py again")
        self.plan = manifest["plan"]
        self.provenance: dict | None = manifest.get("provenance")  # None in stores of earlier versions
        self.fingerprint: dict = self.plan["fingerprint"]
        self._heads = [self._read_head(shard) for shard in manifest["shards"]]
        # int64 [I] each, by increasing id; not a dict, which LVIS's 100,170 images would copy into every worker
        parts = [np.zeros((4, 0), np.int64)]
        for n, head in enumerate(self._heads):
            shards = np.full_like(head.image_ids, n)
            parts.append(np.stack([head.image_ids, shards, head.offsets[:-1], head.offsets[1:]]))
        table = np.concatenate(parts, 1)
        self.image_ids, self._shards, self._starts, self._stops = table.take(table[0].argsort(kind="stable"), 1)
        self._maps: dict[int, Rows] = {}

    def _read_head(self, shard: dict) -> Head:
        where, path = f"store {self.folder}: {shard['file']}", self.folder / shard["file"]
        if not path.is_file():
            raise UserError(f"{where} is listed in {MANIFEST} but missing")
        head, width = read_head(path, self.plan["dtype"]), self.fingerprint.get("width")
        if width not in (None, head.width):
            raise UserError(f"{where}: its embeddings do not have the teacher's width, {width}")
        if head.offsets[-1] != shard["regions"]:
            raise UserError(f"{where} has {head.offsets[-1]} regions, {MANIFEST} says {shard['regions']}")
        return head

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __contains__(self, image_id: int) -> bool:
        return self._find(image_id) is not None

    def __getitem__(self, image_id: int) -> StoredRegions:
        """An image's regions, in the order of its proposals; UserError for an unknown image_id."""
        boxes, embeddings, scales, scores = self._views(image_id)
        return StoredRegions(boxes.clone(), unpack(embeddings, scales), scores.clone())

    def read(self, image_id: int) -> Rows:
        """An image's stored rows: boxes, embeddings float16 or int8 [N, D], scales [N] (None for float16), scores."""
        return tuple(None if t is None else t.clone() for t in self._views(image_id))

    def _views(self, image_id: int) -> Rows:
        """:meth:`read` without copying. (Sending a view to another process would send the whole file.)"""
        row = self._find(image_id)
        if row is None:
            raise UserError(f"store {self.folder}: image_id {image_id} is not in it; it was built for another data set")
        index = int(self._shards[row])
        if index not in self._maps:
            if len(self._maps) >= MAPPED_SHARDS:
                self._maps.clear()
            self._maps[index] = map_rows(self._heads[index])
        return select(self._maps[index], int(self._starts[row]), int(self._stops[row]))

    def boxes(self) -> Iterator[tuple[int, Tensor]]:
        """Every image's id and boxes [N, 4], without reading the embeddings."""
        for head in self._heads:
            boxes = map_rows(head)[0].clone()
            yield from zip(head.image_ids.tolist(), boxes.split(head.counts.tolist()), strict=True)

    def ids_in_file_order(self) -> list[int]:
        """All image ids, in the order of the shards."""
        return [i for head in self._heads for i in head.image_ids.tolist()]

    def _find(self, image_id: int) -> int | None:
        row = int(self.image_ids.searchsorted(image_id))
        return row if row < len(self.image_ids) and self.image_ids[row] == image_id else None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}

    def check_teacher(self, fingerprint: dict, where: str) -> None:
        """UserError unless ``fingerprint`` (that of ``where``) is of this store's teacher."""
        check_same_teacher(self.fingerprint, f"store {self.folder}", fingerprint, where)
