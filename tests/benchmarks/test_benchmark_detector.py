"""The benchmarks of the detector, at sizes that take seconds, compare like with like. No test asserts a time."""

import pytest
from benchmark import make_benchmark_parser
from benchmarks import inference, objectives, train_step, vocabulary

from tests.conftest import REPOSITORY
from vild.modeling.objectives import OBJECTIVES


def rows_of(module, *arguments):
    verb = module.__name__.split(".")[-1].replace("_", "-")
    config = REPOSITORY / "configs" / "Glyphs" / "vild.yaml"
    always = [verb, "--config-file", config, "--repeats", 1, "--device", "cpu"]
    rows = list(module.run(make_benchmark_parser().parse_args([str(a) for a in [*always, *arguments]])))
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["ours_s"]) and row["ours_s"] > 0
    return rows


def test_inference_does_the_same_work_on_both_sides():
    rows = rows_of(inference, "--size", 96, "--names", 1203)
    assert [r["what"].split(",")[0] for r in rows] == ["1203 names"] * 2
    same = rows[0]
    assert same["pairs"] == pytest.approx(same["baseline_pairs"], rel=0.2) and same["pairs"] > 100
    assert same["detections"] == pytest.approx(same["baseline_detections"], rel=0.03)
    assert rows[1]["pairs"] > 1203 * 50  # at our own threshold, all of them


def test_a_training_step_distils_every_region():
    rows = rows_of(train_step, "--size", 64, "--regions", 8, "--batch-size", 1)
    assert [(*r["what"].split(", ")[:2], r["baseline"]) for r in rows] == [
        (what, variant, baseline)
        for what, baseline in (("step", "text"), ("step and data", "text"), ("step", "Mask R-CNN"))
        for variant in ("vild", "ensemble")
    ]
    # with one head or two as many regions are more work
    assert all(1 < r["times_flops"] < 2 for r in rows)
    assert rows[0]["times_flops"] == pytest.approx(rows[1]["times_flops"], rel=0.03)
    # a Mask R-CNN differs from "text" in its classifier only
    assert rows[4]["baseline_TFLOP"] == pytest.approx(rows[0]["baseline_TFLOP"], rel=0.1)


def test_every_objective_is_beside_none():
    rows = rows_of(objectives, "--size", 64, "--regions", 8, "--batch-size", 1)
    assert {r["what"].split(", ")[1] for r in rows} == OBJECTIVES.keys()
    assert {(r["baseline"], r["baseline_s"]) for r in rows} == {("no objective", rows[0]["baseline_s"])}
    assert all(r["times_baseline"] == r["ours_s"] / r["baseline_s"] for r in rows)


def test_a_vocabulary_is_the_same_either_way():
    encoded, swapped = rows_of(vocabulary, "--encode", 3, "--names", 200)
    assert encoded["min_cosine"] > 0.99999 and "189 texts" in encoded["what"]
    assert swapped["max_abs_diff"] < 1e-6
