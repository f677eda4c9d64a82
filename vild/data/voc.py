"""Conversion of PASCAL VOC's XML annotations to COCO's format (datasets/prepare_voc.py).

"Difficult" objects become crowds, which COCO's evaluation ignores as VOC's ignores difficult ones.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from vild.utils.untrusted import refused_as

# VOC's class names in its order
NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
# for the text encoder
SPELLED_OUT = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


def read_voc(folder: Path, image_set: str) -> dict:
    """Read an image set ("test") of a VOC folder (VOC2007) into a COCO-style document.

    VOC's corners are 1-based and inclusive; xywh is 0-based.

    Raises:
        UserError: a file is missing or not in VOC's format.
    """
    listing = folder / "ImageSets" / "Main" / f"{image_set}.txt"
    with refused_as(f"{listing} cannot be read"):
        stems = listing.read_text("utf-8-sig").split()
    document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": SPELLED_OUT.get(name, name)} for n, name in enumerate(NAMES, 1)],
    }
    for stem in stems:
        path = folder / "Annotations" / f"{stem}.xml"
        with refused_as(f"{path} cannot be read"):
            xml = path.read_bytes()
        with refused_as(f"{path} is not a VOC annotation"):
            image, annotations = _parse(xml)
        image_id = len(document["images"]) + 1
        document["images"].append({"id": image_id, "file_name": f"{stem}.jpg", **image})
        for annotation in annotations:
            document["annotations"].append({"id": len(document["annotations"]) + 1, "image_id": image_id, **annotation})
    return document


def _parse(xml: bytes) -> tuple[dict, list[dict]]:
    """Size and annotations of one image."""
    tree = ElementTree.fromstring(xml)
    size = {key: int(tree.find(f"size/{key}").text) for key in ("width", "height")}
    annotations = []
    for item in tree.iter("object"):
        x0, y0, x1, y1 = (float(item.find(f"bndbox/{key}").text) for key in ("xmin", "ymin", "xmax", "ymax"))
        width, height = x1 - x0 + 1, y1 - y0 + 1
        annotations.append(
            {
                "category_id": NAMES.index(item.find("name").text.strip()) + 1,
                "bbox": [x0 - 1, y0 - 1, width, height],
                "area": width * height,
                "iscrowd": int(item.findtext("difficult", "0")),
            }
        )
    return size, annotations
