"""Stages: commands that run in parallel, each once.

In the runner's folder, ``stages/<name>.json`` holds a stage's command from its start, and its seconds once it has
finished; ``stages/<name>.log`` holds its output.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import zip_longest
from pathlib import Path

import torch

from vild.utils.errors import UserError
from vild.utils.files import write_json
from vild.utils.lock import only_writer

TOOLS = Path(__file__).resolve().parents[1]
# Before a stage's command: the stage gets SIGTERM (15) when the runner ends in any way, SIGKILL included (1 is
# PR_SET_PDEATHSIG, which stays over execv). Only Linux can. Not as a preexec_fn: that may deadlock beside threads
_TIE = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
_TIED = (sys.executable, "-I", "-c", _TIE) if sys.platform == "linux" else ()
# tqdm's "43%|####  | 12/28 [00:10<00:12" and Detectron2's "eta: 0:00:12"
_PROGRESS = re.compile(rb"(\d+%)\|[^|]*\|\s*\S+ \[[^<\]]*<([\d:]+)|eta: ([\d:]+)")


@dataclass(frozen=True)
class Stage:
    """A tool with its arguments, the file or folder that it writes, and the stages whose outputs it reads."""

    name: str
    output: Path
    command: tuple[str, ...]
    needs: tuple[Stage, ...] = ()


def stage(name: str, output: Path, *command: object, needs: Iterable[Stage] = ()) -> Stage:
    return Stage(name, output, tuple(map(str, command)), tuple(needs))


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, each as a value of CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(n) for n in range(count)]


class Runner:
    """Runs stages, each once; started again, it skips the finished ones.

    Args:
        folder: everything the stages write lies below it.
        environment: variables for the stages' processes, in addition to those of this process.
    """

    def __init__(self, folder: Path, **environment: str):
        self.folder, self.environment = folder, environment
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}  # of the finished stages

    def run(self, *stages: Stage) -> None:
        """Run what the stages need, step by step; then the stages, in parallel. They must not need one another.

        Raises:
            UserError: a stage failed (raised when the others of its step have ended), or was started before with
                another command, or another process runs stages here (both raised before anything runs).
        """
        graph: dict[Stage, tuple[Stage, ...]] = {}
        todo = [*stages]
        while todo:
            each = todo.pop()
            graph[each] = each.needs
            todo += [need for need in each.needs if need not in graph]
        with only_writer(self.folder / "stages", folder=True):
            for each in graph:
                self._check_marker(each)
            sorter = TopologicalSorter(graph)
            sorter.prepare()
            while sorter.is_active():
                step = sorter.get_ready()
                self.run_step([each for each in step if each not in stages])
                sorter.done(*step)
            self.run_step(stages)

    def _marker(self, each: Stage) -> Path:
        return self.folder / "stages" / f"{each.name}.json"

    def _check_marker(self, each: Stage) -> None:
        """Note a finished stage. UserError if it was started with another command, whether or not it finished."""
        marker = self._marker(each)
        if each.name in self.seconds or not marker.exists():
            return
        found = json.loads(marker.read_text())
        if found["command"] != list(each.command):
            pairs = enumerate(zip_longest(found["command"], each.command))
            at = next(n for n, (then, now) in pairs if then != now)
            then, now = (" ".join(c[max(0, at - 1) : at + 1]) for c in (found["command"], each.command))  # key, value
            raise UserError(
                f"{marker}: stage '{each.name}' was started with another command, '{then}' where it is now '{now}'; "
                f"remove that file and {each.output}, with what later stages made of it, or rename the grid's row"
            )
        if "seconds" in found:
            self.seconds[each.name] = found["seconds"]
            print(f"{each.name}: finished before", flush=True)

    def run_step(self, stages: Sequence[Stage]) -> None:
        """Run stages that need nothing unfinished: one on each GPU or, without GPUs, as many at once as there are cores
        (two small trainings on one core each finish sooner than one after the other on both). Reports progress
        regularly."""
        waiting = [each for each in stages if each.name not in self.seconds]
        cores, terminal, reported = torch.get_num_threads(), sys.stdout.isatty(), float("-inf")
        free: list[str | None] = [*visible_gpus()] or [None] * cores
        threads = max(1, cores // max(1, len(stages)))  # also of a stage that is added later: bits depend on it
        running: list[_Process] = []
        failures: list[str] = []
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_Process(waiting.pop(0), self, threads, free.pop(0)))
                time.sleep(0.2)
                for process in [each for each in running if each.poll() is not None]:
                    running.remove(process)
                    free.append(process.gpu)
                    name, seconds = process.stage.name, round(process.seconds, 1)
                    if process.returncode:
                        failures.append(line := process.failure())
                    else:
                        write_json(process.marker, {"command": process.stage.command, "seconds": seconds})
                        self.seconds[name], line = seconds, f"{name}: finished in {seconds:.0f} s"
                    left = len(waiting) + len(running)
                    print(line + (f"; {left} left in this step" if left else ""), " " * 40, flush=True)
                if running and time.monotonic() - reported > (3 if terminal else 30):
                    reported = time.monotonic()
                    line = "; ".join(each.progress() for each in running)
                    print(f"{line:<78}", end="\r" if terminal else "\n", flush=True)
        finally:
            for process in running:
                process.terminate()
                process.wait()
        if failures:
            raise UserError(f"{failures[0]}; {len(failures)} of {len(stages)} stages failed")


class _Process(subprocess.Popen):
    """A running stage. Its command is saved first, so that no other command resumes from its unfinished output."""

    def __init__(self, each: Stage, runner: Runner, threads: int, gpu: str | None):
        self.stage, self.marker, self.started = each, runner._marker(each), time.monotonic()
        self.gpu = gpu  # the only one that it sees
        self.log = self.marker.with_suffix(".log")
        write_json(self.marker, {"command": each.command})
        environment = {**os.environ, **runner.environment, "OMP_NUM_THREADS": str(threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [*_TIED, sys.executable, str(TOOLS / each.command[0]), *each.command[1:]]
        with open(self.log, "wb") as file:
            super().__init__(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def failure(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"stage '{self.stage.name}' failed: {lines[-1].removeprefix('error: ')} (see {self.log})"

    def progress(self) -> str:
        """The time since its start and, from its last progress bar, the time left."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            found = _PROGRESS.findall(file.read())
        percent, left, eta = (part.decode() for part in found[-1]) if found else ("", "", "")
        rest = f", {percent}{', ' if percent else ''}{left or eta} left in this stage" if found else ""
        return f"{self.stage.name}: {self.seconds:.0f} s{rest}"
