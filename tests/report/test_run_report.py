"""tools/report.py: a full report, or one line and no file."""

import json
import runpy

import pytest

from tests.conftest import REPOSITORY
from vild.data import datasets
from vild.evaluation.evaluator import CLASSES_FILE, RESULTS_FILE, evaluate_results, write_metrics
from vild.utils.files import write_json


@pytest.fixture
def evaluated(world, tmp_path):
    """The output folder of a detector that found what is there."""
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in datasets.read_annotations("glyphs_val")["annotations"]
    ]
    inference = tmp_path / "run" / "inference"
    write_json(inference / RESULTS_FILE, found)
    metrics = evaluate_results("glyphs_val", inference / RESULTS_FILE, ("bbox",), inference).metrics
    write_metrics(tmp_path / "run", {"glyphs_val": metrics})
    return tmp_path / "run"


@pytest.fixture
def report(evaluated, monkeypatch, capsys):
    """``tools/report.py`` of that run, in this process: exit status and last line of what it printed."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["report.py", "--run", str(evaluated), *map(str, arguments)])
        try:
            runpy.run_path(str(REPOSITORY / "tools" / "report.py"), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, (printed.err if status else printed.out).strip().splitlines()[-1]

    return call


def test_whole_although_the_network_cannot_be_built_any_more(evaluated, report, make_cfg, tmp_path):
    gone = [{"STORE": "a", "VOCABULARY": "gone.safetensors"}]
    (evaluated / "config.yaml").write_text(make_cfg("vild", "MODEL.VILD.TEACHERS", gone).dump())
    groups = {"base": 71.5, "novel": None}
    write_json(tmp_path / "gauges.json", {"teacher_top1": groups, "student_teacher_cosine": groups})
    status, line = report("--diagnostics", tmp_path / "gauges.json")
    page = (evaluated / "report" / "report.md").read_text()
    assert status == 0 and "report.md" in line and "class_" in page and "71.5" in page
    assert "## Cost" not in page
    assert "reliability_glyphs_val.png" in page and (evaluated / "report" / "reliability_glyphs_val.png").is_file()
    truth = len(datasets.read_annotations("glyphs_val")["annotations"])
    row = next(line for line in page.splitlines() if "0.9 to 1.0" in line)  # every box scores 1.0 and is right
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == cells[4] == "100.0" and int(cells[1]) + int(cells[3]) == truth


def test_a_proposal_network_has_none(evaluated, report):
    write_json(evaluated / "inference" / "vild_metrics.json", {"glyphs_val/proposals/AR@100_base": 50.0})
    (evaluated / "inference" / CLASSES_FILE).unlink()
    status, line = report()
    assert status == 2 and "per_class.json does not exist" in line and "proposal network" in line
    assert not (evaluated / "report").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"glyphs_val/bbox/AP": 1.0},
        [1],
        {"teacher_top1": {}},
        {"teacher_top1": {"base": 1.0}, "student_teacher_cosine": {"novel": 1.0}},
        {"teacher_top1": {"base": "a"}},
        {"teacher_top1": {"base": 1.0}, "clip_on_crops": {"AP": 1.0}},
    ],
)
def test_gauges_of_another_kind_are_refused(evaluated, report, tmp_path, content):
    (tmp_path / "other.json").write_text(json.dumps(content))
    status, line = report("--diagnostics", tmp_path / "other.json")
    assert status == 2 and f"--diagnostics {tmp_path}/other.json is not what tools/diagnostics.py writes" in line
    assert not (evaluated / "report").exists()
