"""Data sets by name: LVIS- and COCO-style annotation files with a base/novel split.

``vild/data/builtin.py`` lists the built-in ones; ``DETECTRON2_DATASETS`` is the root. Your own are entries of
``$DETECTRON2_DATASETS/vild_datasets.json`` (tools/add_dataset.py).
"""

from __future__ import annotations

import difflib
import hashlib
import os
from dataclasses import asdict
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from vild.data.annotations import file_of_url, load_annotations, read_json
from vild.data.builtin import BUILTIN, PARTIAL, Entry, origin
from vild.data.classes import MARKS, Classes, make_classes, read_split
from vild.data.masks import usable
from vild.utils.errors import UserError, first_line
from vild.utils.files import write_json

USER_FILE = "vild_datasets.json"


def root() -> Path:
    """``DETECTRON2_DATASETS``, default "datasets"."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def _user_entries() -> dict[str, Entry]:
    path = root() / USER_FILE
    if not path.is_file():
        return {}
    try:
        return {name: Entry(**e) for name, e in read_json(path).items()}
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a list of data sets ({error})") from error


def entries() -> dict[str, Entry]:
    """All data sets: built-in and the user's."""
    return {**BUILTIN, **_user_entries()}


def add_entry(name: str, entry: Entry) -> Path:
    """Add a data set to the user's file; returns its path."""
    path = root() / USER_FILE
    write_json(path, {n: asdict(e) for n, e in {**_user_entries(), name: entry}.items()})
    return path


def get_entry(name: str) -> Entry:
    """The entry of a data set; UserError if there is none."""
    known = entries()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.8)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        user = root() / USER_FILE
        own = f"your own are those of {user}" if user.is_file() else f"there are none of your own: no {user}"
        others = "" if near else f"; known: {', '.join(known)}"
        raise UserError(f"data set '{name}' is not known{hint}; {own} (DETECTRON2_DATASETS is {root()}){others}")
    return known[name]


def is_there(name: str) -> bool:
    """Whether a data set's annotation file exists."""
    return (root() / get_entry(name).json).is_file()


_READ: dict[tuple[str, int, int], dict] = {}  # parsed files by path, time and size: a changed one is read again
MOST_READ = 8


def _key(path: Path) -> tuple[str, int, int]:
    return str(path), path.stat().st_mtime_ns, path.stat().st_size


def read_annotations(name: str, entry: Entry | None = None) -> dict:
    """The parsed and validated annotation file of a data set, or of an entry that need not be registered (cached: do
    not modify)."""
    entry = entry or get_entry(name)
    path = root() / entry.json
    if not os.path.isfile(path):  # False, too, for invalid file names
        hint = f"; {origin(entry)}" if BUILTIN.get(name) == entry else ""
        raise UserError(f"data set '{name}': {path} does not exist (DETECTRON2_DATASETS is {root()}){hint}")
    if (key := _key(path)) not in _READ:
        document = load_annotations(path)
        if len(_READ) == MOST_READ:
            del _READ[next(iter(_READ))]
        _READ[key] = document
    return _READ[key]


def is_read(name: str) -> bool:
    """Does :func:`read_annotations` have the data set's file already?"""
    path = root() / get_entry(name).json
    return path.is_file() and _key(path) in _READ


def take_over(name: str, document: dict) -> None:
    """Let :func:`read_annotations` return ``document``, as another process has read it from the data set's file."""
    _READ[_key(root() / get_entry(name).json)] = document


def get_classes(name: str, entry: Entry | None = None, document: dict | None = None) -> Classes:
    """The classes of a data set, or of an entry that need not be registered, with annotations that need not be written.

    The file of a built-in data set must have the split's names with their official ids. A training file may lack the
    novel ones (COCO's ``seen_2`` does); they are classes all the same, so that one vocabulary serves training and
    evaluation. A user's file may lack some names of the split.

    Raises:
        UserError: annotation file and split do not match.
    """
    entry = entry or get_entry(name)
    split = read_split(entry.split, root())
    categories = (document or read_annotations(name, entry))["categories"]
    if BUILTIN.get(name) == entry:
        split.check_official(categories, PARTIAL.get(name, tuple(MARKS)), root() / entry.json)
        if entry.keep == "base":
            categories = [*categories, *({"name": n, "id": split.ids[n]} for n in split.absent(categories))]
    classes = make_classes(categories, split)
    if not classes.names:
        raise UserError(f"data set '{name}': split '{entry.split}' matches none of its categories")
    return classes


def load_dicts(name: str) -> list[dict]:
    """The data set in Detectron2's format.

    With ``keep="base"`` nothing of a novel annotation is returned: neither its box, nor its class, nor the fact that
    the image has one (LVIS's image-level lists are read by the evaluator only).

    A data set that is only in Detectron2's catalog is returned unchanged.
    """
    if name not in entries() and name in DatasetCatalog.list():
        return _from_catalog(name)
    entry, classes, document = get_entry(name), get_classes(name), read_annotations(name)
    marks = ("base",) if entry.keep == "base" else ("base", "novel")
    kept = {i: k for k, (i, s) in enumerate(zip(classes.ids, classes.splits, strict=True)) if s in marks}
    sizes = {i["id"]: (i["width"], i["height"]) for i in document["images"]}
    by_image: dict[int, list[dict]] = {}
    for a in document["annotations"]:
        if a["category_id"] not in kept or _is_empty(a["bbox"], *sizes[a["image_id"]]):
            continue
        record = {
            "bbox": a["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": kept[a["category_id"]],
            "iscrowd": a.get("iscrowd", 0),
        }
        if segmentation := usable(a.get("segmentation")):
            record["segmentation"] = segmentation
        by_image.setdefault(a["image_id"], []).append(record)
    folder = root() / entry.images
    return [
        {
            "file_name": str(folder / _file_name(i, entry)),
            "image_id": i["id"],
            "height": i["height"],
            "width": i["width"],
            "annotations": by_image.get(i["id"], []),
        }
        for i in document["images"]
    ]


def _file_name(image: dict, entry: Entry) -> str:
    """An image's file below the image folder. LVIS v1 has no file names, and those in some copies lack the folder
    (train2017, val2017) below ``coco/``: the last two parts of the URL are folder and file."""
    if "coco_url" in image and (entry.images == "coco" or "file_name" not in image):
        return file_of_url(image["coco_url"])
    return image["file_name"]


def _is_empty(box: list[float], width: int, height: int) -> bool:
    """Does a box, xywh, cover nothing of its image?"""
    x, y, w, h = box
    return w <= 0 or h <= 0 or x >= width or y >= height or x + w <= 0 or y + h <= 0


def _from_catalog(name: str) -> list[dict]:
    try:
        return DatasetCatalog.get(name)
    except (OSError, ImportError, AssertionError) as error:
        raise UserError(f"data set '{name}' (Detectron2's own): {first_line(error)}") from error


def images_hash(name: str) -> str:
    """16 hex digits of the SHA-256 of a data set's images: ids, folder and file names, sizes."""
    digest = hashlib.sha256()
    for r in sorted(load_dicts(name), key=lambda r: r["image_id"]):
        place = "/".join(Path(r["file_name"]).parts[-2:])
        digest.update(f"{r['image_id']} {place} {r['height']} {r['width']}\n".encode())
    return digest.hexdigest()[:16]


def forget() -> None:
    """Release cached annotation files (LVIS's take gigabytes)."""
    _READ.clear()


def register_all() -> None:
    """Register all data sets in Detectron2's catalogs, replacing Detectron2's own of the same name (lvis_v1_val,
    coco_2017_val, ...) so that all readers see the same images and classes."""
    for name in entries():
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, lambda name=name: load_dicts(name))
        MetadataCatalog.get(name).set(evaluator_type="vild")
