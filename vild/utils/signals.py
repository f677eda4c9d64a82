"""SIGTERM and SIGINT as a wish to end: at once in most tools, at the end of a step in training.

Schedulers warn with SIGTERM and kill some 30 seconds later (SLURM's preemption and time limit, Kubernetes, torchrun,
which passes it on); a person presses Ctrl-C, which is SIGINT.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# srun sends a signal to every process of a job, a terminal to every process of a command, and torchrun and our own
# launcher pass it on once more: what comes within so many seconds is one wish
ONE_WISH = 1.0


class Ended(BaseException):
    """Raised where the process was asked to end. No ``Exception``: nobody takes it for a failure of what was going on.

    Args:
        number: the signal.
        line: what the user is told ("": nothing).
    """

    def __init__(self, number: int, line: str | None = None):
        self.signal = signal.Signals(number)
        super().__init__(f"ended by {self.signal.name}" if line is None else line)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises :class:`Ended` in the block, as SIGINT raises KeyboardInterrupt."""

    def end(number, frame):
        # a scheduler ends the data loader's workers too; that they died shall not be told on the way out
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Ended(number)

    with _handled(end, (signal.SIGTERM,)):
        yield


class _Wish:
    """Of :func:`held`: the signal that waits, and what the next one does: "raise", "hold" or nothing ("deaf")."""

    asked: int | None = None
    since = 0.0
    then = "raise"


_wish = _Wish()


@contextmanager
def held() -> Iterator[None]:
    """In the block both signals wait: :func:`asked` tells of them, :func:`at_once` raises. Another one, later than
    ``ONE_WISH``, ends the process at once."""
    process = os.getpid()

    def wait(number, frame):
        if os.getpid() != process:  # a data loader's worker, forked in the block: the trainer ends it
            return
        if _wish.then == "raise":
            raise Ended(number)
        if _wish.asked is None:
            _wish.asked, _wish.since = number, time.monotonic()
            line = f"{signal.Signals(number).name}: the training ends after this step; another one ends it at once\n"
            os.write(2, line.encode())  # not by print, which may be what was interrupted
        elif _wish.then == "hold" and time.monotonic() - _wish.since > ONE_WISH:
            signal.signal(number, signal.SIG_DFL)
            os.kill(process, number)

    _wish.asked, _wish.then = None, "hold"
    try:
        with _handled(wait, SIGNALS):
            yield
    finally:
        _wish.asked, _wish.then = None, "raise"


def asked() -> int | None:
    """The signal that waits in :func:`held`, if one does."""
    return _wish.asked


@contextmanager
def at_once() -> Iterator[None]:
    """A block in :func:`held` that may end anywhere: signals raise Ended in it, also one that waits already."""
    before = _wish.then
    if _wish.asked is not None:
        raise Ended(_wish.asked)
    _wish.then = "raise"
    try:
        yield
    finally:
        _wish.then = before


@contextmanager
def unheard() -> Iterator[None]:
    """A block in :func:`held` that signals do not end: the last file is being written. (When one rank has left, the
    launcher sends SIGTERM to the others.)"""
    before, _wish.then = _wish.then, "deaf"
    try:
        yield
    finally:
        _wish.then = before


@contextmanager
def passed_on() -> Iterator[None]:
    """For a process that only waits for its children: signals go to them, and it waits on."""

    def pass_on(number, frame):
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    with _handled(pass_on, SIGNALS):
        yield


def heed_parent_alone() -> None:
    """For a data loader's worker: SIGTERM ends it only where its trainer sends it. A scheduler's goes to every process
    of a job, but the trainer still needs the worker for the step that it ends."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait():  # a handler would not learn who sent it
        while True:
            if signal.sigwaitinfo([signal.SIGTERM]).si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _handled(handler: Callable, numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Where signals are ours to handle: not in a thread, and not those that are ignored (nohup)."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        taken = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
        before = {n: signal.signal(n, handler) for n in taken}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
