"""Locks on outputs: a second process that writes to the same place gets an error."""

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
from vild.utils.files import ATTEMPTS, cannot_write, make_folder, new_folder

logger = logging.getLogger(__name__)

_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_writer(output: str | Path, folder: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock on ``output`` for the length of the block.

    The lock is a POSIX record lock on ``output.lock`` (for a ``folder``: ``.lock`` in it). Its folder is created; if
    the block raises, a new one that is still empty is removed. The file contains pid, host and start time. The kernel
    releases the lock however the process ends, including SIGKILL; a leftover lock file is harmless. Unlike ``flock``,
    record locks are not inherited by data loader workers, which outlive a killed parent by some seconds.

    On NFS, machines see each other's locks unless it is mounted ``nolock`` or ``local_lock=posix``; the locks of a
    machine that died last until the server's lease expires (about 90 seconds). On a file system without locks, a
    warning is logged and the block runs unlocked. Do not lock the same output twice in one process: record locks do
    not distinguish its threads.

    Args:
        wait: for another process to release the lock, instead of an error.

    Raises:
        UserError: another process holds the lock (the message gives its pid, host and start time), or the lock file
            cannot be written.
    """
    output = Path(output)
    path = output / ".lock" if folder else output.with_name(output.name + ".lock")
    with new_folder(path.parent):
        with cannot_write(output):
            file = _acquire(path, output, wait)
        with file:
            try:
                yield
            finally:  # while still holding the lock: a process that has opened this file notices that it is gone
                with suppress(OSError):  # the folder is gone or read-only
                    path.unlink()


def _acquire(path: Path, output: Path, wait: bool):
    """Open and lock ``path``."""
    attempt = 0
    while True:
        make_folder(path.parent)
        try:
            file = open(path, "a+")  # noqa: SIM115
        except FileNotFoundError:  # a holder that failed has just removed the folder
            attempt += 1
            if attempt < ATTEMPTS:
                continue
            raise
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            if error.errno in _HELD and wait:
                logger.warning("%s: waiting for %s which is writing it", output, holder)
                fcntl.lockf(file, fcntl.LOCK_EX)
                file.close()
                continue
            file.close()
            if error.errno in _HELD:
                raise UserError(
                    f"{output}: {holder} is writing it; wait until it ends or choose another output"
                ) from error
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("%s: this file system does not support locks; a second writer would not be detected", path)
            return open(path, "a+")
        if _is_current(file, path):
            file.truncate(0)
            now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
            file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now},")
            file.flush()
            return file
        file.close()  # the previous holder removed it after we had opened it


def _is_current(file, path: Path) -> bool:
    """Is the open file still the one at ``path``?"""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
