"""The record of a run: config, code version, packages, hashes of the data. Every checkpoint carries it, so that
``--resume`` with another model is refused; every evaluation writes one beside its metrics, for the report."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

import detectron2
import torch
import yaml

import vild
from vild.config import default_config
from vild.data import datasets
from vild.env import version
from vild.utils.errors import UserError
from vild.utils.files import hash_file
from vild.utils.untrusted import refused_as

RUN_FILE = "run.json"  # beside the metrics of an evaluation
PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow", "safetensors",
            "pycocotools", "hotcoco")  # fmt: skip

# Keys that a resumed training must not change: the model, random draws, the optimizer's state
FIXED = ("MODEL.", "SEED", "INPUT.FORMAT", "SOLVER.OPTIMIZER")
# Of these, keys that may change: paths, the device, and what training does not use. (Vocabularies and teachers are
# compared by content when they are read; the trainer asks the teacher for the channels of its maps.)
FREE = (
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.VILD.VOCABULARY",
    "MODEL.VILD.TEST_VOCABULARY",
    "MODEL.VILD.STORE",
    "MODEL.VILD.TEACHER.NAME",
    "MODEL.VILD.TEACHER.PRETRAINED",
    "MODEL.VILD.OLD_STUDENT.WEIGHTS",
    "MODEL.VILD.ENSEMBLE_WEIGHT",
    "MODEL.VILD.TEST_TEMPERATURE",
    "MODEL.VILD.CALIBRATION",
    "MODEL.VILD.PRE_NMS_TOPK",
    "MODEL.VILD.MAP_CHANNELS",
)


def run_record(cfg, data_sets: Collection[str]) -> dict:
    """The record, as plain values: the config as YAML, code version, packages, hashes of the annotation files."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "config": cfg.dump(),
        "code": code_version(),
        "packages": {name: version(name) for name in PACKAGES}
        | {"detectron2": detectron2.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}",
        "data": {name: hash_file(datasets.root() / datasets.get_entry(name).json) for name in data_sets},
    }


def code_version() -> str:
    """ "0.1.0, commit 7814c9c1d2e3" (and " with changes"); the version alone outside of a clone."""
    folder = Path(vild.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.check_output(command, cwd=folder, text=True, stderr=subprocess.DEVNULL, timeout=10).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent:  # another project's repository
            return vild.__version__
        commit, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return vild.__version__
    return f"{vild.__version__}, commit {commit}{' with changes' if changes else ''}"


def differing(then: dict, now: dict, default: dict) -> list[tuple[str, object, object]]:
    """(key, value then, value now) of each changed key that a resumed training must not change. A key that did not
    exist then counts as its default; one that no longer exists is ignored."""
    then, now, default = (dict(_flat(tree)) for tree in (then, now, default))
    pairs = ((key, then.get(key, default.get(key)), value) for key, value in now.items())
    fixed = (pair for pair in pairs if pair[0].startswith(FIXED) and pair[0] not in FREE)
    return [(key, a, b) for key, a, b in fixed if not key.endswith("_TEST") and _plain(a) != _plain(b)]


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value):
    """Make values comparable: tuples as lists, as YAML does; extra teachers without their paths; both SyncBNs of
    Detectron2 as one, with the same weights (a training that SyncBN ended at an empty batch goes on with the other)."""
    value = "SyncBN" if value == "naiveSyncBN_N" else value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in ("STORE", "VOCABULARY")}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint from which a training in ``folder`` goes on, if there is one; UserError if it is lost."""
    tag = Path(folder) / "last_checkpoint"
    if not tag.is_file():
        return None
    with refused_as(f"{tag}: is not what a training writes"):
        path = tag.with_name(tag.read_text().strip())
    if not path.is_file():
        raise UserError(f"--resume: {tag} names {path.name}, which is not there")
    return path


def check_resumable(cfg) -> None:
    """UserError, naming the differences, if the checkpoint in ``OUTPUT_DIR`` is of a training with another model.
    (Checkpoints of earlier versions, without a record, pass.)"""
    path = last_checkpoint(cfg.OUTPUT_DIR)
    if path is None:
        return
    with refused_as(f"checkpoint {path} cannot be read"):
        record = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("run")
    if record is None:
        return
    configs = (record["config"], cfg.dump(), default_config().dump())
    if found := differing(*map(yaml.safe_load, configs)):
        changes = "; ".join(f"{key} was {then!r}, is {now!r}" for key, then, now in found)
        raise UserError(
            f"--resume: {path} is of a training with another config: {changes}. To start a new one from its weights: "
            f"MODEL.WEIGHTS {path}, another OUTPUT_DIR, no --resume"
        )
