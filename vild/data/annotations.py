"""Reading and validation of COCO- and LVIS-style annotation files.

Boxes are xywh in pixels. Official files contain boxes that extend beyond the image (Objects365) and boxes without width
or height (COCO); both are accepted, and readers drop the latter. What other writers make of ids, names and the like is
repaired where it is unambiguous, and counted (``repairs.py``).
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from math import fsum
from pathlib import Path

import numpy as np

from vild.data.box_form import doubt, spread
from vild.data.repairs import LISTS, drop_unused_namesakes, is_exact, repair
from vild.data.rle import fits
from vild.utils.errors import UserError, count_of
from vild.utils.untrusted import MOST_DATA, parse_json, read_bytes, refused_as

logger = logging.getLogger(__name__)

FAR = 1e18  # larger than any coordinate; safe in float32 and int64
NUMBERS = {int, float}
LITTLE_OUTSIDE = "boxes that leave their image by less than a pixel (clipped in training)"


def read_json(path: str | Path):
    """Parse a JSON file; UserError if it is missing, truncated or not JSON."""
    with refused_as(f"{path} cannot be read"):
        content = read_bytes(path, MOST_DATA)
    with refused_as(f"{path} is not JSON, or truncated"):
        return parse_json(content)


def load_annotations(path: str | Path) -> dict:
    """Read and validate an annotation file."""
    document = read_json(path)
    check_annotations(document, path)
    return document


def is_lvis_form(document: dict) -> bool:
    """Is a checked document LVIS-style: categories have a frequency, images have negative categories?"""
    return all("frequency" in c for c in document["categories"]) and all(
        "neg_category_ids" in i for i in document["images"]
    )


def check_annotations(document: dict, where: str | Path) -> None:
    """Validate a document; the UserError names the file (``where``), record and field of the first error.

    Repairs it in place; logs a line that counts what was repaired, and one for what is doubtful: boxes that hardly are
    xywh in pixels, a file under two ids.

    Takes four seconds for LVIS's training file (1.27 million annotations).
    """
    if not isinstance(document, dict):
        raise UserError(f"{where}: contains a {type(document).__name__}, not an object with images and annotations")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise UserError(f"{where}: {found(document, key)}; it must be a list")
    repairs: Counter[str] = Counter()
    _check(document, "categories", where, _category_fault, repairs)
    drop_unused_namesakes(document, repairs)
    _unique((c["name"] for c in document["categories"]), "categories", "name", where)
    categories = {c["id"]: c for c in document["categories"]}
    images = _check(document, "images", where, lambda i: _image_fault(i, categories), repairs)
    sizes = {i: (record["width"], record["height"]) for i, record in images.items()}
    _check(document, "annotations", where, lambda a: _annotation_fault(a, sizes, categories, repairs), repairs)
    if repairs:
        logger.warning("%s: accepted with repairs: %s", where, "; ".join(f"{n} {what}" for what, n in repairs.items()))
    for why in (_doubtful_boxes(document["annotations"], sizes), _doubtful_files(document["images"])):
        if why:
            logger.warning("%s: %s", where, why)


def _doubtful_boxes(annotations: list[dict], sizes: dict[int, tuple[int, int]]) -> str:
    some = annotations[spread(len(annotations))]
    shapes = np.array([sizes[a["image_id"]][::-1] for a in some]).reshape(-1, 2)
    return doubt(np.array([a["bbox"] for a in some], float).reshape(-1, 4), shapes)


def _doubtful_files(images: list[dict]) -> str:
    first: dict[tuple, int] = {}
    names = ((image.get("file_name"), image.get("coco_url")) for image in images)
    again = [(name[0] or name[1], first[name], i["id"]) for name, i in zip(names, images, strict=True)
             if first.setdefault(name, i["id"]) != i["id"]]  # fmt: skip
    if not again:
        return ""
    name, *ids = again[0]
    count = count_of(len(again), "image")
    return f"{count} with the file of another, first '{name}' under the ids {ids[0]} and {ids[1]}"


def _check(
    document: dict, key: str, where: str | Path, fault: Callable[[dict], str | None], repairs: Counter[str]
) -> dict[int, dict]:
    """The records of a list by id; UserError at the first for which ``fault`` returns a reason that cannot be
    repaired."""

    def fault_of(record: dict) -> str | None:
        is_id = type(record.get("id")) is int and -(2**63) <= record["id"] < 2**63
        return fault(record) if is_id else f"{found(record, 'id')}; it must be an integer between -2^63 and 2^63"

    for n, record in enumerate(document[key]):
        if not isinstance(record, dict):
            raise UserError(f"{where}: {key}[{n}] is {short(record)}, not an object")
        why = fault_of(record)
        if why and repair(record, repairs):
            why = fault_of(record)
        if why:
            raise UserError(f"{where}: {key}[{n}] (id {short(record.get('id'))}): {why}")
    by_id = {record["id"]: record for record in document[key]}
    if len(by_id) < len(document[key]):
        _unique((record["id"] for record in document[key]), key, "id", where)
    return by_id


def _unique(values: Iterable, key: str, field: str, where: str | Path) -> None:
    seen: dict = {}
    for n, value in enumerate(values):
        if value in seen:
            raise UserError(f"{where}: {key}[{n}] has the same {field} as {key}[{seen[value]}]: {short(value)}")
        seen[value] = n


def _category_fault(category: dict) -> str | None:
    if not isinstance(category.get("name"), str) or not category["name"]:
        return f"{found(category, 'name')}; it must be a string"
    if category.get("frequency", "f") not in ("f", "c", "r"):
        return f'{found(category, "frequency")}; it must be "f", "c" or "r"'
    if not is_list_of(category.get("synonyms", []), str):
        return f"{found(category, 'synonyms')}; it must be a list of strings"
    return None


def _image_fault(image: dict, categories: dict[int, dict]) -> str | None:
    for key in ("width", "height"):
        if type(image.get(key)) is not int or not 0 < image[key] < 2**31:
            return f"{found(image, key)}; it must be a positive integer"
    key = "coco_url" if "file_name" not in image and "coco_url" in image else "file_name"
    if not isinstance(image.get(key), str):
        return f"{found(image, key)}; it must be the name of the image file"
    for key, file_of in (("file_name", str), ("coco_url", file_of_url)):
        if isinstance(image.get(key), str) and not stays_below(file_of(image[key])):
            return f"{found(image, key)}; it must be a path inside the image folder"
    if "\\" in image.get("file_name", ""):
        return f"{found(image, 'file_name')}; folders end with /"
    for key in LISTS:
        if key in image:
            if not is_list_of(image[key], int):
                return f"{found(image, key)}; it must be a list of category ids"
            if unknown := [c for c in image[key] if c not in categories]:
                return f"{key} contains {unknown[0]}, which is not the id of a category"
    return None


def file_of_url(url: str) -> str:
    """Folder and file name of a COCO URL: "val2017/000000000139.jpg"."""
    return "/".join(url.split("/")[-2:])


def stays_below(file_name: str) -> bool:
    """Does a relative file name stay inside its folder? (Symbolic links in the folder are the user's own.)"""
    if not file_name or "\0" in file_name or file_name[0] in "/\\" or file_name[1:2] == ":":
        return False
    return ".." not in re.split(r"[/\\]", file_name) and not re.search("[\ud800-\udfff]", file_name)


def _annotation_fault(
    a: dict, sizes: dict[int, tuple[int, int]], categories: dict[int, dict], repairs: Counter[str]
) -> str | None:
    for key, known, what in (("image_id", sizes, "an image"), ("category_id", categories, "a category")):
        if type(a.get(key)) is not int:
            return f"{found(a, key)}; it must be an integer"
        if a[key] not in known:
            return f"{key} {a[key]} is not the id of {what}"
    box = a.get("bbox")
    if type(box) is not list or len(box) != 4 or not {*map(type, box)} <= NUMBERS:
        return f"{found(a, 'bbox')}; it must be four numbers (x, y, width, height)"
    x, y, w, h = box
    if not (-FAR < x < FAR and -FAR < y < FAR and -FAR < w < FAR and -FAR < h < FAR):
        return f"bbox is {short(box)}: not finite"
    if w < 0 or h < 0:
        return f"bbox is {short(box)}: negative width or height"
    width, height = sizes[a["image_id"]]
    beyond = max(-x, -y, x + w - width, y + h - height)
    if beyond >= 1 and w and h and not (x < width and y < height and x + w > 0 and y + h > 0):
        return f"bbox is {short(box)}: completely outside its image of {width} x {height}"
    if a.get("iscrowd", 0) not in (0, 1):
        return f"{found(a, 'iscrowd')}; it must be 0 or 1"
    area = a.get("area", 0)
    if type(area) not in NUMBERS or not -FAR < area < FAR:
        return f"{found(a, 'area')}; it must be a finite number"
    if not _is_segmentation(a.get("segmentation"), width, height):
        return f"{found(a, 'segmentation')}; it must be a list of polygons or RLE with the size of the image"
    if 0.01 < beyond < 1:
        repairs[LITTLE_OUTSIDE] += 1
    return None


def _is_segmentation(segmentation, width: int, height: int) -> bool:
    """None, polygons (lists of finite numbers) or RLE of the image's size?"""
    try:
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            of_image = segmentation["size"] == [height, width]
            return of_image and (isinstance(counts, str) or is_list_of(counts, int)) and fits(counts, height, width)
        # fsum() visits every number of a polygon at C speed
        return segmentation is None or (
            type(segmentation) is list and all(type(p) is list and abs(fsum(p)) < FAR for p in segmentation)
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def is_list_of(values, kind: type) -> bool:
    return type(values) is list and all(type(v) is kind for v in values)


def whole(record: dict, key: str) -> int:
    """An integer of a record, also written as 1.0; ValueError otherwise."""
    value = record.get(key)
    if type(value) is not int and not (type(value) is float and is_exact(value)):
        raise ValueError(f"{found(record, key)}; it must be an integer")
    return int(value)


def found(record: dict, key: str) -> str:
    """For messages: a key and its value."""
    return f"{key} is {short(record[key])}" if key in record else f"{key} is missing"


def short(value) -> str:
    """For messages: a value as JSON, of at most 60 characters."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # nested too deeply to be written
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
