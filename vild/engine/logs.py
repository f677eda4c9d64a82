"""What a training prints and writes: logs, and metrics by Detectron2's writers, two faults of theirs mended."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from detectron2.engine import default_writers
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter
from detectron2.utils.logger import setup_logger

from vild.engine.best import StopEarly
from vild.utils.errors import Failure, UserError
from vild.utils.files import drop_partial_line


def set_up_logs(folder: str) -> None:
    """The loggers of vild and Detectron2: to the console and to ``log.txt`` in a folder."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_unexpected)
    if logging.getLogger("vild").level == logging.NOTSET:
        setup_logger(folder, distributed_rank=comm.get_rank(), name="vild")
    setup_logger(folder, distributed_rank=comm.get_rank())


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Filter for Detectron2's log of every exception with its traceback: ``one_line_errors`` reports the expected ones
    in one line (and an unexpected OSError with its traceback); StopEarly is not an error."""
    return not (record.exc_info and isinstance(record.exc_info[1], UserError | Failure | OSError | StopEarly))


@contextmanager
def quiet_console() -> Iterator[None]:
    """Detectron2 logs hundreds of lines in the block: to log.txt, but only warnings to the console."""
    console = [h for h in logging.getLogger("detectron2").handlers if getattr(h, "stream", None) is sys.stdout]
    for handler in console:
        handler.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler in console:
            handler.setLevel(logging.DEBUG)  # Detectron2's


class MetricPrinter(CommonMetricPrinter):
    """Detectron2's divides by zero where a training ends within its first steps, just after it has printed."""

    def _get_eta(self, storage: EventStorage) -> str | None:
        if self._last_write is not None and self._last_write[0] == storage.iter:
            return None
        return super()._get_eta(storage)


def build_writers(folder: str, iterations: int) -> Sequence[EventWriter]:
    """Terminal, ``metrics.json`` (without the partial line that a killed run may have left) and TensorBoard."""
    drop_partial_line(os.path.join(folder, "metrics.json"))
    _, *others = default_writers(folder, iterations)
    return [MetricPrinter(iterations), *others]
