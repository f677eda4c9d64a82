"""The kill harness on commands of a few lines: one that resumes without loss, and others."""

import json
import os
import sys
from itertools import islice

import pytest
import torch

from tests.kills.harness import KINDS, Harness, KillableCommand, Moment, Progress, draw_moments, shares
from tests.kills.output_folders import differences, first_difference
from vild.utils.errors import UserError

ATOMIC = """
import os, pathlib, time
folder = pathlib.Path("out"); folder.mkdir(exist_ok=True)
for n in range(6):
    if not (folder / f"{n}").exists():
        time.sleep(0.02)
        with open(folder / f"{n}.tmp", "w") as file:
            file.write("a" * 1000); file.flush(); time.sleep(0.02); file.write("b" * 1000)
        os.rename(folder / f"{n}.tmp", folder / f"{n}")
"""
IN_PLACE = ATOMIC.replace('f"{n}.tmp"', 'f"{n}"').replace('        os.rename(folder / f"{n}", folder / f"{n}")\n', "")
NEW_FILE_EACH_TIME = f"{ATOMIC}\nimport os; (folder / f'of-{{os.getpid()}}').write_text('')"
REFUSES = f"import os, sys\nif os.path.exists('out'): sys.exit('error: out is there already')\n{ATOMIC}"


def harness(tmp_path, *programs):
    jobs = [
        KillableCommand(f"job{n}", (sys.executable, "-c", p), "out" if n == 0 else f"out{n}")
        for n, p in enumerate(programs)
    ]
    return Harness(tmp_path, jobs, os.environ)


def test_files_written_atomically_are_not_lost(tmp_path):
    logged = []
    test = harness(tmp_path, ATOMIC, ATOMIC.replace('"out"', '"out1"'))
    test.run_references(logged.append)
    test.kill_and_compare(9, 2, 0, logged.append)
    assert test.summary() == "9 kills, 0 lost", logged
    assert [sum(kinds.values()) for kinds in test.killed.values()] == [4, 5]  # each has its share
    assert [line.split(":")[0] for line in logged[2:]] == [f"kill {n} of 9" for n in range(1, 10)]
    assert "0 min left" in logged[-1]


@pytest.mark.parametrize(
    ("program", "what"),
    [(IN_PLACE, "has other bytes"), (NEW_FILE_EACH_TIME, "is missing"), (REFUSES, "error: out is there already")],
)
def test_a_loss_is_reported(tmp_path, program, what):
    test = harness(tmp_path, program)
    test.run_references(lambda line: None)
    test.kill_and_compare(6, 2, 0, lambda line: None)
    assert test.summary().startswith(f"6 kills, {len(test.lost)} lost; round ") and what in test.summary()
    assert (tmp_path / "lost1" / "job0.log").exists()  # kept for inspection


def test_a_command_that_fails_by_itself_stops_the_test(tmp_path):
    with pytest.raises(UserError, match="job0: error: no"):
        harness(tmp_path, "import sys; sys.exit('error: no')").run_references()


def test_moments():
    moments = list(islice(draw_moments(0), 2000))
    assert moments == list(islice(draw_moments(0), 2000)) != list(islice(draw_moments(1), 2000))
    for kind, share in KINDS.items():
        some = [m.share for m in moments if m.kind == kind]
        assert abs(len(some) / 2000 - share) < 0.04
        assert all(abs(sum(a <= at < a + 0.25 for at in some) / len(some) - 0.25) < 0.08 for a in (0, 0.25, 0.5, 0.75))
    reference, nothing = Progress(8.0, 4.0, 10), Progress(None, 0.0, 0)
    assert Moment("start", 0.5).has_come(reference, 4.0, nothing)
    assert not Moment("start", 0.5).has_come(reference, 3.9, nothing)
    assert not Moment("work", 0.0).has_come(reference, 99.0, nothing)  # however slow the start is
    assert Moment("work", 0.5).has_come(reference, 99.0, Progress(97.0, 2.0, 0))
    assert not Moment("work", 0.5).has_come(reference, 99.0, Progress(97.0, 1.9, 9))
    assert Moment("write", 0.0).has_come(reference, 9.0, Progress(8.0, 1.0, 1))
    assert not Moment("write", 0.0).has_come(reference, 9.0, Progress(8.0, 1.0, 0))
    assert Moment("write", 0.99).has_come(reference, 9.0, Progress(8.0, 1.0, 10))


def test_shares_are_even():
    assert shares(50, 12) == [4, 4, 4, 4, 4, 5] * 2 and shares(1, 3) == [0, 0, 1] and sum(shares(7, 3)) == 7


def test_differences_of_folders(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "inference").mkdir(parents=True)
        (folder / "inference" / "results.json").write_text("[]")
        (folder / "log.txt").write_text(str(folder))
        rows = [{"total_loss": 1.0 if folder == a else 3.0}, {"total_loss": 2.0, "loss_rpn": 1.5, "time": 1}, {"AP": 1}]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
        torch.save({"model": {"w": torch.ones(3)}, "steps": [1, 2]}, folder / "model.pth")
    assert differences(a, b) == differences(a, b, losses=True) == ""
    (b / "metrics.json").write_text(json.dumps({"total_loss": 2.0, "loss_rpn": 1.25}))
    assert differences(a, b) == ""
    assert differences(a, b, losses=True).startswith("losses {'total_loss': 2.0, 'loss_rpn': 1.25}, not {")
    torch.save({"model": {"w": torch.tensor([1, 1, 1 + 2e-7])}, "steps": [1, 2]}, b / "model.pth")
    assert differences(a, b) == "model.pth: model/w"
    (b / "inference" / "results.json").write_text("[ ]")
    assert differences(a, b) == "inference/results.json has other bytes"
    (b / "inference" / "results.json.tmp").write_text("")
    assert differences(a, b) == "inference/results.json.tmp was left behind"
    assert differences(b, a) == "inference/results.json.tmp is missing"


def test_first_difference():
    a = {"w": [torch.ones(2), 1.0], "n": {"x": None}}
    assert first_difference(a, {"w": [torch.ones(2), 1.0], "n": {"x": None}}) == ""
    assert first_difference(a, {"w": [torch.ones(2), 2.0], "n": {"x": None}}) == "w/1"
    assert first_difference(a, {"w": [torch.ones(2).double(), 1.0], "n": {"x": None}}) == "w/0"
    assert first_difference(a, {"w": [torch.ones(2)], "n": {"x": None}}) == "w"
    assert first_difference(a, {"w": a["w"], "n": {}}) == "n/x" and first_difference(1, 1.0) == "its type"
