"""Invalid annotation files give one-line errors; the oddities of official files are accepted."""

import copy
import json
import math

import pytest

from tests.data.official import annotation
from vild.data.annotations import check_annotations, is_lvis_form, read_json
from vild.utils.errors import UserError


def document() -> dict:
    return {
        "images": [
            {"id": 7, "height": 60, "width": 80, "coco_url": "x/val2017/7.jpg", "neg_category_ids": [4],
             "not_exhaustive_category_ids": []},
            {"id": 8, "height": 60, "width": 80, "file_name": "8.jpg", "neg_category_ids": [],
             "not_exhaustive_category_ids": [3]},
        ],
        "categories": [
            {"id": 3, "name": "cat", "frequency": "f", "synonyms": []},
            {"id": 4, "name": "dog", "frequency": "r"},
        ],
        "annotations": [annotation(1, 7, 3), annotation(2, 8, 4)],
    }  # fmt: skip


def put(*path_and_value):
    """A change of a document: set what lies at a path."""
    *path, last, value = path_and_value

    def change(d):
        for key in path:
            d = d[key]
        d[last] = value

    return change


def drop(*path):
    def change(d):
        for key in path[:-1]:
            d = d[key]
        del d[path[-1]]

    return change


FIRST, SECOND = ("annotations", 0), ("annotations", 1)
MALFORMED = {
    "no images": (drop("images"), "images is missing; it must be a list"),
    "no annotations": (drop("annotations"), "annotations is missing; it must be a list"),
    "no categories": (drop("categories"), "categories is missing; it must be a list"),
    "object for list": (put("annotations", {"1": {}}), 'annotations is {"1": {}}; it must be a list'),
    "number for record": (put("images", 1, 5), "images[1] is 5, not an object"),
    "no id": (drop(*SECOND, "id"), "annotations[1] (id null): id is missing"),
    "text id": (put("images", 0, "id", "7"), 'images[0] (id "7"): id is "7"; it must be an integer'),
    "no name": (drop("categories", 1, "name"), "categories[1] (id 4): name is missing"),
    "frequency": (put("categories", 1, "frequency", "x"), 'categories[1] (id 4): frequency is "x"'),
    "synonyms": (put("categories", 0, "synonyms", "kitty"), 'categories[0] (id 3): synonyms is "kitty"'),
    "no width": (drop("images", 0, "width"), "images[0] (id 7): width is missing"),
    "height 0": (put("images", 0, "height", 0), "images[0] (id 7): height is 0; it must be a positive integer"),
    "no file": (drop("images", 1, "file_name"), "images[1] (id 8): file_name is missing"),
    "url": (put("images", 0, "coco_url", None), "images[0] (id 7): coco_url is null"),
    "negatives": (put("images", 0, "neg_category_ids", 4), "images[0] (id 7): neg_category_ids is 4; it must be"),
    "unknown negative": (put("images", 0, "neg_category_ids", [3, 99]), "neg_category_ids contains 99"),
    "unknown exhaustive": (put("images", 1, "not_exhaustive_category_ids", [9]), "exhaustive_category_ids contains 9"),
    "same image": (put("images", 1, "id", 7), "images[1] has the same id as images[0]: 7"),
    "same annotation": (put(*SECOND, "id", 1), "annotations[1] has the same id as annotations[0]: 1"),
    "same category": (put("categories", 1, "id", 3), "categories[1] has the same id as categories[0]: 3"),
    "same name": (put("categories", 1, "name", "cat"), 'categories[1] has the same name as categories[0]: "cat"'),
    "unknown image": (put(*FIRST, "image_id", 5), "annotations[0] (id 1): image_id 5 is not the id of an image"),
    "text image": (put(*FIRST, "image_id", "7"), 'annotations[0] (id 1): image_id is "7"; it must be an integer'),
    "unknown category": (put(*SECOND, "category_id", 5), "annotations[1] (id 2): category_id 5 is not the id"),
    "no category": (drop(*SECOND, "category_id"), "annotations[1] (id 2): category_id is missing"),
    "list category": (put(*SECOND, "category_id", [4]), "category_id is [4]; it must be an integer"),
    "no box": (drop(*SECOND, "bbox"), "annotations[1] (id 2): bbox is missing; it must be four numbers"),
    "three numbers": (put(*SECOND, "bbox", [1, 2, 3]), "bbox is [1, 2, 3]; it must be four numbers"),
    "text in box": (put(*SECOND, "bbox", [1, 2, 3, "4"]), 'bbox is [1, 2, 3, "4"]; it must be four numbers'),
    "null in box": (put(*SECOND, "bbox", [1, None, 3, 4]), "it must be four numbers"),
    "negative width": (put(*SECOND, "bbox", [1, 2, -3, 4]), "bbox is [1, 2, -3, 4]: negative width or height"),
    "nan": (put(*SECOND, "bbox", [math.nan, 2, 3, 4]), "bbox is [NaN, 2, 3, 4]: not finite"),
    "infinite": (put(*SECOND, "bbox", [1, 2, 3, math.inf]), "bbox is [1, 2, 3, Infinity]: not finite"),
    "outside right": (put(*SECOND, "bbox", [80, 2, 3, 4]), "completely outside its image of 80 x 60"),
    "outside left": (put(*SECOND, "bbox", [-5, 2, 5, 4]), "completely outside its image of 80 x 60"),
    "outside below": (put(*SECOND, "bbox", [5, 61, 5, 4]), "completely outside its image of 80 x 60"),
    "crowd": (put(*SECOND, "iscrowd", "no"), 'iscrowd is "no"; it must be 0 or 1'),
    "area": (put(*SECOND, "area", "big"), 'area is "big"; it must be a finite number'),
    "flat polygon": (put(*SECOND, "segmentation", [1, 2, 3, 4, 5, 6]), "segmentation is [1, 2, 3, 4, 5, 6]; it must"),
    "text polygon": (put(*SECOND, "segmentation", [[1, 2, 3, 4, 5, "6"]]), "it must be a list of polygons or RLE"),
    "nan polygon": (put(*SECOND, "segmentation", [[1, 2, 3, 4, 5, math.nan]]), "it must be a list of polygons or RLE"),
    "text mask": (put(*SECOND, "segmentation", "mask.png"), 'segmentation is "mask.png"; it must be'),
    "rle": (put(*SECOND, "segmentation", {"counts": [1]}), "it must be a list of polygons or RLE"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_a_one_line_error(name):
    change, message = MALFORMED[name]
    wrong = copy.deepcopy(document())
    change(wrong)
    with pytest.raises(UserError) as caught:
        check_annotations(wrong, "some/file.json")
    found = str(caught.value)
    assert found.startswith("some/file.json: ") and message in found and "\n" not in found


def test_what_official_files_contain_passes():
    right = document()
    check_annotations(right, "x")
    for box in ([-5, -5, 20, 20], [70.5, 50, 40, 40], [3, 4, 0, 5], [3, 4, 5, 0.0], [0, 0, 80, 60]):
        right["annotations"][0]["bbox"] = box  # sticking out (Objects365), without width (COCO), the whole image
        check_annotations(right, "x")
    for segmentation in (None, [], [[1, 2, 3, 4]], {"size": [60, 80], "counts": "Pf4"}):
        right["annotations"][0]["segmentation"] = segmentation
        check_annotations(right, "x")
    del right["annotations"][0]["segmentation"], right["annotations"][0]["area"]
    check_annotations({**right, "annotations": []}, "x")
    check_annotations(right, "x")


def test_the_format_is_detected():
    assert is_lvis_form(document())
    for change in (drop("images", 0, "neg_category_ids"), drop("categories", 0, "frequency")):
        coco = document()
        change(coco)
        assert not is_lvis_form(coco)


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"\xff\xfe\x00", b'{"images": []}}', b"[" * 100_000])
def test_a_truncated_file_is_a_one_line_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is not ") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"b\.json cannot be read \(No such file"):
        read_json(tmp_path / "b.json")
    with pytest.raises(UserError, match="contains a list, not an object"):
        check_annotations([], "x")


@pytest.mark.parametrize("name", ["unknown image", "nan", None])
def test_a_tool_ends_with_one_line_and_status_2(tmp_path, monkeypatch, tool, capsys, name):
    """A malformed file (None: a truncated one) through the command line; nothing is written."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    change, message = MALFORMED[name] if name else (lambda d: None, "is not JSON, or truncated")
    wrong = document()
    change(wrong)
    (tmp_path / "a.json").write_text(json.dumps(wrong)[: None if name else -20])
    assert tool("add_dataset.py", "--name", "mine", "--json", "a.json", "--images", "p", "--split", "lvis") == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]  # libraries may warn before
    assert out == "" and last.startswith(f"error: {tmp_path / 'a.json'}") and message in last
    assert "Traceback" not in err
    assert not (tmp_path / "vild_datasets.json").exists()
