"""A grid of settings by seeds on the built-in world: what to run for each row, and the table and plot of what came out.

A grid is a YAML file: ``seeds``, ``iterations`` (of each detector; 0: as its config says) and ``rows``, a name and a
setting each:

* ``config``: one of configs/Glyphs/; every key with capitals is an override of it (``MODEL.VILD.OBJECTIVES: [...]``);
* ``data``: "nonovel" (training scenes without novel objects) or "all" (the novel names annotated: an oracle);
* ``teachers: 2``: a second teacher, of another width, beside the first (MODEL.VILD.TEACHERS);
* or ``evaluate``: another row's detector, with ``novel_texts: rotated`` (a control that must destroy novel AP);
* or ``clip_on_crops: true``: the teacher on every proposal, no detector.

A key that a row would not look at is refused, and so is an override that does not fit its config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from vild.engine import load_config
from vild.errors import UserError
from vild.evaluation import cost
from vild.files import written_whole
from vild.modeling.loss_weights import parse_loss_weights
from vild.modeling.objectives import parse_objectives
from vild.pipeline import REPOSITORY, GlyphsRun, Stage, stage
from vild.teaching import distils_maps
from vild.untrusted import read_yaml
from vild.vocabulary import Vocabulary

METRICS = ["bbox/AP50_novel", "bbox/AP50_base", "bbox/AP50_all", "bbox/APr", "bbox/APc", "bbox/APf",
           "segm/AP50_novel", "segm/AP50_base"]  # fmt: skip
SECONDS, PARAMETERS, GFLOP = "seconds a step", "million parameters", "GFLOP"
CONFIGS = REPOSITORY / "configs" / "Glyphs"
CHOICES = {"data": ("train", "nonovel", "all"), "novel_texts": ("", "rotated"), "clip_on_crops": (False, True),
           "teachers": (1, 2)}  # fmt: skip
LOOKS_AT = {"config": ("data", "teachers"), "evaluate": ("novel_texts",), "clip_on_crops": ()}  # each sort of row


@dataclass(frozen=True)
class Row:
    """One setting of a grid (see above)."""

    name: str
    config: str = ""
    data: str = "train"
    evaluate: str = ""
    novel_texts: str = ""
    clip_on_crops: bool = False
    teachers: int = 1
    overrides: tuple[tuple[str, object], ...] = ()

    @property
    def stage(self) -> str:
        """Its name as a folder."""
        return "row-" + re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


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
        if row.evaluate and row.evaluate not in trained:
            raise UserError(f"grid {path}, row '{row.name}': evaluate: '{row.evaluate}' is no row with a config")
        if row.evaluate and trained[row.evaluate].teachers > 1:
            raise UserError(f"grid {path}, row '{row.name}': evaluate: '{row.evaluate}' has more teachers than one")
        if row.clip_on_crops and not any(map(_fit_for_gauges, grid.rows)):
            raise UserError(
                f"grid {path}, row '{row.name}': it is measured beside a row with a config (of one teacher), "
                "which is missing"
            )
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
    known = {k: v for k, v in setting.items() if k in ("config", "evaluate", *CHOICES)}
    overrides = {k: v for k, v in setting.items() if k not in known}
    for key in overrides:
        if key != key.upper():
            raise UserError(
                f"{where}: '{key}' is not one of config, evaluate, {', '.join(CHOICES)}, nor a config's key"
            )
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
    if sort != "clip_on_crops" and not isinstance(known[sort], str):
        raise UserError(f"{where}: {sort}: {known[sort]} is not text")
    if known.get("teachers", 1) > 1 and (not known.get("config") or known.get("data", "train") != "train"):
        raise UserError(f"{where}: teachers is for a config on data: train")
    if sort == "config":
        _check_config(known["config"], overrides, where)
    return Row(name, **known, overrides=tuple(overrides.items()))


def _check_config(config: str, overrides: Mapping[str, object], where: str) -> None:
    """UserError unless there is such a config and the overrides fit it."""
    known = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml"))
    known = [name for name in known if not name.startswith("ablations/")]
    if config not in known:
        raise UserError(f"{where}: config: '{config}' is not one of {', '.join(known)}")
    try:
        cfg = load_config(str(CONFIGS / f"{config}.yaml"), [str(x) for pair in overrides.items() for x in pair])
        parse_objectives(cfg.MODEL.VILD.OBJECTIVES)
        parse_loss_weights(cfg.MODEL.VILD.LOSS_WEIGHTS)
        distils_maps(cfg)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _fit_for_gauges(row: Row) -> bool:
    return bool(row.config) and row.data == "train" and row.teachers == 1


def run_seed(run: GlyphsRun, rows: tuple[Row, ...]) -> None:
    """Everything one seed needs, each stage once: what the rows share, then the rows, side by side."""
    data = {row.data for row in rows}
    oracle = [run.make_vocabulary("vocabulary_all", "glyphs_train_all")] if "all" in data else []
    run.prepare(*oracle)
    if "nonovel" in data:  # it never meets a novel object: its proposal network neither
        run.run(run.world("world_nonovel", "nonovel_train"))
        run.run(run.train("network_nonovel", "proposals", "DATASETS.TRAIN", "('glyphs_nonovel_train',)"))
        run.run(run.make_proposals("proposals_nonovel", "glyphs_nonovel_train", "network_nonovel"))
        run.run(run.store("store_nonovel", "glyphs_nonovel_train", "proposals_nonovel"))
    second = run.second_teacher() if any(row.teachers == 2 for row in rows) else None
    run.run(*(_train(run, row, second if row.teachers == 2 else None) for row in rows if row.config))
    others = []
    for row in rows:
        if row.evaluate:
            others.append(_evaluate(run, row, next(r for r in rows if r.name == row.evaluate)))
        elif row.clip_on_crops:
            others.append(_gauges(run, row, next(filter(_fit_for_gauges, rows))))
    run.run(*others)


def _train(run: GlyphsRun, row: Row, second: dict | None = None) -> Stage:
    where: tuple[object, ...] = ()
    start = "proposals"
    if row.data == "all":
        where = (
            "DATASETS.TRAIN",
            "('glyphs_train_all',)",
            "MODEL.VILD.VOCABULARY",
            run.folder / "vocabulary_all.safetensors",
        )
    elif row.data == "nonovel":
        where = ("DATASETS.TRAIN", "('glyphs_nonovel_train',)", "MODEL.VILD.STORE", run.folder / "store_nonovel")
        start = "network_nonovel"
    if second is not None:
        where = ("MODEL.VILD.TEACHERS", [second])
    overrides = (x for pair in row.overrides for x in pair)
    return run.train(row.stage, row.config, *where, *overrides, start=start)


def _evaluate(run: GlyphsRun, row: Row, other: Row) -> Stage:
    vocabulary = run.vocabulary
    if row.novel_texts == "rotated":
        vocabulary = run.folder / "vocabulary_rotated.safetensors"
        rotate_novel(Vocabulary.load(run.vocabulary)).save(vocabulary)
    return stage(
        row.stage, "train_net.py", "--config-file", run.config(other.config), "--eval-only", "--num-gpus", 0,
        *(x for pair in other.overrides for x in pair),  # first: MODEL.WEIGHTS may be among them
        "OUTPUT_DIR", run.folder / row.stage, "MODEL.WEIGHTS", run.folder / other.stage / "model_final.pth",
        "MODEL.VILD.VOCABULARY", run.vocabulary, "MODEL.VILD.TEST_VOCABULARY", vocabulary,
    )  # fmt: skip


def _gauges(run: GlyphsRun, row: Row, student: Row) -> Stage:
    return replace(run.gauges("gauges", student.stage, "proposals_val", student.config), name=row.stage)


def rotate_novel(vocabulary: Vocabulary) -> Vocabulary:
    """Every novel name gets the next novel name's embedding: a control that must destroy novel AP."""
    novel = vocabulary.mask("novel").nonzero()[:, 0]
    embeddings = vocabulary.embeddings.clone()
    embeddings[novel] = vocabulary.embeddings[novel.roll(1)]
    return replace(vocabulary, embeddings=embeddings, prompts="rotated")


def read_row(run: GlyphsRun, row: Row) -> dict[str, float | None]:
    """A row's metrics of one seed; of a trained one also its seconds a step, and what it costs."""
    if row.clip_on_crops:
        return {f"bbox/{key}": value for key, value in run.read_gauges()[1].items()}
    found = dict(run.metrics(row.stage))
    log = run.folder / row.stage / "metrics.json"
    if log.is_file():
        times = [json.loads(line).get("time") for line in log.read_text().splitlines()]
        found[SECONDS] = float(np.median([t for t in times if t is not None]))
    if row.config and (built := cost.detector_of_run(run.folder / row.stage, "MODEL.DEVICE", "cpu")):
        found[PARAMETERS] = cost.parameters(built[0])["all"] / 1e6
        found[GFLOP] = cost.flops(*built)["all"] / 1e9
    return found


def mean_and_std(values: list[float | None], digits: int = 1) -> str:
    """ "70.8 ± 2.9": over the seeds, with the sample's standard deviation."""
    if not values or any(v is None for v in values):
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def table(results: Mapping[str, list[dict]], gauges: Mapping[str, list[dict]]) -> str:
    """Markdown. ``results``: row to a seed's metrics each; ``gauges``: gauge to a seed's {"base", "novel"} each."""
    options = {"tablefmt": "pipe", "disable_numparse": True}
    headers = ["", "seeds", *(m.replace("bbox/", "box ").replace("segm/", "mask ") for m in METRICS),
               SECONDS, PARAMETERS, GFLOP]  # fmt: skip
    body = [
        [name, str(len(values)), *(mean_and_std([v.get(m) for v in values]) for m in METRICS),
         mean_and_std([v.get(SECONDS) for v in values], 2),
         *(mean_and_std([values[0].get(c)], 2) for c in (PARAMETERS, GFLOP))]  # the same whatever the seed
        for name, values in results.items() if values
    ]  # fmt: skip
    page = tabulate(body, headers, **options) + "\n"
    if gauges:
        rows = [
            [name, *(mean_and_std([v[m] for v in values], 3 if "cosine" in name else 1) for m in ("base", "novel"))]
            for name, values in gauges.items()
        ]
        page += "\n" + tabulate(rows, ["gauge", "base", "novel"], **options) + "\n"
    return page


def plot(results: Mapping[str, list[dict]], path: Path) -> None:
    """Novel over base box AP50, a cross a row: mean and standard deviation over the seeds."""
    with _axes(path) as axes:
        for number, (name, values) in enumerate(r for r in results.items() if r[1]):
            x, y = ([v.get(f"bbox/AP50_{mark}") for v in values] for mark in ("base", "novel"))
            if None not in x and None not in y:
                look = {"color": f"C{number % 10}", "marker": "os^Dv"[number // 10 % 5], "label": name}
                axes.errorbar(np.mean(x), np.mean(y), xerr=_spread(x), yerr=_spread(y), **look, **_POINT)
        axes.set_xlabel("box AP50, base names")
        axes.set_ylabel("box AP50, novel names")


def plot_cost(results: Mapping[str, list[dict]], path: Path) -> None:
    """Novel (filled) and base (open) box AP50 over GFLOP a picture, a row each; nothing where all rows cost the
    same."""
    rows = {name: values for name, values in results.items() if values and GFLOP in values[0]}
    if len({round(values[0][GFLOP], 6) for values in rows.values()}) < 2:
        return
    with _axes(path) as axes:
        for number, (name, values) in enumerate(rows.items()):
            for mark, face in (("novel", f"C{number % 10}"), ("base", "none")):
                y = [v.get(f"bbox/AP50_{mark}") for v in values]
                if None in y:
                    continue
                look = {"color": f"C{number % 10}", "marker": "os^Dv"[number // 10 % 5], "markerfacecolor": face}
                label = name if mark == "novel" else None
                axes.errorbar(values[0][GFLOP], np.mean(y), yerr=_spread(y), label=label, **look, **_POINT)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.set_minor_formatter("{x:.3g}")
        axes.set_xlabel("GFLOP a picture")
        axes.set_ylabel("box AP50, novel (filled) and base names")


_POINT = {"linestyle": "none", "capsize": 3}


def _spread(values: list[float]) -> float | None:
    return np.std(values, ddof=1) if len(values) > 1 else None


@contextmanager
def _axes(path: Path) -> Iterator[Any]:
    """The axes of a picture with the legend beside it, written when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    yield axes
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    with written_whole(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=110, bbox_inches="tight")
    pyplot.close(figure)
