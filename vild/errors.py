"""What a user got wrong, in one line."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable

LONGEST = 2000  # characters of a message


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


class BadPicture(UserError):
    """A picture that cannot be read, or is not what its annotations are of."""


def one_line_errors(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Decorate a script's ``main``: a UserError ends as one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapper(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            logging.shutdown()
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapper
