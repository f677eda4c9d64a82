"""Training continues from a trained student, whose embeddings are imitated and whose weights never change."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torchvision.ops import box_iou

from vild.checkpoint.checkpointer import read_network_record
from vild.data.provenance import LEAK, judge_network
from vild.engine.sources import load_old_student
from vild.engine.trainer import Trainer
from vild.teacher.clip import hash_weights
from vild.utils.errors import UserError


def test_the_old_student_is_imitated_and_does_not_change(make_cfg, checkpoint_file):
    keys = ["MODEL.VILD.OLD_STUDENT.WEIGHTS", str(checkpoint_file), "MODEL.WEIGHTS", str(checkpoint_file)]
    cfg = make_cfg("vild", *keys, "SOLVER.IMS_PER_BATCH", 1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    old = trainer.model.old_student[0]
    kept = trainer.checkpointer.trained_on["starts"]
    assert [network["file"] for network in kept] == [checkpoint_file.name]  # once, although both keys name it
    before, names = hash_weights(old), set(trainer.model.state_dict())
    assert names == set(old.state_dict()) and not any(p.requires_grad for p in old.parameters())
    inputs = next(iter(trainer.data_loader))
    student = trainer.model.eval()
    image, boxes = student.preprocess_image(inputs).tensor, [inputs[0]["distill"].proposal_boxes]
    mine = student.roi_heads.region_embeddings(student.backbone(image), boxes)
    torch.testing.assert_close(student._old_embeddings(image, boxes), mine, rtol=1e-4, atol=1e-5)
    with EventStorage():
        loss = student.train()(inputs)["loss_old_student"]
    loss.backward()  # they differ in batch norm's statistics only
    assert loss > 0 and student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert hash_weights(old) == before


def test_what_is_annotated_may_leave_the_old_student(make_cfg, checkpoint_file, monkeypatch):
    """The loss does not see the old embeddings of regions on an annotation, and does those of the others."""
    trainer = Trainer(make_cfg("vild", "MODEL.VILD.OLD_STUDENT.WEIGHTS", str(checkpoint_file)))
    inputs, student = next(iter(trainer.data_loader)), trainer.model.train()
    truth = [x["instances"].gt_boxes.tensor for x in inputs]

    def loss(turned: bool | None) -> float:
        def old(images, boxes):
            found = zip(boxes, truth, strict=True)
            labelled = torch.cat([box_iou(b.tensor, t).amax(1) >= 0.5 for b, t in found])
            assert labelled.any() and not labelled.all()
            rows = F.normalize(torch.ones(len(labelled), student.vocabulary.width), dim=1)
            return torch.where((labelled == turned)[:, None], -rows, rows) if turned is not None else rows

        monkeypatch.setattr(student, "_old_embeddings", old)
        torch.manual_seed(0)  # of the sampling
        with EventStorage():
            return student(inputs)["loss_old_student"].item()

    assert loss(True) == loss(None) != loss(False)


def test_an_old_student_of_another_teacher_is_refused(make_cfg, checkpoint_file, vocabulary, tmp_path):
    other = tmp_path / "vocabulary.safetensors"
    replace(vocabulary, fingerprint={**vocabulary.fingerprint, "weights": "other"}).save(other)
    keys = ["MODEL.VILD.OLD_STUDENT.WEIGHTS", str(checkpoint_file), "MODEL.VILD.VOCABULARY", str(other)]
    with pytest.raises(UserError, match="OLD_STUDENT.WEIGHTS .* is of teacher"):
        load_old_student(make_cfg("vild", *keys))


def test_an_old_student_of_another_architecture_is_refused(make_cfg, checkpoint_file, vocabulary_file):
    key = "MODEL.VILD.OLD_STUDENT.WEIGHTS"
    with pytest.raises(UserError, match=rf"{checkpoint_file}: .*roi_heads.* is \(.*\), not \("):
        load_old_student(make_cfg("vild", key, str(checkpoint_file), "MODEL.ROI_BOX_HEAD.FC_DIM", 32))
    with pytest.raises(UserError, match="is missing, not"):
        load_old_student(make_cfg("vild", key, str(vocabulary_file)))


def test_the_audit_sees_the_old_student(make_cfg, checkpoint_file, tmp_path):
    """An old student trained on novel names leaks them into a training from scratch."""
    leaky = {"name": "all", "file": "all.json", "sha": "1", "split": "", "keep": "all", "annotations": {"ring": 3}}
    checkpoint = torch.load(checkpoint_file, weights_only=True)
    checkpoint["trained_on"] = {"data_sets": [leaky], "stores": [], "starts": []}
    torch.save(checkpoint, tmp_path / "old.pth")
    trainer = Trainer(make_cfg("vild", "MODEL.VILD.OLD_STUDENT.WEIGHTS", str(tmp_path / "old.pth")))
    trainer.checkpointer.save("model")
    record = read_network_record(f"{trainer.cfg.OUTPUT_DIR}/model.pth")
    (start,) = record["trained_on"]["starts"]
    verdict, evidence = judge_network(record, ["ring"], [*start["trained_on"]["data_sets"][0]["annotations"]])
    assert verdict == LEAK and "old.pth" in evidence and "novel names ('ring'" in evidence
