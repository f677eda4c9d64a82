"""The best checkpoint is kept, the training ends when it no longer gets better, also across a resume."""

import itertools
import json
import math
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import TrainerBase, hooks
from detectron2.utils.events import EventStorage

from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import default_config
from vild.engine import best
from vild.engine.best import KeepBest, StopEarly, evaluations_since_best, read_history
from vild.engine.trainer import Trainer
from vild.utils import files
from vild.utils.errors import UserError
from vild.utils.signals import Ended

VALUES = {1: 10.0, 3: 30.0, 5: 20.0, 7: 25.0, 9: 40.0}  # by iteration
EVALUATION_AFTER_3 = 12  # of the moments at which Small may be killed


@pytest.fixture
def train(make_cfg, monkeypatch):
    """Train ten iterations at most, evaluating every second one to VALUES; returns the config and the evaluations."""

    def run(patience, until=None, resume=False, metric="bbox/AP50_novel"):
        cfg = make_cfg(
            "vild", "SOLVER.MAX_ITER", 10, "TEST.EVAL_PERIOD", 2, "TEST.BEST_METRIC", metric,
            "TEST.PATIENCE", patience, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.IMS_PER_BATCH", 1,
        )  # fmt: skip
        trainer, evaluated = None, []

        def test(cls, cfg, model, evaluators=None):
            evaluated.append(trainer.iter)
            if until is not None and trainer.iter >= until:
                raise KeyboardInterrupt
            done = trainer.iter - (trainer.iter + 1) % 2  # what was missed is made up for before the first step
            return {"bbox": {"AP50_novel": VALUES[min(done, 9)]}}

        monkeypatch.setattr(Trainer, "test", classmethod(test))
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
        trainer.train()
        return cfg, evaluated

    return run


def history(cfg):
    with open(f"{cfg.OUTPUT_DIR}/best.json") as file:
        return json.load(file)["history"]


def weights(cfg, name):
    return torch.load(f"{cfg.OUTPUT_DIR}/{name}.pth", weights_only=True)


def test_the_best_is_kept(train):
    cfg, _ = train(patience=0)
    assert history(cfg) == [[i, v] for i, v in VALUES.items()]
    assert weights(cfg, "model_best")["iteration"] == 9


def test_it_ends_early_with_the_best_weights(train):
    cfg, evaluated = train(patience=2)
    assert [i for i, _ in history(cfg)] == [1, 3, 5, 7] and len(evaluated) == 5  # the last one is of the final weights
    kept, final = weights(cfg, "model_best"), weights(cfg, "model_final")
    assert kept["iteration"] == 3 and final["iteration"] == 9
    assert all(torch.equal(kept["model"][k], final["model"][k]) for k in kept["model"])
    cfg, evaluated = train(patience=2, resume=True)  # it has ended: it is evaluated, and that is all
    assert [i for i, _ in history(cfg)] == [1, 3, 5, 7] and evaluated == [9]


def test_a_resumed_run_decides_as_one_that_was_never_stopped(train):
    """Killed in the evaluation after iteration 5, whose checkpoint is already there."""
    with pytest.raises(KeyboardInterrupt):
        train(patience=2, until=5)
    cfg, evaluated = train(patience=2, resume=True)
    assert [i for i, _ in history(cfg)] == [1, 3, 5, 7] and len(evaluated) == 3


def test_mistakes(train):
    with pytest.raises(UserError, match="'bbox/AP99' is not one of bbox/AP50_novel"):
        train(patience=0, metric="bbox/AP99")
    with pytest.raises(UserError, match="EVAL_PERIOD is 0"):
        KeepBest("bbox/AP", 0, 0, "")


@pytest.mark.parametrize(
    ("patience", "metric", "message"), [(-1, "bbox/AP", "-1 is below 0"), (2, "", "BEST_METRIC is empty")]
)
def test_a_patience_that_never_ends_anything_is_refused(make_cfg, patience, metric, message):
    with pytest.raises(UserError, match=message):
        Trainer(make_cfg("vild", "TEST.PATIENCE", patience, "TEST.BEST_METRIC", metric, "TEST.EVAL_PERIOD", 2))


def test_the_metrics_of_two_test_sets_are_listed():
    keeper = KeepBest("bbox/AP", 0, 2, "")
    keeper.trainer = SimpleNamespace(storage=EventStorage(), checkpointer=None)
    keeper.trainer.storage.put_scalars(**{"my-set/bbox/AP50": 1.0, "my-set/bbox/AP-cat": 1.0, "loss": 2.0})
    with pytest.raises(UserError, match="'bbox/AP' is not one of my-set/bbox/AP50$"):
        keeper._evaluated(1)


def test_evaluations_since_the_best():
    assert evaluations_since_best([1.0]) == 0 and evaluations_since_best([1.0, 3.0, 3.0, 2.0]) == 2
    assert evaluations_since_best([math.nan, 1.0]) == 0 and evaluations_since_best([1.0, math.nan]) == 1
    assert issubclass(StopEarly, Exception)


@pytest.mark.parametrize("nan", ["null", "NaN"])
def test_an_evaluation_without_a_value_is_read_as_nan(tmp_path, nan):
    """It was written as NaN once, which JSON does not have."""
    path = tmp_path / "best.json"
    path.write_text(f'{{"metric": "bbox/AP", "history": [[1, {nan}], [3, 2.5]], "ended": null}}')
    values, ended = read_history(path, "bbox/AP", 5)
    assert math.isnan(values.pop(1)) and (values, ended) == ({3: 2.5}, None)


class Killable(VildCheckpointer):
    """Can be killed before a file is written, before ``last_checkpoint`` names it, and after both."""

    def save(self, name, **kwargs):
        self.trainer.may_be_killed()
        super().save(name, **kwargs)
        self.trainer.may_be_killed()

    def tag_last_checkpoint(self, name):
        self.trainer.may_be_killed()
        super().tag_last_checkpoint(name)


class Small(Trainer):
    """The trainer with a model of one weight, which counts the steps; ``values`` are of the odd iterations. ``kill`` is
    raised at the ``moment``-th time at which it may be killed."""

    def __init__(self, folder, patience, values=VALUES, kill=KeyboardInterrupt, moment=-1, metric="bbox/AP50_novel"):
        TrainerBase.__init__(self)
        self._trainer = SimpleNamespace()
        self.cfg, self.max_iter, self.whole, self.guard = default_config(), 10, -1, SimpleNamespace(agreed=False)
        self.cfg.OUTPUT_DIR, self.values, self.kill, self.moment = str(folder), values, kill, moment
        self.moments, self.last = itertools.count(), None
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.checkpointer = Killable(self.model, str(folder), trainer=weakref.proxy(self))
        self.checkpointer.trainer = weakref.proxy(self)
        self.register_hooks(
            [
                hooks.PeriodicCheckpointer(self.checkpointer, 2),
                hooks.EvalHook(2, lambda: self.test(self.cfg, self.model)),
                KeepBest(metric, patience, 2, folder),
            ]
        )

    state_dict, load_state_dict = TrainerBase.state_dict, TrainerBase.load_state_dict

    def may_be_killed(self):
        if next(self.moments) == self.moment:
            raise self.kill

    def run_step(self):
        self.model.weight.data += 1

    def test(self, cfg, model):
        self.may_be_killed()
        self.last = int(model.weight)
        return {"bbox": {"AP50_novel": self.values[self.last - 1]}}

    def go(self):
        if self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("")
            self.start_iter = self.iter + 1
        self.train()
        return self


@pytest.fixture
def small(monkeypatch):
    """Small's class, which can be killed before and after best.json is written too; without waiting for the disk."""
    running = []

    class Watched(Small):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            running[:] = [self]

    def write_json(path, document):
        running[0].may_be_killed()
        files.write_json(path, document)
        running[0].may_be_killed()

    monkeypatch.setattr(best, "write_json", write_json)
    monkeypatch.setattr(files, "_sync", lambda path: None)
    return Watched


def outcome(folder):
    """best.json, and how many steps made the weights of model_best and model_final."""
    steps = (torch.load(folder / f"model_{n}.pth", weights_only=True)["model"]["weight"] for n in ("best", "final"))
    return json.loads((folder / "best.json").read_text()), *map(int, steps)


@pytest.mark.parametrize(
    ("patience", "last", "ended", "kept", "final", "kill"),
    [
        (0, 40.0, None, 10, 10, KeyboardInterrupt),
        (2, 40.0, 7, 4, 4, KeyboardInterrupt),
        (2, 40.0, 7, 4, 4, Ended(signal.SIGTERM)),
        (3, 40.0, None, 10, 10, KeyboardInterrupt),
        (3, 22.0, None, 4, 10, KeyboardInterrupt),
    ],
    ids=["no patience", "ends early", "ends early, asked", "the last is the best", "patience ends with the training"],
)
def test_killed_at_any_moment_a_resumed_run_decides_as_one_that_was_never_stopped(
    small, tmp_path, patience, last, ended, kept, final, kill
):
    values = VALUES | {9: last}
    whole = small(tmp_path / "whole", patience, values).go()
    rows = [[i, v] for i, v in values.items() if ended is None or i <= ended]
    expected = {"metric": "bbox/AP50_novel", "history": rows, "ended": ended}, kept, final
    assert outcome(tmp_path / "whole") == expected and whole.last == final
    moments = next(whole.moments)
    assert moments > 30
    for moment in range(moments):
        folder = tmp_path / str(moment)
        with pytest.raises((KeyboardInterrupt, Ended)):
            small(folder, patience, values, kill, moment).go()
        assert (small(folder, patience, values).go().last, *outcome(folder)) == (final, *expected), moment
    again = small(folder, patience, values).go()  # nothing is left to do
    assert (again.last, *outcome(folder)) == (final, *expected)


@pytest.mark.parametrize("moment", range(6))
def test_killed_again_while_it_makes_up_for_an_evaluation(small, tmp_path, moment):
    for at in (EVALUATION_AFTER_3, moment):
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path, 2, moment=at).go()
    small(tmp_path, 2).go()
    seen, *steps = outcome(tmp_path)
    assert [i for i, _ in seen["history"]] == [1, 3, 5, 7] and steps == [4, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"metric": "bbox/AP", "history": [[1, 2.0]], "ended": null}',
         r"best.json is of TEST.BEST_METRIC 'bbox/AP', which is 'bbox/AP50_novel' now"),
        ("[[1, 10.0]]", r"best.json is not what TEST.BEST_METRIC writes.* \(TypeError"),
        ('{"metric": "bbox/AP50_novel", "hist', r"best.json is not what .* \(JSONDecodeError"),
        ('{"metric": "bbox/AP50_novel", "history": [[1, 2, 3]], "ended": null}', r"best.json is not what"),
        ('{"metric": "bbox/AP50_novel", "history": [[1, 2]], "ended": "a"}', r"best.json is not what"),
    ],
)  # fmt: skip
def test_another_history_is_refused(small, tmp_path, content, message):
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, 2, moment=EVALUATION_AFTER_3).go()
    (tmp_path / "best.json").write_text(content)
    tag = (tmp_path / "last_checkpoint").read_text()
    with pytest.raises(UserError, match=message):
        small(tmp_path, 2).go()
    assert (tmp_path / "best.json").read_text() == content and (tmp_path / "last_checkpoint").read_text() == tag
    (tmp_path / "best.json").unlink()
    small(tmp_path, 0).go()
    assert outcome(tmp_path)[1:] == (10, 10)


def test_a_training_of_no_step_keeps_nothing(small, tmp_path):
    trainer = small(tmp_path, 2, {-1: 1.0})
    trainer.max_iter = 0
    trainer.go()
    assert not (tmp_path / "model_best.pth").exists() and trainer.last == 0
