"""Each region embedding should be closest to its own teacher embedding among all of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

from vild.modeling.losses import cosine_logits
from vild.modeling.objectives.regions import RegionBatch
from vild.modeling.objectives.registry import objective
from vild.modeling.schedule import POSITIVE


@objective(runs_when_empty=True, ranges={"temperature": POSITIVE})  # all ranks must take part in the gathering
def contrast(regions: RegionBatch, *, temperature: float = 0.07) -> Tensor:
    """InfoNCE from student to teacher (van den Oord et al. 2018, eq. 4). The negatives are the teacher embeddings of
    the other regions, across all images and ranks. (With words as negatives it would be ``hard_targets`` with
    CONFIDENCE 0.)"""
    teacher, first = _all_ranks(regions.teacher.float())
    if not len(regions.student):
        return regions.zero()
    logits = cosine_logits(regions.student.float(), teacher, temperature)
    own = torch.arange(len(logits), device=logits.device) + first
    return regions.mean(F.cross_entropy(logits, own, reduction="none"))


def _all_ranks(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of every rank, and the index of this rank's first. A collective: all ranks must call it."""
    if comm.get_world_size() == 1:
        return rows, 0
    parts = comm.all_gather(rows.cpu())
    return torch.cat(parts).to(rows.device), sum(map(len, parts[: comm.get_rank()]))
