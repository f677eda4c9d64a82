"""The stores of several teachers over the same regions, read as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vild.errors import UserError
from vild.teacher.store import EmbeddingStore, Regions


class SeveralStores(EmbeddingStore):
    """A store whose records also have the embeddings of ``others``, in their order.

    Raises:
        UserError: a folder is no store, or one was built from other proposals.
    """

    def __init__(self, folder: str | Path, others: Sequence[str | Path]):
        super().__init__(folder)
        self.others = [EmbeddingStore(other) for other in others]
        for other in self.others:
            same = other.plan.get("proposals") == self.plan.get("proposals")
            if not (same and np.array_equal(other.image_ids, self.image_ids)):
                raise UserError(f"store {other.folder}: it was built from other proposals than store {self.folder}")

    def __getitem__(self, image_id: int) -> Regions:
        """A picture's regions, with ``others``: each further teacher's embeddings."""
        return replace(super().__getitem__(image_id), others=tuple(o[image_id].embeddings for o in self.others))
