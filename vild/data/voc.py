"""PASCAL VOC's layout: an XML file in ``Annotations/`` for each image in ``JPEGImages/``.

Corners are pixels counted from 1, the last one included; xywh counts from 0. "Difficult" objects become crowds, which
COCO's evaluation ignores as VOC's ignores difficult ones.
"""

from __future__ import annotations

import logging
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from vild.utils.errors import UserError, count_of
from vild.utils.images import images_below, is_hidden, upright_size
from vild.utils.untrusted import read_any_bytes, refused_as

logger = logging.getLogger(__name__)

# VOC's class names in its order
NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
# for the text encoder
SPELLED_OUT = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    folder: Path, subset: str | None = None, names: Sequence[str] | None = None, images: Path | None = None
) -> dict:
    """Read a VOC folder into a COCO-style document.

    Args:
        folder: with Annotations/, or the XML files themselves.
        subset: a list in ImageSets/Main, as "test"; None: every annotation file.
        names: the classes in their order; None: all that occur in the folder, sorted.
        images: the folder in which the image files must be; None: they are not looked for, and end in ".jpg".

    Raises:
        UserError: naming file, object, key and value.
    """
    home = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    stems = None
    if subset is not None:
        listing = folder / "ImageSets" / "Main" / f"{subset}.txt"
        with refused_as(f"{listing} cannot be read"):
            lines = read_any_bytes(listing).decode("utf-8-sig").splitlines()
        if not (stems := [line.strip() for line in lines if line.strip()]):
            raise UserError(f"{listing}: --subset {subset}: no image is listed there")
    if stems is None or names is None:
        xmls = [path.relative_to(home) for path in home.rglob("*.xml") if not is_hidden(path, home)]
        every = sorted(path.with_suffix("").as_posix() for path in xmls)
        if not every:
            raise UserError(f"{home}: no .xml file is there")
    else:
        every = stems
    parsed = {stem: _read(home / f"{stem}.xml") for stem in [*every, *(stems or ())]}
    objects = [o for _, _, found in parsed.values() for o in found]
    first = 0 if (at_0 := sum(0 in box[:2] for _, box, _ in objects)) else 1
    if at_0:
        logger.warning("%s: %d of %d boxes begin at 0, so pixels are counted from 0, not from 1 as VOC does",
                       home, at_0, len(objects))  # fmt: skip
    known = [*names] if names else sorted({name for name, _, _ in objects})
    files = None if images is None else _files_below(images)
    repeated = 0
    spelled = SPELLED_OUT if names == NAMES else {}
    document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": spelled.get(name, name)} for n, name in enumerate(known, 1)],
    }
    for stem in every if stems is None else stems:
        (size, file_name, found), xml = parsed[stem], home / f"{stem}.xml"
        image_id = len(document["images"]) + 1
        if files is None:
            file_name = f"{stem}.jpg"
        else:
            file_name = _find_image(xml, stem, file_name, files, images)
            if (upright := upright_size(images / file_name)) != (size["width"], size["height"]):
                is_, has = (f"{width} x {height}" for width, height in (size.values(), upright))
                raise UserError(f"{xml}: size is {is_}, but its image {file_name} is {has}, turned upright")
        seen = set()
        document["images"].append({"id": image_id, "file_name": file_name, **size})
        for n, (name, (x0, y0, x1, y1), difficult) in enumerate(found, 1):
            if name not in known:
                raise UserError(f"{xml} is not a VOC annotation of these names (object {n}: name is {name})")
            thing = (name, x0, y0, x1, y1)
            if files is not None and thing in seen:
                repeated += 1
                continue
            seen.add(thing)
            box = [x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first]
            record = {"id": len(document["annotations"]) + 1, "image_id": image_id, "iscrowd": difficult}
            record |= {"category_id": known.index(name) + 1, "bbox": box, "area": box[2] * box[3]}
            document["annotations"].append(record)
    if repeated:
        logger.warning("%s: %s with class and box of another, left out", home, count_of(repeated, "object"))
    return document


def _read(path: Path) -> tuple[dict, str, list[tuple[str, list[float], int]]]:
    """Size and file name of an image; name, corners and the flag "difficult" of each object."""
    with refused_as(f"{path} cannot be read"):
        xml = read_any_bytes(path)
    try:
        tree = ElementTree.fromstring(xml)
        size = {key: int(_number(tree, f"size/{key}")) for key in ("width", "height")}
        if min(size.values()) < 1:
            raise ValueError(f"size is {size['width']} x {size['height']}")
        objects = []
        for n, item in enumerate(tree.iter("object"), 1):
            try:
                objects.append(_object(item))
            except ValueError as error:
                raise ValueError(f"object {n}: {error}") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{path} is not a VOC annotation ({error})") from None
    return size, (tree.findtext("filename") or "").strip(), objects


def _object(item: ElementTree.Element) -> tuple[str, list[float], int]:
    name, difficult = ((item.findtext(key) or "").strip() for key in ("name", "difficult"))
    if not name:
        raise ValueError("name is missing")
    if difficult not in ("", "0", "1"):
        raise ValueError(f"difficult is '{difficult}'; it must be 0 or 1")
    box = [_number(item, f"bndbox/{key}") for key in CORNERS]
    for n in (0, 1):
        if box[n] > box[n + 2]:
            raise ValueError(f"{CORNERS[n]} is {box[n]:g}, more than {CORNERS[n + 2]}, {box[n + 2]:g}")
    return name, box, int(difficult or 0)


def _number(item: ElementTree.Element, key: str) -> float:
    text = item.findtext(key)
    try:
        if abs(value := float(text)) < 1e9 and "_" not in text:  # Python itself takes 0_1 for 1
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{key} is {'missing' if text is None else repr(text[:30])}; it must be a number")


def _files_below(folder: Path) -> dict[str, str]:
    """Image files below a folder by their names, and by these without suffix."""
    names = [path.relative_to(folder).as_posix() for path in images_below(folder)]
    return {**{name.rpartition(".")[0]: name for name in names}, **{name: name for name in names}}


def _find_image(path: Path, stem: str, file_name: str, files: dict[str, str], images: Path) -> str:
    """The image of an XML file: the one with its stem; without one, that of its ``<filename>``, perhaps outdated."""
    beside = (Path(stem).parent / Path(file_name.replace("\\", "/")).name).as_posix()
    has_stem = beside.rpartition(".")[0] == stem  # it decides between a.jpg and a.png
    found = (has_stem and files.get(beside)) or files.get(stem) or files.get(beside)
    if found is None:
        raise UserError(f"{path}: filename is '{file_name}': neither that nor {stem}.* is an image in {images}")
    return found


def write_voc(folder: Path, source: Path, names: Sequence[str], records: Iterable[tuple[dict, list[dict]]]) -> None:
    """Write boxes, rounded to whole pixels, in VOC's layout, with copies of the images. See ``yolo.write_yolo``."""
    stems = []
    for image, things in records:
        name = Path(image["file_name"])
        stems.append(name.with_suffix("").as_posix())
        tree = ElementTree.Element("annotation")
        for key, value in {"folder": "JPEGImages", "filename": name.name}.items():
            ElementTree.SubElement(tree, key).text = value
        _add(tree, "size", {"width": image["width"], "height": image["height"], "depth": 3})
        ElementTree.SubElement(tree, "segmented").text = "0"
        for a in things:
            x, y, width, height = a["bbox"]
            item = _add(tree, "object", {"name": names[a["category_id"] - 1], "pose": "Unspecified", "truncated": 0})
            ElementTree.SubElement(item, "difficult").text = "0"
            (x0, x1), (y0, y1) = _pixels(x, width), _pixels(y, height)
            _add(item, "bndbox", dict(zip(CORNERS, (x0 + 1, y0 + 1, x1, y1), strict=True)))
        ElementTree.indent(tree)
        xml, copy = folder / "Annotations" / f"{stems[-1]}.xml", folder / "JPEGImages" / name
        for file in (xml, copy):
            file.parent.mkdir(parents=True, exist_ok=True)
        xml.write_bytes(ElementTree.tostring(tree, "utf-8"))
        shutil.copyfile(source / name, copy)
    listing = folder / "ImageSets" / "Main" / "trainval.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("".join(f"{stem}\n" for stem in stems), "utf-8")


def _pixels(start: float, length: float) -> tuple[int, int]:
    """A span rounded to whole pixels, at least one: where it begins and ends, from 0."""
    first, last = round(start), round(start + length)
    return (first, last) if first < last else (int(start + length / 2), int(start + length / 2) + 1)


def _add(parent: ElementTree.Element, tag: str, values: dict) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, tag)
    for key, value in values.items():
        ElementTree.SubElement(element, key).text = str(value)
    return element
