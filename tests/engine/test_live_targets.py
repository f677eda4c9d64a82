"""Distillation targets from the teacher at work, alone and beside a store."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from safetensors import safe_open

from tests.conftest import store_plan
from vild.data import datasets
from vild.data.mapper import ViLDMapper, training_augmentations, visible_window
from vild.engine.live_targets import LiveTargets
from vild.engine.sources import open_live_teacher, open_store, parse_distillation
from vild.engine.trainer import Trainer
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import distillation
from vild.modeling.losses import image_loss
from vild.store.store import EmbeddingStore, StoreWriter
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

FROM, STILL = "MODEL.VILD.DISTILL_FROM", ("INPUT.RANDOM_FLIP", "none")


def records(count=4):
    return sorted(datasets.load_dicts("glyphs_train"), key=lambda r: r["image_id"])[:count]


def inputs_of(cfg, count=2):
    mapper = ViLDMapper.from_config(cfg, open_store(cfg))
    np.random.seed(0)
    return [mapper(r) for r in records(count)]


def build(cfg, live_teacher=None):
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    if live_teacher:
        model.set_live_teacher(live_teacher)
    return model


def losses_of(model, inputs):
    torch.manual_seed(1)
    with EventStorage():
        return model(inputs)


def proposals_in(size, boxes):
    return Instances(size, proposal_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))


def look(live, image, window, proposals):
    """At one image."""
    return live([image], [window], [proposals])[0]


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


def test_what_a_user_gets_wrong(make_cfg, teacher, vocabulary, tmp_path):
    def told(message, function, *overrides):
        with pytest.raises(UserError, match=message) as caught:
            function(make_cfg("vild", *overrides))
        assert "\n" not in str(caught.value)

    told("DISTILL_FROM: 'techer' is not one of store, teacher, mixed", Trainer, FROM, "techer")
    told("MODEL.VILD.STORE is empty, .*'vild' distils.*'mixed'", Trainer, FROM, "mixed", "MODEL.VILD.STORE", "")
    for source in ("store", "mixed"):
        maps = ("MODEL.VILD.OBJECTIVES", '[{"NAME": "l1"}, {"NAME": "tokens"}]')
        told(f"OBJECTIVES: 'tokens' needs .* not '{source}'", Trainer, FROM, source, *maps, "MODEL.VILD.STORE", "")
    told(
        "INPUT.FORMAT: .*'L' images",
        lambda cfg: open_live_teacher(cfg, None),
        FROM,
        "teacher",
        "INPUT.FORMAT",
        "L",
    )
    told("teacher 'ViT-X': open_clip has no model", Trainer, FROM, "teacher", "MODEL.VILD.TEACHER.NAME", "ViT-X")
    for name, fingerprint in (("weights", {"weights": "0" * 16}), ("width", {"width": 61, "weights": "1" * 16})):
        width = fingerprint.get("width", teacher.width)
        words = Vocabulary(vocabulary.names, torch.eye(60, width), vocabulary.splits,
                           fingerprint={**vocabulary.fingerprint, **fingerprint})  # fmt: skip
        words.save(path := tmp_path / f"{name}.safetensors")
        sides = rf"MODEL.VILD.TEACHER is of teacher .*width 64.* but vocabulary .*{name}\.safetensors is of .*width"
        told(f"{sides} {width}", Trainer, FROM, "teacher", "MODEL.VILD.VOCABULARY", str(path))


def test_a_config_that_cannot_mean_what_it_says_is_refused(make_cfg):
    key, teachers = "MODEL.VILD.", ("MODEL.VILD.TEACHERS", "[{'STORE': 'a', 'VOCABULARY': 'b'}]")
    over = (f"{key}OBJECTIVES", "[{'NAME': 'soft_targets', 'OVER': 'background'}]")
    for variant, overrides, message in [
        ("vild", (f"{key}TEMPERATURE", -0.1), "TEMPERATURE: -0.1 is below 0"),
        ("vild", (f"{key}TEST_TEMPERATURE", -0.1), "TEST_TEMPERATURE: -0.1 is below 0"),
        ("vild", (f"{key}DISTILL_WEIGHT", -1.0), "DISTILL_WEIGHT: -1.0 is below 0"),
        ("ensemble", (f"{key}ENSEMBLE_WEIGHT", 1.5), "ENSEMBLE_WEIGHT: 1.5 is not within 0 and 1"),
        ("vild", (f"{key}OLD_STUDENT.WEIGHT", -0.5), "OLD_STUDENT.WEIGHT: -0.5 is below 0"),
        ("text", teachers, "the variant 'text' distils from no teacher"),
        ("vild", (f"{key}SEVERAL_TEACHERS.WEIGHTS", "confidence"), "MODEL.VILD.TEACHERS is empty"),
        ("image", over, "the variant 'image' has no background class"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_distillation(make_cfg(variant, *overrides))
    for variant in ("text", "image", "vild", "ensemble"):
        parse_distillation(make_cfg(variant))


@pytest.mark.parametrize("variant", ["image", "ensemble"])
def test_an_image_head_that_nothing_trains_is_refused(make_cfg, variant):
    key, old = "MODEL.VILD.OBJECTIVES", ("MODEL.VILD.OLD_STUDENT.WEIGHTS", "old.pth")
    for objectives in ("[]", '[{"NAME": "attention"}, {"NAME": "tokens"}]', '[{"NAME": "distances"}]'):
        with pytest.raises(UserError, match=f"the image head of the variant '{variant}' would learn nothing"):
            parse_distillation(make_cfg(variant, FROM, "teacher", key, objectives))
    assert parse_distillation(make_cfg(variant, FROM, "teacher", *MAPS)).needs_maps
    assert not parse_distillation(make_cfg("vild", key, "[]")).needs_maps
    if variant == "image":  # its only head remembers
        assert not parse_distillation(make_cfg(variant, key, "[]", *old)).needs_maps


def test_the_live_teacher_crops_as_the_store_was_cropped(make_cfg, teacher):
    fingerprint = {**teacher.fingerprint, "preprocess": {**teacher.fingerprint["preprocess"], "crop": "pad"}}
    cfg = make_cfg("vild", FROM, "mixed")
    assert open_live_teacher(cfg, SimpleNamespace(fingerprint=fingerprint)).encode.__self__.crop == "pad"
    assert open_live_teacher(cfg, open_store(cfg)).encode.__self__.crop == "squash"


MAPS = ("MODEL.VILD.OBJECTIVES", '[{"NAME": "l1"}, {"NAME": "tokens"}, {"NAME": "attention"}]')


def trainer_of(cfg):
    torch.manual_seed(0)
    return Trainer(cfg)


def gradients(parameters):
    return [p.grad for p in parameters if p.grad is not None and p.grad.any()]


@pytest.mark.parametrize("variant", ["image", "vild", "ensemble"])
def test_maps_teach_the_adapter_and_the_backbone(make_cfg, variant):
    cfg = make_cfg(variant, FROM, "teacher", *MAPS, *STILL)
    trainer, inputs = trainer_of(cfg), inputs_of(cfg)
    losses = losses_of(model := trainer.model.train(), inputs)
    assert all(losses[k].isfinite() and losses[k] > 0 for k in ("loss_tokens", "loss_attention"))
    heads, trained = model.roi_heads, {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert heads.adapter.weight.shape == (96, 64, 1, 1) and {id(p) for p in heads.adapter.parameters()} <= trained
    losses["loss_attention"].backward(retain_graph=True)
    assert gradients(model.backbone.parameters()) and not gradients(heads.parameters())
    losses["loss_tokens"].backward(retain_graph=True)
    assert len(gradients(heads.adapter.parameters())) == len(gradients(heads.parameters())) == 2
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_maps_change_neither_first_weights_nor_other_losses(make_cfg):
    cfg = make_cfg("vild", FROM, "teacher", *STILL)
    inputs = inputs_of(cfg)
    plain, model = (trainer_of(c).model.train() for c in (cfg, make_cfg("vild", FROM, "teacher", *MAPS)))
    mine, others = plain.state_dict(), model.state_dict()
    assert others.keys() - mine.keys() == {"roi_heads.adapter.weight", "roi_heads.adapter.bias"}
    assert all(torch.equal(v, others[k]) for k, v in mine.items())
    expected, losses = losses_of(plain, inputs), losses_of(model, inputs)
    assert losses.keys() - expected.keys() == {"loss_tokens", "loss_attention"}
    assert all(torch.equal(v, losses[k]) for k, v in expected.items())


def test_attention_needs_no_adapter_and_text_no_maps(make_cfg):
    attention = ("MODEL.VILD.OBJECTIVES", '[{"NAME": "attention"}]')
    cfg = make_cfg("vild", FROM, "teacher", *attention)
    model = trainer_of(cfg).model.train()
    assert model.roi_heads.adapter is None and losses_of(model, inputs_of(cfg))["loss_attention"] > 0
    assert trainer_of(make_cfg("text", *MAPS)).model.roi_heads.adapter is None  # it distils nothing


def test_no_region_gives_no_loss_of_maps(make_cfg):
    cfg = make_cfg("vild", FROM, "teacher", *MAPS)
    model, inputs = trainer_of(cfg).model.train(), inputs_of(cfg)
    live = model.live_teacher
    model.set_live_teacher(lambda images, windows, found: live(images, windows, [p[:0] for p in found]))
    losses = losses_of(model, inputs)
    assert losses["loss_tokens"] == losses["loss_attention"] == 0
    sum(losses.values()).backward()
    assert model.roi_heads.adapter.weight.grad is not None  # or other processes would wait for it


def test_the_adapter_is_in_the_checkpoint_and_not_in_the_detector(make_cfg, tmp_path):
    cfg = make_cfg("vild", FROM, "teacher", *MAPS, "DATASETS.TEST", "()")
    trainer_of(cfg).checkpointer.save("model")
    path = f"{cfg.OUTPUT_DIR}/model.pth"
    assert "roi_heads.adapter.weight" in torch.load(path, weights_only=True)["model"]
    detector = OpenVocabularyDetector(make_cfg("vild", FROM, "teacher", *MAPS, "MODEL.WEIGHTS", path))
    detector.save(tmp_path / "folder", teacher=False)
    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
        assert not any("adapter" in key for key in file.keys())  # noqa: SIM118
    OpenVocabularyDetector.from_pretrained(tmp_path / "folder")


IMAGES = ("MODEL.VILD.OBJECTIVES", '[{"NAME": "l1"}, {"NAME": "picture_tokens"}]')


def test_whole_images_teach_the_backbone_and_change_no_other_loss(make_cfg):
    cfg = make_cfg("vild", FROM, "teacher", *IMAGES, *STILL)
    plain, model = (trainer_of(c).model.train() for c in (make_cfg("vild", FROM, "teacher", *STILL), cfg))
    mine, others = plain.state_dict(), model.state_dict()
    assert others.keys() - mine.keys() == {"roi_heads.picture_adapter.weight", "roi_heads.picture_adapter.bias"}
    assert all(torch.equal(v, others[k]) for k, v in mine.items())
    inputs = inputs_of(cfg)
    expected, losses = losses_of(plain, inputs), losses_of(model, inputs)
    assert losses.pop("loss_picture_tokens") > 0 and losses.keys() == expected.keys()
    assert all(torch.equal(v, losses[k]) for k, v in expected.items())
    losses_of(model, inputs)["loss_picture_tokens"].backward()
    heads = model.roi_heads
    assert len(gradients(heads.picture_adapter.parameters())) == len(gradients(heads.parameters())) == 2
    assert gradients(model.backbone.parameters())


def test_the_level_and_the_teacher_look_at_the_same_image():
    """An image in columns 16 to 48 of an image 64 wide, bright on its right, on a level of stride 8; the rest is
    another."""
    level = torch.full((1, 1, 2, 8), -7.0)
    level[..., 2:4], level[..., 4:6] = 0, 1
    window, of_teacher = (16, 0, 48, 16), torch.zeros(3, 2, 4)
    found = distillation.image_maps(level, 8, [(window, of_teacher)], torch.nn.Identity())
    assert found["adapted_images"][0, 0].tolist() == [[0, 0, 1, 1]] * 2
    image = torch.full((3, 16, 64), 9, dtype=torch.uint8)
    image[:, :, 16:48] = 255
    seen = []

    def encode(images, boxes):
        seen.extend([*images, *boxes])
        return torch.ones(1, 3), torch.ones(1, 3, 2, 4)

    live = LiveTargets(encode, image_format="RGB", per_image=3, min_visible=0.5, map_channels=3)
    assert live.image_map(image, window).shape == (3, 2, 4)
    assert (seen[0] == 255).all() and seen[0].shape == (3, 16, 32) and seen[1].tolist() == [[0, 0, 32, 16]]
