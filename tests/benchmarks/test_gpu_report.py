"""The report of a GPU, at tiny sizes on a CPU: what does not depend on a GPU's speed holds there, too.
(What the rows of training steps call, test_benchmark_detector.py tries; "world" trains for minutes.)"""

import json

from benchmarks import gpu


def report(tool, folder, *words):
    return tool("gpu_report.py", "--output-dir", folder, "--device", "cpu", "--tiny", *words)


def test_rows_of_a_cpu(tool, tmp_path, teacher_folder):
    rows = ["crops", "launches", "pass", "no-foreground", "no-regions", "evaluation", "live"]
    words = ("--minutes", 600, "--teacher", f"local-dir:{teacher_folder}", "--rows", *rows)
    assert report(tool, tmp_path / "gpu", *words) == 0
    found = {row["row"]: row for row in json.loads((tmp_path / "gpu" / "gpu.json").read_text())["rows"]}
    assert list(found) == rows and not any("failed" in row for row in found.values()), found
    for name in ("crops", "launches", "no-foreground", "no-regions"):
        assert found[name]["holds"], found[name]
    assert found["crops"]["max_abs_diff"] == 0 and found["evaluation"]["masks"] > 0
    page = (tmp_path / "gpu" / "gpu.md").read_text()
    assert page.count("\n| ") == len(rows) + 1 and "speeds mean nothing" in page


def test_a_killed_report_continues_and_a_failing_row_is_one_line(tool, tmp_path, monkeypatch, capsys):
    def killed(settings):
        raise KeyboardInterrupt

    def broken(settings):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    checks = [gpu.Check("a", "x", lambda s: (True, {"n": 1})), gpu.Check("b", "x", broken)]
    monkeypatch.setattr(gpu, "CHECKS", [*checks, gpu.Check("c", "x", killed)])
    assert report(tool, tmp_path) != 0
    monkeypatch.setattr(gpu, "CHECKS", [*checks[:1], checks[1], gpu.Check("c", "x", lambda s: (True, {}))])
    assert report(tool, tmp_path) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(r["row"], r["holds"]) for r in rows] == [("a", True), ("b", False), ("c", True)]
    assert rows[1]["failed"] == "RuntimeError: CUDA error: an illegal memory access"
    assert capsys.readouterr().out.count("row a;") == 1  # not measured again
    assert report(tool, tmp_path, "--rows", "d") == 2 and "--rows d" in capsys.readouterr().err
    assert tool("gpu_report.py", "--output-dir", tmp_path / "none", "--device", "cpu") == 2
    assert not (tmp_path / "none").exists()
