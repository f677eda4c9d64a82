"""Proposal files: ``image_ids`` int64 [I], ``offsets`` int64 [I + 1], ``boxes`` float32 [N, 4] (xyxy, absolute
pixels of the original image) and ``scores`` float32 [N] in one ``.safetensors``, or COCO-results JSON. The
metadata of the former may have a provenance record (``vild.data.provenance``)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import boxes as box_ops

from vild.data.annotations import short, whole
from vild.utils.errors import UserError
from vild.utils.files import write_tensors
from vild.utils.untrusted import MOST_DATA, open_tensors, parse_json, read_bytes, refused_as

Proposals = dict[int, tuple[Tensor, Tensor]]  # image_id: boxes [N, 4] xyxy, scores [N]


def save_proposals(path: str | Path, proposals: Proposals, provenance: dict | None = None) -> None:
    """Write the file atomically, images sorted by id."""
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
    with refused_as(f"proposals: {path} is not a proposal file"):
        if path.suffix == ".json":
            return _from_json(_read_results(path))
        with open_tensors(path) as file:
            return _from_tensors(*(file.get_tensor(key) for key in ("image_ids", "offsets", "boxes", "scores")))


def select_rows(
    boxes: Tensor, scores: Tensor, limit: int, min_size: float | None = None, nms: float | None = None
) -> tuple[Tensor, dict[str, int]]:
    """Select an image's best proposals.

    Args:
        limit: maximum number of proposals.
        min_size: minimum length of the shorter side, in pixels of the original image.
        nms: IoU threshold of class-agnostic NMS (equal scores: the first wins).

    Returns:
        rows int64 [K] by decreasing score; number of boxes that ``min_size`` and ``nms``, where given, dropped.
    """
    rows, dropped = scores.argsort(descending=True, stable=True), {}
    if min_size is not None:
        kept = rows[((boxes[rows, 2:] - boxes[rows, :2]) >= min_size).all(1)]
        dropped["min_size"], rows = len(rows) - len(kept), kept
    if nms is not None:
        # by rank, not by score: torchvision does not define the order of equal scores
        kept = rows[box_ops.nms(boxes[rows].float(), -torch.arange(len(rows)).float(), nms)]
        dropped["nms"], rows = len(rows) - len(kept), kept
    return rows[:limit], dropped


def select_proposals(
    proposals: Proposals, limit: int, min_size: float | None = None, nms: float | None = None
) -> tuple[Proposals, dict[str, int]]:
    """:func:`select_rows` for every image; numbers of dropped boxes are summed.

    Raises:
        UserError: a threshold out of range.
    """
    if min_size is not None and not 0 < min_size < float("inf"):
        raise UserError(f"--min-size {min_size}: must be a positive number of pixels")
    if nms is not None and not 0 < nms < 1:
        raise UserError(f"--nms {nms}: must be an IoU between 0 and 1")
    selected, dropped = {}, Counter()
    for image_id, (boxes, scores) in proposals.items():
        rows, numbers = select_rows(boxes, scores, limit, min_size, nms)
        selected[image_id] = boxes[rows], scores[rows]
        dropped.update(numbers)
    return selected, dict(dropped)


def read_provenance(path: str | Path) -> dict | None:
    """A proposal file's provenance record; None if it has none."""
    if Path(path).suffix == ".json":
        return None
    with refused_as(f"proposals: {path} is not a proposal file"), open_tensors(path) as file:
        record = parse_json((file.metadata() or {}).get("provenance", "null"))
        if not isinstance(record, dict | None):
            raise ValueError("its provenance is not a record")
        return record


def read_labels(path: str | Path) -> set[int]:
    """The category ids in a proposal file, if any (for the leakage audit; training never reads them)."""
    with refused_as(f"proposals: {path} is not a proposal file"):
        if Path(path).suffix == ".json":
            return {r["category_id"] for r in _read_results(path) if "category_id" in r}
        with open_tensors(path) as file:
            keys = set(file.keys()) - {"image_ids", "offsets", "boxes", "scores"}
            others = [file.get_tensor(key) for key in sorted(keys)]
        return {v for t in others if not t.is_floating_point() for v in t.flatten().tolist()}


def _read_results(path: str | Path) -> list[dict]:
    results = parse_json(read_bytes(path, MOST_DATA))
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise ValueError("not a list of records")
    return results


def _from_json(results: list[dict]) -> Proposals:
    rows: dict[int, list] = {}
    for r in sorted(results, key=lambda r: -r["score"]):
        x, y, w, h = map(float, r["bbox"])
        image_id = whole(r, "image_id")
        if not -(2**63) <= image_id < 2**63:
            raise ValueError(f"image_id {short(image_id)} is not between -2^63 and 2^63")
        rows.setdefault(image_id, []).append([x, y, x + w, y + h, float(r["score"])])
    flat = torch.tensor([row for some in rows.values() for row in some], dtype=torch.float32).reshape(-1, 5)
    return _split_up(rows, [len(v) for v in rows.values()], flat[:, :4], flat[:, 4])


def _from_tensors(ids: Tensor, offsets: Tensor, boxes: Tensor, scores: Tensor) -> Proposals:
    rows = len(boxes)
    shapes = {
        "image_ids": (ids, torch.int64, (len(offsets) - 1,)),
        "offsets": (offsets, torch.int64, offsets.shape[:1]),
        "boxes": (boxes, torch.float32, (rows, 4)),
        "scores": (scores, torch.float32, (rows,)),
    }
    for name, (tensor, dtype, shape) in shapes.items():
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{name} have type {tensor.dtype} and shape {list(tensor.shape)}")
    if offsets[0] != 0 or offsets[-1] != rows or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets do not increase from 0 to {rows}")
    return _split_up(ids.tolist(), offsets.diff().tolist(), boxes, scores)


def _split_up(ids: Iterable[int], counts: Sequence[int], boxes: Tensor, scores: Tensor) -> Proposals:
    """Split rows by image; ValueError for non-finite numbers."""
    if not boxes.isfinite().all() or not scores.isfinite().all():
        raise ValueError("a box or a score is not finite")
    return dict(zip(ids, zip(boxes.split(counts), scores.split(counts), strict=True), strict=True))
