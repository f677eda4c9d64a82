"""Images that are only distilled from (MODEL.VILD.DISTILL_IMAGES)."""

import itertools

import pytest
import torch
from detectron2.utils.events import EventStorage

from vild.data.loader import build_train_loader
from vild.engine.sources import open_store, parse_distillation
from vild.modeling import build_model
from vild.modeling.region_heads import VARIANTS
from vild.utils.errors import UserError

TEACHING = [variant for variant in VARIANTS if variant != "text"]


def batches(cfg, start, count):
    return list(itertools.islice(build_train_loader(cfg, open_store(cfg), start), count))


def losses_of(cfg, inputs):
    """With the statistics of batches out of the way: they are of all images of a step."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    torch.manual_seed(1)  # the sampling of proposals
    with EventStorage():
        losses = model(inputs)
    return {name: value.item() for name, value in losses.items()}


def test_they_come_beside_the_labelled_ones_and_a_resumed_run_sees_the_same(make_cfg):
    cfg = make_cfg("vild", "SOLVER.IMS_PER_BATCH", 2, "MODEL.VILD.DISTILL_IMAGES", 3)
    whole = batches(cfg, 0, 4)
    assert [["distill_only" in x for x in batch] for batch in whole] == [[False] * 2 + [True] * 3] * 4
    for a, b in zip(whole[2:], batches(cfg, 2, 2), strict=True):
        assert [x["image_id"] for x in a] == [x["image_id"] for x in b]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b, strict=True))
    text = make_cfg("text", "SOLVER.IMS_PER_BATCH", 2, "MODEL.VILD.DISTILL_IMAGES", 3)
    assert [len(batch) for batch in batches(text, 0, 2)] == [2, 2]  # nothing to distil


@pytest.mark.parametrize("variant", TEACHING)
def test_detection_losses_are_of_the_labelled_images_and_distillation_of_all(make_cfg, variant):
    cfg = make_cfg(variant, "SOLVER.IMS_PER_BATCH", 2, "MODEL.VILD.DISTILL_IMAGES", 2)
    ((*labelled, one, two),) = batches(cfg, 0, 1)
    alone, both = losses_of(cfg, labelled), losses_of(cfg, [*labelled, one, two])
    for name in alone.keys() - {"loss_l1"}:
        assert both[name] == pytest.approx(alone[name], rel=1e-4), name
    # loss_l1 is a mean over regions
    others = losses_of(cfg, [{key: x[key] for key in x if key != "distill_only"} for x in (one, two)])
    counts = [sum(len(x["distill"]) for x in group) for group in (labelled, (one, two))]
    mean = (alone["loss_l1"] * counts[0] + others["loss_l1"] * counts[1]) / sum(counts)
    assert both["loss_l1"] == pytest.approx(mean, rel=1e-4) and both["loss_l1"] != pytest.approx(alone["loss_l1"])
    # neither their labels nor their place among the inputs matter
    bare = {**one, "instances": one["instances"][:0]}
    assert losses_of(cfg, [two, labelled[0], bare, labelled[1]]) == pytest.approx(both, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("MODEL.VILD.DISTILL_FROM", "mixed"), "need a store, but DISTILL_FROM is 'mixed'"),
        (("SOLVER.ACCUMULATE", 2), "need SOLVER.ACCUMULATE 1"),
        (("DATALOADER.ASPECT_RATIO_GROUPING", True), "ASPECT_RATIO_GROUPING False"),
        (("MODEL.VILD.DISTILL_IMAGES", -1), "MODEL.VILD.DISTILL_IMAGES: -1 is"),
    ],
)
def test_what_does_not_go_with_them_is_refused(make_cfg, settings, message):
    with pytest.raises(UserError, match=message):
        parse_distillation(make_cfg("vild", "MODEL.VILD.DISTILL_IMAGES", 2, *settings))


def test_they_are_divided_among_processes(make_cfg, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    parse_distillation(make_cfg("vild", "SOLVER.IMS_PER_BATCH", 4, "MODEL.VILD.DISTILL_IMAGES", 2))
    with pytest.raises(UserError, match="not whole numbers of images on 2 processes"):
        parse_distillation(make_cfg("vild", "SOLVER.IMS_PER_BATCH", 4, "MODEL.VILD.DISTILL_IMAGES", 3))
