"""Gradients of objectives on region embeddings, against formulas and autograd through the normalisation."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import REPOSITORY
from vild.modeling.objectives import RegionBatch, parse_objectives
from vild.report.gradient_shares import gradient_norm, shares

M, D = 7, 5


def batch() -> RegionBatch:
    generator = torch.Generator().manual_seed(0)
    student, teacher, words = (F.normalize(torch.randn(n, D, generator=generator).double(), dim=1) for n in (M, M, 4))
    return RegionBatch(student, teacher, (3, 4), {"base": words}, 0.1)


def tangent(regions: RegionBatch, gradient: np.ndarray) -> float:
    student = regions.student.numpy()
    return np.linalg.norm(gradient - (gradient * student).sum(1, keepdims=True) * student)


def test_l1_squared_and_cosine_by_their_formulas():
    regions = batch()
    s, t = regions.student.numpy(), regions.teacher.numpy()
    expected = {"l1": np.sign(s - t) / M, "squared": 2 * (s - t) / M, "cosine": -t / M}
    for name, gradient in expected.items():
        (objective,) = parse_objectives([{"NAME": name, "WEIGHT": 7}])  # of weight 1, whatever its own
        assert gradient_norm(objective, regions) == pytest.approx(tangent(regions, gradient), rel=1e-9)


@pytest.mark.parametrize("entry", [{"NAME": "contrast"}, {"NAME": "angles"}, {"NAME": "distances"},
                                   {"NAME": "soft_targets", "TEMPERATURE": {"FROM": 1, "TO": 3}}])  # fmt: skip
def test_it_is_what_reaches_the_layer_below_the_normalisation(entry):
    """The gradient on x of objective(x / |x|), for |x| = 1, by finite differences."""
    regions, (objective,) = batch(), parse_objectives([entry])

    def loss(x: torch.Tensor) -> float:
        rows = RegionBatch(F.normalize(x, dim=1), regions.teacher, regions.counts, regions.words, regions.temperature)
        return objective(rows, 0.5).item()

    gradient, step = np.zeros((M, D)), 1e-3  # objectives compute in single precision
    for index in np.ndindex(M, D):
        up, down = (regions.student.clone() for _ in range(2))
        up[index] += step
        down[index] -= step
        gradient[index] = (loss(up) - loss(down)) / (2 * step)
    assert gradient_norm(objective, regions) == pytest.approx(np.linalg.norm(gradient), rel=0.01)


def test_the_proposed_weight_has_the_share():
    (objective,) = parse_objectives([{"NAME": "contrast", "WEIGHT": {"FROM": 2, "TO": 0}}])
    ((*names, weight, norm, share, proposed),) = shares([("row", objective, 4.0)], [0.5], l1=3.0, share=0.25)
    assert names == ["row", "contrast"] and (weight, norm) == (4.0, 0.5)  # 4 times 1, in the middle of the training
    assert share == pytest.approx(4 * 0.5 / 3) and proposed * norm / 3.0 == pytest.approx(0.25)


def test_the_tool_on_a_grid(tool, world, checkpoint_file, vocabulary_file, store_folder, teacher_folder, tmp_path,
                            capsys):  # fmt: skip
    output = tmp_path / "shares.json"
    config = REPOSITORY / "configs" / "Glyphs" / "vild.yaml"
    opts = ("--opts", "MODEL.VILD.VOCABULARY", vocabulary_file, "MODEL.VILD.STORE", store_folder,
            "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0)  # fmt: skip
    flags = ("--config-file", config, "--weights", checkpoint_file, "--batches", 1)
    grid = REPOSITORY / "configs" / "Glyphs" / "ablations" / "objectives.yaml"
    assert tool("gradient_shares.py", *flags, "--grid", grid, "--output", output, *opts) == 0
    found = json.loads(output.read_text())
    rows = {(row["row"], row["objective"]): row for row in found["rows"]}
    l1 = rows["ViLD (L1)", "l1"]
    assert l1["share"] == pytest.approx(1) and l1["proposed"] == l1["weight"] == 4.0
    assert found["l1"] == pytest.approx(4 * l1["gradient"])
    for row in (row for row in found["rows"] if row["gradient"] is not None):
        assert row["proposed"] * row["gradient"] == pytest.approx(found["l1"])
    assert rows["tokens, live teacher", "tokens"]["gradient"] is None
    assert "| tokens, live teacher" in capsys.readouterr().out
    assert tool("gradient_shares.py", *flags, "--share", 0, *opts) == 2
    assert "--share: invalid" in capsys.readouterr().err
    assert tool("gradient_shares.py", *flags, *opts, "MODEL.VILD.DISTILL_FROM", "teacher") == 2
    assert "DISTILL_FROM 'store'" in capsys.readouterr().err
    assert tool("gradient_shares.py", *flags, *opts, "MODEL.VILD.OBJECTIVES", '[{"NAME": "l1", "WEIGHT": 0}]') == 2
    assert "its L1, of which shares are, has weight 0" in capsys.readouterr().err


@pytest.fixture
def measure(tool, world, checkpoint_file, vocabulary_file, store_folder, tmp_path):
    """The rows that the tool writes of a grid, by row and objective."""

    def run(grid: str, *opts: object) -> dict[tuple[str, str], dict]:
        (tmp_path / "grid.yaml").write_text(grid)
        config, output = REPOSITORY / "configs" / "Glyphs" / "vild.yaml", tmp_path / "shares.json"
        flags = ("--config-file", config, "--weights", checkpoint_file, "--batches", 1, "--output", output)
        opts = ("MODEL.VILD.VOCABULARY", vocabulary_file, "MODEL.VILD.STORE", store_folder,
                "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, *opts)  # fmt: skip
        assert tool("gradient_shares.py", *flags, "--grid", tmp_path / "grid.yaml", "--opts", *opts) == 0
        return {(row["row"], row["objective"]): row for row in json.loads(output.read_text())["rows"]}

    return run


def test_loss_weights_count(measure):
    """As in the training, which multiplies losses by them, too; in the middle of a schedule."""
    weights = '[{"LOSS": "loss_l1", "WEIGHT": {"FROM": 0, "TO": 6}}, {"LOSS": "loss_box_reg", "WEIGHT": 4}]'
    grid = f"rows: {{a: {{config: vild}}, b: {{config: vild, MODEL.VILD.LOSS_WEIGHTS: {weights}}}}}"
    found = measure(grid)
    assert (found["a", "l1"]["weight"], found["b", "l1"]["weight"]) == (4, 12)
    assert (found["a", "l1"]["share"], found["b", "l1"]["share"]) == pytest.approx((1, 3))
    assert measure(grid, "MODEL.VILD.LOSS_WEIGHTS", weights)["b", "l1"]["share"] == pytest.approx(1)


def test_a_softmax_has_the_temperature_of_its_row(measure):
    """Not of the detector that embeds: of a row that is as that detector's config the gradient is the same."""
    rows = "{config: vild, MODEL.VILD.OBJECTIVES: [{NAME: soft_targets}]%s}"
    grid = f"rows: {{a: {rows % ''}, b: {rows % ', MODEL.VILD.TEMPERATURE: 0.1'}}}"
    found, other = measure(grid), measure(grid, "MODEL.VILD.TEMPERATURE", 0.1)
    key = ("b", "soft_targets")
    assert found[key]["gradient"] != pytest.approx(found["a", "soft_targets"]["gradient"], rel=0.1)
    assert found[key]["gradient"] == pytest.approx(other[key]["gradient"])
    assert found["a", "soft_targets"]["gradient"] == pytest.approx(other["a", "soft_targets"]["gradient"])


def test_rows_that_distil_nothing_pull_at_nothing(measure):
    kept = "MODEL.VILD.OLD_STUDENT.HEAD_ONLY: true"
    found = measure(f"rows: {{a: {{config: vild}}, b: {{config: vild, {kept}}}, c: {{config: text}}}}")
    assert [*found] == [("a", "l1")]


def test_the_measure_is_l1_at_the_config_s_own_weight(measure):
    """Whether DISTILL_WEIGHT or WEIGHT gives it."""
    grid = "rows: {a: {config: vild, MODEL.VILD.DISTILL_WEIGHT: 1.0, MODEL.VILD.OBJECTIVES: [{NAME: l1, WEIGHT: 8}]}}"
    (row,) = measure(grid, "MODEL.VILD.DISTILL_WEIGHT", 2.0).values()
    assert row["share"] == pytest.approx(4)
    weighed = '[{"NAME": "contrast"}, {"NAME": "l1", "WEIGHT": 4}]'
    (row,) = measure(grid, "MODEL.VILD.DISTILL_WEIGHT", 2.0, "MODEL.VILD.OBJECTIVES", weighed).values()
    assert row["share"] == pytest.approx(1)
