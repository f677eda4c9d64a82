"""SIGTERM and SIGINT as a request to end: immediately in most tools, after the current step in training.

Schedulers send SIGTERM and kill some 30 seconds later (SLURM's preemption and time limit, Kubernetes, torchrun, which
passes it on); a person presses Ctrl-C, which is SIGINT.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# srun signals every process of a job, a terminal every process of a command, and torchrun and our own launcher pass
# the signal on once more: whatever arrives within this many seconds is one request
ONE_REQUEST = 1.0


class Ended(BaseException):
    """Raised where the process was asked to end. Not an ``Exception``: nothing should handle it as a failure.

    Args:
        number: the signal.
        line: the message for the user ("": none).
    """

    def __init__(self, number: int, line: str | None = None):
        self.signal = signal.Signals(number)
        super().__init__(f"ended by {self.signal.name}" if line is None else line)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises :class:`Ended` in the block, as SIGINT raises KeyboardInterrupt."""

    def end(number, frame):
        # a scheduler ends the data loader's workers too: do not report their death on the way out
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise Ended(number)

    with _handled(end, (signal.SIGTERM,)):
        yield


# State of deferred(): the signal that waits, when it came, and what the next does ("raise", "defer" or "ignore")
_request = SimpleNamespace(pending=None, since=0.0, then="raise")


@contextmanager
def deferred() -> Iterator[None]:
    """Signals wait in the block: :func:`pending` returns the one that came, :func:`interruptible` raises it. A second
    one, later than ``ONE_REQUEST``, ends the process immediately."""
    process = os.getpid()

    def wait(number, frame):
        if os.getpid() != process:  # a data loader's worker, forked in the block: the trainer ends it
            return
        if _request.then == "raise":
            raise Ended(number)
        if _request.pending is None:
            _request.pending, _request.since = number, time.monotonic()
            name = signal.Signals(number).name
            line = f"{name}: the training ends after this step; a second signal ends it immediately\n"
            os.write(2, line.encode())  # print may be what was interrupted
        elif _request.then == "defer" and time.monotonic() - _request.since > ONE_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(process, number)

    _request.pending, _request.then = None, "defer"
    try:
        with _handled(wait, SIGNALS):
            yield
    finally:
        _request.pending, _request.then = None, "raise"


def pending() -> int | None:
    """The signal that waits in :func:`deferred`, if there is one."""
    return _request.pending


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in :func:`deferred` that may end anywhere: signals raise Ended in it, including one already pending."""
    if _request.pending is not None:
        raise Ended(_request.pending)
    with _then("raise"):
        yield


@contextmanager
def uninterruptible() -> Iterator[None]:
    """A block in :func:`deferred` that no signal ends, for the last file: the launcher ends the other ranks when one
    has left."""
    with _then("ignore"):
        yield


@contextmanager
def _then(action: str) -> Iterator[None]:
    before, _request.then = _request.then, action
    try:
        yield
    finally:
        _request.then = before


@contextmanager
def forwarded_to_children() -> Iterator[None]:
    """For a process that only waits for its children: it passes signals on to them and keeps waiting."""

    def forward(number, frame):
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    with _handled(forward, SIGNALS):
        yield


@contextmanager
def held() -> Iterator[None]:
    """SIGTERM waits in the block, and in processes that are forked in it until :func:`end_by_parent_only`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_by_parent_only() -> None:
    """For a data loader's worker: only its trainer's SIGTERM ends it. A scheduler signals every process of a job, but
    the trainer needs the worker to finish its step."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait():  # a handler would not learn who sent it
        while True:
            if signal.sigwaitinfo([signal.SIGTERM]).si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _handled(handler: Callable, numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Handle signals in the block, in the main thread only, and leave ignored ones (nohup) ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        taken = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
        before = {n: signal.signal(n, handler) for n in taken}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
