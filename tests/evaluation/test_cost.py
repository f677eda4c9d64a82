"""The cost of a detector: equal to a count by hand, independent of the weights."""

import pytest
import torch
from torch import nn

from vild.evaluation import cost
from vild.modeling import build_model
from vild.report.run_report import cost_blocks


@pytest.fixture
def build(make_cfg):
    return lambda *overrides: build_model(make_cfg("vild", *overrides))


def test_parameters_are_all_of_them_each_once(build):
    model = build()
    counts = cost.parameters(model)
    assert counts["all"] == sum(p.numel() for p in model.parameters()) == sum(counts[p] for p in cost.PARTS)
    assert all(counts[p] > 0 for p in cost.PARTS)
    other = cost.parameters(build("MODEL.VILD.VARIANT", "ensemble"))
    assert {p for p in cost.PARTS if other[p] != counts[p]} == {"heads"} and other["heads"] > counts["heads"]


def test_operations_of_convolutions_counted_by_hand(build):
    model, counted = build().train(), []

    def count(module, inputs, output):
        counted.append(2 * output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1])

    counts = cost.flops(model, 128)
    assert model.training and all(m.training for m in model.modules())
    for m in model.backbone.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(count)
    model.eval().backbone(torch.zeros(1, 3, 128, 128))
    assert counts["backbone"] + counts["FPN"] == sum(counted)


def test_operations_depend_on_the_size_below_the_heads_and_on_no_weight(build):
    model = build()
    small, padded, large = (cost.flops(model, size) for size in (128, 250, 256))
    assert {p: large[p] / small[p] for p in cost.PARTS} == {
        "backbone": 4,
        "FPN": 4,
        "RPN": pytest.approx(4, rel=0.01),
        "heads": 1,
    }
    assert padded == large
    torch.manual_seed(7)
    assert cost.flops(build(), 128) == small
    fewer = cost.flops(build("MODEL.RPN.POST_NMS_TOPK_TEST", 30, "TEST.DETECTIONS_PER_IMAGE", 50), 128)
    assert fewer["heads"] == pytest.approx(small["heads"] / 2)


def test_a_run_is_built_from_what_it_left(make_cfg, vocabulary_file, tmp_path):
    assert cost.detector_of_run(tmp_path) is None
    cfg = make_cfg("vild", "MODEL.VILD.VOCABULARY", str(tmp_path / "gone"))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert cost.detector_of_run(tmp_path) is None and cost_blocks(tmp_path) == []
    (tmp_path / "config.yaml").write_text(make_cfg("vild").dump())
    state = torch.get_rng_state()
    model, size = cost.detector_of_run(tmp_path)
    assert size == 128 and torch.equal(torch.get_rng_state(), state)
    assert cost.latency(model, size, runs=1) > 0
    _, table, text = cost_blocks(tmp_path)
    assert (
        table.headers[1:] == [*cost.PARTS, "all"] and table.rows[1][-1] == f"{cost.flops(model, 128)['all'] / 1e9:.2f}"
    )
    assert "128 x 128 pixels" in text.text


@pytest.mark.parametrize(
    "gone",
    [
        ("MODEL.VILD.TEACHERS", [{"STORE": "a", "VOCABULARY": "gone.safetensors"}]),
        ("MODEL.VILD.OBJECTIVES", [{"NAME": "soft_targets", "OVER": "gone.safetensors"}]),
    ],
)
def test_a_run_that_cannot_be_built_any_more_has_no_cost_and_logs_why(make_cfg, tmp_path, caplog, gone):
    (tmp_path / "config.yaml").write_text(make_cfg("vild", *gone).dump())
    assert cost.detector_of_run(tmp_path) is None and cost_blocks(tmp_path) == []
    assert f"{tmp_path}: the cost of the network" in caplog.text and "gone.safetensors does not exist" in caplog.text
