"""Stages: commands that run side by side, each once.

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
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import zip_longest
from pathlib import Path

import torch

from vild.utils.errors import UserError
from vild.utils.files import write_json

TOOLS = Path(__file__).resolve().parents[1]
POLL = 0.2  # seconds between two looks at the running stages
# tqdm's "43%|####  | 12/28 [00:10<00:12" and Detectron2's "eta: 0:00:12"
_PROGRESS = re.compile(rb"(\d+%)\|[^|]*\|\s*\S+ \[[^<\]]*<([\d:]+)|eta: ([\d:]+)")


@dataclass(frozen=True)
class Stage:
    """A tool with its arguments, the file or folder that it writes, and the stages whose outputs it reads."""

    name: str
    command: tuple[str, ...]
    output: Path
    needs: tuple[Stage, ...] = ()

    @classmethod
    def of(cls, name: str, output: Path, *command: object, needs: tuple[Stage, ...] = ()) -> Stage:
        return cls(name, tuple(map(str, command)), output, needs)


class Runner:
    """Runs stages, each once; started again, it skips the finished ones.

    Args:
        folder: everything the stages write lies below it.
        environment: variables for the stages' processes, added to this process's own.
    """

    def __init__(self, folder: Path, **environment: str):
        self.folder, self.environment = folder, environment
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}  # of the finished stages

    def run(self, *stages: Stage) -> None:
        """Run what the stages need, in waves of stages that do not need one another; then the stages, side by side.

        Raises:
            UserError: a stage failed (raised when those beside it have ended), or was started before with another
                command (raised before anything runs).
        """
        graph: dict[Stage, tuple[Stage, ...]] = {}
        todo = list(stages)
        while todo:
            stage = todo.pop(0)
            graph[stage] = stage.needs
            todo += stage.needs
        for stage in graph:
            self._check_marker(stage)
        sorter = TopologicalSorter(graph)
        sorter.prepare()
        while sorter.is_active():
            wave = sorter.get_ready()
            self._run_wave([stage for stage in wave if stage not in stages])
            sorter.done(*wave)
        self._run_wave(stages)

    def _marker(self, stage: Stage) -> Path:
        return self.folder / "stages" / f"{stage.name}.json"

    def _check_marker(self, stage: Stage) -> None:
        """Note a finished stage. UserError if what is there, finished or not, was made by another command."""
        marker = self._marker(stage)
        if stage.name in self.seconds or not marker.exists():
            return
        found = json.loads(marker.read_text())
        if found["command"] != list(stage.command):
            pairs = enumerate(zip_longest(found["command"], stage.command))
            at = next(n for n, (then, now) in pairs if then != now)
            then, now = (" ".join(c[max(0, at - 1) : at + 1]) for c in (found["command"], stage.command))  # key, value
            raise UserError(
                f"{marker}: stage '{stage.name}' was started with another command, '{then}' where it is now '{now}'; "
                f"remove that file and {stage.output}, with what later stages made of it, or rename the grid's row"
            )
        if "seconds" in found:
            self.seconds[stage.name] = found["seconds"]
            print(f"{stage.name}: finished before", flush=True)

    def _run_wave(self, wave: Sequence[Stage]) -> None:
        """Run stages, as many at once as there are cores: two small trainings on a core each finish sooner than one
        after the other on both. Reports progress every 30 s, on a terminal every 3 s."""
        waiting = [stage for stage in wave if stage.name not in self.seconds]
        cores, terminal, reported = torch.get_num_threads(), sys.stdout.isatty(), -60.0
        threads = max(1, cores // max(1, len(wave)))  # finished ones count: a restart does not change the last bits
        running, failures = [], []
        try:
            while waiting or running:
                while waiting and len(running) < cores:
                    running.append(_Process(waiting.pop(0), self, threads))
                time.sleep(POLL)
                for process in [p for p in running if p.poll() is not None]:
                    running.remove(process)
                    name, seconds = process.stage.name, round(process.seconds, 1)
                    if process.returncode:
                        failures.append(process.failure())
                        line = failures[-1]
                    else:
                        write_json(self._marker(process.stage), {"command": process.stage.command, "seconds": seconds})
                        self.seconds[name] = seconds
                        line = f"{name}: finished in {seconds:.0f} s"
                    left = len(waiting) + len(running)
                    print(line + (f"; {left} left before the next step" if left else ""), " " * 40, flush=True)
                if running and time.monotonic() - reported > (3 if terminal else 30):
                    reported = time.monotonic()
                    print(f"{'; '.join(p.progress() for p in running):<78}", end="\r" if terminal else "\n", flush=True)
        finally:
            for process in running:
                process.terminate()
                process.wait()
        if failures:
            raise UserError(f"{failures[0]}; {len(failures)} of {len(wave)} stages failed")


class _Process(subprocess.Popen):
    """A running stage. Its command is written down before it starts, so that no other one continues what it left."""

    def __init__(self, stage: Stage, runner: Runner, threads: int):
        marker = runner._marker(stage)
        write_json(marker, {"command": stage.command})
        self.stage, self.log, self.started = stage, marker.with_suffix(".log"), time.monotonic()
        command = [sys.executable, str(TOOLS / stage.command[0]), *stage.command[1:]]
        environment = {**os.environ, **runner.environment, "OMP_NUM_THREADS": str(threads)}
        with open(self.log, "wb") as file:
            super().__init__(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def failure(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"stage '{self.stage.name}' failed: {lines[-1].removeprefix('error: ')} (see {self.log})"

    def progress(self) -> str:
        """The time it has run and, from its last progress bar, the time left."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            found = _PROGRESS.findall(file.read())
        percent, left, eta = (part.decode() for part in found[-1]) if found else ("", "", "")
        rest = f", {percent}{', ' if percent else ''}{left or eta} left in this step" if found else ""
        return f"{self.stage.name}: {self.seconds:.0f} s{rest}"
