"""A detector is calibrated on the base classes of a data set, and on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances

from vild.checkpoint.checkpointer import save_weights
from vild.data.provenance import training_record
from vild.inference import calibrate as module
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import build_model
from vild.modeling.calibration import Calibration
from vild.utils.errors import NotAvailable, UserError
from vild.utils.images import read_image
from vild.vocabulary.regions import Gap


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
    boxes = module.ground_truth_boxes("glyphs_val")
    splits = truth.classes.splits
    for image_id, (box, classes) in boxes.items():
        keep = [i for i, number in enumerate(classes) if splits[number] == "base"]
        boxes[image_id] = box[keep], [classes[i] for i in keep]
    monkeypatch.setattr(module, "truth_of", lambda _: other)
    monkeypatch.setattr(module, "ground_truth_boxes", lambda _: boxes)
    assert module.calibrate(detector, "glyphs_val") == expected


def test_an_ensembles_novel_names_are_calibrated_as_if_base_names_were_novel(
    make_cfg, vocabulary_file, seeing, monkeypatch, tmp_path
):
    """In the second fit no class is base, so that only the image head speaks; its numbers are the novel classes'."""
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


def test_the_gap_between_regions_and_words_is_that_of_base_names(detector, teacher, seeing, monkeypatch):
    """By the teacher's embeddings of their boxes, one by one. Without the teacher there is none."""
    regions, words, splits = [], [], detector.trained.splits
    for record in module.datasets.load_dicts("glyphs_val"):
        image = torch.from_numpy(read_image(record["file_name"], "RGB").copy()).permute(2, 0, 1)
        for a in record["annotations"]:
            if splits[a["category_id"]] == "base":
                x, y, w, h = a["bbox"]
                regions.append(teacher.encode_regions(image, torch.tensor([[x, y, x + w, y + h]])))
                words.append(a["category_id"])
    regions = torch.cat(regions)
    # an untrained teacher's regions say nothing about words: let them
    rows = F.normalize(torch.eye(60)[words].T @ regions + detector.trained.embeddings / 10, dim=1)
    detector.trained = replace(detector.trained, embeddings=rows)
    expected, found = Gap.fit(regions, rows[words]), module.calibrate(detector, "glyphs_val").examples
    assert expected.slope > 0.1 and found.slope == pytest.approx(expected.slope, abs=1e-4)
    np.testing.assert_allclose(found.image, expected.image, atol=1e-5)
    np.testing.assert_allclose(found.word, expected.word, atol=1e-5)

    def missing(_):
        raise NotAvailable("no network")

    monkeypatch.setattr(type(detector), "teacher", property(missing))
    assert module.calibrate(detector, "glyphs_val").examples is None


def test_few_images_do_not_say_which_image_is_unlike_them(detector, seeing, caplog, monkeypatch):
    """One image has no spread: its statistics were NaN, in a file that no one could load."""
    record = max(module.datasets.load_dicts("glyphs_train_all"), key=lambda r: len(r["annotations"]))
    monkeypatch.setattr(module.datasets, "load_dicts", lambda _: [record])
    monkeypatch.setattr(module, "FEWEST", 1)
    found = module.calibrate(detector, "glyphs_train_all")
    assert found.images is None and "1 image; to tell when an image is unlike those, take" in caplog.text
    assert Calibration.from_state(found.state()) == found
    monkeypatch.setattr(module.datasets, "load_dicts", lambda _: [])
    with pytest.raises(UserError, match="calibration on glyphs_train_all: it has no images"):
        module.calibrate(detector, "glyphs_train_all")


def test_federated_annotations_are_said_to_give_high_scores(detector, seeing, caplog):
    module.calibrate(detector, "glyphs_val")
    assert "whether they are there" not in caplog.text
    module.calibrate(detector, "glyphs_lvis_val")
    assert "calibration on glyphs_lvis_val: of most classes LVIS's images do not say whether they" in caplog.text


def test_a_fit_by_which_a_surer_detection_scores_lower_is_refused(detector, seeing, monkeypatch):
    """A logit that rises by 1 raises log-odds and margin by 1, and the score's log-odds by the sum of their weights."""
    fitted = module.fit
    for wrong in ({"alone": (0.5, -0.6, 0.0)}, {"final": (0.5, -0.6, 0.0, 0.0)}, {"final": (-0.1, 0.6, 0.0, 0.0)}):
        monkeypatch.setattr(module, "fit", lambda *a, wrong=wrong, **k: replace(fitted(*a, **k), **wrong))
        with pytest.raises(UserError, match="right detections do not have higher scores than wrong ones"):
            module.calibrate(detector, "glyphs_train_all")


def test_too_few_detections_are_refused(detector, seeing, monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 10**6)
    with pytest.raises(UserError, match=r"calibration on glyphs_val: \d+ right and \d+ wrong detections of base"):
        module.calibrate(detector, "glyphs_val")


def test_the_tool_writes_weights_that_are_used(tool, seeing, checkpoint_file, make_cfg, tmp_path, capsys, monkeypatch):
    cfg = make_cfg("vild")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    output = tmp_path / "calibrated.pth"
    arguments = ("--config-file", tmp_path / "config.yaml", "--weights", checkpoint_file, "--dataset",
                 "glyphs_train_all", "--output", output)  # fmt: skip
    assert not tool("calibrate.py", *arguments)
    said = capsys.readouterr()
    assert "probability that a detection is right" in said.out and "was trained on" not in said.err
    found = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(output)))
    assert found.model.roi_heads.calibration.data_set == "glyphs_train_all"
    assert tool("calibrate.py", *arguments[:-1], tmp_path / "x.json") == 2
    assert ".pth or .safetensors" in capsys.readouterr().err
    before = checkpoint_file.read_bytes()
    assert tool("calibrate.py", *arguments[:-1], checkpoint_file) == 2
    assert "is the file of --weights" in capsys.readouterr().err and checkpoint_file.read_bytes() == before
    # what cannot be written is said before the data set is looked at
    monkeypatch.setattr(module, "calibrate", lambda *_: pytest.fail("calibrated"))
    assert tool("calibrate.py", *arguments[:-1], tmp_path / "config.yaml" / "x.pth") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_calibration_on_the_training_set_is_said_to_be_too_sure(tool, seeing, make_cfg, tmp_path, capsys):
    cfg = make_cfg("vild")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    start = training_record(["glyphs_train_all"], None)
    for n, record in enumerate((start, {**training_record(["glyphs_train"], None), "starts": [{"trained_on": start}]})):
        save_weights(tmp_path / f"{n}.safetensors", build_model(cfg), record)
        assert not tool("calibrate.py", "--config-file", tmp_path / "config.yaml", "--dataset", "glyphs_train_all",
                        "--weights", tmp_path / f"{n}.safetensors", "--output", tmp_path / "c.pth")  # fmt: skip
        assert f"{n}.safetensors was trained on glyphs_train_all: " in capsys.readouterr().err
