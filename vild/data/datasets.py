"""Data sets by name: LVIS- and COCO-form annotation files with a base/novel split.

Detectron2's own names and folders hold where it has them; ``DETECTRON2_DATASETS`` is the root. Any further
data set of either form joins by an entry in ``$DETECTRON2_DATASETS/vild_datasets.json`` (tools/add_dataset.py).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from vild.errors import UserError

SPLIT_DIR = Path(__file__).parent / "splits"
USER_FILE = "vild_datasets.json"


@dataclass(frozen=True)
class Entry:
    """Where a data set lies and how it is read.

    Attributes:
        json: annotation file, below the root.
        images: picture folder, below the root.
        split: a file in ``vild/data/splits`` (without .json) or a path; says which names are base and novel.
            Names in neither are left out.
        keep: "base" drops every annotation that is not of a base name (training), "all" keeps all.
        protocol: how it is evaluated, "coco" (all names compete everywhere) or "lvis" (federated).
    """

    json: str
    images: str
    split: str
    keep: str = "all"
    protocol: str = "coco"


def _glyphs(json_name: str, images: str, **kwargs) -> Entry:
    return Entry(f"glyphs/annotations/{json_name}.json", f"glyphs/{images}", "lvis", **kwargs)


BUILTIN = {
    "glyphs_train": _glyphs("coco_train", "train", keep="base"),
    "glyphs_train_all": Entry("glyphs/annotations/coco_train_all.json", "glyphs/train", "everything"),
    "glyphs_nonovel_train": _glyphs("coco_nonovel_train", "nonovel_train", keep="base"),
    "glyphs_dev": _glyphs("coco_dev", "dev"),
    "glyphs_val": _glyphs("coco_val", "val"),
    "glyphs_lvis_train": _glyphs("lvis_train", "train", keep="base", protocol="lvis"),
    "glyphs_lvis_val": _glyphs("lvis_val", "val", protocol="lvis"),
}


def root() -> Path:
    """``DETECTRON2_DATASETS``, "datasets" unless set."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def entries() -> dict[str, Entry]:
    """Every data set vild knows: its own and the user's."""
    path = root() / USER_FILE
    if not path.is_file():
        return dict(BUILTIN)
    try:
        return {**BUILTIN, **{name: Entry(**e) for name, e in json.loads(path.read_text()).items()}}
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a list of data sets ({error})") from error


def add_entry(name: str, entry: Entry) -> Path:
    """Write a data set into the user's file; returns the file."""
    path = root() / USER_FILE
    known = json.loads(path.read_text()) if path.is_file() else {}
    aside = path.with_suffix(".tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps({**known, name: asdict(entry)}, indent=1))
    aside.rename(path)
    return path


def get_entry(name: str) -> Entry:
    known = entries()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean '{near[0]}'?" if near else f" (known: {', '.join(known)})"
        raise UserError(f"data set '{name}' is not known{hint}")
    return known[name]


@functools.lru_cache(maxsize=8)
def _read_json(path: str, mtime: float) -> dict:
    del mtime  # part of the key: a file that changed is read again
    return json.loads(Path(path).read_text())


def read_annotations(name: str) -> dict:
    """The annotation file of a data set, parsed (shared: do not change it)."""
    return _read_annotations(name, get_entry(name))


def _read_annotations(name: str, entry: Entry) -> dict:
    path = root() / entry.json
    if not path.is_file():
        hint = "; tools/make_glyphs.py makes the built-in world" if name.startswith("glyphs") else ""
        raise UserError(f"data set '{name}': {path} does not exist (DETECTRON2_DATASETS is {root()}){hint}")
    try:
        return _read_json(str(path), path.stat().st_mtime)
    except json.JSONDecodeError as error:
        raise UserError(f"data set '{name}': {path} is not JSON ({error})") from error


def _read_split(name: str) -> dict:
    places = [SPLIT_DIR / f"{name}.json", root() / name, Path(name)]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(f"split '{name}' is neither one of vild/data/splits nor a file (below {root()} or from here)")
    try:
        split = json.loads(path.read_text())
        base, novel = split["base"], split["novel"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f'split {path}: not of the form {{"base": [...], "novel": [...]}} ({error})') from error
    if isinstance(base, list) and isinstance(novel, list) and (both := set(base) & set(novel)):
        raise UserError(f"split {path}: '{min(both)}' is both base and novel")
    return split


def _matches(category: dict, rule: list | dict) -> bool:
    """Does a split's rule (a list of names, or {"frequency": [...]}) take a category?"""
    if isinstance(rule, dict):
        return category.get("frequency") in rule["frequency"]
    return category["name"] in rule


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their category ids."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    splits: tuple[str, ...]
    frequencies: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]


def get_classes(name: str) -> Classes:
    """Base and novel classes of a data set, from its annotation file and its split."""
    return check_entry(name, get_entry(name))


def check_entry(name: str, entry: Entry) -> Classes:
    """The classes of a data set that need not be known yet; UserError if its files do not fit."""
    split = _read_split(entry.split)
    chosen = []
    for category in sorted(_read_annotations(name, entry)["categories"], key=lambda c: c["id"]):
        for mark in ("base", "novel"):
            if _matches(category, split[mark]):
                chosen.append((category, mark))
    if not chosen:
        raise UserError(f"data set '{name}': split '{entry.split}' matches none of its categories")
    return Classes(
        tuple(c["id"] for c, _ in chosen),
        tuple(c["name"] for c, _ in chosen),
        tuple(mark for _, mark in chosen),
        tuple(c.get("frequency", "") for c, _ in chosen),
        tuple(tuple(s for s in c.get("synonyms", ()) if s != c["name"]) for c, _ in chosen),
    )


def load_dicts(name: str) -> list[dict]:
    """The data set in Detectron2's form.

    With ``keep="base"`` nothing of a novel annotation gets through: neither its box, nor its class, nor that
    the picture holds one (LVIS's image-level lists stay in the file, for the evaluator alone).

    A data set that only Detectron2's catalog knows comes as the catalog has it.
    """
    if name not in entries() and name in DatasetCatalog.list():
        return _from_catalog(name)
    entry, classes, document = get_entry(name), get_classes(name), read_annotations(name)
    contiguous = {i: k for k, i in enumerate(classes.ids)}
    kept = {i for i, s in zip(classes.ids, classes.splits, strict=True) if entry.keep == "all" or s == "base"}
    by_image: dict[int, list[dict]] = {}
    for a in document["annotations"]:
        if a["category_id"] not in kept or a["bbox"][2] <= 0 or a["bbox"][3] <= 0:
            continue
        record = {
            "bbox": a["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": contiguous[a["category_id"]],
            "iscrowd": a.get("iscrowd", 0),
        }
        if segmentation := _usable_segmentation(a.get("segmentation")):
            record["segmentation"] = segmentation
        by_image.setdefault(a["image_id"], []).append(record)
    folder = root() / entry.images
    return [
        {
            # LVIS v1 names no file: the last two parts of the URL are COCO's folder and file
            "file_name": str(folder / (i.get("file_name") or "/".join(i["coco_url"].split("/")[-2:]))),
            "image_id": i["id"],
            "height": i["height"],
            "width": i["width"],
            "annotations": by_image.get(i["id"], []),
        }
        for i in document["images"]
    ]


def _usable_segmentation(segmentation: dict | list | None) -> dict | list | None:
    """RLE as it is; polygons without those of fewer than three corners; None if nothing is left."""
    if isinstance(segmentation, list):
        return [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
    return segmentation


def _from_catalog(name: str) -> list[dict]:
    try:
        return DatasetCatalog.get(name)
    except (OSError, ImportError, AssertionError) as error:
        raise UserError(f"data set '{name}' (Detectron2's own): {str(error).splitlines()[0]}") from error


def pictures_hash(name: str) -> str:
    """Which pictures a data set holds: SHA-256 over ids, folder and file names, sizes (16 hex digits)."""
    digest = hashlib.sha256()
    for r in sorted(load_dicts(name), key=lambda r: r["image_id"]):
        place = "/".join(Path(r["file_name"]).parts[-2:])
        digest.update(f"{r['image_id']} {place} {r['height']} {r['width']}\n".encode())
    return digest.hexdigest()[:16]


def forget() -> None:
    """Drop parsed annotation files from memory (LVIS's take gigabytes)."""
    _read_json.cache_clear()


def register_all() -> None:
    """Tell Detectron2's catalogs every data set that they do not know yet."""
    for name in entries():
        if name not in DatasetCatalog.list():
            DatasetCatalog.register(name, lambda name=name: load_dicts(name))
            MetadataCatalog.get(name).set(evaluator_type="vild")
