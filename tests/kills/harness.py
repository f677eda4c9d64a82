"""SIGKILL at random moments, the same command again: does the end equal that of a run that was left alone?"""

from __future__ import annotations

import os
import random
import runpy
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests.kills.output_folders import differences, look
from vild.utils.errors import UserError

KINDS = {"start": 0.1, "work": 0.55, "write": 0.35}  # of moments, with their shares


@dataclass(frozen=True)
class KillableCommand:
    """A command that goes on when it is started again.

    Attributes:
        command: run in a folder of its own, so that all its paths can be relative.
        output: the folder below that one which it writes.
        kill: whether it is killed, or only run after one that was.
        losses: whether the losses that it logged last belong to its result.
    """

    name: str
    command: tuple[str, ...]
    output: str
    kill: bool = True
    losses: bool = False


@dataclass(frozen=True)
class Course:
    """How far a run is: seconds from its start to the first change in its folder (None: there was none yet), seconds
    since, names that have appeared there."""

    begin: float | None
    work: float
    names: int


@dataclass(frozen=True)
class Moment:
    """When a run is killed; ``at`` [0, 1) is drawn evenly.

    Of kind "start", before it has written anything; "work", at a share of the seconds that an undisturbed run works
    after that; "write", when the n-th new name appears in its folder: what has just been begun is not whole yet.
    """

    kind: str
    at: float

    def has_come(self, undisturbed: Course, seconds: float, now: Course) -> bool:
        """``seconds``: since the start."""
        if self.kind == "start":
            return seconds >= self.at * undisturbed.begin
        if self.kind == "work":
            return now.begin is not None and now.work >= self.at * undisturbed.work
        return now.names > self.at * undisturbed.names


def draw_moments(seed: int) -> Iterator[Moment]:
    """Without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield Moment(str(rng.choice(list(KINDS), p=list(KINDS.values()))), float(rng.random()))


def shares(total: int, parts: int) -> list[int]:
    """``total`` in so many parts, as even as can be."""
    return [(n + 1) * total // parts - n * total // parts for n in range(parts)]


def start(job: KillableCommand, folder: Path, environment: Mapping[str, str], warm: bool) -> int:
    """Begin a job in ``folder``, in a process group of its own; its output is appended to ``<name>.log`` there.

    ``warm``: the command, a Python script, runs in a copy of this process, which has loaded the libraries already: a
    new interpreter takes some ten seconds to do so before anything can be lost.

    Returns:
        its process id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        log = os.open(f"{job.name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if not warm:
            os.execve(job.command[0], job.command, environment)
        os.environ.clear()
        os.environ.update(environment)
        status = _run_script(job.command[1:])
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run_script(arguments: Sequence[str]) -> int:
    """Run a script as if the interpreter had been started with it; its exit status."""
    for seed in (torch.seed, np.random.seed, random.seed):
        seed()  # the copies would all draw the same
    sys.argv = list(arguments)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    return 0


def run(
    job: KillableCommand,
    folder: Path,
    environment: Mapping[str, str],
    moment: Moment | None = None,
    undisturbed: Course | None = None,
    warm: bool = False,
) -> tuple[int, Course]:
    """Run a job (:func:`start`) until its end or, with its whole process group, the ``moment``.

    Returns:
        exit status (-9: killed) and how far it came.
    """
    first, names, before = None, 0, look(folder / job.output)
    child, status, begun = start(job, folder, environment, warm), None, time.monotonic()
    try:
        while True:
            over, waited = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - begun
            if over:
                status = os.waitstatus_to_exitcode(waited)
                return status, Course(first, seconds - (first or seconds), names)
            seen = look(folder / job.output)
            if seen != before:
                first = seconds if first is None else first
                names += len(seen.keys() - before.keys())
                before = seen
            now = Course(first, 0.0 if first is None else seconds - first, names)
            if moment is not None and moment.has_come(undisturbed, seconds, now):
                break
            time.sleep(0.001)
    finally:
        # a run that ended by itself may have left children, too; one that has just begun has no group yet
        for kill, target in ((os.killpg, child), (os.kill, child)):
            if kill is os.killpg or status is None:
                with suppress(ProcessLookupError):
                    kill(target, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), now


@dataclass
class Harness:
    """Jobs that build on one another, run once undisturbed, then in rounds in which each is killed and begun again.

    Args:
        folder: ``whole/``, ``expected/`` and ``round/`` lie in it.
        jobs: in their order.
        environment: of the commands.
        link: names in ``folder`` that the jobs read, linked into the folder they run in.
        warm: see :func:`start`.
    """

    folder: Path
    jobs: Sequence[KillableCommand]
    environment: Mapping[str, str]
    link: Sequence[str] = ()
    warm: bool = False
    courses: dict[str, Course] = field(default_factory=dict)
    killed: dict[str, dict[str, int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def measure(self, tell: Callable[[str], None] = print) -> None:
        """Every job once, left alone; its output is kept as ``expected/<job>``.

        Raises:
            UserError: one failed.
        """
        whole, expected = self._empty("whole"), self._empty("expected")
        for job in self.jobs:
            status, self.courses[job.name] = run(job, whole, self.environment, warm=self.warm)
            if status != 0:
                raise UserError(f"{job.name}: {self._last_line(whole, job)} (see {whole / job.name}.log)")
            shutil.copytree(whole / job.output, expected / job.name)
            course = self.courses[job.name]
            tell(f"{job.name}, undisturbed: {course.begin or 0:.1f} s to its start, {course.work:.1f} s of work")
            self.killed[job.name] = dict.fromkeys(KINDS, 0)

    def torment(self, kills: int, rounds: int, seed: int, tell: Callable[[str], None] = print) -> None:
        """Kill ``kills`` times, evenly over jobs and rounds; what is lost is added to ``lost``."""
        moments, victims, done, begun = draw_moments(seed), [j for j in self.jobs if j.kill], 0, time.monotonic()
        quotas = iter(shares(kills, rounds * len(victims)))
        for number in range(rounds):
            folder = self._empty("round")
            for job in self.jobs:
                quota, finished = next(quotas) if job.kill else 0, False
                while quota or not finished:
                    if finished:  # it ended before its moment came: once more, from the beginning
                        shutil.rmtree(folder / job.output)
                    moment = next(moments) if quota else None
                    status, now = run(job, folder, self.environment, moment, self.courses[job.name], self.warm)
                    finished = status == 0
                    if status == -signal.SIGKILL and moment is not None:
                        quota, done = quota - 1, done + 1
                        self.killed[job.name][moment.kind] += 1
                        left = (time.monotonic() - begun) / done * (kills - done)
                        tell(f"kill {done} of {kills}: {_describe(job, moment, now)}; {left / 60:.0f} min left")
                    elif not finished:
                        self._lose(number, job, self._last_line(folder, job))
                        shutil.rmtree(folder / job.output, ignore_errors=True)
                        finished = not quota
                    elif place := differences(self.folder / "expected" / job.name, folder / job.output, job.losses):
                        self._lose(number, job, place)

    def _lose(self, number: int, job: KillableCommand, what: str) -> None:
        self.lost.append(f"round {number + 1}, {job.name}: {what}")
        kept = self.folder / f"lost{len(self.lost)}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.folder / "round", kept, symlinks=True)

    def _empty(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for other in self.link:
            (folder / other).symlink_to(Path("..") / other)
        return folder

    def _last_line(self, folder: Path, job: KillableCommand) -> str:
        lines = (folder / f"{job.name}.log").read_text(errors="replace").strip().splitlines()
        return (lines or ["no output"])[-1]

    def verdict(self) -> str:
        """One line."""
        kills = sum(sum(kinds.values()) for kinds in self.killed.values())
        return "; ".join([f"{kills} kills, {len(self.lost)} lost", *self.lost])


def _describe(job: KillableCommand, moment: Moment, now: Course) -> str:
    if now.begin is None:
        return f"{job.name}, while it starts"
    where = f", at the appearance of its name {now.names}" if moment.kind == "write" else ""
    return f"{job.name}, {now.work:.1f} s into its work{where}"
