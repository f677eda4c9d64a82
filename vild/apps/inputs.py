"""Find the images that a user names: files, and folders of them."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vild.utils.errors import UserError, count_of, printable
from vild.utils.images import SUFFIXES


@dataclass(frozen=True)
class ImageFile:
    """An image file, and its name in results: the path relative to the given folder, with "/"."""

    path: Path
    name: str


def find_images(inputs: Sequence[str | Path], leave_out: Path | None = None) -> list[ImageFile]:
    """List images: given files whatever their names, and all files with an image suffix below given folders, sorted,
    without hidden ones. A line on stderr says what else is there and was left out, by suffix.

    Args:
        leave_out: a folder to skip, the one for the results.

    Raises:
        UserError: a missing file or folder, or a folder without images.
    """
    found, leave_out = [], leave_out and leave_out.resolve()
    for given in map(Path, inputs):
        if not given.exists():
            raise UserError(f"--input {given}: does not exist")
        if not given.is_dir():
            found.append(ImageFile(given, given.name))
            continue
        images, others = _files_below(given, leave_out)
        if not images:
            there = f", but {_by_suffix(others)}" if others else ""
            raise UserError(f"--input {given}: the folder contains no image ({', '.join(SUFFIXES)}){there}")
        if others:
            print(f"--input {given}: left out {_by_suffix(others)}", file=sys.stderr)
        names = sorted(path.relative_to(given).as_posix() for path in images)
        found += [ImageFile(given / name, name) for name in names]
    return found


def _files_below(folder: Path, leave_out: Path | None) -> tuple[list[Path], list[Path]]:
    """Images, and other files."""
    images, others = [], []
    for where, folders, files in os.walk(folder):
        here = Path(where)
        folders[:] = [f for f in folders if not f.startswith(".") and (here / f).resolve() != leave_out]
        for file in files:
            if not file.startswith("."):
                (images if file.lower().endswith(SUFFIXES) else others).append(here / file)
    return images, others


def _by_suffix(files: Sequence[Path]) -> str:
    """ "3 files: 2 .heic, 1 .dng"."""
    counts = Counter(file.suffix.lower() or "without suffix" for file in files)
    often = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    listed = ", ".join(f"{count} {printable(suffix)}" for suffix, count in often[:8])
    return f"{count_of(len(files), 'file')}: {listed}{', ...' if len(counts) > 8 else ''}"
