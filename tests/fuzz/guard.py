"""What a case must not do: hang, take gigabytes, write elsewhere, start a program, ask the network."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CPU_SECONDS, SECONDS = 20, 1500  # of a case; the second for one that waits
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_FORBIDDEN = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.chmod", "shutil.rmtree"),
}
_watch: dict = {"folder": None, "seen": []}


class Hang(BaseException):
    """No Exception: nobody catches it."""


def _audit(event: str, args: tuple) -> None:
    folder = _watch["folder"]
    if folder is None:
        return
    if event == "open":
        path, _, flags = args
        elsewhere = isinstance(flags, int) and flags & _WRITES and not _below(path, folder)
    else:
        elsewhere = event in _FORBIDDEN and not (args and _below(args[0], folder))
    if elsewhere:
        _watch["seen"].append(f"{event} {str(args)[:200]}")


def _below(path: object, folder: str) -> bool:
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    return os.path.realpath(text).startswith(folder + os.sep) or "__pycache__" in text or text == os.devnull


sys.addaudithook(_audit)  # for good; it looks at nothing but during a case


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """A case: it ends in time and touches nothing outside ``folder``."""

    def hang(*_):
        raise Hang("the case does not end")

    old = {number: signal.signal(number, hang) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # C code that does not end
    _watch.update(folder=os.path.realpath(folder), seen=[])
    try:
        yield
    finally:
        _watch["folder"] = None
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)
    assert not _watch["seen"], f"outside its folder: {_watch['seen']}"


def forget_peak() -> None:
    """Let the peak of this process's memory begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes: the most memory this process has had since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
