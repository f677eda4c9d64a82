"""A result as a person uses it: printed, drawn, saved, converted."""

import json
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from PIL import Image

import vild
from vild.apps.detector import make_detector
from vild.inference.detections import Detections
from vild.utils.errors import UserError


def detections(count: int, names=("sun", "chess knight"), **rest) -> Detections:
    boxes = torch.tensor([[i, i + 0.4, i + 10, i + 20.6] for i in range(count)]).reshape(-1, 4)
    scores, classes = torch.linspace(0.9, 0.1, count), torch.arange(count) % len(names)
    return Detections(
        (60, 80), names, ("novel", ""), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes, **rest
    )


def test_printed_it_is_a_line_each():
    assert (
        repr(detections(2))
        == str(detections(2))
        == (
            "2 detections in 80 x 60 pixels\n  sun           0.90  [0, 0, 10, 21]\n  chess knight  0.10  [1, 1, 11, 22]"
        )
    )
    assert repr(detections(0)) == "0 detections in 80 x 60 pixels" and repr(detections(1)).startswith("1 detection in")
    lines = repr(detections(37, ("x" * 300, "sun"))).splitlines()
    assert len(lines) == 12 and lines[-1] == "  … 27 more" and max(map(len, lines)) < 80
    assert "unlike" in repr(detections(1, distance=1.5)) and len(repr(detections(1)[:0]).splitlines()) == 1


def test_labels_and_a_table(monkeypatch):
    found = detections(3)
    assert found.labels == ["sun", "chess knight", "sun"] and found[1:].labels == found.labels[1:]
    pandas = pytest.importorskip("pandas")
    table = found.to_pandas()
    assert isinstance(table, pandas.DataFrame) and table["name"].tolist() == found.labels
    assert table["split"].tolist() == ["novel", "", "novel"] and table["score"].tolist() == found.scores.tolist()
    assert table[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == found.pred_boxes.tensor.tolist()
    assert found[:0].to_pandas().columns.tolist() == table.columns.tolist() and len(found[:0].to_pandas()) == 0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        found.to_pandas()


def test_drawn_and_saved(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    sources = ((tmp_path / "a.png", None), (Image.fromarray(rgb), None), (rgb, "RGB"), (rgb[:, :, ::-1], "BGR"))
    drawn = [np.asarray(detections(3, source=source)[:2].draw()) for source in sources]
    assert drawn[0].shape == (640, 853, 3) and all((other == drawn[0]).all() for other in drawn)
    found = detections(3, source=sources[0])
    assert found.draw(min_side=0).size == (80, 60)
    found.save(tmp_path / "drawn.png")
    assert (np.asarray(Image.open(tmp_path / "drawn.png")) == np.asarray(found.draw())).all()
    found.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == found.to_dict()
    with pytest.raises(UserError, match="out.pdfx: the suffix is neither"):
        found.save(tmp_path / "out.pdfx")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: is now of 9 x 9 pixels, and was of 80 x 60"):
        found.draw()
    with pytest.raises(UserError, match="without an image"):
        detections(1).draw()


def test_a_file_that_was_written_again_is_not_drawn_on(detector, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (80, 60), "red").save(path)
    os.utime(path, ns=(10**18, 10**18))
    found = detector(path, threshold=0)
    assert found.draw().size == found[:1].draw().size == found.to("cpu").draw().size
    Image.new("RGB", (80, 60), "blue").save(path)
    for some in (found, found[:1], found.to("cpu")):
        with pytest.raises(UserError, match="a.png: the file was changed after the detection; detect in it again$"):
            some.draw()
    assert detector(path, threshold=0).draw().size
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        found.draw()


@pytest.mark.parametrize(
    "name",
    ["a.psd", "a.mpg", "a.hdf5", "a.grib", "a.xbm", "a.msp", "a.wmf", "x" * 300 + ".png", "x" * 300 + ".json",
     "a\0.png", "a\0.json", "\ud800.png"],
)  # fmt: skip
def test_what_cannot_be_written_is_one_line(name, tmp_path):
    found = detections(3, source=(Image.new("RGB", (80, 60)), None))
    with pytest.raises(UserError, match="cannot be written|the suffix is neither") as caught:
        found.save(f"{tmp_path}/{name}")
    assert str(caught.value).count(str(tmp_path)) == 1 and not list(tmp_path.iterdir())


def test_words_in_python_are_those_of_the_tools(make_cfg, checkpoint_file, detector, teacher_folder):
    """With synonyms behind a bar, in a text and in a list."""
    import argparse

    from tests.conftest import REPOSITORY
    from vild.utils.command_line import add_detector_flags

    parser = argparse.ArgumentParser()
    parser.add_argument("--threshold", default=0.4)
    add_detector_flags(parser)
    text = "sofa | couch, chess knight"
    flags = ["--config-file", str(REPOSITORY / "configs/Glyphs/vild.yaml"), "--weights", str(checkpoint_file),
             "--vocabulary", text, "--opts", "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}"]  # fmt: skip
    tool = make_detector(parser.parse_args(flags))
    for words in (text, text.split(", ")):
        mine = detector.with_vocabulary(words)
        assert mine.names == tool.names == ("sofa", "chess knight")
        assert mine.vocabulary.synonyms == tool.vocabulary.synonyms == (("couch",), ())
        assert torch.equal(mine._offered.text, tool._offered.text)


def test_help_begins_with_what_one_needs():
    lines = vild.__doc__.splitlines()
    assert "from vild import OpenVocabularyDetector" in lines[2] and len(lines) < 14
    for name in vild._PUBLIC:
        assert name in vild.__doc__


def test_fiftyone(monkeypatch):
    """Against the fields that its documentation names; a stub stands for the package, which is large."""
    masks = torch.zeros(3, 100, 200, dtype=torch.bool)
    masks[0, 10:25, 20:60] = masks[1, 99, 199] = masks[2, 99, 199] = True
    boxes = [[20.0, 10.0, 60.0, 40.0], [0.0, 0.0, 200.0, 100.0], [199.7, 99.6, 200.0, 100.0]]
    fields = {"pred_boxes": Boxes(torch.tensor(boxes)), "scores": torch.tensor([0.75, 0.5, 0.25]), "pred_masks": masks}
    found = Detections((100, 200), ["kite", "dog"], ["base", "novel"], pred_classes=torch.tensor([1, 0, 1]), **fields)
    fiftyone = ModuleType("fiftyone")
    known = {"label", "bounding_box", "confidence", "mask"}
    fiftyone.Detection = lambda **given: SimpleNamespace(**given) if given.keys() == known else 1 / 0
    fiftyone.Detections = lambda *, detections: SimpleNamespace(detections=detections)
    monkeypatch.setitem(sys.modules, "fiftyone", fiftyone)
    there = found.to_fiftyone().detections
    assert [d.label for d in there] == ["dog", "kite", "dog"] and [d.confidence for d in there] == [0.75, 0.5, 0.25]
    assert there[0].bounding_box == pytest.approx([0.1, 0.1, 0.2, 0.3])
    assert there[1].bounding_box == pytest.approx([0, 0, 1, 1])
    assert there[2].bounding_box == pytest.approx([0.9985, 0.996, 0.0015, 0.004], abs=1e-6)
    assert there[0].mask.shape == (30, 40) and there[0].mask[:15].all() and not there[0].mask[15:].any()
    assert there[1].mask.shape == (100, 200) and np.argwhere(there[1].mask).tolist() == [[99, 199]]
    assert there[2].mask.tolist() == [[True]]
    found.pred_boxes.tensor[:2] = torch.tensor([[-20.0, -10.0, 60.0, 40.0], [190.0, 90.0, 250.0, 130.0]])
    there = found.to_fiftyone().detections
    assert there[0].bounding_box == pytest.approx([0, 0, 0.3, 0.4]) and there[0].mask.shape == (40, 60)
    assert there[1].bounding_box == pytest.approx([0.95, 0.9, 0.05, 0.1]) and there[1].mask.shape == (10, 10)
    found.pred_boxes.tensor[0] = torch.tensor([-20.0, -10.0, -5.0, -5.0])
    assert found.to_fiftyone().detections[0].mask.shape == (1, 1)
    found.remove("pred_masks")
    assert found.to_fiftyone().detections[0].mask is None and found[:0].to_fiftyone().detections == []
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(UserError, match="^the package fiftyone is not installed: pip install fiftyone$"):
        found.to_fiftyone()
