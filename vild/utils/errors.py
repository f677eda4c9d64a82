"""What a user got wrong, what went wrong around us, and being asked to end: each in one line."""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vild.utils.signals import ONE_WISH, Ended, ended_by_sigterm

# what disks and network folders say; another OSError is a fault of ours and keeps its traceback
_STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EMFILE),
}
LONGEST = 2000  # characters of a message
WORKER = "DataLoader worker"  # PyTorch's words for the death of a loader's process begin so
KILLED = "when memory is short, the system kills; see DATALOADER.NUM_WORKERS or --num-workers"


class UserError(ValueError):
    """A mistake the user can mend. The message is one line that names the file, the key and the value.

    It is one line whatever a file put into it: a name of two lines, or the control characters that move a terminal's
    cursor, become spaces.
    """

    def __init__(self, message: str):
        text = str(message).strip()
        # a data loader's worker wraps the message into its traceback, whose last line is the message
        if text.startswith("Caught ") and "\n" in text:
            text = text.splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: ")
        text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
        super().__init__("".join(c if c.isprintable() else " " for c in text))


class BadImage(UserError):
    """An image that cannot be read, or is not what its annotations are of."""


class Failure(RuntimeError):
    """What nobody typed wrong and no traceback would explain: a process that was killed, a loss that is not finite.
    The message is one line."""


def printable(name: str | os.PathLike) -> str:
    """A file's name as text that any terminal and file takes: bytes of it that are not UTF-8 are escaped."""
    return str(name).encode(errors="backslashreplace").decode()


def first_line(error: BaseException) -> str:
    """What an exception says, its first line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate a script's ``main``: what is foreseen ends as one line on stderr.

    Exit status 2 for a UserError or a disk that fails, 1 for a Failure, 128 + signal where SIGTERM or SIGINT asked for
    the end. (That is what a shell reports of a process that a signal ended. Not 0: a scheduler's "afterok", make and
    :mod:`experiments.runner` would take what is half done for done.)
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        if hasattr(sys.stdout, "reconfigure"):  # a file's name need not be text
            sys.stdout.reconfigure(errors="backslashreplace")
        logging.raiseExceptions = False  # a log that cannot be written prints no traceback for each of its lines
        try:
            with ended_by_sigterm():
                try:
                    return main(*args, **kwargs)
                except RuntimeError as error:  # PyTorch's, of a loader outside of training (see loader.Watched)
                    if isinstance(error, Failure) or not str(error).startswith(WORKER):
                        raise
                    time.sleep(ONE_WISH)  # if that was a scheduler, its signal is on the way to this process too
                    raise Failure(f"{first_line(error).rstrip('. ')} ({KILLED})") from error
        except UserError as error:
            _leave(f"error: {error}", 2)
        except Failure as error:
            _leave(f"error: {error}", 1)
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


_marker: Path | None = None


def tell_once(marker: Path) -> None:
    """From now on this process tells nothing if another one, with the same ``marker`` (a file that is not there yet),
    was the first: what has gone wrong on all processes of a job, or on all because of one, is told once."""
    global _marker
    _marker = marker


def first_to_tell() -> bool:
    """Is no other process of this job before us with something to tell? Yes, once."""
    if _marker is None:
        return True
    try:
        os.close(os.open(_marker, os.O_CREAT | os.O_EXCL))
    except OSError:  # it is there; or its folder has gone, and the launcher with it
        return False
    return True


def _leave(line: str, status: int) -> None:
    logging.shutdown()
    if line and first_to_tell():
        print(line, file=sys.stderr)
    sys.exit(status)
