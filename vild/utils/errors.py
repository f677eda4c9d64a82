"""Errors that end a tool with one line on stderr: user mistakes, failing disks, killed workers, signals."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from vild.utils.signals import ONE_REQUEST, Ended, ended_by_sigterm

# Errors of disks and network file systems. Any other OSError is a bug of ours and keeps its traceback.
_STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENAMETOOLONG),
}
LONGEST = 2000  # characters of a message
WORKER = "DataLoader worker"  # how PyTorch's message about a dead worker process begins
KILLED = "the system kills processes when memory is short; see DATALOADER.NUM_WORKERS or --num-workers"
NO_DETECTRON2 = "Detectron2 is not installed: run python -m vild.install_detectron2"
# How the warnings begin that our dependencies raise about one another and, "not writable", Detectron2 of what it copies
_KNOWN_WARNINGS = ("`torch.jit.script", "pkg_resources is deprecated", "Importing from timm", "torch.meshgrid",
                   "The given NumPy array is not writable", "This DataLoader will create")  # fmt: skip


class UserError(ValueError):
    """A mistake that the user can correct. The message names the file, the key and the value.

    It is a single line whatever a file contains: line breaks and terminal control characters become spaces.
    """

    status = 2

    def __init__(self, message: str):
        text = str(message).strip()
        # a data loader's worker wraps the message into its traceback, whose last line is the message
        if text.startswith("Caught ") and "\n" in text:
            text = text.splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: ")
        text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
        super().__init__("".join(c if c.isprintable() else " " for c in text))


class BadImage(UserError):
    """An image that cannot be read or does not match its annotations."""


class NotAvailable(UserError):
    """A file that would have to be downloaded, and cannot be."""


class Failure(RuntimeError):
    """A failure that is no user mistake and that a traceback would not explain: a killed process, a loss that is not
    finite. The message is a single line."""

    status = 1


def printable(name: str | os.PathLike) -> str:
    """A file name as text that any terminal and file accepts: bytes that are not UTF-8 are escaped."""
    return str(name).encode(errors="backslashreplace").decode()


def count_of(number: int, noun: str) -> str:
    """ "1 image", "2,000 images", "2 classes"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def first_of(names: Sequence[str]) -> str:
    """ "'mug'", or "'mug', ..." where there are more."""
    return f"'{names[0]}'" + (", ..." if len(names) > 1 else "")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate a tool's ``main``: expected errors end as one line on stderr, known third-party warnings are silenced.

    Exit status: 2 for a UserError, a missing Detectron2 or a failing disk; 1 for a Failure; 128 + signal after SIGTERM
    or SIGINT, as a shell reports it (a scheduler or make would take 0 for a finished result).
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        if hasattr(sys.stdout, "reconfigure"):  # file names need not be valid text
            sys.stdout.reconfigure(errors="backslashreplace")
        logging.raiseExceptions = False  # no traceback for every log line that a full disk refuses
        silence_known_warnings()
        logging.basicConfig(format="%(message)s")  # else open_clip does, and warnings begin with "WARNING:vild..."
        try:
            with ended_by_sigterm():
                try:
                    return main(*args, **kwargs)
                except RuntimeError as error:  # a data loader's, outside of training (see loader.Watched)
                    if isinstance(error, Failure) or not str(error).startswith(WORKER):
                        raise
                    time.sleep(ONE_REQUEST)  # if a scheduler did it, its signal is on the way to this process too
                    raise Failure(f"{first_line(error).rstrip('. ')} ({KILLED})") from error
        except (UserError, Failure) as error:
            _leave(f"error: {error}", error.status)
        except ImportError as error:
            if not is_detectron2_missing(error):
                raise
            _leave(f"error: {NO_DETECTRON2}", 2)
        except OSError as error:
            if error.errno not in _STORAGE:
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            _leave(f"error: {where}{error.strerror}", 2)
        except KeyboardInterrupt:
            _leave("ended by SIGINT", 128 + signal.SIGINT)
        except Ended as ended:
            _leave(str(ended), 128 + ended.signal)

    return wrapper


def is_detectron2_missing(error: ImportError) -> bool:
    """Whether this is the ImportError of a machine without Detectron2."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "detectron2"


def silence_known_warnings() -> None:
    """Ignore the warnings of :data:`_KNOWN_WARNINGS`, in this process and in those it starts, and what PyTorch logs in
    this one about Detectron2's use of it."""
    for start in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", start)
    filters = ",".join(f"ignore:{start}" for start in _KNOWN_WARNINGS)
    given = os.environ.get("PYTHONWARNINGS", "")
    if filters not in given:
        os.environ["PYTHONWARNINGS"] = f"{given},{filters}" if given else filters
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # "is_fx_tracing ...": Detectron2's pooler


_marker: Path | None = None


def report_once(marker: Path) -> None:
    """Let only one process of a job report an error, which often occurs in all: the first to create ``marker``."""
    global _marker
    _marker = marker


def first_to_report() -> bool:
    """Whether this process reports the error of its job; True at most once per job."""
    if _marker is None:
        return True
    try:
        os.close(os.open(_marker, os.O_CREAT | os.O_EXCL))
    except OSError:  # it exists; or its folder has gone, and the launcher with it
        return False
    return True


def _leave(line: str, status: int) -> None:
    logging.shutdown()
    if line and first_to_report():
        print(line, file=sys.stderr)
    sys.exit(status)
