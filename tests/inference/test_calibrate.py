"""A detector is calibrated on the base classes of a data set, and on nothing else."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from vild.checkpoint.checkpointer import save_weights
from vild.inference import calibrate as module
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError


@pytest.fixture
def seeing(monkeypatch, world):
    """Detections around the objects of each image, surer where they fit, and a few wrong ones."""

    def detect(detector, record, classes):
        rng = np.random.default_rng(record["image_id"])
        boxes, classes, odds = [], [], []
        for a in record["annotations"]:
            for shift, sure in ((1, 3), (8, 0)):
                x, y, w, h = a["bbox"]
                dx, dy = rng.uniform(-shift, shift, 2)
                boxes.append([x + dx, y + dy, x + w + dx, y + h + dy])
                classes.append(a["category_id"])
                odds.append(sure + rng.normal())
        for _ in range(5):
            x, y = rng.uniform(0, 90, 2)
            boxes.append([x, y, x + 30, y + 30])
            classes.append(rng.integers(60))
            odds.append(rng.normal() - 2)
        found = Instances((128, 128), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
                         pred_classes=torch.tensor(classes), log_odds=torch.tensor(odds).float(),
                         margin=torch.tensor(odds).float())  # fmt: skip
        return found, torch.from_numpy(rng.normal(size=(1, 384))).float()

    monkeypatch.setattr(module, "_detect", detect)
    monkeypatch.setattr(module, "FEWEST", 5)


def test_surer_detections_get_higher_scores(detector, seeing):
    found = module.calibrate(detector, "glyphs_train_all")
    assert found.final[0] + found.final[1] > 0 and found.data_set == "glyphs_train_all"
    assert 0 < found.right < found.detections


def test_no_novel_label_is_read(detector, seeing, monkeypatch):
    """The fit is the same where the novel annotations are others, or missing."""
    expected = module.calibrate(detector, "glyphs_val")
    truth = module.truth_of("glyphs_val")
    novel = {i for i, s in zip(truth.classes.ids, truth.classes.splits, strict=True) if s == "novel"}
    some = [a for a in truth.document["annotations"] if a["category_id"] not in novel]
    assert len(some) < len(truth.document["annotations"])
    other = module.GroundTruth({**truth.document, "annotations": some}, truth.classes, truth.protocol)
    monkeypatch.setattr(module, "truth_of", lambda _: other)
    assert module.calibrate(detector, "glyphs_val") == expected


def test_an_ensembles_novel_names_are_calibrated_as_if_base_names_were_novel(
    make_cfg, vocabulary_file, seeing, monkeypatch, tmp_path
):
    """In the second fit no class is base, so that only the image head speaks; its numbers are the novel classes'."""
    from vild.modeling import build_model

    save_weights(tmp_path / "m.safetensors", build_model(make_cfg("ensemble")))
    detector = OpenVocabularyDetector(make_cfg("ensemble", "MODEL.WEIGHTS", str(tmp_path / "m.safetensors")))
    asked, detect = [], module._detect

    def shifted(detector, record, classes):
        asked.append(int(classes.base.sum()))
        found, statistics = detect(detector, record, classes)
        if not classes.base.any():
            found.log_odds = 2 * found.log_odds
        return found, statistics

    monkeypatch.setattr(module, "_detect", shifted)
    found = module.calibrate(detector, "glyphs_train_all")
    assert set(asked) == {40, 0}  # more detections take part where the log-odds are doubled, hence 5 %
    alone, final = found.novel
    assert alone == pytest.approx((found.alone[0] / 2, *found.alone[1:]), rel=0.05)
    assert len(final) == 4 and final[0] < found.final[0]


def test_too_few_detections_are_refused(detector, seeing, monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 10**6)
    with pytest.raises(UserError, match=r"calibration on glyphs_val: \d+ right and \d+ wrong detections of base"):
        module.calibrate(detector, "glyphs_val")


def test_the_tool_writes_weights_that_are_used(tool, seeing, checkpoint_file, make_cfg, tmp_path, capsys):
    cfg = make_cfg("vild")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    output = tmp_path / "calibrated.pth"
    arguments = ("--config-file", tmp_path / "config.yaml", "--weights", checkpoint_file, "--dataset",
                 "glyphs_train_all", "--output", output)  # fmt: skip
    assert not tool("calibrate.py", *arguments)
    assert "probability that a detection is right" in capsys.readouterr().out
    found = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(output)))
    assert found.model.roi_heads.calibration.data_set == "glyphs_train_all"
    assert tool("calibrate.py", *arguments[:-1], tmp_path / "x.json") == 2
    assert ".pth or .safetensors" in capsys.readouterr().err
