"""The embedding store: the teacher's region embeddings on disk, read by the detector's data mapper.

A folder with ``manifest.json`` and ``shard-00000.safetensors`` ... Each shard holds, for some images,
``image_ids`` int64 [I], ``offsets`` int64 [I + 1], ``boxes`` float32 [N, 4] (xyxy, absolute pixels of the
original image), ``embeddings`` float16 [N, D], or int8 with ``scales`` float32 [N], and ``scores`` float32 [N].
Rows offsets[i]:offsets[i + 1] belong to image i. A shard appears by rename, whole or not at all; the manifest is
complete once it lists every shard with its checksum. No pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vild.store.manifest import MANIFEST, hash_ids, read_manifest, unfinished, write_manifest
from vild.store.shards import Head, MappedShard, check_sum, hash_shard, pack, read_head, unpack
from vild.utils.errors import UserError
from vild.utils.files import cannot_write, write_tensors
from vild.utils.fingerprint import describe, same_regions, same_teacher

MAPPED_SHARDS = 1024  # at once, in a process; when more are asked for, all are mapped anew


@dataclass(frozen=True)
class StoredRegions:
    """One image's rows: boxes float32 [N, 4] xyxy, embeddings float32 [N, D] unit, scores float32 [N].
    ``others``: the embeddings [N, D_k] of further teachers (``several_stores.py``)."""

    boxes: Tensor
    embeddings: Tensor
    scores: Tensor
    others: tuple[Tensor, ...] = ()


class StoreWriter:
    """Write a store shard by shard; a run that was killed goes on after its last whole shard.

    Args:
        folder: the store.
        plan: what must be equal for a run to go on: teacher fingerprint, crop rule, hash of the proposals.
        image_ids: all images, in the order in which they are written.
        shard_images: images a shard.
        provenance: where the proposals are from; no part of the plan, which has their hash.
        dtype: of the embeddings, "float16" or "int8".

    Raises:
        UserError: the folder holds a store of another plan, or shards that nobody knows the plan of.
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
        self._sums: dict[str, str] = {}  # checksums that were told before: finish() does not take them from the files
        if (self.folder / MANIFEST).exists():
            manifest = read_manifest(self.folder)
            known = manifest["plan"]
            differ = [k for k in {**known, **self.plan} if known.get(k) != self.plan.get(k)]
            if "fingerprint" in differ and same_regions(known["fingerprint"], self.plan["fingerprint"]):
                differ.remove("fingerprint")  # the same weights from another place
                self.plan["fingerprint"] = known["fingerprint"]
            if differ:
                key = differ[0]
                old, new = known.get(key), self.plan.get(key)
                if key == "fingerprint":
                    old, new = describe(old), describe(new)
                raise UserError(f"store {self.folder}: it was begun with {key} = {old}, now it is {new}")
            listed = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
            self._sums = {name: checksum for name, checksum in listed.items() if (self.folder / name).exists()}
        elif any(self.folder.glob("shard-*.safetensors")):
            raise UserError(
                f"store {self.folder}: it has shards but no {MANIFEST}, which says of what teacher; name another folder"
            )
        else:
            write_manifest(self.folder, unfinished(self.plan, provenance))
        self.chunks = [image_ids[i : i + shard_images] for i in range(0, len(image_ids), shard_images)]

    def shard_path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def missing(self) -> Iterator[tuple[int, list[int]]]:
        """Shards still to write: (index, image ids)."""
        for index, ids in enumerate(self.chunks):
            if not self.shard_path(index).exists():
                yield index, ids

    def write_shard(self, index: int, regions: Callable[[int], StoredRegions]) -> None:
        """Compute ``regions(image_id)`` for every image of the shard and write it.

        Raises:
            UserError: embeddings that are not finite, with the image; the store has gone.
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
        if not (self.folder / MANIFEST).exists():  # renamed, or on a disk that has gone: nothing is begun in its place
            raise UserError(f"store {self.folder}: {MANIFEST} has gone while the store was being written")
        write_tensors(self.shard_path(index), tensors)

    def finish(self, counts_planned: dict[int, int] | None = None) -> dict:
        """Write the complete manifest, with checksums and counts; returns it.

        ``counts_planned``: how many regions each image was to have. Those that have none though some were planned
        could not be read (``--unreadable skip``); the manifest lists them under "unreadable". What is in the shards is
        asked, so that the list is whole whoever wrote them.

        Raises:
            UserError: a shard that was there, listed with its checksum, has another one now.
        """
        paths = [self.shard_path(index) for index in range(len(self.chunks))]
        heads = [read_head(path, self.plan["dtype"]) for path in paths]
        counts = [int(head.offsets[-1]) for head in heads]
        empty = [i for head in heads for i in head.image_ids[np.diff(head.offsets) == 0].tolist()]
        unreadable = [i for i in empty if (counts_planned or {}).get(i)]
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(hash_shard, paths))
        for path, found in zip(paths, sums, strict=True):
            check_sum(path, found, self._sums.get(path.name))
        shards = [
            {"file": path.name, "regions": count, "sha256": checksum}
            for path, count, checksum in zip(paths, counts, sums, strict=True)
        ]
        manifest = {"plan": self.plan, "provenance": self.provenance}
        manifest |= {"complete": True, "regions": sum(counts), "shards": shards}
        manifest |= {"unreadable": unreadable} if unreadable else {}
        write_manifest(self.folder, manifest)
        return manifest


class EmbeddingStore:
    """Random access by image. Files are mapped, not read; no lock, no open file: safe to use from data loader
    workers, forked or spawned.

    Opening one reads the head of every shard, nothing else; checksums are for ``tools/inspect_store.py --verify``.

    Raises:
        UserError: the folder is no store, an unfinished one, or one with a missing or truncated shard.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if not manifest["complete"]:
            raise UserError(f"store {folder}: it is unfinished; run tools/build_teacher_store.py again")
        self.plan = manifest["plan"]
        self.provenance: dict | None = manifest.get("provenance")  # stores of earlier versions have none
        self.fingerprint: dict = self.plan["fingerprint"]
        self._heads: list[Head] = []
        for shard in manifest["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise UserError(f"store {folder}: {path.name} is listed in {MANIFEST} but missing")
            head = read_head(path, self.plan["dtype"])
            width = self.fingerprint.get("width")
            if width not in (None, head.places["embeddings"][1][1]):
                raise UserError(f"store {folder}: {path.name} is not {width} wide, as its teacher is")
            if head.offsets[-1] != shard["regions"]:
                raise UserError(
                    f"store {folder}: {path.name} has {head.offsets[-1]} regions, {MANIFEST} says {shard['regions']}"
                )
            self._heads.append(head)
        # four numbers an image, sorted by id: a dict of LVIS's 100,170 images would be copied into every worker
        nothing = np.zeros(0, np.int64)
        ids = np.concatenate([nothing, *(h.image_ids for h in self._heads)])
        order = ids.argsort(kind="stable")
        self.image_ids = ids[order]  # int64, rising
        self._shards = np.repeat(np.arange(len(self._heads)), [len(h.image_ids) for h in self._heads])[order]
        self._starts = np.concatenate([nothing, *(h.offsets[:-1] for h in self._heads)])[order]
        self._stops = np.concatenate([nothing, *(h.offsets[1:] for h in self._heads)])[order]
        self._maps: dict[int, MappedShard] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __contains__(self, image_id: int) -> bool:
        return self._find(image_id) is not None

    def __getitem__(self, image_id: int) -> StoredRegions:
        """An image's regions, in the order of its proposals.

        Raises:
            UserError: the store does not know the image.
        """
        boxes, embeddings, scales, scores = self._views(image_id)
        return StoredRegions(boxes.clone(), unpack(embeddings, scales), scores.clone())

    def read(self, image_id: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """An image's record as it is stored: boxes, embeddings float16 or int8 [N, D], scales [N] (None for float16),
        scores."""
        return tuple(None if t is None else t.clone() for t in self._views(image_id))

    def _views(self, image_id: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """:meth:`read` without the copies; a view sent to another process would take the whole file with it."""
        row = self._find(image_id)
        if row is None:
            raise UserError(f"store {self.folder}: image_id {image_id} is not in it; it was built for other data")
        return self._map(int(self._shards[row])).rows(int(self._starts[row]), int(self._stops[row]))

    def boxes(self) -> Iterator[tuple[int, Tensor]]:
        """Every image's id and boxes [N, 4], without reading the embeddings."""
        for head in self._heads:
            boxes = MappedShard(head).tensors["boxes"].clone()
            bounds = head.offsets.tolist()
            for image_id, start, stop in zip(head.image_ids.tolist(), bounds[:-1], bounds[1:], strict=True):
                yield image_id, boxes[start:stop]

    def ids_in_file_order(self) -> list[int]:
        """Every image's id, as the shards have them."""
        return [i for head in self._heads for i in head.image_ids.tolist()]

    def _find(self, image_id: int) -> int | None:
        row = int(self.image_ids.searchsorted(image_id))
        return row if row < len(self.image_ids) and self.image_ids[row] == image_id else None

    def _map(self, index: int) -> MappedShard:
        found = self._maps.get(index)
        if found is None:
            if len(self._maps) >= MAPPED_SHARDS:
                self._maps.clear()
            found = self._maps[index] = MappedShard(self._heads[index])
        return found

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": {}}

    def check_teacher(self, fingerprint: dict, where: str) -> None:
        """UserError unless ``fingerprint`` (that of ``where``) is this store's teacher."""
        if not same_teacher(self.fingerprint, fingerprint):
            mine, other = describe(self.fingerprint), describe(fingerprint)
            raise UserError(f"store {self.folder} is of teacher {mine}, but {where} is of teacher {other}")
