"""What annotation files of other tools write in their own way is accepted where it has one meaning, and counted."""

import copy
import json
import logging

import numpy as np
import pytest
from detectron2.structures.masks import polygon_area
from PIL import Image
from pycocotools import mask as mask_api

from tests.data.official import annotation, write
from vild.data import datasets
from vild.data.annotations import check_annotations
from vild.data.mapper import ViLDMapper
from vild.data.masks import has_mask
from vild.utils.errors import UserError


def document():
    images = [{"id": n, "height": 60, "width": 80, "file_name": f"a/{n}.png"} for n in (1, 2, 3)]
    categories = [{"id": 1, "name": "bicycle"}, {"id": 2, "name": "kite"}]
    annotations = [annotation(k, i, c, iscrowd=0) for k, (i, c) in enumerate([(1, 1), (1, 2), (2, 1), (3, 2)], 1)]
    return {"images": images, "categories": categories, "annotations": annotations}


def said(changed, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_annotations(changed, "gt.json")
    return [record.getMessage() for record in caplog.records]


def test_numbers_written_as_floats_are_the_same_numbers(caplog):
    changed = document()
    for image in changed["images"]:
        image.update(id=float(image["id"]), width=80.0, height=60.0, neg_category_ids=[1.0, 2])
    for record in changed["annotations"]:
        record.update(image_id=float(record["image_id"]), category_id=float(record["category_id"]))
    changed["categories"][1]["id"] = 2.0
    (line,) = said(changed, caplog)
    assert line == "gt.json: accepted with repairs: 21 ids, sizes or flags written as 1.0"
    for image in changed["images"]:
        assert image.pop("neg_category_ids") == [1, 2]
    assert json.dumps(changed) == json.dumps(document())  # 1.0 is written otherwise
    assert said(document(), caplog) == []
    for wrong in (1.5, 2.0**60, float("nan"), True, "1"):
        changed = document()
        changed["annotations"][2]["image_id"] = wrong
        with pytest.raises(UserError, match=r"annotations\[2\] \(id 3\): image_id"):
            check_annotations(changed, "gt.json")


def test_flags_names_and_boxes(caplog):
    changed = document()
    changed["annotations"][0]["iscrowd"] = changed["annotations"][1]["iscrowd"] = None
    changed["images"][0]["file_name"] = "a\\1.png"
    little = ([-0.4, 8, 28, 36], [52.5, 8, 28, 36], [80.0, 8, 0.7, 36], [5, -0.6, 28, 0.5])
    for record, box in zip(changed["annotations"], little, strict=True):
        record["bbox"] = box
    (line,) = said(changed, caplog)
    assert line == (
        "gt.json: accepted with repairs: 1 file names with backslashes; 2 iscrowd of null, taken as 0; "
        "4 boxes that leave their image by less than a pixel (clipped in training)"
    )
    assert changed["images"] == document()["images"] and changed["annotations"][0]["iscrowd"] == 0
    assert [a["bbox"] for a in changed["annotations"]] == list(little)  # evaluated as pycocotools does
    for name in ("..\\1.png", "\\1.png", "a\\..\\..\\1.png"):
        changed["images"][0]["file_name"] = name
        with pytest.raises(UserError, match="must be a path inside the image folder"):
            check_annotations(changed, "gt.json")


def test_a_category_without_annotation_gives_way_to_its_namesake(caplog):
    """Roboflow writes a root category with the name of a class."""
    changed = document()
    changed["categories"].insert(0, {"id": 0, "name": "bicycle", "supercategory": "none"})
    unclear = copy.deepcopy(changed), copy.deepcopy(changed), copy.deepcopy(changed)
    (line,) = said(changed, caplog)
    assert "category 'bicycle' (id 0) left out" in line and changed["categories"] == document()["categories"]
    unclear[0]["annotations"][1]["category_id"] = 0  # both are used
    unclear[1]["annotations"] = []  # neither is
    unclear[2]["images"][0]["neg_category_ids"] = [0]  # an image speaks of it
    for each in unclear:
        with pytest.raises(UserError, match=r'categories\[1\] has the same name as categories\[0\]: "bicycle"'):
            check_annotations(each, "gt.json")


def test_a_root_category_is_accepted_by_the_tools(tmp_path, monkeypatch, tool, capsys, caplog):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    changed = document()
    changed["categories"].insert(0, {"id": 0, "name": "bicycle", "supercategory": "none"})
    write(tmp_path / "a.json", changed)
    (tmp_path / "p").mkdir()
    assert tool("add_dataset.py", "--name", "m", "--json", "a.json", "--images", "p", "--split", "everything") == 0
    assert "2 base and 0 novel names" in capsys.readouterr().out
    assert caplog.text.count("category 'bicycle' (id 0) left out") == 1
    assert datasets.get_classes("m").ids == (1, 2)


def test_doubtful_files_are_reported_and_accepted(caplog):
    changed = document()
    changed["images"][2]["file_name"] = "a/1.png"
    (line,) = said(changed, caplog)
    assert line == "gt.json: 1 image with the file of another, first 'a/1.png' under the ids 1 and 3"
    right = [[5, 8, 28, 36], [40, 8, 28, 36], [52, 30, 27, 29], [30, 20, 48, 20]]
    for form, words in (
        (lambda x, y, w, h: [x, y, x + w, y + h], "look like corners"),
        (lambda x, y, w, h: [x / 80, y / 60, w / 80, h / 60], "look like relative coordinates"),
        (lambda x, y, w, h: [x, y, w, h], None),
    ):
        changed = document()
        for record, box in zip(changed["annotations"], right, strict=True):
            record["bbox"] = form(*box)
        lines = said(changed, caplog)
        assert lines == [] if words is None else len(lines) == 1 and words in lines[0]


def test_masks_of_any_form_are_trained_on_as_bitmasks(tmp_path, monkeypatch):
    """CVAT writes RLE uncompressed, `counts` a list. The truth: the pixels themselves."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    pixels = np.zeros((60, 80), np.uint8)
    pixels[8:44, 5:33] = 1
    compressed = mask_api.encode(np.asfortranarray(pixels))
    flat = np.concatenate([[0], pixels.T.flatten(), [0]])
    counts = np.diff([0, *np.flatnonzero(np.diff(flat)), flat.size - 2]).tolist()
    masks = [
        {"size": [60, 80], "counts": counts},
        {"size": [60, 80], "counts": compressed["counts"].decode()},
        [[5, 8, 33, 8, 33, 44, 5, 44], [1, 1, 2, 2]],
    ]
    changed = document()
    changed["annotations"] = [annotation(k, 1, 1, segmentation=m) for k, m in enumerate(masks)]
    outside = annotation(9, 1, 2, bbox=[80.2, 5, 0.5, 5], segmentation=masks[0])
    write(tmp_path / "a.json", {**changed, "annotations": [*changed["annotations"], outside]})
    (tmp_path / "p/a").mkdir(parents=True)
    Image.new("RGB", (80, 60)).save(tmp_path / "p/a/1.png")
    datasets.add_entry("mine", datasets.Entry("a.json", "p", "everything"))
    record = datasets.load_dicts("mine")[0]
    assert len(record["annotations"]) == 3  # nothing of the fourth is in its image
    mapper = ViLDMapper(store=None, distill_per_image=1, min_visible=0.5, augmentations=[], image_format="BGR",
                        use_instance_mask=True, instance_mask_format="bitmask")  # fmt: skip
    instances = mapper(record)["instances"]
    assert len(instances) == 3
    for mask in instances.gt_masks.tensor:
        np.testing.assert_array_equal(mask.numpy(), pixels.astype(bool))


@pytest.mark.parametrize(
    ("polygon", "area"),
    [
        ([5, 8, 33, 8, 20, 8], 0),  # lines and a point
        ([5, 8, 5, 30, 5, 20], 0),
        ([0, 0, 10, 10, 5, 5], 0),
        ([7, 7, 7, 7, 7, 7], 0),
        ([5, 8, 33, 8, 33, 44], 504),
        ([5, 8, 33, 8, 33, 44, 5, 44], 1008),
    ],
)
def test_a_polygon_without_area_is_no_mask(polygon, area):
    """The area by Detectron2's own formula."""
    assert polygon_area(np.array(polygon[::2]), np.array(polygon[1::2])) == area
    assert has_mask([polygon]) == bool(area) and has_mask([polygon, [1, 1, 9, 1, 9, 9]])
