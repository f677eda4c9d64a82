"""Keep the best checkpoint by a chosen metric, and stop early when it no longer improves.

Detectron2's BestCheckpointer keeps no history, so that a resumed run would decide differently from one never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from vild.utils.errors import UserError
from vild.utils.files import write_json
from vild.utils.untrusted import parse_json, read_bytes, refused_as

HISTORY = "best.json"  # in the output folder; see read_history
BEST = "model_best"


class StopEarly(Exception):
    """Raised in a training whose metric has not improved for TEST.PATIENCE evaluations."""


def evaluations_since_best(values: Sequence[float]) -> int:
    """Number of evaluations after the (first) best one. NaN ranks below everything."""
    ranked = [-math.inf if math.isnan(v) else v for v in values]
    return len(ranked) - 1 - ranked.index(max(ranked))


def check_patience(metric: str, patience: int) -> None:
    """UserError if TEST.PATIENCE is below 0, or set without TEST.BEST_METRIC."""
    if patience < 0:
        raise UserError(f"TEST.PATIENCE: {patience} is below 0")
    if patience and not metric:
        raise UserError(f"TEST.PATIENCE is {patience}, but TEST.BEST_METRIC is empty: there is no metric to improve")


def read_history(path: Path, metric: str, before: int) -> tuple[dict[int, float], int | None]:
    """The evaluations that :class:`KeepBest` has recorded in a file, of iterations below ``before``.

    Returns:
        the value of each, by iteration; the iteration after which patience ran out, if it did. That is written
        together with the evaluation that decided it, so that a run killed before its ``model_final.pth`` does not train
        on, and a finished one does not start again.

    Raises:
        UserError: the file is for another metric, or not a history.
    """
    if not before or not path.exists():
        return {}, None
    with refused_as(f"--resume: {path} is not what TEST.BEST_METRIC writes; without it a new history begins"):
        document = parse_json(read_bytes(path))
        then, ended = document["metric"], document["ended"]
        rows = [(int(i), math.nan if value is None else float(value)) for i, value in document["history"]]
        history = {i: value for i, value in rows if i < before}
        ended = ended if ended is not None and int(ended) < before else None
    if then != metric:
        raise UserError(
            f"--resume: {path} is of TEST.BEST_METRIC '{then}', which is '{metric}' now; without the file a new "
            "history begins"
        )
    return history, ended


class KeepBest(HookBase):
    """Save ``model_best.pth`` whenever an evaluation is better than all earlier ones.

    The history is kept in a file, so that a resumed run decides as one that was never stopped.

    Args:
        metric: key of the evaluation results, such as "bbox/AP50_novel"; higher is better.
        patience: stop after this many evaluations without improvement (0: never). The evaluation at the end of the
            training does not count: the last weights stay ``model_final.pth``.
        period: iterations between evaluations.
    """

    def __init__(self, metric: str, patience: int, period: int, folder: str):
        if period <= 0:
            raise UserError(f"TEST.BEST_METRIC is '{metric}', but TEST.EVAL_PERIOD is 0: nothing is evaluated")
        self.metric, self.patience, self.period = metric, patience, period
        self.path = Path(folder) / HISTORY
        self.history: dict[int, float] = {}

    def before_train(self):
        start = self.trainer.start_iter
        self.history, ended = comm.all_gather(read_history(self.path, self.metric, start))[0]  # the main process's
        if ended is not None:
            raise StopEarly(f"it had ended after iteration {ended}, says {self.path}")
        if start and start % self.period == 0 and start < self.trainer.max_iter and start - 1 not in self.history:
            # the run was stopped between a checkpoint and the end of the evaluation after it
            next(h for h in self.trainer._hooks if isinstance(h, hooks.EvalHook))._do_eval()
            self._evaluated(start - 1)

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period == 0 and done < self.trainer.max_iter:
            self._evaluated(self.trainer.iter)

    def after_train(self):
        end = self.trainer.max_iter
        # a run stopped in its last evaluation is resumed at its end, where it is evaluated again
        if max(1, self.trainer.start_iter) <= end <= self.trainer.iter + 1 and end - 1 not in self.history:
            self._evaluated(end - 1)

    def _evaluated(self, iteration: int) -> None:
        """Record an evaluation. Called by all ranks; only the main process has the results."""
        stop = False
        if comm.is_main_process():
            latest = self.trainer.storage.latest()
            if self.metric not in latest:
                # with several test sets "<data set>/bbox/AP50"; a class's own are "bbox/AP-cat"
                known = ", ".join(
                    k for k in latest if ("bbox/" in k or "segm/" in k) and "-" not in k.rpartition("/")[2]
                )
                raise UserError(f"TEST.BEST_METRIC: '{self.metric}' is not one of {known}")
            self.history[iteration] = latest[self.metric][0]
            since = evaluations_since_best([*self.history.values()])
            if since == 0:  # the checkpoint comes before the file that mentions it
                self._save(iteration)
            stop = 0 < self.patience <= since and iteration + 1 < self.trainer.max_iter
            ended = iteration if stop else None
            write_json(self.path, {"metric": self.metric, "history": [*self.history.items()], "ended": ended})
        if any(comm.all_gather(stop)):
            raise StopEarly(f"no better {self.metric} in {self.patience} evaluations")

    def _save(self, iteration: int) -> None:
        """Save with the given iteration: before the first and after the last step the trainer's own is one ahead, and a
        resumed run would start from it."""
        ahead, self.trainer.iter = self.trainer.iter, iteration
        self.trainer.checkpointer.save(BEST, iteration=iteration)
        self.trainer.iter = ahead
