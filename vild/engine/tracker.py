"""The metrics of a training at Weights & Biases or MLflow (config key ``TRACKER``), beside ``metrics.json``.

Project, server and login are the packages' own environment variables (``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ...).
"""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

import yaml
from detectron2.utils.events import EventWriter, get_event_storage

from vild.utils.errors import UserError, first_line
from vild.utils.files import write_json
from vild.utils.untrusted import parse_json, read_bytes, refused_as

logger = logging.getLogger(__name__)

RUN_FILE = "tracker.json"  # in OUTPUT_DIR: the run that --resume continues
NAMES = {"wandb": "init", "mlflow": "start_run"}  # and what begins a run


def check_tracker(name: str) -> None:
    """UserError if ``TRACKER`` names none, or one whose package is not installed."""
    if name and name not in NAMES:
        raise UserError(f"TRACKER: '{name}' is neither of {', '.join(NAMES)}")
    try:  # a folder "wandb" of earlier runs can be imported, too
        installed = not name or hasattr(import_module(name), NAMES[name])
    except ImportError:
        installed = False
    if not installed:
        raise UserError(f"TRACKER: the package {name} is not installed: pip install {name}")


class Tracker(EventWriter):
    """Writes what Detectron2's JSONWriter writes: the same values at the same iterations.

    A tracker that fails during the training ends the tracking, not the training.
    """

    def __init__(self, cfg, window: int = 20):
        self.cfg, self.window, self.last, self.run = cfg, window, -1, None

    def open(self) -> None:
        """Begin the run of ``OUTPUT_DIR``, or continue it.

        Raises:
            UserError: the package refuses, for want of a login, for example.
        """
        name, folder, known = self.cfg.TRACKER, Path(self.cfg.OUTPUT_DIR), None
        if (path := folder / RUN_FILE).is_file():
            with refused_as(f"{path} is not the record of a tracker"):
                known = parse_json(read_bytes(path)).get(name)
        try:
            if name == "wandb":
                import wandb

                self.run = wandb.init(id=known, resume="allow", dir=folder, config=yaml.safe_load(self.cfg.dump()))
                self.run.define_metric("*", step_metric="iteration")  # a resumed training may go back some steps
                current = self.run.id
            else:
                import mlflow

                self.run = mlflow
                current = mlflow.start_run(run_id=known, run_name=None if known else folder.name).info.run_id
                mlflow.log_text(self.cfg.dump(), "config.yaml")
        except Exception as error:  # each package has its own
            raise UserError(f"TRACKER {name}: {first_line(error)}") from error
        write_json(path, {name: current})

    def write(self) -> None:
        by_iteration: dict[int, dict[str, float]] = {}
        for key, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self.window).items():
            if iteration > self.last:
                by_iteration.setdefault(iteration, {})[key] = value
        self.last = max(by_iteration, default=self.last)
        for iteration in sorted(by_iteration):
            if self.run is None:
                return
            try:
                if self.cfg.TRACKER == "wandb":
                    self.run.log({**by_iteration[iteration], "iteration": iteration})
                else:
                    self.run.log_metrics(by_iteration[iteration], step=iteration)
            except Exception as error:  # a server that cannot be reached must not cost a training
                self._give_up(error)

    def close(self) -> None:
        if self.run is not None:
            try:
                (self.run.finish if self.cfg.TRACKER == "wandb" else self.run.end_run)()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("TRACKER %s: %s; metrics.json goes on alone", self.cfg.TRACKER, first_line(error))
        self.run = None
