"""The card of a shared detector says what its files record."""

import copy
import json

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from vild.checkpoint.checkpointer import detector_hash, write_weights
from vild.checkpoint.pretrained import find_weights
from vild.data.provenance import training_record
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling.calibration import Calibration
from vild.utils.errors import UserError

CALIBRATION = Calibration((1, 0, 0), (1, 0, 0, 0), 0.01, "x", 1, 1)


def test_data_teacher_metrics_and_licence(detector, make_cfg, tmp_path):
    path, start = tmp_path / "model.safetensors", {"file": "R-50.pkl", "sha": "0" * 16, "trained_on": None}
    record = training_record(["glyphs_train"], None) | {"starts": [start]}
    write_weights(path, detector.model.state_dict(), detector.trained, "vild", record)
    (tmp_path / "run" / "inference").mkdir(parents=True)
    metrics = {"glyphs_val/bbox/AP50_novel": 12.345, "glyphs_val/bbox/AP50_nothing": None}
    (tmp_path / "run" / "inference" / "vild_metrics.json").write_text(json.dumps(metrics))
    saved = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(path)))
    (tmp_path / "run" / "inference" / "run.json").write_text(
        json.dumps({"detector": detector_hash(saved.model), "config": saved.cfg.dump()})
    )
    saved.save(tmp_path / "kites", False, "cc-by-4.0", tmp_path / "run", "me/kites")
    card = ModelCard.load(tmp_path / "kites" / "README.md")  # by the hub's own library
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("cc-by-4.0", "vild", "kites")
    assert card.data.pipeline_tag == "zero-shot-object-detection"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("glyphs_val", "bbox/AP50_novel", 12.345)
    body = card.text
    (data_set,) = record["data_sets"]
    count = f"{sum(data_set['annotations'].values()):,} annotations of {len(data_set['annotations'])} names"
    source = f"glyphs_train ({data_set['file']}, SHA-256 {data_set['sha']}"
    facts = [detector.trained.fingerprint["weights"], source, count, "starting from R-50.pkl (not recorded)", "12.3"]
    for fact in (*facts, "60: 40 annotated, 20 held out", 'from_pretrained("hf-hub:me/kites")'):
        assert fact in body
    assert "AP50_nothing" not in body and find_weights(tmp_path / "kites") == tmp_path / "kites"
    saved.save(tmp_path / "odd", teacher=False, licence="mine: ask first\n")
    odd = ModelCard.load(tmp_path / "odd" / "README.md")
    assert odd.data.license.strip() == "mine: ask first" and odd.data.eval_results is None
    assert "None were given." in odd.text and 'from_pretrained("hf-hub:OWNER/odd")' in odd.text
    with pytest.raises(UserError, match=r"nowhere/inference/vild_metrics\.json is not a file of metrics"):
        saved.save(tmp_path / "other", teacher=False, licence="mit", run=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


def test_metrics_of_another_detector_are_refused(detector, make_cfg, tmp_path):
    """Of other weights, of these before they were calibrated, or of unknown ones. Adapters change no detection."""
    bare, record = copy.deepcopy(detector.model), tmp_path / "run" / "inference" / "run.json"
    record.parent.mkdir(parents=True)
    (record.parent / "vild_metrics.json").write_text('{"glyphs_val/bbox/AP": 1}')
    for name, fitted in (("plain.safetensors", None), ("calibrated.pth", CALIBRATION)):
        write_weights(tmp_path / name, bare.state_dict(), bare.vocabulary, "vild", calibration=fitted)
    plain, calibrated = (
        OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(tmp_path / name)))
        for name in ("plain.safetensors", "calibrated.pth")
    )
    bare.roi_heads.adapter = nn.Linear(2, 2)
    of_plain, of_calibrated = detector_hash(plain.model), detector_hash(calibrated.model)
    assert detector_hash(bare) == of_plain != of_calibrated
    record.write_text(json.dumps({"detector": of_plain, "config": plain.cfg.dump()}))
    plain.save(tmp_path / "good", teacher=False, licence="mit", run=tmp_path / "run")
    assert detector_hash(OpenVocabularyDetector.from_pretrained(tmp_path / "good").model) == of_plain
    with pytest.raises(UserError, match=rf"run\.json is of detector {of_plain}, this one is {of_calibrated}"):
        calibrated.save(tmp_path / "other", teacher=False, licence="mit", run=tmp_path / "run")
    warm = make_cfg("vild", "MODEL.WEIGHTS", str(tmp_path / "plain.safetensors"), "MODEL.VILD.TEST_TEMPERATURE", "0.5")
    with pytest.raises(UserError, match=r"run\.json is of another evaluation: .*TEST_TEMPERATURE 0.0, here 0.5$"):
        OpenVocabularyDetector(warm).save(tmp_path / "other", teacher=False, licence="mit", run=tmp_path / "run")
    with torch.no_grad():
        plain.model.roi_heads.bbox_pred.bias[0] += 1e-6
    with pytest.raises(UserError, match=rf"run\.json is of detector {of_plain}, this one is"):
        plain.save(tmp_path / "other", teacher=False, licence="mit", run=tmp_path / "run")
    record.write_text("{}")
    with pytest.raises(UserError, match=r"run\.json does not say which detector was evaluated"):
        plain.save(tmp_path / "other", teacher=False, licence="mit", run=tmp_path / "run")
    assert not (tmp_path / "other").exists()
