"""YOLO's layout: read as supervision reads it, and what is odd is one line."""

import numpy as np
import pytest
from PIL import Image

from tests.data.layouts import save_image, things
from vild.data.yolo import read_yolo
from vild.utils.errors import UserError


def test_yolo_by_hand(yolo, root, caplog):
    folder, document = read_yolo(yolo / "data.yaml", "train", root)
    assert folder == yolo / "images" / "train"
    assert things(document) == {
        "a.jpg": [("dog", [30, 15, 20, 30]), ("cat", [0, 0, 8, 12])],
        "b.jpg": [],
        "deep/c.jpg": [("dog", [5, 4, 20, 20])],
    }
    assert [a["area"] for a in document["annotations"]] == pytest.approx([600, 96, 400])
    assert document["annotations"][2]["segmentation"] == [pytest.approx([5, 4, 25, 4, 25, 24, 5, 24])]
    assert "1 of 3 images without label file" in caplog.text


def test_yolo_as_supervision_reads_it(yolo, root):
    supervision = pytest.importorskip("supervision")
    (yolo / "images/train/deep/c.jpg").unlink()
    theirs = supervision.DetectionDataset.from_yolo(str(yolo / "images/train"), str(yolo / "labels/train"),
                                                    str(yolo / "data.yaml"))  # fmt: skip
    _, document = read_yolo(yolo / "data.yaml", "train", root)
    boxes = [a["bbox"] for a in document["annotations"]]
    for path, _, found in theirs:
        mine = [box for box, a in zip(boxes, document["annotations"], strict=True)
                if document["images"][a["image_id"] - 1]["file_name"] == path.rsplit("/", 1)[1]]  # fmt: skip
        mine = np.array(mine).reshape(-1, 4)
        assert found.xyxy == pytest.approx(np.concatenate([mine[:, :2], mine[:, :2] + mine[:, 2:]], 1), abs=1e-4)


def test_where_a_data_yaml_has_its_images(yolo, root, tmp_path):
    whole = read_yolo(yolo / "data.yaml", "train", root)[1]
    (yolo / "list.txt").write_bytes(b"./images/train/a.jpg\r\n./images/train/b.jpg  \n \n./images/train/deep/c.jpg\n")
    for hidden in ("._a.jpg", ".trash/a.jpg"):
        (yolo / "images/train" / hidden).parent.mkdir(exist_ok=True)
        (yolo / "images/train" / hidden).write_bytes(b"resource fork")
    for text in ("path: /content/pets\ntrain: images/train", f"path: {yolo}\ntrain: [images/train]",
                 "train: ../images/train", "train: list.txt"):  # fmt: skip
        (yolo / "data.yaml").write_text(f"{text}\nnames: [cat, dog]\n")
        assert read_yolo(yolo / "data.yaml", "train", root)[1] == whole, text


def test_a_turned_image_has_its_upright_size(yolo, root):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(yolo / "images/train/a.jpg", (60, 80), exif=exif)
    assert things(read_yolo(yolo / "data.yaml", "train", root)[1])["a.jpg"][0] == ("dog", [30, 15, 20, 30])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("2 .5 .5 .1 .1", "line 2: class is 2; data.yaml has the names 0 to 1"),
        ("cat .5 .5 .1 .1", "line 2: class is 'cat', not a number"),
        ("0.5 .5 .5 .1 .1", "line 2: class is 0.5; data.yaml has the names 0 to 1"),
        ("0 .5 .5 .1", "line 2: has 4 numbers, neither class and box"),
        ("0 .5 .5 .1 .1 .1 .1 .2", "line 2: has 8 numbers"),
        ("0 40 .5 .1 .1", "line 2: centre x is 40; it must be a fraction of the image, between 0 and 1"),
        ("0 .5 .5 .1 -0.001", "line 2: height is -0.001; it must be"),
        ("0 .5 0.5_5 .1 .1", "line 2: centre y is '0.5_5', not a number"),
        ("0_1 .5 .5 .1 .1", "line 2: class is '0_1', not a number"),
        ("0 .5 nan .1 .1", "line 2: centre y is 'nan', not a number"),
        ("0 .1 .1 .5 .1 .5 1.6", "line 2: y of corner 3 is 1.6; it must be"),
    ],
)
def test_a_wrong_line_is_named(yolo, root, line, why):
    (yolo / "labels/train/a.txt").write_text(f"0 .5 .5 .1 .1\n{line}\n")
    with pytest.raises(UserError, match=rf"labels/train/a\.txt {why}".replace("(", r"\(")):
        read_yolo(yolo / "data.yaml", "train", root)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("nc: 2", "nc: 3"), "2 names, but nc is 3"),
        (("{0: cat, 1: dog}", "{1: cat, 2: dog}"), "names has an empty one, or does not begin at 0"),
        (("{0: cat, 1: dog}", "['', dog]\nnc: 2"), "duplicate key"),
        (("names: {0: cat, 1: dog}", "names: [cat, '']"), "names has an empty one"),
        (("names: {0: cat, 1: dog}\nnc: 2", "x: 1"), "data.yaml: names is missing; it must be a list"),
        (("nc: 2", "kpt_shape: [17, 3]"), "labels with keypoints are not read"),
        (("images/train", "images/nowhere"), "train is images/nowhere: .* does not exist"),
        (("train: images/train\n", ""), "--subset: train is not in it; it has val"),
        (("images/train", "labels/train"), "no image is there"),
    ],
)
def test_a_wrong_data_yaml_is_named(yolo, root, change, why):
    path = yolo / "data.yaml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=why):
        read_yolo(path, "train", root)


def test_labels_that_are_nowhere_are_an_error(yolo, root):
    (yolo / "labels").rename(yolo / "label")
    with pytest.raises(UserError, match=r"none of 3 images has a label file, as .*pets/labels/train/a\.txt"):
        read_yolo(yolo / "data.yaml", "train", root)
    (yolo / "label").rename(yolo / "labels")
    (yolo / "images/train/a.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"a\.jpg cannot be read"):
        read_yolo(yolo / "data.yaml", "train", root)


def test_a_score_is_counted(yolo, root, caplog):
    (yolo / "labels/train/a.txt").write_text("0 .5 .5 .1 .1 .9\n1 .5 .5 .1 .1\n")
    assert len(read_yolo(yolo / "data.yaml", "train", root)[1]["annotations"]) == 3
    assert "1 lines with a sixth number" in caplog.text
