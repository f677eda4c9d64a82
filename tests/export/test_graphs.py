"""Exported graphs of other kinds of detectors, and what the tool writes beside them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.conftest import REPOSITORY
from tests.export.exported import bare_runner, check_same, random_vocabulary, records, session_of
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.export.detector import ExportedDetector
from vild.export.write import write_model
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import build_model
from vild.modeling.calibration import Calibration
from vild.utils.images import read_image

pytestmark = pytest.mark.slow
FULL = Calibration((0.8, 0.1, -3.0), (0.5, 0.3, -4.0, -1.0), 0.01, "dev", 100, 50)


@pytest.fixture
def small(vocabulary_file, tmp_path):
    """A variant's detector without masks whose regions are proposed and pooled on one level: its graph is made in a
    fraction of the time."""

    def make(variant: str) -> OpenVocabularyDetector:
        keys = ["MODEL.MASK_ON", False, "MODEL.VILD.VOCABULARY", str(vocabulary_file)]
        keys += ["MODEL.RESNETS.OUT_FEATURES", ["res3"], "MODEL.FPN.IN_FEATURES", ["res3"]]
        keys += ["MODEL.RPN.IN_FEATURES", ["p3"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3"]]
        keys += ["MODEL.ANCHOR_GENERATOR.SIZES", [[32]], "MODEL.WEIGHTS", str(tmp_path / "model.pth")]
        cfg = load_config(str(REPOSITORY / f"configs/Glyphs/{variant}.yaml"), keys)
        torch.manual_seed(0)
        VildCheckpointer(build_model(cfg), str(tmp_path)).save("model")
        return OpenVocabularyDetector(cfg)

    return make


def test_the_ensemble_asks_which_names_are_base(small, images, tmp_path):
    """And a detector without masks has no such output. (The exported ensemble with masks is the released one.)"""
    detector = small("ensemble")
    write_model(detector, tmp_path / "model.onnx")
    vocabulary = random_vocabulary(detector, 40)
    vocabulary.save(tmp_path / "v.safetensors")
    done = bare_runner("--weights", tmp_path / "model.onnx", "--vocabulary", tmp_path / "v.safetensors",
                       "--input", *images, "--output", tmp_path / "r.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for record, image in zip(json.loads((tmp_path / "r.json").read_text()), images, strict=True):
        check_same(record["detections"], detector(image, vocabulary, threshold=0).to_dict()["detections"])
    session, text = session_of(tmp_path / "model.onnx"), vocabulary.embeddings.numpy()
    assert [x.name for x in session.get_inputs()] == ["picture", "text", "base"]
    assert [x.name for x in session.get_outputs()] == ["boxes", "scores", "classes", "other_classes", "other_scores"]
    scores = [
        session.run(["scores"], {"picture": read_image(images[0]), "text": text, "base": np.full(40, base)})[0]
        for base in (True, False)
    ]
    assert not np.allclose(*scores)


def test_a_folder_that_needs_nothing_else(tool, trained, checkpoint_file, teacher_folder, images, tmp_path):
    config, output = REPOSITORY / "configs/Glyphs/vild.yaml", tmp_path / "folder"
    overrides = ["--opts", "MODEL.WEIGHTS", checkpoint_file, "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}",
                 "MODEL.VILD.TEACHER.PRETRAINED", ""]  # fmt: skip
    assert not tool("export.py", "--config-file", config, "--output-dir", output, *overrides)
    found = OpenVocabularyDetector.from_pretrained(tmp_path / "folder")(images[0], threshold=0)
    assert torch.equal(found.scores, trained(images[0], threshold=0).scores) and len(found)


def both_formats(detector, folder, monkeypatch):
    """Functions of the inputs by name: the exported detector as onnxruntime and as torch.export run it."""
    kind = ExportedDetector(detector.model)
    program = kind.program()
    monkeypatch.setattr(ExportedDetector, "program", lambda _: program)
    for suffix in (".onnx", ".pt2"):
        write_model(detector, folder / f"model{suffix}")
    session, archive = session_of(folder / "model.onnx"), torch.export.load(folder / "model.pt2").module()

    def by_torch(inputs: dict) -> list[np.ndarray]:
        return [
            x.detach().numpy() for x in archive(*(torch.from_numpy(np.asarray(inputs[n])) for n in kind.input_names))
        ]

    return lambda inputs: session.run(None, inputs), by_torch


def check_exported(detector, run, image_file, shown: int) -> None:
    """``run`` equals the detector with the first ``shown`` of its names, the others competing."""
    names = detector.trained
    inputs = {"picture": detector.model_input(image_file)["image"].permute(1, 2, 0).numpy(),
              "text": names.embeddings.numpy(), "shown": np.array(shown)}  # fmt: skip
    if detector.model.roi_heads.variant == "ensemble":
        inputs["base"] = names.mask("base").numpy()
    boxes, scores, classes, *_, other_classes, other_scores = run(inputs)
    some = detector.with_vocabulary(names)
    some._offered = replace(some._offered, shown=shown)
    found = some(image_file, across_names=1.0, threshold=0)
    mine = records(boxes, scores, classes)
    for record, others in zip(mine, zip(other_classes, other_scores, strict=True), strict=True):
        record["alternatives"] = [{"name": int(c), "score": float(s)} for c, s in zip(*others, strict=True) if s >= 0]
    expected = records(found.pred_boxes.tensor.numpy(), found.scores, found.pred_classes)
    for record, others in zip(expected, found.alternatives, strict=True):
        record["alternatives"] = [{"name": names.names.index(name), "score": s} for name, s in others]
    check_same(mine, expected)
    assert (np.diff(scores) <= 0).all() and (classes < shown).all() and len(expected) > 0


@pytest.mark.parametrize("variant", ["vild", "ensemble"])
def test_calibration_is_in_the_graph(variant, small, images, tmp_path, monkeypatch):
    """ONNX and torch.export equal PyTorch, for all names and for some of them in a context. An ensemble's novel names
    have numbers of their own there, too."""
    detector, calibration = small(variant), FULL
    if variant == "ensemble":
        calibration = replace(FULL, novel=((1.0, 0.0, -2.0), (0.4, 0.0, -2.0, 0.5)))
    plain = detector(images[-1], across_names=1.0, threshold=0)
    monkeypatch.setattr(detector.model.roi_heads, "calibration", calibration)
    for run in both_formats(detector, tmp_path, monkeypatch):
        for file in images[-2:]:
            for shown in (len(detector.trained), 7):
                check_exported(detector, run, file, shown)
    assert json.loads((tmp_path / "model.json").read_text())["calibration"] == calibration.state()
    calibrated = detector(images[-1], across_names=1.0, threshold=0)
    for split in ("base", "novel"):  # it does something to both
        scores = [f.scores[detector.trained.mask(split)[f.pred_classes]] for f in (plain, calibrated)]
        assert min(map(len, scores)) > 3 and abs(scores[0].mean() - scores[1].mean()) > 1e-3
