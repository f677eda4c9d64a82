"""A converted checkpoint is a detector that detects, and that can be evaluated, trained, saved and exported."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image

from tests.data.official import lvis_document
from tests.modeling.test_calibration import check_papers_scores
from tests.modeling.test_lvis_models import images
from vild.checkpoint.checkpointer import VildCheckpointer, detector_hash
from vild.data import datasets
from vild.engine.trainer import Trainer
from vild.export.write import write_model
from vild.inference.image_features import ImageFeatures
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import build_model
from vild.modeling.released.rcnn import ReleasedRCNN
from vild.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.slow


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)


def test_the_converted_detector_detects(released_detector, image):
    found = released_detector(image, threshold=0, across_names=1.0, channels="BGR")
    assert len(found) == 20 and len(released_detector.names) == 1203
    assert found.pred_masks.any() and found.scores.isfinite().all()


def test_its_scores_are_the_papers_to_the_last_bit(thin_cfg, image, monkeypatch):
    """Calibration came later and leaves a checkpoint without one alone."""
    check_papers_scores(OpenVocabularyDetector(thin_cfg), Image.fromarray(image), monkeypatch)


def test_any_image_any_words(thin_cfg, image, tmp_path):
    detector = OpenVocabularyDetector(thin_cfg)
    found = detector(image, threshold=0, across_names=1.0, channels="BGR")
    assert found.image_size == (90, 150) and len(found) == 20 and found.pred_masks.shape == (20, 90, 150)
    assert detector.names[0] == "aerosol_can" and found.pred_masks.any()
    rows = torch.nn.functional.normalize(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    four = Vocabulary(("a", "b", "c", "d"), rows, ("base", "novel", "novel", "base"))
    others = detector.with_vocabulary(four)(image, threshold=0, channels="BGR")
    assert set(others.labels) <= {*"abcd"} and len(others)
    detector.save(tmp_path / "folder", teacher=False)
    again = OpenVocabularyDetector.from_pretrained(tmp_path / "folder", device="cpu")(
        image, threshold=0, across_names=1.0, channels="BGR"
    )
    assert torch.equal(again.pred_boxes.tensor, found.pred_boxes.tensor) and torch.equal(again.scores, found.scores)
    sizes = [image, image[:40, :60], image]
    together = detector(sizes, threshold=0, across_names=1.0, channels="BGR")
    assert [len(x) for x in together] == [20] * 3 and torch.allclose(together[2].scores, found.scores, atol=1e-5)


def test_boxes_go_from_the_canvas_to_the_image():
    boxes = torch.tensor([[0.0, 0, 127, 127], [12.8, 6.4, 12.8, 64]])
    found = Instances((128, 128), pred_boxes=Boxes(boxes), scores=torch.ones(2))
    inputs = [{"image": torch.zeros(3, 50, 100), "height": 200, "width": 400}]
    result = ReleasedRCNN._postprocess([found], inputs, [(128, 128)])[0]["instances"]
    assert result.image_size == (200, 400)
    expected = [[0, 0, 396.875, 396.875], [40, 20, 40, 200]]  # the image took 64 rows of the canvas
    assert torch.allclose(result.pred_boxes.tensor, torch.tensor(expected))


def test_boxes_go_from_the_image_to_the_canvas(thin_cfg, image):
    """An image of 150 x 90 pixels takes 128 x 77 of the canvas."""
    detector, image = OpenVocabularyDetector(thin_cfg), Image.fromarray(image)
    features = ImageFeatures(detector, image)
    assert torch.allclose(features.scaled(torch.tensor([[0.0, 0, 150, 90]])), torch.tensor([[0.0, 0, 128, 77]]))
    found, whole = features.detect(detector._offered), detector(image, threshold=0, across_names=1.0)
    assert torch.allclose(found.pred_boxes.tensor, whole.pred_boxes.tensor, atol=1e-4) and len(found) == 20


def test_it_can_be_evaluated_on_lvis(thin_cfg, image, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "lvis").mkdir()
    (tmp_path / "lvis/lvis_v1_val.json").write_text(json.dumps(lvis_document({1: [3, 800]}, "val")))
    (tmp_path / "coco/val2017").mkdir(parents=True)
    Image.fromarray(image[:60, :80]).save(tmp_path / "coco/val2017/000000000001.jpg")
    datasets.register_all()
    cfg = thin_cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.DATALOADER.NUM_WORKERS = 0
    model = Trainer.build_model(cfg)
    VildCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    Trainer.test(cfg, model)
    metrics = json.loads((tmp_path / "output/inference/vild_metrics.json").read_text())
    assert "lvis_v1_val/segm/AP" in metrics
    run = json.loads((tmp_path / "output/inference/run.json").read_text())
    assert run["detector"] == detector_hash(OpenVocabularyDetector(thin_cfg).model)


def test_it_can_be_trained_on(thin_cfg):
    model = build_model(thin_cfg).train()
    VildCheckpointer(model).load(thin_cfg.MODEL.WEIGHTS)
    inputs = images()
    with EventStorage():
        losses = model(inputs)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_text", "loss_l1", "loss_box_reg", "loss_mask"}
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_can_be_exported(thin_cfg, image, tmp_path):
    """The graph resizes the image itself; its results differ in the last bits only."""
    onnxruntime, detector = pytest.importorskip("onnxruntime"), OpenVocabularyDetector(thin_cfg)
    body = detector.model.backbone.bottom_up
    body.stages = [stage[:1] for stage in body.stages]  # blocks that are alike only make the export slower
    write_model(detector, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    vocabulary = detector.trained
    for array in (image, image[:, :40], image[:9, :7]):
        feed = {"picture": array, "text": vocabulary.embeddings.numpy(), "base": vocabulary.mask("base").numpy()}
        boxes, scores, classes, masks, *_ = session.run(None, feed)
        found = detector(array, threshold=0, across_names=1.0, channels=thin_cfg.INPUT.FORMAT)
        near = (torch.from_numpy(boxes)[:, None] - found.pred_boxes.tensor).abs().amax(2) < 1e-2
        near &= torch.from_numpy(classes)[:, None] == found.pred_classes
        near &= (torch.from_numpy(scores)[:, None] - found.scores).abs() < 1e-4
        assert len(boxes) == len(found) and (~near.any(0)).sum() <= 1 and masks.shape[1:] == (28, 28)
