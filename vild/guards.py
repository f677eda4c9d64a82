"""What ends a training before its time, at a moment from which it can go on: a signal."""

from __future__ import annotations

from detectron2.engine import HookBase
from detectron2.utils import comm

from vild import signals
from vild.signals import Ended


class Guard(HookBase):
    """Once a step all ranks tell one another whether they were asked to end, so that they end after the same step.

    (A pickled object over gloo, as Detectron2's own gathering of the losses in every step.) To be registered last.
    """

    agreed = False  # that all ranks end here

    def after_step(self):
        number = next((n for n in comm.all_gather(signals.asked()) if n is not None), None)
        if number is not None:
            self.agreed = True
            raise Ended(number)
