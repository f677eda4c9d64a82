"""Proposal files: ``image_ids`` int64 [I], ``offsets`` int64 [I + 1], ``boxes`` float32 [N, 4] (xyxy, absolute
pixels of the original picture) and ``scores`` float32 [N] in one ``.safetensors``, or COCO-results JSON. The former
may say in its metadata where the proposals are from (``vild.data.provenance``)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torchvision.ops import boxes as box_ops

from vild.errors import UserError
from vild.files import write_tensors

Proposals = dict[int, tuple[Tensor, Tensor]]  # image_id: boxes [N, 4] xyxy, scores [N]


def save_proposals(path: str | Path, proposals: Proposals, provenance: dict | None = None) -> None:
    """Write the file, whole or not at all, pictures by rising id."""
    ids = sorted(proposals)
    counts = torch.tensor([len(proposals[i][0]) for i in ids])
    tensors = {
        "image_ids": torch.tensor(ids, dtype=torch.int64),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        "boxes": torch.cat([proposals[i][0] for i in ids]).float().contiguous(),
        "scores": torch.cat([proposals[i][1] for i in ids]).float().contiguous(),
    }
    write_tensors(path, tensors, {"provenance": json.dumps(provenance)} if provenance else None)


def load_proposals(path: str | Path) -> Proposals:
    """Read a ``.safetensors`` of :func:`save_proposals` or a list of {"image_id", "bbox" xywh, "score"}."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"proposals: {path} does not exist; tools/make_proposals.py makes them")
    try:
        if path.suffix == ".json":
            return _from_json(json.loads(path.read_text()))
        file = load_file(path)
        bounds = file["offsets"].tolist()
        return {
            i: (file["boxes"][a:b], file["scores"][a:b])
            for i, a, b in zip(file["image_ids"].tolist(), bounds[:-1], bounds[1:], strict=True)
        }
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"proposals: {path} is not a proposal file ({type(error).__name__}: {error})") from error


def select_rows(
    boxes: Tensor, scores: Tensor, limit: int, min_size: float | None = None, nms: float | None = None
) -> tuple[Tensor, dict[str, int]]:
    """Which of a picture's proposals are worth their cost.

    Args:
        limit: at most so many, the best.
        min_size: drop boxes whose shorter side is less, in pixels of the original picture.
        nms: drop boxes whose IoU with a better one that stays is more (one class, ties in the order given).

    Returns:
        rows int64 [K] by falling score; how many each of ``min_size`` and ``nms``, if given, dropped.
    """
    rows, dropped = scores.argsort(descending=True, stable=True), {}
    if min_size is not None:
        kept = rows[((boxes[rows, 2:] - boxes[rows, :2]) >= min_size).all(1)]
        dropped["min_size"], rows = len(rows) - len(kept), kept
    if nms is not None:
        # by rank, not by score: torchvision's order of equal scores is no promise
        kept = rows[box_ops.nms(boxes[rows].float(), -torch.arange(len(rows)).float(), nms)]
        dropped["nms"], rows = len(rows) - len(kept), kept
    return rows[:limit], dropped


def select_proposals(
    proposals: Proposals, limit: int, min_size: float | None = None, nms: float | None = None
) -> tuple[Proposals, dict[str, int]]:
    """:func:`select_rows` of every picture; the numbers dropped are sums.

    Raises:
        UserError: a threshold that drops everything or nothing by its meaning.
    """
    if min_size is not None and not 0 < min_size < float("inf"):
        raise UserError(f"--min-size {min_size}: it is a number of pixels above 0")
    if nms is not None and not 0 < nms < 1:
        raise UserError(f"--nms {nms}: it is an IoU between 0 and 1")
    selected, dropped = {}, Counter()
    for image_id, (boxes, scores) in proposals.items():
        rows, numbers = select_rows(boxes, scores, limit, min_size, nms)
        selected[image_id] = boxes[rows], scores[rows]
        dropped.update(numbers)
    return selected, dict(dropped)


def read_provenance(path: str | Path) -> dict | None:
    """What a proposal file says about its origin; None if it says nothing."""
    if Path(path).suffix == ".json":
        return None
    try:
        with safe_open(path, "np") as file:
            return json.loads((file.metadata() or {}).get("provenance", "null"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"proposals: {path} is not a proposal file ({type(error).__name__}: {error})") from error


def read_labels(path: str | Path) -> set[int]:
    """The category ids that a proposal file carries, if it does; nothing here ever reads them for training."""
    if Path(path).suffix == ".json":
        return {r["category_id"] for r in json.loads(Path(path).read_text()) if "category_id" in r}
    others = [t for key, t in load_file(path).items() if key not in ("image_ids", "offsets", "boxes", "scores")]
    return {v for t in others if not t.is_floating_point() for v in t.flatten().tolist()}


def _from_json(results: list[dict]) -> Proposals:
    rows: dict[int, list] = {}
    for r in sorted(results, key=lambda r: -r["score"]):
        x, y, w, h = r["bbox"]
        rows.setdefault(r["image_id"], []).append([x, y, x + w, y + h, r["score"]])
    return {i: (torch.tensor(v)[:, :4], torch.tensor(v)[:, 4]) for i, v in rows.items()}


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, first 16 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()[:16]
