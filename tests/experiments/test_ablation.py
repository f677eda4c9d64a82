"""A grid's rows become stages, each of which runs once; its table says what the runs gave."""

import json
import runpy

import numpy as np
import pytest
from experiments import ablation
from experiments.glyphs import EXTRA_WIDTH, GlyphsRun
from experiments.grid import Row
from experiments.runner import Runner, Stage
from PIL import Image

from tests.conftest import REPOSITORY
from tests.experiments.test_grid import GRID, read
from vild.data import datasets
from vild.engine.run_record import code_version
from vild.evaluation import cost
from vild.modeling.extra_teachers import check_teachers


@pytest.fixture
def stages_of(tmp_path, monkeypatch, vocabulary):
    """A grid's stages in their order, with tools that do nothing."""
    done: list[Stage] = []

    def run_step(self, stages):
        for stage in stages:
            if stage not in done:
                done.append(stage)
                if stage.name == "vocabulary":
                    vocabulary.save(stage.output)

    def stages(text):
        done.clear()
        ablation.run_seed(GlyphsRun(tmp_path / "seed0", iterations=10), read(tmp_path, text).rows)
        return list(done)

    monkeypatch.setattr(Runner, "run_step", run_step)
    return stages


def test_each_stage_runs_once_and_rows_share_what_comes_before(stages_of):
    done = stages_of(GRID)
    names = [s.name for s in done]
    assert len(set(names)) == len(names)
    assert names[-2:] == ["row-rotated", "diagnostics"] and names.index("store") < names.index("vild")
    cosine = " ".join(next(s for s in done if s.name == "row-cosine").command)
    assert "MODEL.VILD.OBJECTIVES [{'NAME': 'cosine'}] MODEL.VILD.DISTILL_WEIGHT 3.0" in cosine
    assert "glyphs_train_all" in " ".join(next(s for s in done if s.name == "row-oracle").command)


def test_the_weights_that_are_evaluated_are_the_other_rows(stages_of):
    """Not those that it started from."""
    done = stages_of('rows: {a: {config: vild, MODEL.WEIGHTS: "", MODEL.VILD.TEMPERATURE: 0.02}, b: {evaluate: a}}')
    command = next(s for s in done if s.name == "row-b").command
    overrides = dict(zip(command[6::2], command[7::2], strict=True))
    assert len(overrides) == (len(command) - 6) / 2 - 1  # one key is given twice, and the later value counts
    assert overrides["MODEL.WEIGHTS"].endswith("row-a/model_final.pth")
    assert overrides["MODEL.VILD.TEMPERATURE"] == "0.02"


def test_the_diagnostics_are_of_the_named_row(stages_of):
    """With its overrides: the paper's table has ViLD's cosine to the teacher, not that of the first row."""
    paper = (REPOSITORY / "configs/Glyphs/ablations/paper.yaml").read_text()
    (command,) = (s.command for s in stages_of(paper) if s.command[0] == "diagnostics.py")
    assert command[command.index("--config-file") + 1].endswith("Glyphs/vild.yaml")
    assert command[command.index("MODEL.WEIGHTS") + 1].endswith("/vild/model_final.pth")
    command = stages_of(GRID)[-1].command
    opts = command[command.index("--opts") + 1 :]
    overrides = dict(zip(opts[::2], opts[1::2], strict=True))
    assert overrides["MODEL.VILD.DISTILL_WEIGHT"] == "3.0"
    command = stages_of('rows: {a: {config: vild, MODEL.WEIGHTS: ""}, b: {clip_on_crops: a}}')[-1].command
    assert command[command.index("--opts") + 1 :][:3] == ("MODEL.WEIGHTS", "", "MODEL.WEIGHTS")


def test_settings_are_chosen_without_a_novel_label(stages_of, world):
    """Names are held out of the base ones; neither the training nor the dev set has a novel one."""
    done = {s.name: s.command for s in stages_of("rows: {a: {config: vild, data: heldout}, b: {config: vild}}")}
    row = " ".join(done["row-a"])
    assert "DATASETS.TRAIN ('glyphs_heldout_train',) DATASETS.TEST ('glyphs_heldout_dev',)" in row
    assert "vocabulary_heldout" in row and "glyphs_heldout_train" in done["vocabulary_heldout"]
    assert "heldout" not in " ".join(done["vild"])
    everything = datasets.get_classes("glyphs_dev")
    base = {n for n, mark in zip(everything.names, everything.splits, strict=True) if mark == "base"}
    for name in ("glyphs_heldout_train", "glyphs_heldout_dev"):
        classes = datasets.get_classes(name)
        assert {*classes.names} == base and classes.splits.count("novel") == 10


def test_no_curve_reads_what_settings_are_not_chosen_by(tmp_path, monkeypatch, capsys):
    (tmp_path / "grid.yaml").write_text("rows: {a: {config: vild, data: heldout}}")
    flags = ["--grid", str(tmp_path / "grid.yaml"), "--output-dir", str(tmp_path / "output"), "--curves"]
    monkeypatch.setattr("sys.argv", ["ablate.py", *flags])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "tools" / "ablate.py"), run_name="__main__")
    assert caught.value.code == 2 and "row 'a' has data: heldout" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("none", [None, float("nan")], ids=["null", "NaN, as it was written once"])
def test_weights_and_shares_of_objectives_in_the_table(stages_of, tmp_path, none):
    text = "rows: {a: {config: vild}, b: {config: text}}\nshares: a"
    stages_of(text)
    found = (("l1", 4.0, 1.0), ("tokens", 0.25, none), ("contrast", 0.5, 0.312))
    rows = [{"row": "a", "objective": name, "weight": weight, "share": share} for name, weight, share in found]
    run = GlyphsRun(tmp_path / "seed0", iterations=10)
    written = run.shares(run.detector("vild", "vild"), tmp_path / "grid.yaml").output
    written.write_text(json.dumps({"l1": 1, "rows": rows}))
    shares = ablation.read_shares(run, read(tmp_path, text), tmp_path / "grid.yaml")
    assert shares == {"a": ("4 l1 + 0.25 tokens + 0.5 contrast", "1 + - + 0.31")}
    metrics = dict.fromkeys(ablation.METRICS, 1.0)
    head, _, a, b = ablation.table({"a": [metrics], "b": [metrics]}, {}, shares).strip().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (head, a, b)]
    assert [row[1:4] for row in cells] == [
        [ablation.WEIGHT, ablation.SHARE, "seeds"],
        [*shares["a"], "1"],
        ["-", "-", "1"],
    ]


def test_shares_are_measured_again_when_the_grid_has_changed(tmp_path):
    """Else new rows had none, and changed rows those of their former weights."""
    run, grid, measured = GlyphsRun(tmp_path, iterations=10), tmp_path / "grid.yaml", []
    for weight in (2.0, 8.0, 2.0):
        grid.write_text(f"rows: {{a: {{config: vild, MODEL.VILD.DISTILL_WEIGHT: {weight}}}}}\nshares: a")
        measured.append(run.shares(run.detector("vild", "vild"), grid))
    assert measured[0] == measured[2] and measured[0].name != measured[1].name
    assert len({each.output for each in measured}) == 2


def test_a_second_teacher_is_made_for_the_rows_that_ask_for_it(stages_of, make_cfg):
    """It changes no other stage's command: what ran without it is not run again."""
    before = {s.name: s.command for s in stages_of(GRID)}
    two = "  two: {config: vild, teachers: 2, MODEL.VILD.DISTILL_WEIGHT: 1.0}\n"
    after = {s.name: s.command for s in stages_of(GRID + two)}
    assert {name: after[name] for name in before} == before
    new = [name for name in after if name not in before]
    assert sorted(new) == ["row-two", "store2", "teacher2", "vocabulary2"]
    assert list(after).index("proposals_train") < list(after).index("store2") < list(after).index("row-two")
    teacher, words, store, row = (after[n] for n in ("teacher2", "vocabulary2", "store2", "row-two"))
    folder = teacher[teacher.index("--output-dir") + 1]
    assert words[words.index("--teacher") + 1] == store[store.index("--teacher") + 1] == f"local-dir:{folder}"
    proposals = after["store"][after["store"].index("--proposals") + 1]
    assert store[store.index("--proposals") + 1] == proposals
    key = row.index("MODEL.VILD.TEACHERS")
    (entry,) = check_teachers(make_cfg("vild", *row[key : key + 2]).MODEL.VILD.TEACHERS)
    assert entry["STORE"] == store[store.index("--output-dir") + 1]
    assert entry["VOCABULARY"] == words[words.index("--output") + 1]
    assert row[-2:] == ("MODEL.VILD.DISTILL_WEIGHT", "1.0") and teacher[-2:] == ("--width", str(EXTRA_WIDTH))


def test_the_diagnostics_of_a_run_are_numbers_by_group(tmp_path):
    """As tools/diagnostics.py writes them, whose verdict is in words."""
    values = {"base": 1.0, "novel": 2.0}
    recall = {f"glyphs_val/recall50_{group}": value for group, value in values.items()}
    written = {"teacher_top1": values, "verdict": "Distillation has converged", "proposals": recall,
               "clip_on_crops": {"AP50_novel": 3.0}}  # fmt: skip
    run = GlyphsRun(tmp_path)
    (tmp_path / "diagnostics.json").write_text(json.dumps(written))
    assert run.read_diagnostics() == ({"teacher_top1": values, "proposal_recall50": values}, {"AP50_novel": 3.0})


def test_table_and_plot(tmp_path):
    metrics = [{m: 10.0 * n + seed for n, m in enumerate(ablation.METRICS)} for seed in (0, 1, 2)]
    results = {"ViLD": metrics, "crops": [{"bbox/AP50_novel": 7.0}], "not yet": []}
    page = ablation.table(results, {"teacher_top1": [{"base": 96.0, "novel": 97.0}]})
    assert "| ViLD" in page and "1.0 ± 1.0" in page and "not yet" not in page and "| 7.0" in page and "96.0" in page
    ablation.plot(results, tmp_path / "plot.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "plot.png").convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_a_line_for_each_row_in_both_images(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(ablation, "write_figure", lambda figure, path: drawn.append(figure.axes[0]))
    costs = {"not yet": None, "crops": {}, "b": {ablation.GFLOP: 2.0}, "a": {ablation.GFLOP: 1.0}}
    novel = {"crops": 9.0, "b": 4.0, "a": 6.0}
    results = {name: [] if cost is None else [{"bbox/AP50_novel": novel[name], "bbox/AP50_base": 50.0, **cost}]
               for name, cost in costs.items()}  # fmt: skip
    results["no base"] = [{"bbox/AP50_novel": 1.0}]
    ablation.plot(results, tmp_path / "plot.png")
    ablation.plot_cost(results, tmp_path / "cost.png")
    lines = [[label.get_text() for label in axes.get_yticklabels()] for axes in drawn]
    assert lines == [["crops", "a", "b"], ["a, 1 GFLOP", "b, 2 GFLOP"]]
    marks = [axes.containers[0][0].get_xdata().tolist() for axes in drawn]
    assert marks == [[9.0, 6.0, 4.0], [6.0, 4.0]]
    assert [text.get_text() for text in drawn[0].texts] == ["novel classes", "base classes"]


def test_what_a_row_costs(make_cfg, tmp_path):
    """Stands in the table, whatever the seed; and over it AP50, where rows differ."""
    run, row = GlyphsRun(tmp_path), Row("ViLD", config="vild")
    (tmp_path / row.stage / "inference").mkdir(parents=True)
    (tmp_path / row.stage / "config.yaml").write_text(make_cfg("vild").dump())
    metrics = {"glyphs_val/bbox/AP50_novel": 60.0, "glyphs_val/bbox/AP50_base": 80.0}
    (tmp_path / row.stage / "inference" / "vild_metrics.json").write_text(json.dumps(metrics))
    found = ablation.read_row(run, row) | ablation.read_cost(run, row)
    model, _ = cost.detector_of_run(tmp_path / row.stage)
    assert found[ablation.PARAMETERS] * 1e6 == pytest.approx(sum(p.numel() for p in model.parameters()))
    assert found[ablation.GFLOP] * 1e9 == pytest.approx(cost.flops(model, 128)["all"])
    other = {**found, ablation.GFLOP: 9.87}
    page = ablation.table({"ViLD": [found] * 2, "none": [{}]}, {})
    assert f"| {found[ablation.GFLOP]:.2f} " in page and page.count(f"{found[ablation.PARAMETERS]:.2f}") == 1
    for rows, drawn in (({"a": [found], "b": [found]}, False), ({"a": [found, found], "b": [other], "c": [{}]}, True)):
        ablation.plot_cost(rows, tmp_path / "cost.png")
        assert (tmp_path / "cost.png").exists() == drawn


def test_two_grids_of_one_output(tmp_path, monkeypatch, capsys):
    """Each has its own table and plot, named after its file; nothing of the other's is overwritten."""
    monkeypatch.setattr(Runner, "run_step", lambda self, stages: None)
    scores = {"ViLD": 40.0, "cosine": 30.0, "other": 20.0}
    monkeypatch.setattr(ablation, "read_row", lambda run, row: {"bbox/AP50_novel": scores[row.name] + run.seed,
                                                                "bbox/AP50_base": 60.0})  # fmt: skip
    counted = []
    monkeypatch.setattr(ablation, "read_cost", lambda run, row: counted.append(run.seed) or {})
    for name, other in (("first", "cosine"), ("second", "other")):
        grid = tmp_path / f"{name}.yaml"
        grid.write_text(f"seeds: [0, 1]\nrows: {{ViLD: {{config: vild}}, {other}: {{config: text}}}}")
        monkeypatch.setattr("sys.argv", ["ablate.py", "--grid", str(grid), "--output-dir", str(tmp_path / "output")])
        runpy.run_path(str(REPOSITORY / "tools" / "ablate.py"), run_name="__main__")
    assert counted == [0] * 4  # of the first seed only: it is the same of all
    for name, other, mean in (("first", "cosine", "30.5 ± 0.7"), ("second", "other", "20.5 ± 0.7")):
        written = tmp_path / "output" / name
        document = json.loads(written.with_suffix(".json").read_text())
        rows = document["rows"]
        assert document["seeds"] == [0, 1] and document["iterations"] == 0 and document["code"] == code_version()
        assert list(rows) == ["ViLD", other] and rows["ViLD"][1]["bbox/AP50_novel"] == 41.0
        assert f"| {mean} " in written.with_suffix(".md").read_text() and written.with_suffix(".png").stat().st_size
    assert "seed 1" in capsys.readouterr().out
