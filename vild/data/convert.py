"""Annotations in YOLO's or VOC's layout as COCO-style documents."""

from __future__ import annotations

import os
from pathlib import Path

from vild.data.annotations import check_annotations
from vild.data.voc import read_voc
from vild.data.yolo import read_yolo
from vild.utils.errors import UserError


def convert(root: Path, given: str, images: str | None, subset: str | None) -> tuple[str, dict] | None:
    """Read and validate annotations that are no JSON file.

    Args:
        root: of the data sets.
        given: a ``data.yaml``, or a VOC folder, below it.
        images: the image folder below it; None where the layout says where it is.
        subset: as "train".

    Returns:
        the image folder below ``root``, and a COCO-style document; None if ``given`` is a JSON file.

    Raises:
        UserError: an invalid file or an argument that does not fit the layout.
    """
    path = root / given
    if path.suffix.lower() in (".yaml", ".yml"):
        if images is not None:
            raise UserError(f"--images {images}: {given} itself says where its images are")
        folder, document = read_yolo(path, subset, root)
    elif path.is_dir():
        jpegs = path / "JPEGImages"
        folder = root / images if images else jpegs if jpegs.is_dir() else path
        document = read_voc(path, subset, images=folder)
    elif images is None:
        raise UserError(f"--json {given}: {'give --images, too' if path.exists() else f'{path} does not exist'}")
    elif subset is not None:
        raise UserError(f"--subset {subset}: {given} is no data.yaml and no VOC folder")
    else:
        return None
    check_annotations(document, path)
    return os.path.relpath(folder, root), document
