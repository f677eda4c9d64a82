"""What a user got wrong, what went wrong around us, and being asked to end: each in one line."""

from __future__ import annotations

import errno
import functools
import logging
import signal
import sys
from collections.abc import Callable

from vild.signals import Ended, ended_by_sigterm

# a disk that is full, read-only, broken or gone, met by a library: vild's own files name themselves (vild/files.py)
_OF_THE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT,
)  # fmt: skip


class UserError(ValueError):
    """A mistake the user can mend. The message is one line that names the file, the key and the value."""


class Failure(RuntimeError):
    """What nobody typed wrong and no traceback would explain: a process that was killed, a loss that is not finite.
    The message is one line."""


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate a script's ``main``: what is foreseen ends as one line on stderr.

    Exit status 2 for a UserError or a disk that fails, 1 for a Failure, 128 + signal where SIGTERM or SIGINT asked for
    the end. (That is what a shell reports of a process that a signal ended. Not 0: a scheduler's "afterok", make and
    :mod:`vild.pipeline` would take what is half done for done.)
    """

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        logging.raiseExceptions = False  # a log that cannot be written prints no traceback for each of its lines
        try:
            with ended_by_sigterm():
                return main(*args, **kwargs)
        except UserError as error:
            # a data loader's worker wraps the message into its traceback, whose last line is the message
            line = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
            _leave(f"error: {line}", 2)
        except Failure as error:
            _leave(f"error: {error}", 1)
        except OSError as error:
            if error.errno not in _OF_THE_DISK:
                raise
            _leave(f"error: {error}", 2)
        except KeyboardInterrupt:
            _leave("ended by SIGINT", 128 + signal.SIGINT)
        except Ended as ended:
            _leave(str(ended), 128 + ended.signal)

    return wrapper


def _leave(line: str, status: int) -> None:
    logging.shutdown()
    if line:
        print(line, file=sys.stderr)
    sys.exit(status)
