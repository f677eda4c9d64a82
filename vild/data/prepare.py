"""Derive the open-vocabulary annotation files from the official ones, and check them (datasets/prepare_*.py).

The results are the files that other papers use: ``lvis_v1_train_norare`` drops LVIS's rare annotations and keeps all
images and 1,203 categories. COCO's ``_2`` files (OVR-CNN, ipynb/003) keep the annotations of some classes including
crowds, the images that contain any, and the categories of these classes; ``_oriorder`` (Detic) keeps all 80 categories.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vild.data.annotations import load_annotations
from vild.data.classes import MARKS, Split, read_split
from vild.utils.errors import UserError
from vild.utils.files import written_whole

# The fields by which files are compared
FIELDS = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}

# Published sizes of the official files: (images, annotations, categories); None: not published
OFFICIAL = {
    # lvisdataset.org (the download page gives 1,270,141 instances in 100,170 images, and 19,809 for val)
    "lvis/lvis_v1_train.json": (100_170, 1_270_141, 1203),
    "lvis/lvis_v1_val.json": (19_809, None, 1203),
    # cocodataset.org
    "coco/annotations/instances_train2017.json": (118_287, None, 80),
    "coco/annotations/instances_val2017.json": (5_000, None, 80),
}


def keep_annotations(document: dict, ids: set[int]) -> dict:
    """All images and categories; annotations of the categories ``ids``."""
    return {**document, "annotations": [a for a in document["annotations"] if a["category_id"] in ids]}


def keep_images(document: dict, ids: set[int]) -> dict:
    """Annotations of the categories ``ids`` and the images that contain any; all categories."""
    document = keep_annotations(document, ids)
    used = {a["image_id"] for a in document["annotations"]}
    return {**document, "images": [i for i in document["images"] if i["id"] in used]}


def keep_categories(document: dict, ids: set[int]) -> dict:
    """Categories ``ids``, their annotations, and the images that contain any."""
    return {**keep_images(document, ids), "categories": [c for c in document["categories"] if c["id"] in ids]}


def keep_val2017(document: dict, _) -> dict:
    """The images of COCO's val2017, according to their URLs (MDETR's "minival")."""
    images = [i for i in document["images"] if i.get("coco_url", "").split("/")[-2:-1] == ["val2017"]]
    used = {i["id"] for i in images}
    return {**document, "images": images, "annotations": [a for a in document["annotations"] if a["image_id"] in used]}


@dataclass(frozen=True)
class Derived:
    """A file derived from an official one.

    Attributes:
        path, source: below the root.
        derive: gives the document from that of ``source`` and the ids of the categories of ``marks``.
        marks: the lists of the split that the file may have annotations of.
        published: as in OFFICIAL.
    """

    path: str
    source: str
    derive: Callable[[dict, set[int]], dict]
    marks: tuple[str, ...]
    published: tuple[int | None, int | None, int | None]


def _zeroshot(part: str, kind: str, derive: Callable, marks: tuple[str, ...], published: tuple) -> Derived:
    source = f"coco/annotations/instances_{part}2017.json"
    return Derived(f"coco/zero-shot/instances_{part}2017_{kind}.json", source, derive, marks, published)


BASE, BOTH = ("base",), ("base", "novel")
LVIS = (
    Derived("lvis/lvis_v1_train_norare.json", "lvis/lvis_v1_train.json", keep_annotations, BASE, (100_170, None, 1203)),
    # 4,809: the catalogue of TensorFlow Datasets (lvis, "minival")
    Derived("lvis/lvis_v1_minival.json", "lvis/lvis_v1_val.json", keep_val2017, BOTH, (4_809, None, 1203)),
)
# 107,761 images with 665,387 base boxes: as quoted from OVR-CNN (Zareian et al. 2021), not verified against the paper;
# 4,836: also its issue 17
COCO = (
    _zeroshot("train", "seen_2", keep_categories, BASE, (107_761, 665_387, 48)),
    _zeroshot("train", "seen_2_oriorder", keep_images, BASE, (107_761, 665_387, 80)),
    _zeroshot("val", "seen_2", keep_categories, BASE, (None, None, 48)),
    _zeroshot("val", "unseen_2", keep_categories, ("novel",), (None, None, 17)),
    _zeroshot("val", "all_2", keep_categories, BOTH, (4_836, None, 65)),
    _zeroshot("val", "all_2_oriorder", keep_images, BOTH, (4_836, None, 80)),
)


def prepare(derived: Sequence[Derived], root: Path, split_name: str, official: bool) -> None:
    """Write the files that do not exist yet, and check those that do.

    Args:
        root: ``DETECTRON2_DATASETS``.
        split_name: defines the base and novel classes.
        official: the sources must be the published files, with the published sizes, names and ids.

    Raises:
        UserError: a source or an existing file is not as expected, or there is none of the sources of the missing
            files. Files written before that are kept.
    """
    split = read_split(split_name, root)
    # one big file in memory at a time: summaries of existing files first
    existing = {d.path: summarize(_read(d, root, split, official)) for d in derived if (root / d.path).is_file()}
    lacking = {d.path: d.source for d in derived if d.path not in existing and not (root / d.source).is_file()}
    if lacking and not any((root / d.source).is_file() for d in derived):
        path, source = next(iter(lacking.items()))
        raise UserError(f"{root / source} does not exist; {path} is derived from it")
    for source in dict.fromkeys(d.source for d in derived):
        wanted = [d for d in derived if d.source == source]
        if not (root / source).is_file():
            made = [d.path for d in wanted if d.path in existing]
            if made:
                print(f"{source} does not exist: its {len(made)} files are checked against the published sizes only")
            for path in (p for p, needed in lacking.items() if needed == source):
                print(f"{path}: not made, {root / source} does not exist")
            continue
        print(f"reading {root / source}")
        document = load_annotations(root / source)
        if official:
            _check_official(document, source, OFFICIAL[source], tuple(MARKS), split)
        for d in wanted:
            made = d.derive(document, _category_ids(document, split, d.marks))
            if d.path in existing:
                expected = summarize(made)
                for kind, found in existing[d.path].items():
                    if found != expected[kind]:
                        what = f"its {found[0]:,} {kind} differ from the {expected[kind][0]:,} derived from {source}"
                        raise UserError(f"{root / d.path}: {what}; delete it to have it written again")
                print(f"{d.path}: already exists, same content as derived from {source}")
                continue
            if not made["images"]:
                raise UserError(f"{root / source}: no image for {d.path}")
            if official:
                _check_official(made, d.path, d.published, d.marks, split)
            write_json(root / d.path, made)
            print(f"{d.path}: written")


def summarize(document: dict) -> dict[str, tuple[int, str]]:
    """Number and hash of the records of each kind, independent of their order, by the fields in FIELDS."""
    summary = {}
    for kind, keys in FIELDS.items():
        digest = hashlib.sha256()
        for record in sorted(document[kind], key=lambda r: r["id"]):
            digest.update(json.dumps([record[k] for k in keys]).encode())
        summary[kind] = len(document[kind]), digest.hexdigest()
    return summary


def _category_ids(document: dict, split: Split, marks: Sequence[str]) -> set[int]:
    return {c["id"] for c in document["categories"] if split.mark(c) in {MARKS[m] for m in marks}}


def _read(d: Derived, root: Path, split: Split, official: bool) -> dict:
    """An existing derived file; UserError for an annotation of a class that is not of ``d.marks``."""
    print(f"reading {root / d.path}")
    document = load_annotations(root / d.path)
    if official:
        _check_official(document, d.path, d.published, d.marks, split)
    ids, names = _category_ids(document, split, d.marks), {c["id"]: c["name"] for c in document["categories"]}
    for n, a in enumerate(document["annotations"]):
        if a["category_id"] not in ids:
            raise UserError(
                f"{d.path}: annotations[{n}] (id {a['id']}) is of '{names[a['category_id']]}', which is not one of the "
                f"{' or '.join(d.marks)} names of split {split.path.stem}"
            )
    return document


def _check_official(document: dict, path: str, published: tuple, marks: tuple[str, ...], split: Split) -> None:
    """UserError for other sizes than published, or other names or ids than in the split's lists ``marks``."""
    for kind, expected in zip(FIELDS, published, strict=True):
        found = len(document[kind])
        print(f"{path}: {found:,} {kind}" + (f", published {expected:,}" if expected is not None else ""))
        if expected not in (None, found):
            raise UserError(
                f"{path}: {found:,} {kind}, but the published file has {expected:,} (--unofficial accepts other files)"
            )
    split.check_official(document["categories"], marks, path)


def write_json(path: Path, document: dict) -> None:
    """Write a document atomically, one record per line (json.dump is slow, json.dumps doubles the memory)."""
    with written_whole(path) as temporary, open(temporary, "w") as file:
        for n, (key, value) in enumerate(document.items()):
            file.write(f"{',' if n else '{'}\n{json.dumps(key)}: ")
            if isinstance(value, list):
                file.write("[")
                file.writelines((",\n" if m else "\n") + json.dumps(record) for m, record in enumerate(value))
                file.write("]")
            else:
                file.write(json.dumps(value))
        file.write("}\n")
