"""Metrics at Weights & Biases or MLflow: those of metrics.json, from one process, one run over a resume."""

import json
import math
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest

from tests.engine.test_distributed import TAKE_ALL, forked, on_ranks, train  # noqa: F401  (a fixture)
from vild.engine.trainer import Trainer
from vild.utils.errors import UserError

SETTINGS = ("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")


class Run(SimpleNamespace):
    """What both packages' calls are written to."""

    def __init__(self, log):
        super().__init__(id="a1", info=SimpleNamespace(run_id="a1"), file=log)

    def note(self, call, *values):
        with open(self.file, "a") as file:
            file.write(json.dumps([call, *values]) + "\n")

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "iteration")

    def log(self, values):
        self.note("log", values.pop("iteration"), values)

    def finish(self):
        self.note("end")


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Both packages; returns a function that reads their calls."""
    run, wandb, mlflow = Run(tmp_path / "calls"), ModuleType("wandb"), ModuleType("mlflow")

    def init(*, id, resume, dir, config):
        assert resume == "allow" and config["SOLVER"]["MAX_ITER"] > 0
        run.note("open", id)
        return run

    def start_run(*, run_id, run_name):
        assert run_name == (None if run_id else "output")
        run.note("open", run_id)
        return run

    wandb.init = init
    mlflow.start_run, mlflow.end_run = start_run, run.finish
    mlflow.log_text = lambda text, name: None
    mlflow.log_metrics = lambda values, step: run.log({**values, "iteration": step})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return lambda: [json.loads(line) for line in run.file.read_text().splitlines()]


def trained(cfg, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()


def written(cfg):
    """{iteration: values} of metrics.json."""
    by_iteration = defaultdict(dict)
    with open(f"{cfg.OUTPUT_DIR}/metrics.json") as file:
        for line in file:
            values = json.loads(line)
            by_iteration[values.pop("iteration")] |= values
    return by_iteration


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_values_of_metrics_json(make_cfg, packages, name):
    """Two trainings of one folder, the second a resume, write one run."""
    cfg = make_cfg("text", "TRACKER", name, *SETTINGS)
    trained(cfg)
    whole = [*packages()]
    assert whole[0] == ["open", None] and whole[-1] == ["end"]
    sent = defaultdict(dict)
    for _, iteration, values in whole[1:-1]:
        sent[iteration] |= values
    assert sent == written(cfg) and set(sent) == {2} and "total_loss" in sent[2]
    trained(make_cfg("text", "TRACKER", name, *SETTINGS, "SOLVER.MAX_ITER", 5), resume=True)
    again = packages()[len(whole) :]
    assert again[0] == ["open", "a1"] and again[-1] == ["end"]
    assert {iteration for _, iteration, _ in again[1:-1]} == {4}


@pytest.mark.slow
def test_one_process_of_two_writes(make_cfg, packages, forked):  # noqa: F811
    cfg = make_cfg("text", *TAKE_ALL, "TRACKER", "wandb", "SOLVER.MAX_ITER", 2)
    assert on_ranks(train, cfg=cfg) == 0
    calls = packages()
    assert [c for c in calls if c[0] != "log"] == [["open", None], ["end"]]
    assert [iteration for call, iteration, *_ in calls[1:-1]] == [1]


def test_a_mistake_is_one_line_before_the_training(make_cfg, packages, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="TRACKER: 'tensorboard' is neither of wandb, mlflow"):
        Trainer(make_cfg("text", "TRACKER", "tensorboard"))
    sys.modules["wandb"].init = lambda **_: (_ for _ in ()).throw(RuntimeError("no API key\nrun wandb login"))
    with pytest.raises(UserError, match="TRACKER wandb: no API key$"):
        trained(make_cfg("text", "TRACKER", "wandb", *SETTINGS))
    assert not (tmp_path / "output" / "tracker.json").exists()
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # a folder of that name
    for name in ("mlflow", "wandb"):
        with pytest.raises(UserError, match=f"TRACKER: the package {name} is not installed: pip install {name}"):
            Trainer(make_cfg("text", "TRACKER", name))


def test_a_tracker_that_fails_does_not_end_the_training(make_cfg, packages, caplog):
    def fail(*_, **__):
        raise ConnectionError("no route")

    sys.modules["mlflow"].log_metrics = fail
    cfg = make_cfg("text", "TRACKER", "mlflow", *SETTINGS)
    trained(cfg)
    assert math.isfinite(written(cfg)[2]["total_loss"])
    assert caplog.text.count("TRACKER mlflow: no route; metrics.json goes on alone") == 1
    assert packages() == [["open", None]]
