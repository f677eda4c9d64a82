"""What holds for YOLO's and VOC's layouts alike."""

import json
import logging

import numpy as np
import pytest

from tests.data.layouts import CAT, SIZES, XML, save_image, things
from vild.data import datasets
from vild.data.voc import read_voc, write_voc
from vild.data.yolo import read_yolo, write_yolo


def test_a_repeated_object_is_one(yolo, voc, root, caplog):
    (yolo / "labels/train/a.txt").write_text("0 .5 .5 .1 .1\n1 .5 .5 .1 .1\n0 0.5 .5 .10 .1\n")
    assert len(things(read_yolo(yolo / "data.yaml", "train", root)[1])["a.jpg"]) == 2
    assert "1 lines that repeat class and box of another, left out" in caplog.text
    (voc / "Annotations/a.xml").write_text(XML.format("a.png", CAT.format(1) + CAT.format(2) + CAT.format(1)))
    assert len(things(read_voc(voc, images=voc / "JPEGImages"))["a.png"]) == 3
    assert "1 object with class and box of another, left out" in caplog.text


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
