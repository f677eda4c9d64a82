"""What the processes of a job need alike is done once on each machine: annotation files of a gigabyte are not parsed by
every process."""

from __future__ import annotations

import itertools
import logging
import marshal
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from typing import TypeVar

from detectron2.utils import comm

from vild.data import datasets
from vild.utils.errors import Failure, UserError, first_line

logger = logging.getLogger(__name__)

T = TypeVar("T")


def once_a_machine(work: Callable[[], T]) -> T:
    """What ``work()`` returns in the first process of this machine, which alone calls it; all processes of the job must
    call this function, and wait for the result.

    Raises:
        UserError: in every process, if ``work`` raised it in one.
        Failure: the same for any other exception; the process that raised it raises that.
    """
    if comm.get_world_size() == 1:
        return work()
    rank, local = comm.get_rank(), comm.get_local_rank()
    result = error = told = None
    if local == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
            told = error if isinstance(error, UserError) else Failure(f"process {rank}: {first_line(error)}")
    everyone = comm.all_gather((result, told))
    if error is not None:
        raise error
    for _, theirs in everyone:
        if isinstance(theirs, Failure):
            time.sleep(5)  # the process itself reports more: its traceback
        if theirs is not None:
            raise theirs
    return everyone[rank - local][0]


def share_annotations(names: Collection[str]) -> None:
    """Parse and check the annotation files of data sets in the first process of this machine, which reports repairs
    and doubts; the others take over the result, so that ``datasets.read_annotations`` returns at once. All processes
    of the job must call it.

    Raises:
        UserError: in every process, for a file that is missing or invalid.
    """
    if comm.get_world_size() == 1:
        return
    # others are in Detectron2's catalog only
    missing = [name for name in names if name in datasets.entries() and not datasets.is_read(name)]
    missing = sorted({*itertools.chain(*comm.all_gather(missing))})
    folder = once_a_machine(lambda: _write(missing)) if missing else ""
    if not folder:
        return
    try:
        if comm.get_local_rank():
            for number, name in enumerate(missing):
                with open(os.path.join(folder, str(number)), "rb") as file:
                    datasets.take_over(name, marshal.load(file))
        comm.synchronize()
    finally:
        if comm.get_local_rank() == 0:
            shutil.rmtree(folder)


def _write(names: Collection[str]) -> str:
    """Write parsed annotation files to a new folder, which only this user can read; "" without space for them. Marshal
    is the fastest format for JSON's types, and these processes run the same Python."""
    documents = [datasets.read_annotations(name) for name in names]
    folder = tempfile.mkdtemp(prefix="vild-")
    try:
        for number, document in enumerate(documents):
            with open(os.path.join(folder, str(number)), "wb") as file:
                marshal.dump(document, file)
    except OSError as error:
        shutil.rmtree(folder)
        logger.warning("every process parses the annotation files itself: %s: %s", folder, error.strerror)
        return ""
    return folder
