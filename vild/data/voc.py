"""PASCAL VOC's XML annotations in COCO's form (datasets/prepare_voc.py).

Objects marked "difficult" become crowds: VOC's evaluation ignores them, and so does COCO's with crowds.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from vild.utils.errors import UserError

# VOC's names in its alphabetical order; those that a text encoder would not read are spelt out
NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SPELT_OUT = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


def read_voc(folder: Path, image_set: str) -> dict:
    """The COCO-form document of an image set ("test") of a VOC folder (VOC2007).

    Boxes: VOC counts pixels from 1 and includes the last; xywh counts from 0.

    Raises:
        UserError: a file is missing or not of VOC's form.
    """
    listing = folder / "ImageSets" / "Main" / f"{image_set}.txt"
    try:
        stems = listing.read_text().split()
    except OSError as error:
        raise UserError(f"{listing} cannot be read ({error.strerror})") from error
    document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": SPELT_OUT.get(name, name)} for n, name in enumerate(NAMES, 1)],
    }
    for stem in stems:
        path = folder / "Annotations" / f"{stem}.xml"
        try:
            image, annotations = _read_image(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a VOC annotation ({error})") from error
        image_id = len(document["images"]) + 1
        document["images"].append({"id": image_id, "file_name": f"{stem}.jpg", **image})
        for annotation in annotations:
            document["annotations"].append({"id": len(document["annotations"]) + 1, "image_id": image_id, **annotation})
    return document


def _read_image(path: Path) -> tuple[dict, list[dict]]:
    """Size and annotations of one XML file."""
    tree = ElementTree.parse(path).getroot()
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
