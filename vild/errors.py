"""What a user got wrong, in one line."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake the user can mend. The message is one line that names the file, the key and the value."""


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate a script's ``main``: a UserError ends as one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            logging.shutdown()
            # a data loader's worker wraps the message into its traceback, whose last line is the message
            line = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)

    return wrapper
