"""A curve has a point for each checkpoint that a training kept, and ends at the training's own result."""

import itertools
import json

import pytest
from experiments.curves import COLUMNS, plot_curves, run_curve
from experiments.glyphs import GlyphsRun
from experiments.grid import Row
from experiments.runner import Runner

from vild.utils.files import write_json


def test_checkpoints_before_the_end_are_evaluated(tmp_path, monkeypatch):
    run, row = GlyphsRun(tmp_path, seed=3), Row("ours", "vild", overrides=(("MODEL.VILD.DISTILL_WEIGHT", 2.0),))
    folder = tmp_path / row.stage
    folder.mkdir()
    (folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 800}\nVERSION: 2\n")
    for name in ("0000199", "0000599", "0000799", "final", "calibrated"):  # a pruned run: 400 is missing
        (folder / f"model_{name}.pth").touch()
    commands = {}

    def write_metrics(name, novel):
        (tmp_path / name / "inference").mkdir(parents=True)
        metrics = {"glyphs_val/bbox/AP50_novel": novel, "glyphs_val/bbox/AP50_base": 90.0}
        (tmp_path / name / "inference" / "vild_metrics.json").write_text(json.dumps(metrics))

    def evaluate(self, *stages):
        for n, stage in enumerate(stages):
            commands[stage.name] = stage.command
            write_metrics(stage.name, 10.0 * n)

    monkeypatch.setattr(Runner, "run", evaluate)
    write_metrics(row.stage, 50.0)
    assert run_curve(run, row) == {200: [0.0, 90.0], 600: [10.0, 90.0], 800: [50.0, 90.0]}
    assert list(commands) == ["row-ours-200", "row-ours-600"]
    command = commands["row-ours-600"]
    assert "--eval-only" in command and "MODEL.VILD.DISTILL_WEIGHT" in command
    settings = dict(itertools.pairwise(command))
    assert settings["MODEL.WEIGHTS"] == str(folder / "model_0000599.pth")
    assert settings["OUTPUT_DIR"] == str(tmp_path / "row-ours-600")


@pytest.mark.parametrize(("ended", "at"), [(599, 400), (None, 800)], ids=["ended early", "patience lasted"])
def test_the_result_of_an_early_end_is_that_of_the_best_iteration(tmp_path, monkeypatch, ended, at):
    """Whose checkpoint is model_final.pth then; checkpoints after it are points of their own."""
    run, row, scored = GlyphsRun(tmp_path), Row("ours", "vild"), []
    folder = tmp_path / row.stage
    folder.mkdir()
    (folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 800}\nTEST: {BEST_METRIC: bbox/AP}\nVERSION: 2\n")
    write_json(folder / "best.json", {"metric": "bbox/AP", "history": [[199, 1.0], [399, 3.0], [599, 3.0]],
                                      "ended": ended})  # fmt: skip
    for name in ("0000199", "0000399", "0000599", "best", "final"):
        (folder / f"model_{name}.pth").touch()
    monkeypatch.setattr(Runner, "run", lambda self, *stages: scored.extend(stage.name for stage in stages))
    monkeypatch.setattr(run, "read_metrics", lambda name: dict.fromkeys(COLUMNS, 9.0 if name == row.stage else 1.0))
    curve = run_curve(run, row)
    others = [iteration for iteration in (200, 400, 600) if iteration != at]
    assert scored == [f"{row.stage}-{iteration}" for iteration in others]
    assert curve == {at: [9.0, 9.0]} | {iteration: [1.0, 1.0] for iteration in others} and [*curve] == sorted(curve)


def test_checkpoints_are_scored_with_the_second_teacher_as_the_row_is(tmp_path, monkeypatch):
    run, row, ran = GlyphsRun(tmp_path), Row("two", "vild", teachers=2), []
    (tmp_path / row.stage / "inference").mkdir(parents=True)
    (tmp_path / row.stage / "config.yaml").write_text("SOLVER: {MAX_ITER: 800}\nVERSION: 2\n")
    (tmp_path / row.stage / "model_0000199.pth").touch()
    monkeypatch.setattr(Runner, "run", lambda self, *stages: ran.extend(stages))
    monkeypatch.setattr(run, "read_metrics", lambda name: dict.fromkeys(COLUMNS, 1.0))
    run_curve(run, row)
    trained, scored = (dict(itertools.pairwise(s.command)) for s in (run.detector("a", "vild", teachers=2), *ran))
    assert scored["MODEL.VILD.TEACHERS"] == trained["MODEL.VILD.TEACHERS"] and "store2" in scored["MODEL.VILD.TEACHERS"]


def test_the_drawing_has_the_mean_over_seeds_and_every_name():
    curves = {"ViLD": [{200: [10.0, 50.0], 400: [20.0, 60.0]}, {200: [30.0, 70.0], 400: [40.0, 80.0], 600: [0, 0]}],
              "ViLD-text": [{200: [1.0, 2.0]}], "ended early": [{200: [9.0, 9.0]}, {400: [9.0, 9.0]}]}  # fmt: skip
    novel, base = plot_curves(curves).axes
    assert [list(line.get_ydata()) for line in novel.lines] == [[20.0, 30.0], [1.0]]
    assert [list(line.get_ydata()) for line in base.lines] == [[60.0, 70.0], [2.0]]
    assert list(novel.lines[0].get_xdata()) == [200, 400]  # the iterations that every seed has
    assert {text.get_text() for text in novel.texts} == {"ViLD", "ViLD-text"}


def test_names_at_near_ends_are_apart_and_within_the_plot():
    ends = [91.0, 92.0, 92.5, 93.0, 99.0, 99.5]
    novel, _ = plot_curves({f"row {n}": [{200: [end, end]}] for n, end in enumerate(ends)}).axes
    heights = {text.get_text(): text.xy[1] for text in novel.texts}
    assert sorted(heights, key=heights.get) == [f"row {n}" for n in range(6)] and max(heights.values()) <= 100
    assert min(b - a for a, b in itertools.pairwise(sorted(heights.values()))) >= 4
