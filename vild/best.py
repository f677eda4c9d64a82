"""The best checkpoint on a chosen metric, and the end of a training that no longer gets better."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from vild.errors import UserError
from vild.files import write_json

HISTORY = "best.json"  # in the output folder: [[iteration, value], ...] of every evaluation
BEST = "model_best"


class StopEarly(Exception):
    """Raised inside a training that has not become better for as long as it was given."""


def evaluations_since_best(values: Sequence[float]) -> int:
    """How many evaluations came after the (first) best one; NaN is worse than anything."""
    ranked = [-math.inf if math.isnan(v) else v for v in values]
    return len(ranked) - 1 - ranked.index(max(ranked))


def check_patience(metric: str, patience: int) -> None:
    """UserError for TEST.PATIENCE below 0, or without a TEST.BEST_METRIC to become better."""
    if patience < 0:
        raise UserError(f"TEST.PATIENCE: {patience} is below 0")
    if patience and not metric:
        raise UserError(f"TEST.PATIENCE is {patience}, but TEST.BEST_METRIC is empty: nothing says what is better")


class KeepBest(HookBase):
    """Saves ``model_best.pth`` whenever an evaluation is better than all before it.

    What was seen so far lies in a file, so that a resumed run decides as one that was never stopped.

    Args:
        metric: of the evaluation's results, "bbox/AP50_novel" say; higher is better.
        patience: evaluations without a better one after which the training ends (0: it never does).
        period: iterations between evaluations.
    """

    def __init__(self, metric: str, patience: int, period: int, folder: str):
        if period <= 0:
            raise UserError(f"TEST.BEST_METRIC is '{metric}', but TEST.EVAL_PERIOD is 0: nothing is evaluated")
        self.metric, self.patience, self.period = metric, patience, period
        self.path = Path(folder) / HISTORY
        self.history: list[tuple[int, float]] = []

    def before_train(self):
        start = self.trainer.start_iter
        if self.path.is_file():
            self.history = [(i, v) for i, v in json.loads(self.path.read_text()) if i < start]
        if start and start % self.period == 0 and start < self.trainer.max_iter and start - 1 not in dict(self.history):
            # it was stopped between a checkpoint and the end of the evaluation that follows it
            next(h for h in self.trainer._hooks if isinstance(h, hooks.EvalHook))._do_eval()
            self._evaluated(start - 1)

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period == 0 and done < self.trainer.max_iter:
            self._evaluated(self.trainer.iter)

    def after_train(self):
        if self.trainer.iter + 1 >= self.trainer.max_iter and self.trainer.start_iter < self.trainer.max_iter:
            self._evaluated(self.trainer.max_iter - 1)

    def _evaluated(self, iteration: int) -> None:
        """Called by all ranks after an evaluation, whose results the main process has."""
        stop = False
        if comm.is_main_process():
            latest = self.trainer.storage.latest()
            if self.metric not in latest:
                # with several test sets "<data set>/bbox/AP50"; a class's own are "bbox/AP-cat"
                known = ", ".join(
                    k for k in latest if ("bbox/" in k or "segm/" in k) and "-" not in k.rpartition("/")[2]
                )
                raise UserError(f"TEST.BEST_METRIC: '{self.metric}' is not one of {known}")
            self.history.append((iteration, latest[self.metric][0]))
            write_json(self.path, self.history)
            since = evaluations_since_best([value for _, value in self.history])
            if since == 0:
                self.trainer.checkpointer.save(BEST, iteration=iteration)
            stop = 0 < self.patience <= since
        if any(comm.all_gather(stop)):
            raise StopEarly(f"no better {self.metric} in {self.patience} evaluations")
