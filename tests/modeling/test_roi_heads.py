from dataclasses import replace

import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from vild.data import datasets
from vild.data.mapper import ViLDMapper
from vild.engine.sources import open_store
from vild.modeling import build_model
from vild.modeling.distillation import distill_weight
from vild.modeling.region_heads import VARIANTS
from vild.modeling.schedule import parse_loss_weights
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary


def inputs_of(cfg, count=2):
    mapper = ViLDMapper.from_config(cfg, open_store(cfg))
    return [mapper(record) for record in datasets.load_dicts("glyphs_train")[:count]]


def build(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.fixture
def detector(make_cfg):
    cfg = make_cfg("ensemble")
    return cfg, build(cfg).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_reaches_every_parameter(make_cfg, variant):
    cfg = make_cfg(variant)
    model = build(cfg).train()
    with EventStorage():
        losses = model(inputs_of(cfg))
    expected = {"loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    expected |= {"loss_text"} if variant != "image" else set()
    expected |= {"loss_l1"} if variant != "text" else set()
    assert set(losses) == expected
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert not any("text" in n for n, _ in model.named_parameters())  # text embeddings are frozen


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_without_objects_or_regions_train(make_cfg, variant):
    cfg = make_cfg(variant)
    model = build(cfg).train()
    inputs = inputs_of(cfg)
    for x in inputs:
        x["instances"] = x["instances"][:0]
        if "distill" in x:
            x["distill"] = x["distill"][:0]
    with EventStorage():
        total = sum(model(inputs).values())
    total.backward()
    assert total.isfinite()


def test_without_objectives_nothing_is_learned_of_the_regions(make_cfg):
    """But they pass the head: the losses of the sampled RoIs are those of the same batch with an objective."""
    values = []
    for objectives in ([], [{"NAME": "l1"}]):
        cfg = make_cfg("vild", "MODEL.VILD.OBJECTIVES", objectives, "INPUT.RANDOM_FLIP", "none")
        model = build(cfg).train()
        torch.manual_seed(1)
        with EventStorage() as storage:
            values.append({k: v.item() for k, v in model(inputs_of(cfg)).items()})
        assert storage.latest()["vild/num_distilled"][0] > 0
    none, paper = values
    assert paper.keys() - none.keys() == {"loss_l1"} and none == {k: paper[k] for k in none}


def test_any_loss_is_weighted_by_its_name(make_cfg):
    """By a schedule of training progress; all other losses stay as they are."""
    entries = [
        {"LOSS": name, "WEIGHT": {"FROM": a, "TO": 1 - a}} for name, a in (("loss_text", 1), ("loss_rpn_cls", 0))
    ]
    values = []
    for given in ([], entries):
        cfg = make_cfg("vild", "MODEL.VILD.LOSS_WEIGHTS", str(given), "INPUT.RANDOM_FLIP", "none", "SOLVER.MAX_ITER", 8)
        model, inputs = build(cfg).train(), inputs_of(cfg)
        for step in (0, 6):
            torch.manual_seed(1)
            with EventStorage(step):
                values.append({k: v.item() for k, v in model(inputs).items()})
    plain, later, start, end = values
    assert start["loss_rpn_cls"] == 0 and end["loss_text"] == pytest.approx(later["loss_text"] / 4)
    assert end["loss_rpn_cls"] == pytest.approx(0.75 * later["loss_rpn_cls"])
    assert {k: start[k] for k in start if k != "loss_rpn_cls"} == {k: plain[k] for k in plain if k != "loss_rpn_cls"}
    model.roi_heads.loss_weights = parse_loss_weights([{"LOSS": "loss_hard", "WEIGHT": 1}])
    message = "LOSS_WEIGHTS: 'loss_hard' is not one of .*loss_l1, loss_mask.*loss_text"
    with EventStorage(), pytest.raises(UserError, match=message):
        model(inputs)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["loss_text"], "loss_text is not"),
        ([{"LOSS": "loss_text"}], "is not"),
        ([{"LOSS": "loss_text", "WEIGHT": 1, "SHAPE": "step"}], "is not"),
        ([{"LOSS": "loss_text", "WEIGHT": "1e-1"}], "loss_text, WEIGHT: '1e-1' is not a number"),
        ([{"LOSS": "loss_text", "WEIGHT": {"FROM": 0, "TO": -1}}], "loss_text, WEIGHT: .* is below 0"),
        ([{"LOSS": "loss_text", "WEIGHT": 1}] * 2, "duplicate loss 'loss_text'"),
    ],
)
def test_mistakes_in_loss_weights_are_one_line(entries, message):
    with pytest.raises(UserError, match=f"^MODEL.VILD.LOSS_WEIGHTS.*{message}") as caught:
        parse_loss_weights(entries)
    assert "\n" not in str(caught.value)


def test_image_loss_is_weighted(make_cfg):
    values = []
    for weight in (0.5, 1.0):
        cfg = make_cfg("vild", "MODEL.VILD.DISTILL_WEIGHT", weight, "INPUT.RANDOM_FLIP", "none")
        model = build(cfg).train()
        torch.manual_seed(1)
        with EventStorage():
            values.append(model(inputs_of(cfg))["loss_l1"].item())
    assert values[1] == pytest.approx(2 * values[0], rel=1e-5)


@pytest.mark.parametrize(("width", "expected"), [(512, 0.5), (128, 1.0), (2048, 0.25)])
def test_a_weight_of_zero_is_the_papers_brought_to_the_teachers_width(width, expected):
    assert distill_weight(0.0, width) == expected and distill_weight(0.7, width) == 0.7


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 0.1 + 0.2 + 0.3 + 2.0), (1.0, (0.01 + 0.04 + 0.09) / 2 + 1.5)])
def test_the_box_loss_changes_from_l2_to_l1_at_beta(make_cfg, beta, expected):
    """One foreground RoI of two, equal to its ground truth: the deltas are the error."""
    heads = build(make_cfg("vild", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", beta)).roi_heads
    boxes = Boxes(torch.tensor([[10.0, 10.0, 50.0, 40.0], [60.0, 60.0, 90.0, 90.0]]))
    deltas = torch.tensor([[0.1, -0.2, 0.3, -2.0], [9.0, 9.0, 9.0, 9.0]])
    labels = torch.tensor([0, heads.num_classes])
    proposals = [Instances((128, 128), proposal_boxes=boxes, gt_boxes=boxes)]
    assert heads._box_loss(deltas, labels, proposals).item() == pytest.approx(expected / 2, rel=1e-5)


def detect(model, images):
    with torch.inference_mode():
        return [o["instances"] for o in model([{"image": i, "height": 128, "width": 128} for i in images])]


def test_batched_equals_one_by_one(detector):
    cfg, model = detector
    images = [x["image"] for x in inputs_of(cfg, 3)]
    for together, alone in zip(detect(model, images), (detect(model, [i])[0] for i in images), strict=True):
        torch.testing.assert_close(together.pred_boxes.tensor, alone.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(together.scores, alone.scores, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_the_vocabulary_permutes_the_predictions(make_cfg, vocabulary, variant):
    cfg = make_cfg(variant)
    model = build(cfg).eval()
    pooled = torch.randn(5, 64, 7, 7, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(len(vocabulary), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        straight, boxes = model.roi_heads.scores(pooled)
        model.set_vocabulary(vocabulary.take(order.tolist()))
        permuted, same_boxes = model.roi_heads.scores(pooled)
    torch.testing.assert_close(straight[:, order], permuted)
    assert torch.equal(boxes, same_boxes)


def test_permuting_novel_names_permutes_novel_predictions_only(detector, vocabulary):
    _, model = detector
    pooled = torch.randn(5, 64, 7, 7, generator=torch.Generator().manual_seed(0))
    novel = vocabulary.mask("novel").nonzero()[:, 0]
    order = torch.arange(len(vocabulary))
    order[novel] = novel.roll(1)
    with torch.inference_mode():
        straight, _ = model.roi_heads.scores(pooled)
        embeddings = vocabulary.embeddings[order]
        model.set_vocabulary(Vocabulary(vocabulary.names, embeddings, vocabulary.splits))
        permuted, _ = model.roi_heads.scores(pooled)
    torch.testing.assert_close(permuted, straight[:, order])
    base = vocabulary.mask("base")
    torch.testing.assert_close(permuted[:, base], straight[:, base])


def test_a_vocabulary_of_another_size_changes_no_weight(detector, vocabulary):
    cfg, model = detector
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.set_vocabulary(vocabulary.take([3, 50]))
    (found,) = detect(model, [inputs_of(cfg, 1)[0]["image"]])
    assert set(found.pred_classes.tolist()) <= {0, 1} and len(found) > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    wide = Vocabulary(("a",), torch.eye(1, 32), ("",))
    with pytest.raises(UserError, match="width is 32.*64"):
        model.set_vocabulary(wide)


def test_no_proposals_at_test(detector):
    _, model = detector
    features = {f: torch.randn(1, 64, s, s) for f, s in zip(("p2", "p3", "p4"), (32, 16, 8), strict=True)}
    empty = Instances((128, 128), proposal_boxes=Boxes(torch.zeros(0, 4)), objectness_logits=torch.zeros(0))
    with torch.inference_mode():
        (found,), _ = model.roi_heads(None, features, [empty])
    assert len(found) == 0 and found.pred_masks.shape[0] == 0


def test_detections_are_inside_the_image_and_sorted(detector):
    cfg, model = detector
    (found,) = detect(model, [inputs_of(cfg, 1)[0]["image"]])
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes.max() <= 128
    assert (found.scores[:-1] >= found.scores[1:]).all()
    assert len(found) <= cfg.TEST.DETECTIONS_PER_IMAGE and found.pred_masks.shape[1:] == (128, 128)


def test_only_class_agnostic_heads(make_cfg):
    with pytest.raises(UserError, match="class-agnostic"):
        build(make_cfg("vild", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", False))
    with pytest.raises(UserError, match=r"VARIANT: 'vlid'.*ensemble"):
        build(make_cfg("vild", "MODEL.VILD.VARIANT", "vlid"))


def test_objectives_of_the_config_are_added_and_logged(make_cfg, vocabulary, tmp_path):
    vocabulary.take(vocabulary.mask("base").nonzero()[:, 0].tolist()).save(words := tmp_path / "words.safetensors")
    objectives = [
        {"NAME": "l1", "WEIGHT": 0.25},
        {"NAME": "soft_targets", "TEMPERATURE": 2, "OVER": str(words)},
        {"NAME": "hard_targets", "WEIGHT": {"FROM": 0, "TO": 1}},
    ]
    cfg = make_cfg("vild", "MODEL.VILD.OBJECTIVES", str(objectives), "INPUT.RANDOM_FLIP", "none")
    plain = make_cfg("vild", "INPUT.RANDOM_FLIP", "none")
    values = []
    for each, step in [(cfg, 0), (cfg, cfg.SOLVER.MAX_ITER), (plain, 0)]:
        model = build(each).train()
        torch.manual_seed(1)
        with EventStorage(step):
            values.append({k: v.item() for k, v in model(inputs_of(cfg)).items()})
    first, last, paper = values
    assert first["loss_l1"] == pytest.approx(paper["loss_l1"] / 4) and first["loss_soft_targets"] > 0
    assert first["loss_hard_targets"] == 0 < last["loss_hard_targets"]
    assert first.keys() - paper.keys() == {"loss_soft_targets", "loss_hard_targets"}
    # the list moves with the detector, so that no step sends it to the GPU again; checkpoints do not have it
    model = build(cfg)
    (rows,) = model.roi_heads.distillation.buffers()
    assert torch.equal(rows, Vocabulary.load(words).embeddings)
    assert model.state_dict().keys() == build(plain).state_dict().keys()
    assert [rows.device.type for rows in model.to("meta").roi_heads.distillation.buffers()] == ["meta"]


def test_word_lists_that_do_not_fit_are_refused(make_cfg, vocabulary, tmp_path):
    base = vocabulary.take(vocabulary.mask("base").nonzero()[:, 0].tolist())
    other = replace(base, fingerprint={**base.fingerprint, "weights": "other"})
    novel = vocabulary.names[vocabulary.mask("novel").nonzero()[0, 0]]
    leaking = replace(base, names=(*base.names[:-1], novel.replace(" ", "_").upper()))
    for words, message in ((other, "is of teacher"), (leaking, f"contains '{leaking.names[-1]}', a novel name")):
        words.save(path := tmp_path / "words.safetensors")
        objectives = [{"NAME": "soft_targets", "OVER": str(path)}]
        with pytest.raises(UserError, match=rf"words\.safetensors {message}"):
            build(make_cfg("vild", "MODEL.VILD.OBJECTIVES", str(objectives)))
