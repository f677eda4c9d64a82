"""What to run for each row of a grid (``grid.py``), and the table and plots of what came out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from experiments.grid import Row
from experiments.pipeline import GlyphsRun, Stage, stage
from vild.evaluation import cost
from vild.evaluation.metrics import DIAGNOSTICS, TABLES, title
from vild.utils.files import written_whole
from vild.vocabulary.vocabulary import Vocabulary

METRICS = TABLES["ablation"]
SECONDS, PARAMETERS, GFLOP = "seconds a step", "million parameters", "GFLOP"


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
    seconds = {"twice": {"STORE": str(run.folder / "store"), "VOCABULARY": str(run.vocabulary)}}
    if any(row.teachers == 2 for row in rows):
        seconds[2] = run.second_teacher()
    run.run(*(_train(run, row, seconds.get(row.teachers)) for row in rows if row.config))
    others = []
    for row in rows:
        if row.evaluate:
            others.append(_evaluate(run, row, next(r for r in rows if r.name == row.evaluate)))
        elif row.clip_on_crops:
            others.append(_gauges(run, row, next(r for r in rows if r.name == row.clip_on_crops)))
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
    return run.train(row.stage, row.config, *where, *row.arguments, start=start)


def _evaluate(run: GlyphsRun, row: Row, other: Row) -> Stage:
    vocabulary = run.vocabulary
    if row.novel_texts == "rotated":
        vocabulary = run.folder / "vocabulary_rotated.safetensors"
        rotate_novel(Vocabulary.load(run.vocabulary)).save(vocabulary)
    return stage(
        row.stage, "train_net.py", "--config-file", run.config(other.config), "--eval-only", "--num-gpus", 0,
        *other.arguments,  # first: MODEL.WEIGHTS may be among them
        "OUTPUT_DIR", run.folder / row.stage, "MODEL.WEIGHTS", run.folder / other.stage / "model_final.pth",
        "MODEL.VILD.VOCABULARY", run.vocabulary, "MODEL.VILD.TEST_VOCABULARY", vocabulary,
    )  # fmt: skip


def _gauges(run: GlyphsRun, row: Row, student: Row) -> Stage:
    gauges = run.gauges("gauges", student.stage, "proposals_val", student.config, *student.arguments)
    return replace(gauges, name=row.stage)


def rotate_novel(vocabulary: Vocabulary) -> Vocabulary:
    """Every novel name gets the next novel name's embedding: a control that must destroy novel AP."""
    novel = vocabulary.mask("novel").nonzero()[:, 0]
    embeddings = vocabulary.embeddings.clone()
    embeddings[novel] = vocabulary.embeddings[novel.roll(1)]
    return replace(vocabulary, embeddings=embeddings, prompts="rotated")


def read_row(run: GlyphsRun, row: Row) -> dict[str, float | None]:
    """A row's metrics of one seed; of a trained one also its seconds a step."""
    if row.clip_on_crops:
        return {f"bbox/{key}": value for key, value in run.read_gauges()[1].items()}
    found = dict(run.metrics(row.stage))
    log = run.folder / row.stage / "metrics.json"
    if log.is_file():
        times = [json.loads(line).get("time") for line in log.read_text().splitlines()]
        found[SECONDS] = float(np.median([t for t in times if t is not None]))
    return found


def read_cost(run: GlyphsRun, row: Row) -> dict[str, float]:
    """What a trained row's detector costs, the same whatever the seed; of other rows nothing."""
    built = cost.detector_of_run(run.folder / row.stage, "MODEL.DEVICE", "cpu") if row.config else None
    if built is None:
        return {}
    return {PARAMETERS: cost.parameters(built[0])["all"] / 1e6, GFLOP: cost.flops(*built)["all"] / 1e9}


def mean_and_std(values: list[float | None], digits: int = 1) -> str:
    """ "70.8 ± 2.9": over the seeds, with the sample's standard deviation."""
    if not values or any(v is None for v in values):
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def table(results: Mapping[str, list[dict]], gauges: Mapping[str, list[dict]]) -> str:
    """Markdown. ``results``: row to a seed's metrics each, the first with what the row costs; ``gauges``: gauge to a
    seed's {"base", "novel"} each."""
    options = {"tablefmt": "pipe", "disable_numparse": True}
    headers = ["", "seeds", *map(title, METRICS),
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
            [name, *(mean_and_std([v[m] for v in values], DIAGNOSTICS.get(name, 1)) for m in ("base", "novel"))]
            for name, values in gauges.items()
        ]
        page += "\n" + tabulate(rows, ["gauge", "base", "novel"], **options) + "\n"
    return page


def plot(results: Mapping[str, list[dict]], path: Path) -> None:
    """Novel over base box AP50, a cross a row: mean and standard deviation over the seeds."""
    with _axes(path, results) as axes:
        for number, (name, values) in enumerate(results.items()):
            x, y = ([v.get(f"bbox/AP50_{mark}") for v in values] for mark in ("base", "novel"))
            if values and None not in x and None not in y:
                look = _look(number)
                axes.errorbar(np.mean(x), np.mean(y), xerr=_spread(x), yerr=_spread(y), label=name, **look)
        axes.set_xlabel("box AP50, base names")
        axes.set_ylabel("box AP50, novel names")


def plot_cost(results: Mapping[str, list[dict]], path: Path) -> None:
    """Novel (filled) and base (open) box AP50 over GFLOP an image, a row each; nothing where all rows cost the
    same."""
    rows = [(n, *row) for n, row in enumerate(results.items()) if row[1] and GFLOP in row[1][0]]
    if len({round(values[0][GFLOP], 6) for _, _, values in rows}) < 2:
        return
    with _axes(path, results) as axes:
        for number, name, values in rows:
            for mark, more in (("novel", {"label": name}), ("base", {"markerfacecolor": "none"})):
                y = [v.get(f"bbox/AP50_{mark}") for v in values]
                if None not in y:
                    axes.errorbar(values[0][GFLOP], np.mean(y), yerr=_spread(y), **_look(number), **more)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.set_minor_formatter("{x:.3g}")
        axes.set_xlabel("GFLOP an image")
        axes.set_ylabel("box AP50, novel (filled) and base names")


def _look(number: int) -> dict[str, object]:
    """Of a row's points, by its place among the results: the same in every image."""
    return {"color": f"C{number % 10}", "marker": "os^Dv"[number // 10 % 5], "linestyle": "none", "capsize": 3}


def _spread(values: list[float]) -> float | None:
    return np.std(values, ddof=1) if len(values) > 1 else None


@contextmanager
def _axes(path: Path, results: Mapping[str, list[dict]]) -> Iterator[Any]:
    """The axes of an image of ``results`` with the legend beside it, written when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    seeds = max(map(len, results.values()))
    axes.set_title(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed")
    yield axes
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    with written_whole(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=110, bbox_inches="tight")
    pyplot.close(figure)
