"""What a user got wrong, in one line."""

from __future__ import annotations

import errno
import functools
import logging
import sys
from collections.abc import Callable

# a disk that is full, read-only, broken or gone, met by a library: vild's own files name themselves (vild/files.py)
_OF_THE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT,
)  # fmt: skip


class UserError(ValueError):
    """A mistake the user can mend. The message is one line that names the file, the key and the value."""


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate a script's ``main``: a UserError, or a disk that fails, ends as one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        logging.raiseExceptions = False  # a log that cannot be written prints no traceback for each of its lines
        try:
            return main(*args, **kwargs)
        except UserError as error:
            logging.shutdown()
            # a data loader's worker wraps the message into its traceback, whose last line is the message
            line = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.errno not in _OF_THE_DISK:
                raise
            logging.shutdown()
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapper
