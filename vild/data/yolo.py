"""YOLO's layout, as Ultralytics reads and writes it: ``data.yaml`` has the names and the folders of images; the labels
of ``images/a.jpg`` are in ``labels/a.txt``, a line per object: the number of its name, then centre x, centre y, width
and height of its box, or the corners x, y of its polygon, in fractions of the upright image."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from math import isfinite, nan
from pathlib import Path

import numpy as np
import yaml

from vild.data.annotations import found
from vild.data.repairs import is_exact
from vild.utils.errors import UserError
from vild.utils.images import images_below, upright_size
from vild.utils.untrusted import read_bytes, read_yaml, refused_as
from vild.vocabulary.words import parse_words

logger = logging.getLogger(__name__)

SUBSETS = ("train", "val", "test")
BOX = ("centre x", "centre y", "width", "height")
SLACK = 0.01  # how far beyond 0 and 1 Ultralytics accepts a number


def read_yolo(path: Path, subset: str | None, root: Path) -> tuple[Path, dict]:
    """Read a subset of a ``data.yaml``.

    Args:
        subset: "train", "val" or "test".
        root: of the data sets; the yaml's ``path`` may be below it, as below the yaml's own folder.

    Returns:
        a folder, and a COCO-style document whose file names are relative to it.

    Raises:
        UserError: naming file, line, key and value.
    """
    path = path.absolute()
    given = read_yaml(path, "data set")
    if not isinstance(listed := given.get("names"), list | dict):
        raise UserError(f"data set {path}: {found(given, 'names')}; it must be a list, or names by number from 0")
    names = parse_words(path)
    if len(names.names) != len(listed) or (isinstance(listed, dict) and min(map(int, listed)) != 0):
        raise UserError(f"data set {path}: names has an empty one, or does not begin at 0")
    if "kpt_shape" in given:
        raise UserError(f"data set {path}: kpt_shape is {given['kpt_shape']}: labels with keypoints are not read")
    if not given.get(subset):
        there = ", ".join(key for key in SUBSETS if given.get(key)) or "none"
        what = "is missing" if subset is None else f"{subset} is not in it"
        raise UserError(f"data set {path}: --subset: {what}; it has {there}")
    files = _find_images(path, given, subset, root)
    folder = Path(os.path.commonpath([file.parent for file in files]))
    without, extra, images, annotations = 0, Counter(), [], []
    for file in files:
        width, height = upright_size(file)
        image = {"id": len(images) + 1, "file_name": file.relative_to(folder).as_posix()}
        images.append({**image, "width": width, "height": height})
        labels = labels_of(file)
        if not labels.exists():
            without += 1
            continue
        for thing in _read_objects(labels, len(names.names), np.array([width, height]), extra):
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), "iscrowd": 0, **thing})
    if without == len(files):
        raise UserError(f"data set {path}: none of {without} images has a label file, as {labels_of(files[0])}")
    counts = {f"of {len(files)} images without label file, taken to have no object": without, **extra}
    if counts := [f"{n} {what}" for what, n in counts.items() if n]:
        logger.warning("%s: %s: %s", path, subset, "; ".join(counts))
    categories = [
        {"id": n, "name": name, **({"synonyms": [*synonyms]} if synonyms else {})}
        for n, (name, synonyms) in enumerate(zip(names.names, names.synonyms, strict=True), 1)
    ]
    return folder, {"images": images, "annotations": annotations, "categories": categories}


def labels_of(image: Path) -> Path:
    """The label file of an image: as Ultralytics has it, in place of the last "images" is "labels"."""
    return Path("/labels/".join(image.as_posix().rsplit("/images/", 1))).with_suffix(".txt")


def _find_images(path: Path, given: dict, subset: str, root: Path) -> list[Path]:
    """The images of a subset: of folders, or listed in text files."""
    base = str(given.get("path") or "")
    homes = [path.parent / base, root.absolute() / base, Path(base).absolute(), path.parent]
    files = []
    for item in given[subset] if isinstance(given[subset], list) else [given[subset]]:
        # Roboflow writes "../train/images" for "train/images"
        places = [home / part for home in homes for part in (str(item), str(item).removeprefix("../"))]
        place = next((p for p in places if p.exists()), None)
        if place is None:
            raise UserError(f"data set {path}: {subset} is {item}: {places[0]} does not exist")
        if place.is_dir():
            files += images_below(place)
        else:
            with refused_as(f"data set {path}: {subset}: {place} is not a list of images"):
                lines = read_bytes(place).decode("utf-8-sig").split("\n")
                files += [place.parent / line.strip() for line in lines if line.strip()]
    if not files:
        raise UserError(f"data set {path}: {subset} is {given[subset]}: no image is there")
    return [Path(os.path.normpath(file)) for file in files]


def _read_objects(path: Path, count: int, size: np.ndarray, extra: Counter[str]) -> Iterable[dict]:
    """Category, box, area and perhaps polygon of each line. ``size``: width and height of the image."""
    with refused_as(f"{path} cannot be read"):
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    seen = set()
    for n, line in enumerate(lines, 1):
        if fields := line.split():
            try:
                number, values = _parse(fields, count)
            except ValueError as error:
                raise UserError(f"{path} line {n}: {error}") from None
            if (thing := (number, *values.tolist())) in seen:
                extra["lines that repeat class and box of another, left out"] += 1
                continue
            seen.add(thing)
            extra["lines with a sixth number, a score perhaps, which is not read"] += len(fields) == 6
            points = values.reshape(-1, 2) * size
            if len(points) == 2:
                centre, (width, height) = points
                box, shape = [*centre - points[1] / 2, width, height], {"area": width * height}
            else:
                (x, y), low = points.T, points.min(0)
                area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
                box, shape = [*low, *points.max(0) - low], {"area": area, "segmentation": [points.ravel().tolist()]}
            yield {"category_id": number + 1, "bbox": [*map(float, box)], **shape, "area": float(shape["area"])}


def _parse(fields: Sequence[str], count: int) -> tuple[int, np.ndarray]:
    """Number of the name, and the numbers of box or polygon; ValueError naming key and value."""
    number = _number(fields[0], "class")
    if not is_exact(number) or not 0 <= number < count:
        raise ValueError(f"class is {fields[0]}; data.yaml has the names 0 to {count - 1}")
    if len(fields) not in (5, 6) and (len(fields) < 7 or len(fields) % 2 == 0):
        raise ValueError(f"has {len(fields)} numbers, neither class and box (5) nor class and corners (7, 9, ...)")
    rest = fields[1:5] if len(fields) < 7 else fields[1:]
    keys = BOX if len(fields) < 7 else [f"{key} of corner {n}" for n in range(1, len(rest) // 2 + 1) for key in "xy"]
    values = np.array([_number(text, key) for text, key in zip(rest, keys, strict=True)])
    for key, text, value in zip(keys, rest, values, strict=True):
        if not (0 if key in BOX[2:] else -SLACK) <= value <= 1 + SLACK:
            raise ValueError(f"{key} is {text}; it must be a fraction of the image, between 0 and 1")
    return int(number), values


def _number(text: str, key: str) -> float:
    try:
        value = nan if "_" in text else float(text)  # Python itself takes 0_1 for 1
    except ValueError:
        value = nan
    if not isfinite(value):
        raise ValueError(f"{key} is '{text[:30]}', not a number")
    return value


def write_yolo(folder: Path, source: Path, names: Sequence[str], records: Iterable[tuple[dict, list[dict]]]) -> None:
    """Write boxes in YOLO's layout, with copies of the images.

    Args:
        source: folder of the images.
        names: of the categories 1, 2, ...
        records: COCO's record of each image with its annotations.
    """
    for image, things in records:
        copy, whole = folder / "images" / image["file_name"], np.array([image["width"], image["height"]] * 2)
        lines = []
        for a in things:
            x, y, width, height = a["bbox"]
            numbers = np.array([x + width / 2, y + height / 2, width, height]) / whole
            lines.append(f"{a['category_id'] - 1} {' '.join(f'{n:.6f}' for n in numbers)}\n")
        for file in (copy, labels_of(copy)):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / image["file_name"], copy)
        labels_of(copy).write_text("".join(lines))
    document = {"train": "images", "val": "images", "names": dict(enumerate(names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8")
