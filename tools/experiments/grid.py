"""A grid of settings by seeds on the built-in world, read from its file and checked before anything runs.

A grid is a YAML file: ``seeds``, ``iterations`` (of each detector; 0: as its config says) and ``rows``, a name and a
setting each:

* ``config``: one of configs/Glyphs/; every key with capitals is an override of it (``MODEL.VILD.OBJECTIVES: [...]``);
* ``data``: "nonovel" (training scenes without novel objects) or "all" (the novel names annotated: an oracle);
* ``teachers``: 2, a second teacher, of another width, beside the first (MODEL.VILD.TEACHERS); or "twice", the first one
  again as the second (a control: the second projection, loss and say at test, but nobody new);
* or ``evaluate``: another row's detector, with ``novel_texts: rotated`` (a control that must destroy novel AP);
* or ``clip_on_crops``: the teacher on every proposal, no detector; the value is another row, whose detector is measured
  beside it (the gauges).

A detector starts from the proposal network's weights, unless ``MODEL.WEIGHTS`` says otherwise ("": from scratch).
A key that a row would not look at is refused, and so is an override that does not fit its config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.pipeline import CONFIGS
from vild.config import load_config
from vild.engine.best import check_patience
from vild.engine.sources import check_teaching, distils_from
from vild.modeling import build_backbone
from vild.utils.errors import UserError
from vild.utils.untrusted import read_yaml

CHOICES = {"data": ("train", "nonovel", "all"), "novel_texts": ("", "rotated"), "teachers": (1, 2, "twice")}
LOOKS_AT = {"config": ("data", "teachers"), "evaluate": ("novel_texts",), "clip_on_crops": ()}  # each sort of row
# keys that the pipeline sets, and what says it in a grid
OWNED = {"OUTPUT_DIR": "", "SEED": "seeds", "DATASETS.TRAIN": "data", "DATASETS.TEST": "", "MODEL.VILD.VOCABULARY": "",
         "MODEL.VILD.STORE": "data", "MODEL.VILD.TEACHERS": "teachers", "MODEL.VILD.TEACHER.NAME": ""}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One setting of a grid (see above)."""

    name: str
    config: str = ""
    data: str = "train"
    evaluate: str = ""
    novel_texts: str = ""
    clip_on_crops: str = ""
    teachers: int | str = 1
    overrides: tuple[tuple[str, object], ...] = ()

    @property
    def stage(self) -> str:
        """Its name as a folder."""
        return "row-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def arguments(self) -> tuple[object, ...]:
        """Its overrides as a command has them: key, value, key, value ..."""
        return tuple(x for pair in self.overrides for x in pair)


@dataclass(frozen=True)
class Grid:
    """Rows by seeds."""

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    iterations: int = 0


def read_grid(path: Path) -> Grid:
    """A grid's file, checked.

    Raises:
        UserError: no such file, or a key or value that does not fit.
    """
    document = read_yaml(path, "grid")
    if not document.keys() <= {"rows", "seeds", "iterations"}:
        raise UserError(f"grid {path}: its keys are rows, seeds and iterations")
    rows = document.get("rows")
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"grid {path}: rows is empty; give a name and a setting each")
    iterations = document.get("iterations", 0)
    if type(iterations) is not int or iterations < 0:
        raise UserError(f"grid {path}: iterations: {iterations} is not a whole number from 0 on")
    seeds = check_seeds(document.get("seeds", [0, 1, 2]), f"grid {path}: seeds")
    rows = tuple(_row(str(name), setting, f"grid {path}, row '{name}'") for name, setting in rows.items())
    grid = Grid(rows, seeds, iterations)
    trained, stages = {r.name: r for r in grid.rows if r.config}, [r.stage for r in grid.rows]
    for row in grid.rows:
        if stages.count(row.stage) > 1:
            raise UserError(f"grid {path}: two rows would lie in {row.stage}; name them differently")
        for key in ("evaluate", "clip_on_crops"):
            if not (other := getattr(row, key)):
                continue
            where = f"grid {path}, row '{row.name}': {key}: '{other}'"
            if other not in trained:
                raise UserError(f"{where} is no row with a config")
            if trained[other].teachers != 1:
                raise UserError(f"{where} has more teachers than one")
            if key == "clip_on_crops" and trained[other].data != "train":
                raise UserError(f"{where} is not of data: train")
    crops = [row.name for row in grid.rows if row.clip_on_crops]
    if len(crops) > 1:
        raise UserError(f"grid {path}: rows '{crops[0]}' and '{crops[1]}' would both write gauges.json; keep one")
    return grid


def check_seeds(seeds: object, where: str) -> tuple[int, ...]:
    """UserError unless they are a list of different whole numbers, one at least."""
    if not isinstance(seeds, list) or not seeds or any(type(s) is not int or s < 0 for s in seeds):
        raise UserError(f"{where}: {seeds} is not a list of whole numbers from 0 on, [0, 1, 2] say")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: {seeds} has one twice")
    return tuple(seeds)


def _row(name: str, setting: object, where: str) -> Row:
    if not isinstance(setting, dict):
        raise UserError(f"{where}: {setting} is no setting; for example {{config: vild}}")
    if not re.fullmatch(r"[^_|$][^|$]*", name) or not name.isprintable():
        raise UserError(f"{where}: a table or plot cannot show its name; no '|' or '$', no '_' first")
    for key in setting:
        if not isinstance(key, str):
            raise UserError(f"{where}: its key {key!r} is not text")
    known = {k: v for k, v in setting.items() if k in (*LOOKS_AT, *CHOICES)}
    overrides = {k: v for k, v in setting.items() if k not in known}
    for key in overrides:
        if key != key.upper():
            raise UserError(f"{where}: '{key}' is not one of {', '.join((*LOOKS_AT, *CHOICES))}, nor a config's key")
        for owned, instead in OWNED.items():
            if f"{owned}.".startswith(f"{key}."):
                raise UserError(f"{where}: '{key}' is set by the pipeline" + (f"; give {instead}" if instead else ""))
    for key, allowed in CHOICES.items():
        if known.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key}: {known[key]} is not one of {', '.join(map(str, allowed))}")
    sorts = [key for key in LOOKS_AT if known.get(key)]
    if len(sorts) != 1:
        raise UserError(f"{where}: give one of config, evaluate and clip_on_crops")
    (sort,) = sorts
    for key, value in known.items():
        if value and key not in (sort, *LOOKS_AT[sort]):
            raise UserError(f"{where}: '{key}' means nothing beside {sort}")
    if overrides and sort != "config":
        raise UserError(f"{where}: '{next(iter(overrides))}' means nothing beside {sort}")
    if not isinstance(known[sort], str):
        raise UserError(f"{where}: {sort}: {known[sort]} is not a name")
    if known.get("teachers", 1) != 1 and (not known.get("config") or known.get("data", "train") != "train"):
        raise UserError(f"{where}: teachers is for a config on data: train")
    if sort == "config":
        _check_config(known["config"], known.get("teachers", 1), overrides, where)
    return Row(name, **known, overrides=tuple(overrides.items()))


def _check_config(config: str, teachers: object, overrides: Mapping[str, object], where: str) -> None:
    """UserError unless there is such a config of a detector, and the overrides and the number of teachers fit it."""
    known = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml"))
    known = [name for name in known if not re.match("ablations/|Base-|proposals$", name)]
    if config not in known:
        raise UserError(f"{where}: config: '{config}' is not one of {', '.join(known)}")
    try:
        pairs = {**overrides, **({} if teachers == 1 else {"MODEL.VILD.TEACHERS": [{"STORE": "", "VOCABULARY": ""}]})}
        cfg = load_config(str(CONFIGS / f"{config}.yaml"), [str(x) for pair in pairs.items() for x in pair])
        check_teaching(cfg)
        check_patience(cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE)
        if distils_from(cfg) == "nothing" and "MODEL.VILD.OBJECTIVES" in overrides:
            raise UserError("MODEL.VILD.OBJECTIVES means nothing to a detector that distils nothing")
        if cfg.MODEL.VILD.TIMM_BACKBONE:
            build_backbone(cfg)  # does timm have it?
            if "MODEL.WEIGHTS" not in overrides:
                raise UserError('the proposal network has another backbone; add MODEL.WEIGHTS: "" (from scratch)')
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
