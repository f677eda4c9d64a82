"""YOLO's and VOC's layouts: read as supervision reads them, and what is odd is one line."""

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from vild.data import datasets
from vild.data.voc import NAMES, read_voc, write_voc
from vild.data.yolo import read_yolo, write_yolo
from vild.utils.errors import UserError

SIZES = {"a": (80, 60), "b": (200, 100), "deep/c": (50, 40)}  # width, height


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def save_image(path, size, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)


@pytest.fixture
def yolo(root):
    folder = root / "pets"
    for name, size in SIZES.items():
        save_image(folder / "images" / "train" / f"{name}.jpg", size)
    labels = {"a": "1 0.5 0.5 0.25 0.5\n\n0 0.05 0.1 0.1 0.2\n", "deep/c": "1.0 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6\n"}
    for name, text in labels.items():
        (folder / "labels" / "train" / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (folder / "labels" / "train" / f"{name}.txt").write_text(text)
    names = "names: {0: cat, 1: dog}\nnc: 2\n"
    (folder / "data.yaml").write_text(f"path: pets\ntrain: images/train\nval: images/val\n{names}")
    return folder


def things(document):
    """Of each image the file name, and the class and box of its objects."""
    names = {c["id"]: c["name"] for c in document["categories"]}
    return {
        i["file_name"]: [
            (names[a["category_id"]], pytest.approx(a["bbox"], abs=1e-6))
            for a in document["annotations"]
            if a["image_id"] == i["id"]
        ]
        for i in document["images"]
    }


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


def test_a_repeated_object_is_one(yolo, voc, root, caplog):
    (yolo / "labels/train/a.txt").write_text("0 .5 .5 .1 .1\n1 .5 .5 .1 .1\n0 0.5 .5 .10 .1\n")
    assert len(things(read_yolo(yolo / "data.yaml", "train", root)[1])["a.jpg"]) == 2
    assert "1 lines that repeat class and box of another, left out" in caplog.text
    (voc / "Annotations/a.xml").write_text(XML.format("a.png", CAT.format(1) + CAT.format(2) + CAT.format(1)))
    assert len(things(read_voc(voc, images=voc / "JPEGImages"))["a.png"]) == 3
    assert "1 objects that repeat class and box of another, left out" in caplog.text


XML = """<annotation><filename>{}</filename><size><width>80</width><height>60</height></size>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>25</ymax>
</bndbox></object>{}</annotation>"""
CAT = "<object><name>cat</name><bndbox><ymin>{}</ymin><xmin>1</xmin><xmax>80</xmax><ymax>60.0</ymax></bndbox></object>"


@pytest.fixture
def voc(root):
    folder = root / "VOC"
    for name, xml in {"a": XML.format("a.png", CAT.format(1)), "b.1": XML.format("renamed.jpg", "")}.items():
        (folder / "Annotations").mkdir(parents=True, exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(xml)
        save_image(folder / "JPEGImages" / f"{name}.png", (80, 60))
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "val.txt").write_text("b.1\n")
    return folder


def test_voc_by_hand(voc, caplog):
    document = read_voc(voc, images=voc / "JPEGImages")
    assert things(document) == {
        "a.png": [("dog", [10, 20, 20, 5]), ("cat", [0, 0, 80, 60])],
        "b.1.png": [("dog", [10, 20, 20, 5])],
    }
    assert [a["iscrowd"] for a in document["annotations"]] == [1, 0, 1]
    only = read_voc(voc, "val", images=voc / "JPEGImages")
    assert [i["file_name"] for i in only["images"]] == ["b.1.png"] and only["categories"] == document["categories"]
    assert not caplog.text


def test_voc_as_supervision_reads_it(voc):
    supervision = pytest.importorskip("supervision")
    theirs = supervision.DetectionDataset.from_pascal_voc(str(voc / "JPEGImages"), str(voc / "Annotations"))
    for path, _, found in theirs:
        mine = dict(things(read_voc(voc, images=voc / "JPEGImages")))[path.rsplit("/", 1)[1]]
        x, y, w, h = np.array([box.expected for _, box in mine]).T
        assert found.xyxy == pytest.approx(np.stack([x, y, x + w, y + h], 1))
        assert [theirs.classes[c] for c in found.class_id] == [name for name, _ in mine]


def test_pixels_counted_from_0_are_noticed(voc, caplog):
    (voc / "Annotations/a.xml").write_text(XML.format("a.png", CAT.format(0)))
    document = read_voc(voc, images=voc / "JPEGImages")
    assert things(document)["a.png"] == [("dog", [11, 21, 19, 4]), ("cat", [1, 0, 79, 60])]
    assert "1 of 3 boxes begin at 0, so pixels are counted from 0" in caplog.text


def test_a_negative_corner_says_nothing_of_where_pixels_begin(voc, caplog):
    (voc / "Annotations/a.xml").write_text(XML.format("a.png", CAT.format(-3) + CAT.format(0.5)))
    document = read_voc(voc, images=voc / "JPEGImages")
    assert things(document)["a.png"] == [
        ("dog", [10, 20, 20, 5]),
        ("cat", [0, -4, 80, 64]),
        ("cat", [0, -0.5, 80, 60.5]),
    ]
    assert "counted from 0" not in caplog.text


def test_the_image_with_the_stem_of_the_xml_wins(voc):
    """A copy of an XML file, or a renamed one, still has the old <filename>."""
    for name in ("a", "b.1"):
        (voc / "Annotations" / f"{name}.xml").write_text(XML.format("b.1.png", ""))
    assert {*things(read_voc(voc, images=voc / "JPEGImages"))} == {"a.png", "b.1.png"}
    save_image(voc / "JPEGImages/a.jpg", (80, 60))
    for name in ("a.jpg", "a.png"):
        (voc / "Annotations/a.xml").write_text(XML.format(name, ""))
        assert name in things(read_voc(voc, images=voc / "JPEGImages"))
    (voc / "Annotations/b.1.xml").rename(voc / "Annotations/new.xml")
    assert {*things(read_voc(voc, images=voc / "JPEGImages"))} == {"a.png", "b.1.png"}


def test_a_voc_image_has_the_size_of_the_xml(voc):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(voc / "JPEGImages/a.png", (60, 80), exif=exif)
    read_voc(voc, images=voc / "JPEGImages")
    save_image(voc / "JPEGImages/a.png", (80, 60), exif=exif)
    with pytest.raises(UserError, match=r"a\.xml: size is 80 x 60, but its image a\.png is 60 x 80, turned upright"):
        read_voc(voc, images=voc / "JPEGImages")
    (voc / "JPEGImages/a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        read_voc(voc, images=voc / "JPEGImages")


def test_voc_files_that_are_none(voc):
    """Hidden ones are skipped; a pipe, which would never end, and a huge file are refused."""
    (voc / "Annotations/._a.xml").write_bytes(b"resource fork")
    (voc / "JPEGImages/._a.png").write_bytes(b"resource fork")
    (voc / "Annotations/a.xml").write_text('<?xml version="1.0"?>\n' + XML.format("", ""))
    assert len(read_voc(voc, images=voc / "JPEGImages")["images"]) == 2
    (voc / "Annotations/a.xml").unlink()
    os.mkfifo(voc / "Annotations/a.xml")
    with pytest.raises(UserError, match=r"a\.xml cannot be read .*not a regular file"):
        read_voc(voc)
    (voc / "Annotations/a.xml").unlink()
    with open(voc / "Annotations/a.xml", "wb") as file:
        file.truncate(1 << 25)
    with pytest.raises(UserError, match=r"a\.xml cannot be read .*more than 16,777,216 bytes"):
        read_voc(voc)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("<xmax>30</xmax>", "<xmax>3_0</xmax>"), "object 1: bndbox/xmax is '3_0'; it must be a number"),
        (("<xmax>30</xmax>", "<xmax>3o</xmax>"), "object 1: bndbox/xmax is '3o'; it must be a number"),
        (("<xmax>30</xmax>", "<xmax>nan</xmax>"), "object 1: bndbox/xmax is 'nan'"),
        (("<ymax>25</ymax>", ""), "object 1: bndbox/ymax is missing"),
        (("<xmax>30</xmax>", "<xmax>3</xmax>"), "object 1: xmin is 11, more than xmax, 3"),
        (("<difficult>1", "<difficult>yes"), "object 1: difficult is 'yes'; it must be 0 or 1"),
        (("<name>dog</name>", "<name> </name>"), "object 1: name is missing"),
        (("<width>80</width>", "<width>0</width>"), "size is 0 x 60"),
        (("</object>", "</objects>"), "mismatched tag: line 3"),
    ],
)
def test_a_wrong_object_is_named(voc, change, why):
    path = voc / "Annotations/a.xml"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UserError, match=rf"Annotations/a\.xml is not a VOC annotation \({why}"):
        read_voc(voc)


def test_a_voc_image_must_be_there(voc):
    (voc / "JPEGImages/b.1.png").unlink()
    with pytest.raises(UserError, match=r"b\.1\.xml: filename is 'renamed.jpg': neither that nor b\.1\.\* is an image"):
        read_voc(voc, images=voc / "JPEGImages")
    with pytest.raises(UserError, match="not a VOC annotation of these names .object 1: name is dog.*"):
        read_voc(voc, "val", ("cat",))
    with pytest.raises(UserError, match=r"no \.xml file is there"):
        read_voc(voc / "JPEGImages")
    assert read_voc(voc, "val", NAMES)["images"][0]["file_name"] == "b.1.jpg"


def test_a_data_set_of_either_layout(yolo, voc, root, tool, capsys):
    """The images may lie in the XML files' folder, as Roboflow has them."""
    for path in voc.glob("Annotations/*.xml"):
        (voc / "JPEGImages" / path.name).write_bytes(path.read_bytes())
    for name, arguments, folder in [
        ("y", ["pets/data.yaml", "--subset", "train"], yolo / "images/train"),
        ("v", ["VOC"], voc / "JPEGImages"),
        ("r", ["VOC/JPEGImages"], voc / "JPEGImages"),
        ("s", ["VOC", "--subset", "val", "--images", "VOC/JPEGImages"], voc / "JPEGImages"),
    ]:
        assert not tool("add_dataset.py", "--name", name, "--split", "everything", "--json", *arguments)
        assert "2 base and 0 novel names" in capsys.readouterr().out
        assert datasets.get_classes(name).names == ("cat", "dog")
        records = datasets.load_dicts(name)
        assert all(record["file_name"].startswith(str(folder)) for record in records)
        document = json.loads((root / f"vild_datasets/{name}.json").read_text())
        assert document["categories"][1] == {"id": 2, "name": "dog"}
    (voc / "ImageSets/Main/blank.txt").write_text("\n \n")
    assert len(datasets.load_dicts("y")) == 3 and len(datasets.load_dicts("s")) == 1
    for arguments, why in [
        (["pets/data.yaml"], "--subset: is missing; it has train, val"),
        (["VOC", "--subset", "blank"], "blank.txt: --subset blank: no image is listed there"),
        (["pets/data.yaml", "--subset", "train", "--images", "pets"], "--images pets: pets/data.yaml itself says"),
        (["VOC", "--subset", "test"], "test.txt cannot be read"),
        (["pets/none"], "pets/none does not exist"),
        (["pets/images/train/a.jpg"], "give --images, too"),
        (["vild_datasets/y.json", "--images", "pets", "--subset", "val"], "is no data.yaml and no VOC folder"),
        (["VOC", "--split", "coco_48_17", "--name", "../z"], "--name: '../z' cannot be the name of a file"),
    ]:
        flags = ["--name", "z", "--split", "lvis", "--json", *arguments]
        assert tool("add_dataset.py", *flags) == 2
        assert why in capsys.readouterr().err
    assert tool("add_dataset.py", "--name", "z", "--split", "lvis", "--json", "VOC") == 2  # none of its names
    assert sorted(p.name for p in (root / "vild_datasets").iterdir()) == ["r.json", "s.json", "v.json", "y.json"]


def test_what_is_written_is_read(root, caplog):
    """And by supervision. VOC has whole pixels."""
    supervision = pytest.importorskip("supervision")
    caplog.set_level(logging.WARNING)
    rng, names = np.random.default_rng(0), ["café & bar", "on", "no <b>", "1"]
    records = []
    for n, (name, (width, height)) in enumerate([*SIZES.items(), ("none", (30, 30))]):
        save_image(root / "photos" / f"{name}.jpg", (width, height))
        corners = np.sort(rng.uniform(0, 1, (20 if name != "none" else 0, 2, 2)), 1) * [width, height]
        boxes = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], 1)
        found = [{"category_id": k % 4 + 1, "bbox": box.tolist()} for k, box in enumerate(boxes)]
        records.append(({"id": n + 1, "file_name": f"{name}.jpg", "width": width, "height": height}, found))
    everything = {i["file_name"]: found for i, found in records}
    for write, tolerance in ((write_yolo, 1e-3), (write_voc, 0.5)):
        folder = root / write.__name__
        write(folder, root / "photos", names, records)
        if write is write_yolo:
            images, document = read_yolo(folder / "data.yaml", "train", root)
            there = supervision.DetectionDataset.from_yolo(
                str(folder / "images"), str(folder / "labels"), str(folder / "data.yaml")
            )
            assert there.classes == names
        else:
            images = folder / "JPEGImages"
            document = read_voc(folder, "trainval", images=images)
            there = supervision.DetectionDataset.from_pascal_voc(str(images), str(folder / "Annotations"))
        for image in document["images"]:
            assert (images / image["file_name"]).read_bytes() == (root / "photos" / image["file_name"]).read_bytes()
            expected = everything.pop(image["file_name"])
            mine = [a for a in document["annotations"] if a["image_id"] == image["id"]]
            for a, b in zip(mine, expected, strict=True):
                assert document["categories"][a["category_id"] - 1]["name"] == names[b["category_id"] - 1]
                x, y, w, h = b["bbox"]
                low, high = np.array(a["bbox"][:2]), np.add(a["bbox"][:2], a["bbox"][2:])
                edge = 1 if write is write_voc and min(w, h) < 1 else tolerance
                assert np.abs(low - [x, y]).max() <= edge and np.abs(high - [x + w, y + h]).max() <= edge
        assert not everything
        everything = {i["file_name"]: found for i, found in records}
        for path, _, found in there:
            expected = everything[path.rsplit("/", 1)[1]]
            assert [there.classes[c] for c in found.class_id] == [names[a["category_id"] - 1] for a in expected]
            if expected:
                x, y, w, h = np.array([a["bbox"] for a in expected]).T
                assert np.abs(found.xyxy - np.stack([x, y, x + w, y + h], 1)).max() <= 1
    assert not caplog.text
