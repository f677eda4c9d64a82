"""Two commands that write to the same place notice each other."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from vild.utils.errors import UserError
from vild.utils.files import cannot_write

logger = logging.getLogger(__name__)

_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_writer(output: str | Path, folder: bool = False) -> Iterator[None]:
    """For the length of the block this process is the only one that writes ``output``, among those that ask.

    The lock is a POSIX record lock on ``output.lock`` (of a ``folder``: on ``.lock`` in it, which is made), in which
    stand pid, host and time. The kernel takes the lock back when the process ends in whatever way, SIGKILL and power
    cut among them; a file that such an end leaves behind means nothing. Unlike ``flock``'s, the lock is not inherited
    by data loader workers, which live on for some seconds after their parent was killed.

    On NFS the server keeps such locks and machines see each other's, unless it is mounted ``nolock`` or
    ``local_lock=posix``: then a machine sees only its own processes. When a machine dies, an NFS server keeps its locks
    until its lease runs out (some 90 seconds) or it is back. A file system without locks is told in the log, and the
    work goes on. One process must not ask twice for the same place: record locks do not tell its threads apart.

    Raises:
        UserError: another process is writing there, with its pid, host and start; or the place cannot be written.
    """
    output = Path(output)
    path = output / ".lock" if folder else output.with_name(output.name + ".lock")
    with cannot_write(output):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _acquire(path, output)
    with file:
        try:
            yield
        finally:  # while it is still held: whoever waits for this name sees that it has gone, and makes it anew
            with suppress(OSError):  # the folder has gone, or cannot be written any more
                path.unlink()


def _acquire(path: Path, output: Path):
    """The open, locked file ``path``."""
    while True:
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            if error.errno in _HELD:
                raise UserError(f"{output}: {holder} is writing it; wait for its end, or name another place") from error
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("%s: this file system has no locks; a second writer would not be noticed", path)
            return open(path, "a+")
        if _is_there(file, path):
            file.truncate(0)
            now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now},")
            file.flush()
            return file
        file.close()  # its last holder has removed it since it was opened


def _is_there(file, path: Path) -> bool:
    """Is the open file the one under the name?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
