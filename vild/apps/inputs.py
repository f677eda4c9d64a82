"""Find the images that a user names: files, and folders of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vild.utils.errors import UserError

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
            ".webp")  # fmt: skip


@dataclass(frozen=True)
class ImageFile:
    """An image file, and its name in results: the path relative to the given folder, with "/"."""

    path: Path
    name: str


def find_images(inputs: Sequence[str | Path], leave_out: Path | None = None) -> list[ImageFile]:
    """List images: given files whatever their names, and all files with an image suffix below given folders, sorted,
    without hidden ones.

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
        names = sorted(path.relative_to(given).as_posix() for path in _images_below(given, leave_out))
        if not names:
            raise UserError(f"--input {given}: the folder contains no image ({', '.join(SUFFIXES)})")
        found += [ImageFile(given / name, name) for name in names]
    return found


def _images_below(folder: Path, leave_out: Path | None) -> list[Path]:
    found = []
    for where, folders, files in os.walk(folder):
        here = Path(where)
        folders[:] = [f for f in folders if not f.startswith(".") and (here / f).resolve() != leave_out]
        found += [here / f for f in files if not f.startswith(".") and f.lower().endswith(SUFFIXES)]
    return found
