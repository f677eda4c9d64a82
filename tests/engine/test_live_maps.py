"""Feature maps of the teacher at work: what they teach, and what they leave alone."""

import pytest
import torch
from safetensors import safe_open

from tests.engine.live import FROM, MAPS, STILL, inputs_of, losses_of
from vild.engine.live_targets import LiveTargets
from vild.engine.trainer import Trainer
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import distillation


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
