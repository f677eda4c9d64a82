"""Distillation targets from the teacher at work, alone and beside a store."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from tests.conftest import store_plan
from tests.engine.live import FROM, STILL, build, inputs_of, look, losses_of, records
from vild.data.mapper import training_augmentations, visible_window
from vild.engine.live_targets import LiveTargets
from vild.engine.sources import open_live_teacher, open_store
from vild.engine.trainer import Trainer
from vild.modeling.losses import image_loss
from vild.store.store import EmbeddingStore, StoreWriter
from vild.utils.errors import UserError


def proposals_in(size, boxes):
    return Instances(size, proposal_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))


def mean_colour(images, boxes):
    """A stand-in for the teacher: the mean colour [N, 3] of each box of an image, in 0..1."""
    (image,), windows = images, boxes[0].long().tolist()
    return torch.stack([image[:, y0:y1, x0:x1].float().mean((1, 2)) / 255 for x0, y0, x1, y1 in windows])


def test_a_batch_equals_image_by_image_in_the_precision_asked_for(make_cfg):
    cfg = make_cfg("vild", FROM, "mixed", *STILL)
    batch, live = inputs_of(cfg, 3), open_live_teacher(cfg, None)
    parts = [x["image"] for x in batch], [x["window"] for x in batch], [x["distill"] for x in batch]
    parts[2][1] = parts[2][1][:0]  # an image without a proposal
    together = live(*parts)
    half = open_live_teacher(make_cfg("vild", FROM, "mixed", "MODEL.VILD.TEACHER.PRECISION", "bf16"), None)(*parts)
    for n, found in enumerate(together):
        alone = look(live, *(part[n] for part in parts))
        assert len(found) == (0 if n == 1 else 10)
        assert torch.equal(found.proposal_boxes.tensor, alone.proposal_boxes.tensor)
        assert torch.allclose(found.embeddings, alone.embeddings, atol=1e-5)
        assert not len(found) or 1e-5 < (found.embeddings - half[n].embeddings).abs().max() < 0.2
    with pytest.raises(UserError, match="TEACHER.PRECISION: 'half' is none of"):
        open_live_teacher(make_cfg("vild", FROM, "mixed", "MODEL.VILD.TEACHER.PRECISION", "half"), None)


def never(*_):
    raise AssertionError("the live teacher was asked")


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_live_targets_equal_the_store(make_cfg, image_format):
    """On the store's own boxes of an image that no augmentation touched."""
    cfg = make_cfg("vild", FROM, "mixed", "INPUT.FORMAT", image_format, *STILL)
    live = open_live_teacher(cfg, None)
    for x in inputs_of(cfg, 4):
        stored = x["distill"]
        found = look(live, x["image"], x["window"], stored)
        assert torch.equal(found.proposal_boxes.tensor, stored.proposal_boxes.tensor) and len(found) == 10
        cosine = (found.embeddings * stored.embeddings).sum(1)
        assert cosine.min() > 0.999
        assert (found.embeddings - stored.embeddings).abs().max() < 1e-3
        swapped = look(live, x["image"].flip(0), x["window"], stored)
        assert (swapped.embeddings - stored.embeddings).abs().max() > 1e-2  # the teacher can tell
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(look(live, x["image"], x["window"], stored).embeddings, found.embeddings)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_the_teacher_sees_red_as_red(image_format):
    rgb = torch.zeros(3, 20, 40, dtype=torch.uint8)  # RGB: red on the left, blue on the right
    rgb[0, :, :20], rgb[2, :, 20:] = 255, 255
    live = LiveTargets(mean_colour, image_format=image_format, per_image=5, min_visible=0.5)
    image = rgb.flip(0) if image_format == "BGR" else rgb
    found = look(live, image, (0, 0, 40, 20), proposals_in((20, 40), [[2, 2, 18, 18], [22, 2, 38, 18]]))
    assert found.embeddings.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_the_best_proposals_are_taken_and_none_of_the_padding():
    """An image in columns 10 to 40 of an image 60 wide."""
    seen = {}

    def encode(crops, boxes):
        seen.update(crop=crops[0], boxes=boxes[0])
        return torch.ones(len(boxes[0]), 3)

    image = torch.full((3, 20, 60), 128, dtype=torch.uint8)
    image[:, :15, 10:40] = 255
    live = LiveTargets(encode, image_format="RGB", per_image=3, min_visible=0.5)
    boxes = [[0, 0, 30, 15], [41, 2, 59, 12], [0, 0, 16, 10], [20, 5, 30, 10], [12, 0, 20, 20], [11, 1, 20, 10]]
    found = look(live, image, (10, 0, 40, 15), proposals_in((20, 60), boxes))
    # the second lies in the padding, the third mostly; the first and the fifth are cut; the last is one too many
    assert found.proposal_boxes.tensor.tolist() == [[10, 0, 30, 15], [20, 5, 30, 10], [12, 0, 20, 15]]
    assert (seen["crop"] == 255).all() and seen["crop"].shape == (3, 15, 30)
    assert seen["boxes"].tolist() == [[0, 0, 20, 15], [10, 5, 20, 10], [2, 0, 10, 15]]
    assert len(look(live, image, (10, 0, 40, 15), proposals_in((20, 60), boxes[1:2]))) == 0


def test_the_window_is_the_image_without_its_padding(make_cfg):
    """Under large-scale jitter and flips, of a white image: white inside, padding outside."""
    cfg = make_cfg("vild", "INPUT.LARGE_SCALE_JITTER.ENABLED", True, "INPUT.LARGE_SCALE_JITTER.SIZE", 96)
    augmentations, shares = T.AugmentationList(training_augmentations(cfg)), []
    for seed in range(30):
        np.random.seed(seed)
        inputs = T.AugInput(np.full((50, 80, 3), 255, np.uint8))
        x0, y0, x1, y1 = visible_window((50, 80), augmentations(inputs), inputs.image.shape[:2])
        inside = np.zeros((96, 96), bool)
        inside[y0:y1, x0:x1] = True
        assert (inputs.image[inside] == 255).all() and (inputs.image[~inside] == 128).all()
        shares.append((x0 > 0, inside.mean() < 1))
    assert 0 < np.mean(shares, 0)[0] < 1 and 0 < np.mean(shares, 0)[1] < 1


@pytest.mark.parametrize("variant", ["image", "vild", "ensemble"])
def test_a_training_step_without_a_store_reaches_every_parameter(make_cfg, variant):
    cfg = make_cfg(variant, FROM, "teacher", "MODEL.VILD.STORE", "")
    live, inputs = open_live_teacher(cfg, None), inputs_of(cfg)
    assert open_store(cfg) is None and not any("distill" in x for x in inputs)
    losses = losses_of(model := build(cfg, live), inputs)
    assert losses["loss_l1"] > 0
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_text_variant_asks_no_teacher(make_cfg):
    cfg = make_cfg("text", FROM, "teacher")
    assert open_live_teacher(cfg, None) is None and open_store(cfg) is None
    assert "loss_l1" not in losses_of(build(cfg, never), inputs_of(cfg))


def test_the_teacher_is_no_part_of_the_detector(make_cfg):
    """Neither of its state nor of its optimizer; nor do its first weights depend on where targets come from."""
    states = []
    for source in ("store", "teacher"):
        torch.manual_seed(0)
        trainer = Trainer(make_cfg("vild", FROM, source, "DATASETS.TEST", "()"))
        states.append(trainer.model.state_dict())
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def partial_store(folder, teacher, proposals_file, store_folder, count, empty=()):
    """The tiny store's first ``count`` images, those in ``empty`` without a region."""
    whole = EmbeddingStore(store_folder)
    writer = StoreWriter(folder, store_plan(teacher, proposals_file), [r["image_id"] for r in records(count)])

    def regions(image_id):
        rows = whole[image_id]
        keep = 0 if image_id in empty else len(rows.boxes)
        return type(rows)(rows.boxes[:keep], rows.embeddings[:keep], rows.scores[:keep])

    for index, _ in writer.missing():
        writer.write_shard(index, regions)
    writer.finish()
    return str(folder)


def test_mixed_takes_from_the_store_what_it_has(make_cfg, teacher, proposals_file, store_folder, tmp_path, monkeypatch):
    ids = [r["image_id"] for r in records(4)]
    folder = partial_store(tmp_path / "store", teacher, proposals_file, store_folder, 3, empty=ids[2:3])
    stored, mixed = make_cfg("vild"), make_cfg("vild", FROM, "mixed", "MODEL.VILD.STORE", folder)
    # covered images: the loss of "store", and the teacher rests
    expected = losses_of(build(stored), inputs_of(stored, 2))
    found = losses_of(build(mixed, never), inputs_of(mixed, 2))
    assert all(torch.equal(v, found[k]) for k, v in expected.items()) and found.keys() == expected.keys()
    # an image without a region in the store, and one that is not in it, are computed
    inputs = inputs_of(mixed, 4)
    assert ["distill" in x for x in inputs] == [True, True, False, False]
    live, asked, calls, distilled = open_live_teacher(mixed, open_store(mixed)), [], [], []

    def targets(images, windows, proposals):
        found = live(images, windows, proposals)
        asked.extend(zip(images, found, strict=True))
        calls.append(len(images))
        return found

    def loss(embeddings, rows, weights):
        distilled.append(rows)
        return image_loss(embeddings, rows, weights)

    monkeypatch.setattr("vild.modeling.objectives.feature.image_loss", loss)
    assert losses_of(build(mixed, targets), inputs)["loss_l1"].isfinite()
    assert [torch.equal(a, x["image"]) for (a, _), x in zip(asked, inputs[2:], strict=True)] == [True, True]
    assert calls == [2]  # together
    # one mean over the regions of both sources
    of_both = [*(x["distill"] for x in inputs[:2]), *(d for _, d in asked)]
    assert all(len(d) > 0 for d in of_both)
    assert len(distilled) == 1 and torch.equal(distilled[0], torch.cat([d.embeddings for d in of_both]))


def test_the_live_teacher_crops_as_the_store_was_cropped(make_cfg, teacher):
    fingerprint = {**teacher.fingerprint, "preprocess": {**teacher.fingerprint["preprocess"], "crop": "pad"}}
    cfg = make_cfg("vild", FROM, "mixed")
    assert open_live_teacher(cfg, SimpleNamespace(fingerprint=fingerprint)).encode.__self__.crop == "pad"
    assert open_live_teacher(cfg, open_store(cfg)).encode.__self__.crop == "squash"
