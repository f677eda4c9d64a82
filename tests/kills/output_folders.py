"""Lists an output folder, and finds the first difference between two of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

LOGS = ("log.txt", "metrics.json", "events.out.tfevents")  # they show that a run was resumed


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of the last change, and size, of every file in a folder and its subfolders."""
    found = {}
    for path in [folder, *(p for p in _list(folder) if p.is_dir())]:
        for entry in _list(path):
            try:
                state = entry.stat()
            except FileNotFoundError:
                continue
            found[str(entry.relative_to(folder))] = state.st_mtime_ns, state.st_size
    return found


def _list(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def differences(whole: Path, other: Path, losses: bool = False) -> str:
    """The first difference between two output folders; "" if there is none.

    Checkpoints are compared by their contents, bit for bit, other files but logs by their bytes; with ``losses``, also
    the last losses in metrics.json.
    """
    names = [
        {n for n in list_files(f) if not Path(n).name.startswith(LOGS) and (f / n).is_file()} for f in (whole, other)
    ]
    if names[0] != names[1]:
        missing, more = sorted(names[0] - names[1]), sorted(names[1] - names[0])
        return f"{missing[0]} is missing" if missing else f"{more[0]} was left behind"
    for name in sorted(names[0]):
        mine, theirs = whole / name, other / name
        if name.endswith(".pth"):
            if place := first_difference(load(mine), load(theirs)):
                return f"{name}: {place}"
        elif mine.read_bytes() != theirs.read_bytes():
            return f"{name} has other bytes"
    if losses and (pair := [last_losses(f / "metrics.json") for f in (whole, other)]) and pair[0] != pair[1]:
        return f"losses {pair[1]}, not {pair[0]}"
    return ""


def load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def first_difference(a: object, b: object, place: str = "") -> str:
    """The path of the first difference between two nested structures with tensors, as "model/weight"; "" if none."""
    if type(a) is not type(b):
        return place or "its type"
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return f"{place}/{min(map(str, a.keys() ^ b.keys()))}".lstrip("/")
        found = (first_difference(a[k], b[k], f"{place}/{k}".lstrip("/")) for k in a)
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            return place or "its length"
        found = (first_difference(x, y, f"{place}/{n}".lstrip("/")) for n, (x, y) in enumerate(zip(a, b, strict=True)))
    else:
        equal = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        return "" if equal else place or "its value"
    return next(filter(None, found), "")


def last_losses(path: Path) -> dict[str, float]:
    """The losses of the last step in a training's metrics.json."""
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "total_loss" in row]
    return {key: value for key, value in rows[-1].items() if "loss" in key} if rows else {}
