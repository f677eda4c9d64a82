"""The benchmark of the evaluation: the programs agree, and rows are written as they are measured."""

import json

import pytest
from benchmarks import evaluation


def test_benchmark_of_the_evaluation(tmp_path, tool, monkeypatch):
    monkeypatch.setattr(evaluation, "measure", in_this_process)
    rows = tmp_path / "rows.json"
    assert (
        tool("benchmark.py", "evaluation", "--num-images", 4, "--reference-images", 3, "--masks", "--json", rows) == 0
    )
    coco, lvis, *alone = json.loads(rows.read_text())
    for row in (coco, lvis):
        assert row["ours_AP"] == pytest.approx(row["baseline_AP"], abs=1e-6) and row["ours_AP"] > 10
        assert row["ratio"] == row["baseline_s"] / row["ours_s"]
    assert [row["what"].split()[1] for row in alone] == ["bbox", "segm"] and all(r["ours_AP"] > 10 for r in alone)


def in_this_process(function, *args):
    return evaluation.timed(function, args)


def test_each_program_has_its_own_process():
    value, seconds, gibibytes = evaluation.measure(abs, -3)
    assert value == 3 and seconds >= 0 and gibibytes > 0


def test_a_killed_run_keeps_its_rows(tmp_path, tool, monkeypatch, capsys):
    def run(args):
        yield {"what": "first", "ratio": 2.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "run", run)
    assert tool("benchmark.py", "evaluation", "--json", tmp_path / "rows.json") != 0
    assert json.loads((tmp_path / "rows.json").read_text()) == [{"what": "first", "ratio": 2.0}]
    assert "what first; ratio 2" in capsys.readouterr().out
