"""Stores of several teachers over the same regions, read as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vild.store.store import EmbeddingStore, StoredRegions
from vild.utils.errors import UserError

REGIONS = ("proposals", "max_per_image", "nms", "min_size")  # the keys of a plan that decide which regions a store has


class SeveralStores(EmbeddingStore):
    """A store whose records also have the embeddings of extra teachers' stores (``others``), in the given order.

    Raises:
        UserError: not a store, or built from other proposals or another selection of them.
    """

    def __init__(self, folder: str | Path, others: Sequence[str | Path]):
        super().__init__(folder)
        self.others = [EmbeddingStore(other) for other in others]
        for other in self.others:
            same = all(other.plan.get(key) == self.plan.get(key) for key in REGIONS)
            if not (same and np.array_equal(other.image_ids, self.image_ids)):
                raise UserError(f"store {other.folder}: it was built from other proposals than store {self.folder}")

    def __getitem__(self, image_id: int) -> StoredRegions:
        """An image's regions; ``others`` has the extra teachers' embeddings."""
        first, others = super().__getitem__(image_id), [other[image_id] for other in self.others]
        for store, regions in zip(self.others, others, strict=True):
            if not torch.equal(regions.boxes, first.boxes):  # one of the builds could not read the image
                raise UserError(f"store {store.folder}: image_id {image_id} has other regions than in {self.folder}")
        return replace(first, others=tuple(regions.embeddings for regions in others))
