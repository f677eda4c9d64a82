"""Kills commands at random moments, runs them again, and compares the results with those of runs without a kill."""

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

from tests.kills.output_folders import differences, list_files
from vild.utils.errors import UserError

KINDS = {"start": 0.1, "work": 0.55, "write": 0.35}  # kinds of moments, with their probabilities


@dataclass(frozen=True)
class KillableCommand:
    """A command that resumes when it is started again.

    Attributes:
        command: runs in a separate folder; its paths are relative to that.
        output: the folder, below that one, that it writes to.
        kill: whether it is killed, or only runs after one that was.
        losses: whether the last logged losses are compared, too.
    """

    name: str
    command: tuple[str, ...]
    output: str
    kill: bool = True
    losses: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a run is: seconds from its start to the first change in its folder (None: no change yet), seconds since
    then, and the number of new names in the folder."""

    startup: float | None
    work: float
    names: int


@dataclass(frozen=True)
class Moment:
    """When a run is killed: a ``share`` in [0, 1) of a phase of the reference run, which was not killed.

    Of kind "start", of the time before it writes anything; "work", of the time after that; "write", of the new names
    in its folder: a file that has just been created is not complete yet.
    """

    kind: str
    share: float

    def has_come(self, reference: Progress, seconds: float, now: Progress) -> bool:
        """``seconds``: since the start of the run."""
        if self.kind == "start":
            return seconds >= self.share * reference.startup
        if self.kind == "work":
            return now.startup is not None and now.work >= self.share * reference.work
        return now.names > self.share * reference.names


def draw_moments(seed: int) -> Iterator[Moment]:
    """An endless sequence."""
    rng = np.random.default_rng(seed)
    while True:
        yield Moment(str(rng.choice(list(KINDS), p=list(KINDS.values()))), float(rng.random()))


def shares(total: int, parts: int) -> list[int]:
    """Divide ``total`` into parts that differ by at most 1."""
    return [(n + 1) * total // parts - n * total // parts for n in range(parts)]


def start(job: KillableCommand, folder: Path, environment: Mapping[str, str], warm: bool) -> int:
    """Start a job in ``folder`` as a new process group, with its output appended to ``<name>.log``; its process id.

    ``warm``: the command, a Python script, runs in a fork of this process, which has imported the libraries already; a
    new interpreter takes some ten seconds for that.
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
    """Run a script as ``python`` would; its exit status."""
    for seed in (torch.seed, np.random.seed, random.seed):
        seed()  # all forks would draw the same numbers
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
    reference: Progress | None = None,
    warm: bool = False,
) -> tuple[int, Progress]:
    """Run a job (:func:`start`) until its end, or until ``moment``, at which its process group is killed.

    Returns:
        exit status (-9: killed) and progress.
    """
    first, names, before = None, 0, list_files(folder / job.output)
    child, status, started = start(job, folder, environment, warm), None, time.monotonic()
    try:
        while True:
            over, waited = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - started
            if over:
                status = os.waitstatus_to_exitcode(waited)
                return status, Progress(first, seconds - (first or seconds), names)
            seen = list_files(folder / job.output)
            if seen != before:
                first = seconds if first is None else first
                names += len(seen.keys() - before.keys())
                before = seen
            now = Progress(first, 0.0 if first is None else seconds - first, names)
            if moment is not None and moment.has_come(reference, seconds, now):
                break
            time.sleep(0.001)
    finally:
        # also children left by a run that has ended; a run that has just started has no group yet
        for kill, target in ((os.killpg, child), (os.kill, child)):
            if kill is os.killpg or status is None:
                with suppress(ProcessLookupError):
                    kill(target, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), now


@dataclass
class Harness:
    """Runs jobs that build on one another, first without kills, then in rounds in which they are killed and restarted.

    Args:
        folder: has the subfolders ``whole/``, ``expected/`` and ``round/``.
        jobs: in the order in which they run.
        environment: of the commands.
        link: names in ``folder`` that the jobs read, linked into the folder they run in.
        warm: see :func:`start`.
    """

    folder: Path
    jobs: Sequence[KillableCommand]
    environment: Mapping[str, str]
    link: Sequence[str] = ()
    warm: bool = False
    references: dict[str, Progress] = field(default_factory=dict)
    killed: dict[str, dict[str, int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def run_references(self, log: Callable[[str], None] = print) -> None:
        """Run every job once; its output is kept as ``expected/<job>``. UserError if one fails."""
        whole, expected = self._empty("whole"), self._empty("expected")
        for job in self.jobs:
            status, self.references[job.name] = run(job, whole, self.environment, warm=self.warm)
            if status != 0:
                raise UserError(f"{job.name}: {self._last_line(whole, job)} (see {whole / job.name}.log)")
            shutil.copytree(whole / job.output, expected / job.name)
            done = self.references[job.name]
            log(f"{job.name}, not killed: {done.startup or 0:.1f} s to its first output, {done.work:.1f} s of work")
            self.killed[job.name] = dict.fromkeys(KINDS, 0)

    def kill_and_compare(self, kills: int, rounds: int, seed: int, log: Callable[[str], None] = print) -> None:
        """Kill ``kills`` times, evenly over jobs and rounds; differences are added to ``lost``."""
        moments, killable, done, started = draw_moments(seed), [j for j in self.jobs if j.kill], 0, time.monotonic()
        quotas = iter(shares(kills, rounds * len(killable)))
        for number in range(rounds):
            folder = self._empty("round")
            for job in self.jobs:
                quota, finished = next(quotas) if job.kill else 0, False
                while quota or not finished:
                    if finished:  # before its moment came: again from nothing
                        shutil.rmtree(folder / job.output)
                    moment = next(moments) if quota else None
                    status, now = run(job, folder, self.environment, moment, self.references[job.name], self.warm)
                    finished = status == 0
                    if status == -signal.SIGKILL and moment is not None:
                        quota, done = quota - 1, done + 1
                        self.killed[job.name][moment.kind] += 1
                        left = (time.monotonic() - started) / done * (kills - done)
                        log(f"kill {done} of {kills}: {_describe(job, moment, now)}; {left / 60:.0f} min left")
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

    def summary(self) -> str:
        """One line, such as "50 kills, 0 lost"."""
        kills = sum(sum(kinds.values()) for kinds in self.killed.values())
        return "; ".join([f"{kills} kills, {len(self.lost)} lost", *self.lost])


def _describe(job: KillableCommand, moment: Moment, now: Progress) -> str:
    if now.startup is None:
        return f"{job.name}, during startup"
    where = f", at its file {now.names}" if moment.kind == "write" else ""
    return f"{job.name}, {now.work:.1f} s into its work{where}"
