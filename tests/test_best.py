"""The best checkpoint is kept, the training ends when it no longer gets better, also across a resume."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage

from vild.best import KeepBest, StopEarly, evaluations_since_best
from vild.engine import Trainer
from vild.errors import UserError

VALUES = {1: 10.0, 3: 30.0, 5: 20.0, 7: 25.0, 9: 40.0}  # by iteration


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
        return json.load(file)


def weights(cfg, name):
    return torch.load(f"{cfg.OUTPUT_DIR}/{name}.pth", weights_only=True)


def test_the_best_is_kept(train):
    cfg, _ = train(patience=0)
    assert history(cfg) == [[i, v] for i, v in VALUES.items()]
    assert weights(cfg, "model_best")["iteration"] == 9


def test_it_ends_early_with_the_best_weights(train):
    cfg, evaluated = train(patience=2)
    assert [i for i, _ in history(cfg)] == [1, 3, 5, 7] and len(evaluated) == 5  # the last one is of the final weights
    best, final = weights(cfg, "model_best"), weights(cfg, "model_final")
    assert best["iteration"] == 3 and final["iteration"] == 9
    assert all(torch.equal(best["model"][k], final["model"][k]) for k in best["model"])


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
    best = KeepBest("bbox/AP", 0, 2, "")
    best.trainer = SimpleNamespace(storage=EventStorage(), checkpointer=None)
    best.trainer.storage.put_scalars(**{"my-set/bbox/AP50": 1.0, "my-set/bbox/AP-cat": 1.0, "loss": 2.0})
    with pytest.raises(UserError, match="'bbox/AP' is not one of my-set/bbox/AP50$"):
        best._evaluated(1)


def test_evaluations_since_the_best():
    assert evaluations_since_best([1.0]) == 0 and evaluations_since_best([1.0, 3.0, 3.0, 2.0]) == 2
    assert evaluations_since_best([math.nan, 1.0]) == 0 and evaluations_since_best([1.0, math.nan]) == 1
    assert issubclass(StopEarly, Exception)
