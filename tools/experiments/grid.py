"""A grid of settings and seeds on the built-in world, read from a YAML file and checked before anything runs.

The file has ``seeds``, ``iterations`` (of each detector; 0: as its config says), ``shares`` (the name of a row: the
table also has the weight of each row's objectives and their gradients' share of L1's, on what that row's detector of
the first seed embeds) and ``rows``, which maps names to settings. A setting is one of

* ``config``: a config of configs/Glyphs/. Keys in capitals override its keys (``MODEL.VILD.OBJECTIVES: [...]``).
  ``data``: "nonovel" (no novel object is drawn in the training scenes), "all" (novel classes are annotated: an
  oracle) or "heldout" (base names are held out in place of novel ones, and dev is evaluated: for choosing settings).
  ``teachers``: 2, an extra teacher of another width (MODEL.VILD.TEACHERS), or "twice", the first teacher as
  its own extra teacher (a control: a second projection and loss, without new information);
* ``evaluate``: another row's detector, with ``novel_texts: rotated`` (a control that must destroy novel AP);
* ``clip_on_crops``: the teacher classifies every proposal, without a detector; the value names another row, for whose
  detector the diagnostics are computed.

A detector starts from the proposal network's weights unless ``MODEL.WEIGHTS`` is given ("": from scratch).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.glyphs import CONFIGS
from vild.config import load_config
from vild.engine.best import check_patience
from vild.engine.sources import parse_distillation
from vild.modeling import build_backbone
from vild.utils.errors import UserError
from vild.utils.untrusted import read_yaml

CHOICES = {"data": ("train", "nonovel", "all", "heldout"), "novel_texts": ("", "rotated"), "teachers": (1, 2, "twice")}
KINDS = {"config": ("data", "teachers"), "evaluate": ("novel_texts",), "clip_on_crops": ()}  # with the keys they allow
# Config keys that the stages set, and the key of a grid that determines them
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
        """The name of its stage and folder: its config's if it changes nothing, which other grids and tools share."""
        if self.clip_on_crops:
            return "diagnostics"
        if self.config.isidentifier() and self == Row(self.name, self.config):
            return self.config
        return "row-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def arguments(self) -> tuple[object, ...]:
        """The overrides as command line arguments: key, value, key, value ..."""
        return tuple(x for pair in self.overrides for x in pair)


@dataclass(frozen=True)
class Grid:
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    iterations: int = 0
    shares: str = ""


def read_grid(path: Path) -> Grid:
    """Read and check a grid file.

    Raises:
        UserError: the file is missing, or a key or value is not valid.
    """
    document, where = read_yaml(path, "grid"), f"grid {path}"
    keys = ("rows", "seeds", "iterations", "shares")
    _check(document.keys() <= {*keys}, where, f"the allowed keys are {', '.join(keys)}")
    rows, iterations = document.get("rows"), document.get("iterations", 0)
    _check(isinstance(rows, dict) and rows, where, "rows is empty; it maps names to settings")
    _check(type(iterations) is int and iterations >= 0, where, f"iterations: {iterations} is not a whole number >= 0")
    seeds = check_seeds(document.get("seeds", [0, 1, 2]), f"{where}: seeds")
    rows = tuple(_read_row(str(name), setting, f"{where}, row '{name}'") for name, setting in rows.items())
    trained, stages = {row.name: row for row in rows if row.config}, [row.stage for row in rows]
    crops = [row.name for row in rows if row.clip_on_crops]
    _check(len(crops) <= 1, where, f"rows {crops} have clip_on_crops, and would write the same file; keep one")
    for row in rows:
        _check(stages.count(row.stage) == 1, where, f"two rows would be written to {row.stage}; rename one")
        if row.config:
            continue
        key = "evaluate" if row.evaluate else "clip_on_crops"
        source = f"{where}, row '{row.name}': {key}: '{getattr(row, key)}'"
        _check(getattr(row, key) in trained, source, "not the name of a row with a config")
        other = trained[getattr(row, key)]
        _check(other.teachers == 1, source, "this row has more than one teacher")
        allowed = ("train", "nonovel", "all") if row.evaluate else ("train",)  # else val's novel names would be read
        _check(other.data in allowed, source, f"this row is not trained on data: {' or '.join(allowed)}")
    shares = document.get("shares", "")
    if shares:
        where = f"{where}: shares: '{shares}'"
        _check(isinstance(shares, str) and shares in trained, where, "not the name of a row with a config")
        row = trained[shares]
        cfg = load_config(str(CONFIGS / f"{row.config}.yaml"), [str(x) for x in row.arguments])
        _check(row.teachers == 1, where, "this row has more than one teacher")
        _check(parse_distillation(cfg).source == "store", where, "this row's detector does not distil from a store")
    return Grid(rows, seeds, iterations, shares)


def check_seeds(seeds: object, where: str) -> tuple[int, ...]:
    """UserError unless ``seeds`` is a list of one or more different whole numbers >= 0."""
    valid = isinstance(seeds, list) and seeds and all(type(seed) is int and seed >= 0 for seed in seeds)
    _check(valid, where, f"{seeds} is not a list of whole numbers >= 0, such as [0, 1, 2]")
    _check(len(set(seeds)) == len(seeds), where, f"duplicate seed in {seeds}")
    return tuple(seeds)


def _check(condition: object, where: str, message: str) -> None:
    if not condition:
        raise UserError(f"{where}: {message}")


def _read_row(name: str, setting: object, where: str) -> Row:
    _check(isinstance(setting, dict), where, f"{setting} is not a setting such as {{config: vild}}")
    printable = re.fullmatch(r"[^_|$][^|$]*", name) and name.isprintable()
    _check(printable, where, "tables and plots cannot show this name; avoid '|', '$' and a leading '_'")
    for key in setting:
        _check(isinstance(key, str), where, f"key {key!r} is not text")
    known = {key: value for key, value in setting.items() if key in (*KINDS, *CHOICES)}
    overrides = {key: value for key, value in setting.items() if key not in known}
    kinds = [key for key in KINDS if known.get(key)]
    for key in overrides:
        _check(key.isupper(), where, f"'{key}' is not one of {', '.join((*KINDS, *CHOICES))}, nor a config key")
        for owned, instead in OWNED.items():
            message = f"'{key}' is set by the stages" + (f"; use {instead}" if instead else "")
            _check(not f"{owned}.".startswith(f"{key}."), where, message)
    for key, allowed in CHOICES.items():
        value = known.get(key, allowed[0])
        _check(value in allowed, where, f"{key}: {value} is not one of {', '.join(map(str, allowed))}")
    _check(len(kinds) == 1, where, f"give one of {', '.join(KINDS)}")
    kind = kinds[0]
    allowed = (kind, *KINDS[kind], *(overrides if kind == "config" else ()))
    for key, value in setting.items():
        _check(key in allowed or (key in known and not value), where, f"'{key}' has no effect with {kind}")
    _check(isinstance(known[kind], str), where, f"{kind}: {known[kind]} is not a name")
    if kind == "config":
        teachers = known.get("teachers", 1)
        _check(teachers == 1 or known.get("data", "train") == "train", where, "teachers needs data: train")
        _check_config(known["config"], known.get("data"), teachers, overrides, where)
    return Row(name, **known, overrides=tuple(overrides.items()))


def _check_config(config: str, data: object, teachers: object, overrides: Mapping[str, object], where: str) -> None:
    """UserError unless it is a detector's config, and the data, the overrides and the number of teachers fit it."""
    known = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))
    known = [name for name in known if not re.match("ablations/|Base-|proposals$", name)]
    _check(config in known, where, f"config: '{config}' is not one of {', '.join(known)}")
    try:
        pairs = {**overrides, **({} if teachers == 1 else {"MODEL.VILD.TEACHERS": [{"STORE": "", "VOCABULARY": ""}]})}
        cfg = load_config(str(CONFIGS / f"{config}.yaml"), [str(x) for pair in pairs.items() for x in pair])
        distillation = parse_distillation(cfg)
        check_patience(cfg.TEST.BEST_METRIC, cfg.TEST.PATIENCE)
        if distillation.source == "nothing" and "MODEL.VILD.OBJECTIVES" in overrides:
            raise UserError("MODEL.VILD.OBJECTIVES has no effect on a detector without distillation")
        if data == "all" and distillation.variant == "ensemble":
            raise UserError("data: all leaves no novel names, which the variant 'ensemble' scores by another head")
        if cfg.MODEL.VILD.TIMM_BACKBONE:
            build_backbone(cfg)  # fails if timm does not have it
            if "MODEL.WEIGHTS" not in overrides:
                raise UserError('the proposal network has another backbone; add MODEL.WEIGHTS: "" (from scratch)')
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
