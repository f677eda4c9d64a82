"""VOC's layout: read as supervision reads it, and what is odd is one line."""

import os

import numpy as np
import pytest
from PIL import Image

from tests.data.layouts import CAT, XML, save_image, things
from vild.data.voc import NAMES, read_voc
from vild.utils.errors import UserError


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
