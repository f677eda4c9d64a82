"""Each region embedding should be closest to its own teacher embedding among all of the batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
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
    world = comm.get_world_size()
    if world == 1:
        return rows, 0
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(counts, torch.full_like(counts[0], len(rows)))
    counts = torch.cat(counts).tolist()
    padded = F.pad(rows, (0, 0, 0, max(1, *counts) - len(rows)))  # tensors of one size
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), sum(counts[: comm.get_rank()])
