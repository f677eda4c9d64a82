"""The report of a GPU, at tiny sizes on a CPU: what does not depend on a GPU's speed holds there, too."""

import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from benchmarks import gpu
from experiments.glyphs import GlyphsRun
from experiments.runner import Runner

EXACT = ("crops", "launches", "no-foreground", "no-regions", "world")  # hold on any device


def report(tool, folder, *words):
    return tool("gpu_report.py", "--output-dir", folder, "--device", "cpu", "--tiny", *words)


@pytest.fixture
def quick(monkeypatch):
    """One thread, which busy cores do not slow down; of compiling what PyTorch does for every device; and the rows of
    training that are alike at tiny size are measured once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    measure, rows = gpu.train_step.run, {}

    def once(args):
        if (key := str(args)) not in rows:
            rows[key] = list(measure(args))
        return rows[key]

    monkeypatch.setattr(gpu.train_step, "run", once)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def made_before(world, teacher_folder, vocabulary_file, store_folder, checkpoint_file, proposals_file, monkeypatch):
    """The stages before the built-in world's training take what the other tests have made."""
    files = {"world": world, "teacher": teacher_folder, "vocabulary": vocabulary_file, "store": store_folder,
             "proposals": checkpoint_file, "proposals_train": proposals_file}  # fmt: skip

    def run_step(self, stages):
        for stage in [each for each in stages if each.name in files and each.name not in self.seconds]:
            source = files[stage.name]
            if stage.name == "proposals":
                stage.output.mkdir()
                shutil.copy(source, stage.output / "model_final.pth")
            else:
                (shutil.copytree if source.is_dir() else shutil.copy)(source, stage.output)
            self.seconds[stage.name] = 0
        Runner.run_step(self, stages)

    monkeypatch.setattr(GlyphsRun, "run_step", run_step)


def test_every_row_on_a_cpu(tool, tmp_path, teacher_folder, quick, made_before):
    words = ("--minutes", 600, "--teacher", f"local-dir:{teacher_folder}")
    assert report(tool, tmp_path / "gpu", *words) == 0
    found = {row["row"]: row for row in json.loads((tmp_path / "gpu" / "gpu.json").read_text())["rows"]}
    assert list(found) == [check.name for check in gpu.CHECKS]
    assert not {name: row["failed"] for name, row in found.items() if "failed" in row}
    assert all(found[name]["holds"] for name in EXACT), found
    assert found["crops"]["max_abs_diff"] == 0 and found["evaluation"]["masks"] > 0
    for name in [name for name in found if name.startswith("train")]:
        assert found[name]["times_flops"] > 1 and found[name]["ours_with_data_s"] > 0
    page = (tmp_path / "gpu" / "gpu.md").read_text()
    assert page.count("\n| ") == len(found) + 1 and "speeds mean nothing" in page


def test_a_killed_report_continues_and_a_failing_row_is_one_line(tool, tmp_path, monkeypatch, capsys):
    def killed(settings):
        raise KeyboardInterrupt

    def broken(settings):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    checks = [gpu.Check("a", "x", lambda s: (True, {"n": 1})), gpu.Check("b", "x", broken)]
    monkeypatch.setattr(gpu, "CHECKS", [*checks, gpu.Check("c", "x", killed)])
    assert report(tool, tmp_path) != 0
    monkeypatch.setattr(gpu, "CHECKS", [*checks, gpu.Check("c", "x", lambda s: (True, {}))])
    assert report(tool, tmp_path) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(r["row"], r["holds"]) for r in rows] == [("a", True), ("b", False), ("c", True)]
    assert rows[1]["failed"] == "RuntimeError: CUDA error: an illegal memory access"
    told = capsys.readouterr()
    assert told.out.count("row a;") == 1  # not measured again
    assert "in broken" in told.err  # where it failed
    # after such an error every row of the process fails: the next one measures them again
    mended = [gpu.Check(name, "x", lambda s: (True, {})) for name in "bc"]
    monkeypatch.setattr(gpu, "CHECKS", [checks[0], *mended])
    assert report(tool, tmp_path) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(r["row"], r["holds"], "failed" in r) for r in rows] == [(n, True, False) for n in "abc"]
    assert (tmp_path / "gpu.md").read_text().count("| yes") == 3
    assert report(tool, tmp_path, "--rows", "d") == 2 and "--rows d" in capsys.readouterr().err
    assert tool("gpu_report.py", "--output-dir", tmp_path / "none", "--device", "cpu") == 2
    assert not (tmp_path / "none").exists()


def test_a_folder_has_one_report_at_a_time(tool, tmp_path, capsys):
    holder = """from sys import argv, stdin
from vild.utils.lock import only_writer
with only_writer(argv[1], folder=True):
    print(flush=True)
    stdin.read()"""
    command, pipe = [sys.executable, "-c", holder, tmp_path], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        assert report(tool, tmp_path) == 2
        other.stdin.close()
    assert "is writing it" in capsys.readouterr().err and not (tmp_path / "gpu.json").exists()
    (tmp_path / "gpu.json").write_text("[]")
    assert report(tool, tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'gpu.json'}: is not a report's")
