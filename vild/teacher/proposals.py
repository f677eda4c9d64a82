"""Proposal files: ``image_ids`` int64 [I], ``offsets`` int64 [I + 1], ``boxes`` float32 [N, 4] (xyxy, absolute
pixels of the original picture) and ``scores`` float32 [N] in one ``.safetensors``, or COCO-results JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vild.errors import UserError

Proposals = dict[int, tuple[Tensor, Tensor]]  # image_id: boxes [N, 4] xyxy, scores [N]


def save_proposals(path: str | Path, proposals: Proposals) -> None:
    """Write the file, whole or not at all, pictures by rising id."""
    ids = sorted(proposals)
    counts = torch.tensor([len(proposals[i][0]) for i in ids])
    aside = Path(f"{path}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "image_ids": torch.tensor(ids, dtype=torch.int64),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        "boxes": torch.cat([proposals[i][0] for i in ids]).float().contiguous(),
        "scores": torch.cat([proposals[i][1] for i in ids]).float().contiguous(),
    }
    save_file(tensors, aside)
    aside.rename(path)


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


def _from_json(results: list[dict]) -> Proposals:
    rows: dict[int, list] = {}
    for r in sorted(results, key=lambda r: -r["score"]):
        x, y, w, h = r["bbox"]
        rows.setdefault(r["image_id"], []).append([x, y, x + w, y + h, r["score"]])
    return {i: (torch.tensor(v)[:, :4], torch.tensor(v)[:, 4]) for i, v in rows.items()}


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, first 16 hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
