"""Stages run in parallel, each once; only the command that started a stage resumes it."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from experiments.runner import Runner, Stage, stage

from tests.conftest import REPOSITORY
from vild.utils.errors import UserError


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Makes a stage from lines of Python, which find the stage's output as ``out``."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("experiments.runner.TOOLS", tmp_path / "tools")
    (tmp_path / "tools").mkdir()

    def make(name, body, *arguments, needs=()):
        head = "import os, sys, time\nfrom pathlib import Path\nout = Path(sys.argv[2])\n"
        (tmp_path / "tools" / f"{name}.py").write_text(head + body)
        output = tmp_path / f"out-{name}"
        return stage(name, output, f"{name}.py", "--output", output, *arguments, needs=needs)

    return make


def test_more_stages_than_cores(tmp_path, tool):
    """They all run, two at once on two cores, never more; a second run does nothing."""
    wait = """
start, began = time.time(), out.with_name(f"began-{out.name}")
began.touch()
while len(list(out.parent.glob("began-*"))) < 2 and time.time() < start + 1500:
    time.sleep(0.01)
out.write_text(f"{start} {time.time()}")
"""
    stages = [tool(f"s{n}", wait) for n in range(5)]
    run = Runner(tmp_path / "run")
    run.run(*stages)
    spans = [tuple(map(float, path.read_text().split())) for path in tmp_path.glob("out-*")]
    assert len(spans) == 5 and max(sum(a <= t < b for a, b in spans) for t, _ in spans) == 2
    for path in tmp_path.glob("out-*"):
        path.unlink()
    run.run(*stages)
    assert not list(tmp_path.glob("out-*"))
    marker = json.loads((tmp_path / "run/stages/s3.json").read_text())
    assert marker.keys() == {"command", "seconds"} and marker["seconds"] > 0  # as those of earlier versions


@pytest.mark.parametrize(
    ("visible", "count", "gpus"), [(None, 2, {"0", "1"}), ("5,GPU-abc,7", 3, {"5", "GPU-abc", "7"}), ("3", 1, {"3"})]
)
def test_each_gpu_has_one_stage_at_a_time(tmp_path, tool, monkeypatch, visible, count, gpus):
    """Of more stages than GPUs, on more GPUs than cores; and all GPUs are used at once."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    wait = f"""
start, began = time.time(), out.with_name(f"began-{{out.name}}")
began.touch()
while len(list(out.parent.glob("began-*"))) < {count} and time.time() < start + 1500:
    time.sleep(0.01)
out.write_text(f"{{os.environ['CUDA_VISIBLE_DEVICES']}} {{start}} {{time.time()}}")
"""
    Runner(tmp_path / "run").run(*(tool(f"s{n}", wait) for n in range(5)))
    rows = [path.read_text().split() for path in tmp_path.glob("out-*")]
    spans = {gpu: sorted((float(a), float(b)) for g, a, b in rows if g == gpu) for gpu in gpus}
    assert sum(map(len, spans.values())) == 5 and all(spans.values())
    assert all(a[1] <= b[0] for each in spans.values() for a, b in pairwise(each))


def test_a_stage_started_by_another_command_is_refused(tmp_path, tool):
    """Finished or not: half a training would resume with other settings. With its own command it resumes."""
    run = Runner(tmp_path / "run")
    half = "out.mkdir(exist_ok=True)\n"
    half += "if not (out / 'half').exists():\n    (out / 'half').touch()\n    sys.exit('error: no')"
    row, other = (tool("row-a", half, "SEED", "0", "RATE", rate) for rate in "12")
    with pytest.raises(UserError, match="stage 'row-a' failed: no"):
        run.run(row)
    for _ in range(2):
        with pytest.raises(UserError, match="'RATE 1' where it is now 'RATE 2'; remove that file") as error:
            run.run(other)
        assert str(tmp_path / "run/stages/row-a.json") in str(error.value) and str(row.output) in str(error.value)
        Runner(tmp_path / "run").run(row)
    with pytest.raises(UserError, match="'1' where it is now '1 MORE'"):
        run.run(Stage("row-a", row.output, (*row.command, "MORE")))


def test_one_failure_ends_no_other_stage(tmp_path, tool):
    """All others have finished when it is reported, also those that had not started."""
    stages = [tool(n, "out.touch()" if n in "cd" else f"sys.exit('error: of {n}')") for n in "abcd"]
    run = Runner(tmp_path / "run")
    with pytest.raises(UserError, match=r"stage '[ab]' failed: of [ab] \(see .*\); 2 of 4 stages failed"):
        run.run(*stages)
    assert sorted(run.seconds) == ["c", "d"] and (tmp_path / "out-d").exists()


def test_the_end_of_the_runner_ends_its_stages(tmp_path, tool, monkeypatch):
    stage = tool("a", "out.write_text(str(os.getpid()))\ntime.sleep(3600)")

    def ctrl_c(seconds):
        if (tmp_path / "out-a").exists() and (tmp_path / "out-a").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr("experiments.runner.time.sleep", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        Runner(tmp_path / "run").run(stage)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "out-a").read_text()), 0)


def another_runner(folder) -> list[str]:
    """The command of another process that runs the stage "a"."""
    lines = """
import sys
from pathlib import Path
tools, made_up, folder, out = map(Path, sys.argv[1:])
sys.path.insert(0, str(tools))
from experiments import runner
runner.TOOLS = made_up
runner.Runner(folder).run(runner.stage("a", out, "a.py", "--output", out))
"""
    places = (REPOSITORY / "tools", folder / "tools", folder / "run", folder / "out-a")
    return [sys.executable, "-c", lines, *map(str, places)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_killed_runner_leaves_no_stage_running(tmp_path, tool):
    """Else the next one would meet its lock."""
    tool("a", "pipe = os.open(out, os.O_WRONLY)\nos.write(pipe, b'began')\ntime.sleep(30)\nos.write(pipe, b' more')")
    os.mkfifo(tmp_path / "out-a")
    with subprocess.Popen(another_runner(tmp_path)) as other, open(tmp_path / "out-a", "rb") as pipe:
        assert pipe.read(5) == b"began"
        other.kill()
        assert pipe.read() == b""  # until the stage has ended


def test_two_processes_do_not_run_the_same_stages(tmp_path, tool):
    """The second would start what is running, over its log and its marker."""
    wait = "out.touch()\nwhile not out.with_name('go').exists():\n    time.sleep(0.01)"
    first = tool("a", wait)
    with subprocess.Popen(another_runner(tmp_path)) as other:
        while not first.output.exists():
            assert other.poll() is None
            time.sleep(0.01)
        before = (tmp_path / "run/stages/a.json").read_bytes()
        with pytest.raises(UserError, match=f"process {other.pid} on .* is writing it"):
            Runner(tmp_path / "run").run(first)
        assert (tmp_path / "run/stages/a.json").read_bytes() == before
        (tmp_path / "go").touch()
    assert other.returncode == 0 and "seconds" in json.loads((tmp_path / "run/stages/a.json").read_text())


def test_needed_stages_run_first_and_once(tmp_path, tool):
    """Those of several stages too; what a failed one was needed for does not start."""
    a = tool("a", "out.write_text('a')")
    b = tool("b", "out.write_text(Path(sys.argv[3]).read_text() + 'b')", a.output, needs=[a])
    c = tool("c", "out.write_text(Path(sys.argv[3]).read_text() + 'c')", a.output, needs=[a])
    run = Runner(tmp_path / "run")
    run.run(b, c)
    assert (b.output.read_text(), c.output.read_text(), next(iter(run.seconds))) == ("ab", "ac", "a")
    d = tool("d", "sys.exit('error: of d')")
    with pytest.raises(UserError, match="stage 'd' failed: of d"):
        run.run(tool("e", "out.touch()", needs=[d]))
    assert not (tmp_path / "out-e").exists()


def test_a_row_that_is_added_has_its_neighbours_threads(tmp_path, tool, monkeypatch):
    """Seconds a step stay comparable, and so do the last bits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    stages = [tool(n, "out.write_text(os.environ['OMP_NUM_THREADS'])") for n in "ab"]
    Runner(tmp_path / "run").run(*stages)
    (tmp_path / "run/stages/b.json").unlink()
    Runner(tmp_path / "run").run(*stages)
    assert [(tmp_path / f"out-{n}").read_text() for n in "ab"] == ["2", "2"]
