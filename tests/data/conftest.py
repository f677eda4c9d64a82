"""Small data sets in YOLO's and VOC's layouts."""

import pytest

from tests.data.layouts import CAT, SIZES, XML, save_image


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


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
