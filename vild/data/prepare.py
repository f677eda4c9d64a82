"""The open-vocabulary annotation files, made from the official ones and checked (datasets/prepare_*.py).

They are the files that go round: LVIS loses its rare annotations and keeps its images and its 1,203 categories;
COCO's ``_2`` files (OVR-CNN, ipynb/003) keep the annotations of some names, crowds among them, the images that hold
any, and those names' categories; ``_oriorder`` (Detic) is the same with all 80 categories.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vild.data.annotations import check_annotations, read_json
from vild.data.classes import MARKS, Split, read_split
from vild.utils.errors import UserError
from vild.utils.files import written_whole

KINDS = ("images", "annotations", "categories")

# Published sizes of the official files: (images, annotations, categories); None: not published
OFFICIAL = {
    # lvisdataset.org (the download page gives 1,270,141 instances in 100,170 images, and 19,809 for val)
    "lvis/lvis_v1_train.json": (100_170, 1_270_141, 1203),
    "lvis/lvis_v1_val.json": (19_809, None, 1203),
    # cocodataset.org
    "coco/annotations/instances_train2017.json": (118_287, None, 80),
    "coco/annotations/instances_val2017.json": (5_000, None, 80),
}


@dataclass(frozen=True)
class Derived:
    """A file made from an official one.

    Attributes:
        path, source: both below the root.
        make: the document from the source's and its split; shares the source's records.
        marks: the lists of the split whose names it may annotate.
        published: as in OFFICIAL.
    """

    path: str
    source: str
    make: Callable[[dict, Split, tuple[str, ...]], dict]
    marks: tuple[str, ...]
    published: tuple[int | None, int | None, int | None]


def keep_annotations(document: dict, split: Split, marks: tuple[str, ...]) -> dict:
    """The same images and categories, the annotations of the marked names alone."""
    ids = _marked_ids(document, split, marks)
    return {**document, "annotations": [a for a in document["annotations"] if a["category_id"] in ids]}


def keep_names(document: dict, split: Split, marks: tuple[str, ...]) -> dict:
    """The marked names' categories and annotations, and the images that hold one of these."""
    document = keep_names_of_all(document, split, marks)
    ids = _marked_ids(document, split, marks)
    return {**document, "categories": [c for c in document["categories"] if c["id"] in ids]}


def keep_names_of_all(document: dict, split: Split, marks: tuple[str, ...]) -> dict:
    """The marked names' annotations and the images that hold one of these; every category."""
    document = keep_annotations(document, split, marks)
    held = {a["image_id"] for a in document["annotations"]}
    return {**document, "images": [i for i in document["images"] if i["id"] in held]}


def keep_val2017(document: dict, split: Split, marks: tuple[str, ...]) -> dict:
    """The images that lie in COCO's val2017, as their URLs tell (MDETR's "minival")."""
    del split, marks
    images = [i for i in document["images"] if i.get("coco_url", "").split("/")[-2:-1] == ["val2017"]]
    held = {i["id"] for i in images}
    return {**document, "images": images, "annotations": [a for a in document["annotations"] if a["image_id"] in held]}


def _marked_ids(document: dict, split: Split, marks: tuple[str, ...]) -> set[int]:
    wanted = {MARKS[m] for m in marks}
    return {c["id"] for c in document["categories"] if split.mark(c) in wanted}


def _zeroshot(part: str, kind: str, make: Callable, marks: tuple[str, ...], published: tuple) -> Derived:
    source = f"coco/annotations/instances_{part}2017.json"
    return Derived(f"coco/zero-shot/instances_{part}2017_{kind}.json", source, make, marks, published)


BOTH = ("base", "novel")
LVIS = (
    Derived(
        "lvis/lvis_v1_train_norare.json", "lvis/lvis_v1_train.json", keep_annotations, ("base",), (100_170, None, 1203)
    ),
    # 4,809: the catalogue of TensorFlow Datasets (lvis, "minival")
    Derived("lvis/lvis_v1_minival.json", "lvis/lvis_v1_val.json", keep_val2017, BOTH, (4_809, None, 1203)),
)
# 107,761 images with 665,387 base boxes: as quoted from OVR-CNN (Zareian et al. 2021), not held against its text
# here; 4,836: also its issue 17
COCO = (
    _zeroshot("train", "seen_2", keep_names, ("base",), (107_761, 665_387, 48)),
    _zeroshot("train", "seen_2_oriorder", keep_names_of_all, ("base",), (107_761, 665_387, 80)),
    _zeroshot("val", "seen_2", keep_names, ("base",), (None, None, 48)),
    _zeroshot("val", "unseen_2", keep_names, ("novel",), (None, None, 17)),
    _zeroshot("val", "all_2", keep_names, BOTH, (4_836, None, 65)),
    _zeroshot("val", "all_2_oriorder", keep_names_of_all, BOTH, (4_836, None, 80)),
)


@dataclass(frozen=True)
class Summary:
    """What two files must share to be the same data: how many records of each kind, and a hash of them."""

    counts: tuple[int, int, int]
    hashes: tuple[str, str, str]


def summarize(document: dict) -> Summary:
    """Images by id and size, annotations by id, image, category and box, categories by id and name."""
    fields = (("id", "height", "width"), ("id", "image_id", "category_id", "bbox"), ("id", "name"))
    hashes = []
    for kind, keys in zip(KINDS, fields, strict=True):
        digest = hashlib.sha256()
        for record in sorted(document[kind], key=lambda r: r["id"]):
            digest.update(json.dumps([record[k] for k in keys]).encode())
        hashes.append(digest.hexdigest())
    return Summary(tuple(len(document[kind]) for kind in KINDS), tuple(hashes))


def prepare(derived: Sequence[Derived], root: Path, split_name: str, official: bool, say=print) -> None:
    """Make each file that is not there yet, check each that is.

    Args:
        root: ``DETECTRON2_DATASETS``.
        split_name: which names are base and novel.
        official: the sources are the published files: sizes, names and ids must be the published ones.
        say: where progress goes, a line at a time.

    Raises:
        UserError: a source or a file that goes round is not what it should be. Files made before that stay.
    """
    split = read_split(split_name, root)
    for source in dict.fromkeys(d.source for d in derived):
        wanted = [d for d in derived if d.source == source]
        # one big file in memory at a time: what is already there shrinks to its summary first
        there = {d.path: _check_existing(d, root, split, official, say) for d in wanted if (root / d.path).is_file()}
        if not (root / source).is_file():
            if len(there) < len(wanted):
                missing = next(d.path for d in wanted if d.path not in there)
                raise UserError(f"{root / source} does not exist, and {missing} is to be made from it")
            say(f"{source} is not there: its {len(there)} files are checked against what is published alone")
            continue
        document = _read(root / source, say)
        if official:
            _check_published(document, OFFICIAL[source], source, say)
            split.check_official(document["categories"], tuple(MARKS), root / source)
        for d in wanted:
            made = d.make(document, split, d.marks)
            if d.path in there:
                _check_same(d, there[d.path], summarize(made), root)
                say(f"{d.path}: already there, and what {source} gives")
                continue
            if not made["images"]:
                raise UserError(f"{root / source}: not one image of it belongs into {d.path}")
            _check_derived(d, made, split, official, say)
            write_json(root / d.path, made)
            say(f"{d.path}: written")


def _check_existing(d: Derived, root: Path, split: Split, official: bool, say) -> Summary:
    document = _read(root / d.path, say)
    _check_derived(d, document, split, official, say)
    return summarize(document)


def _read(path: Path, say) -> dict:
    say(f"reading {path}")
    document = read_json(path)
    check_annotations(document, path)
    return document


def _check_derived(d: Derived, document: dict, split: Split, official: bool, say) -> None:
    """Sizes as published, and no annotation of a name that the file must not hold."""
    if official:
        _check_published(document, d.published, d.path, say)
        split.check_official(document["categories"], d.marks, d.path)
    ids, names = _marked_ids(document, split, d.marks), {c["id"]: c["name"] for c in document["categories"]}
    for n, a in enumerate(document["annotations"]):
        if a["category_id"] not in ids:
            raise UserError(
                f"{d.path}: annotations[{n}] (id {a['id']}) is of '{names[a['category_id']]}', which is not among the "
                f"{' and '.join(d.marks)} names of split {split.path.stem}"
            )


def _check_published(document: dict, published: tuple, path: str, say) -> None:
    for kind, expected in zip(KINDS, published, strict=True):
        found = len(document[kind])
        say(f"{path}: {found:,} {kind}" + (f", published {expected:,}" if expected is not None else ""))
        if expected not in (None, found):
            raise UserError(
                f"{path}: {found:,} {kind}, but the published file has {expected:,} (--unofficial takes other files)"
            )


def _check_same(d: Derived, found: Summary, made: Summary, root: Path) -> None:
    for kind, n, m, a, b in zip(KINDS, found.counts, made.counts, found.hashes, made.hashes, strict=True):
        if a != b:
            what = f"its {n:,} {kind} are not the {m:,} that {d.source} gives"
            raise UserError(f"{root / d.path}: {what}; delete it to have it made anew")


def write_json(path: Path, document: dict) -> None:
    """Write a document whole or not at all, a record a line (json.dump is slow, json.dumps doubles the memory)."""
    with written_whole(path) as aside, open(aside, "w") as file:
        for n, (key, value) in enumerate(document.items()):
            file.write(f"{',' if n else '{'}\n{json.dumps(key)}: ")
            if isinstance(value, list):
                file.write("[")
                for m, record in enumerate(value):
                    file.write((",\n" if m else "\n") + json.dumps(record))
                file.write("]")
            else:
                file.write(json.dumps(value))
        file.write("}\n")
