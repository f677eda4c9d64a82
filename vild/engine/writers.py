"""What a training prints and writes of its metrics: Detectron2's writers, two faults of theirs mended."""

from __future__ import annotations

import os
from collections.abc import Sequence

from detectron2.engine import default_writers
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter

from vild.utils.files import drop_partial_line


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
