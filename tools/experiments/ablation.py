"""Runs the rows of a grid (``grid.py``), and makes the table and the plots of their results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.glyphs import GlyphsRun
from experiments.grid import Grid, Row
from experiments.runner import Stage
from vild.evaluation import cost
from vild.evaluation.metrics import DIAGNOSTICS, TABLES, title
from vild.inference.drawing import COLOURS
from vild.report.page import markdown_table
from vild.utils.files import written_whole
from vild.vocabulary.vocabulary import Vocabulary

METRICS = TABLES["ablation"]
PARAMETERS, GFLOP = "million parameters", "GFLOP"
WEIGHT, SHARE = "weight", "share of L1's gradient"


def run_seed(run: GlyphsRun, rows: tuple[Row, ...]) -> None:
    """Run all that the rows need, then train their detectors in parallel, then evaluate the other rows."""
    trained = {
        row.name: run.detector(row.stage, row.config, *row.arguments, data=row.data, teachers=row.teachers)
        for row in rows if row.config
    }  # fmt: skip
    run.run(*trained.values())
    by_name, others = {row.name: row for row in rows}, []
    for row in rows:
        if row.evaluate:
            others.append(_evaluate(run, row, by_name[row.evaluate], trained[row.evaluate]))
        elif row.clip_on_crops:
            of = by_name[row.clip_on_crops]
            others.append(run.diagnostics(row.stage, trained[of.name], of.config, *of.arguments))
    run.run(*others)


def _evaluate(run: GlyphsRun, row: Row, other: Row, detector: Stage) -> Stage:
    vocabulary, path = run.vocabulary(), run.folder / "vocabulary_rotated.safetensors"
    if row.novel_texts == "rotated":
        rotate_novel(Vocabulary.load(vocabulary.output)).save(path)
    settings = (
        "MODEL.WEIGHTS", detector.output / "model_final.pth", "MODEL.VILD.VOCABULARY", vocabulary.output,
        "MODEL.VILD.TEST_VOCABULARY", path if row.novel_texts else vocabulary.output,
    )  # fmt: skip
    # after the row's own overrides, in which MODEL.WEIGHTS may be what the training started from
    return run.train(row.stage, other.config, *other.arguments, *settings, flags=("--eval-only",), needs=(detector,))


def rotate_novel(vocabulary: Vocabulary) -> Vocabulary:
    """Give each novel class the embedding of the next one."""
    novel = vocabulary.mask("novel").nonzero()[:, 0]
    embeddings = vocabulary.embeddings.clone()
    embeddings[novel] = vocabulary.embeddings[novel.roll(1)]
    return replace(vocabulary, embeddings=embeddings, prompts="rotated")


def read_row(run: GlyphsRun, row: Row) -> dict[str, float | None]:
    """The metrics of a row."""
    if row.clip_on_crops:
        return {f"bbox/{key}": value for key, value in run.read_diagnostics()[1].items()}
    return run.read_metrics(row.stage)


def read_cost(run: GlyphsRun, row: Row) -> dict[str, float]:
    """Parameters and GFLOP of a trained row's detector, which do not depend on the seed; {} for other rows."""
    built = cost.detector_of_run(run.folder / row.stage, "MODEL.DEVICE", "cpu") if row.config else None
    if built is None:
        return {}
    return {PARAMETERS: cost.parameters(built[0])["all"] / 1e6, GFLOP: cost.flops(*built)["all"] / 1e9}


def read_shares(run: GlyphsRun, grid: Grid, path: Path) -> dict[str, tuple[str, str]]:
    """The weights of each row's objectives ("4 l1 + 0.5 contrast"), and their gradients' shares of L1's ("1 + 0.3") on
    what the detector of the row ``grid.shares`` embeds. ``path``: of the grid."""
    row = next(row for row in grid.rows if row.name == grid.shares)
    detector = run.detector(row.stage, row.config, *row.arguments, data=row.data, teachers=row.teachers)
    run.run(measured := run.shares(detector, path))
    found: dict[str, list[tuple[str, str]]] = {}
    for each in json.loads(measured.output.read_text())["rows"]:
        share = each["share"]  # null, in earlier files NaN, where it has none
        share = "-" if share is None or np.isnan(share) else f"{share:.2g}"
        found.setdefault(each["row"], []).append((f"{each['weight']:.3g} {each['objective']}", share))
    return {name: tuple(" + ".join(column) for column in zip(*parts, strict=True)) for name, parts in found.items()}


def mean_and_std(values: list[float | None], digits: int = 1) -> str:
    """ "70.8 ± 2.9": mean and sample standard deviation over the seeds; "-" if a value is missing."""
    if not values or None in values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {_spread(values):.{digits}f}" if len(values) > 1 else mean


def table(
    results: Mapping[str, list[dict]],
    diagnostics: Mapping[str, list[dict]],
    shares: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Markdown tables.

    Args:
        results: of each row, the metrics of each seed; those of the first seed include the row's cost.
        diagnostics: of each diagnostic, {"base", "novel"} of each seed.
        shares: of :func:`read_shares`.
    """
    body, extra = [], [WEIGHT, SHARE] if shares else []
    for name, values in results.items():
        if values:
            cells = [mean_and_std([v.get(m) for v in values]) for m in METRICS]
            cells += [mean_and_std([values[0].get(c)], 2) for c in (PARAMETERS, GFLOP)]
            weighted = shares.get(name, ("-", "-")) if shares else ()
            body.append([name, *weighted, str(len(values)), *cells])
    tables = [markdown_table(["", *extra, "seeds", *map(title, METRICS), PARAMETERS, GFLOP], body)]
    rows = [
        [name, *(mean_and_std([v[m] for v in values], DIAGNOSTICS.get(name, 1)) for m in ("base", "novel"))]
        for name, values in diagnostics.items()
    ]
    if rows:
        tables.append(markdown_table(["diagnostic", "base", "novel"], rows))
    return "\n\n".join(tables) + "\n"


def plot(results: Mapping[str, list[dict]], path: Path) -> None:
    """Box AP50 of each row, the best on novel classes first."""
    rows = _measured(results)
    write_figure(dots(dict(sorted(rows.items(), key=lambda row: -np.mean(row[1]["novel"])))), path)


def plot_cost(results: Mapping[str, list[dict]], path: Path) -> None:
    """As :func:`plot`, with GFLOP per image, the cheapest row first; no plot if all rows cost the same."""
    costs = {name: values[0][GFLOP] for name, values in results.items() if values and GFLOP in values[0]}
    if len({round(gflop, 6) for gflop in costs.values()}) < 2:
        return
    rows = _measured({name: results[name] for name in sorted(costs, key=costs.get)})
    write_figure(dots({f"{name}, {costs[name]:.3g} GFLOP": values for name, values in rows.items()}), path)


def _measured(results: Mapping[str, list[dict]]) -> dict[str, dict[str, list[float]]]:
    """Box AP50 of novel and base classes by seed, of the rows that have both."""
    found = {name: {group: [v.get(f"bbox/AP50_{group}") for v in values] for group in ("novel", "base")}
             for name, values in results.items() if values}  # fmt: skip
    return {name: groups for name, groups in found.items() if None not in [*groups["novel"], *groups["base"]]}


def dots(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """A line for each row, with its mean on novel and on base classes and the standard deviation over the seeds."""
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for group in ("novel", "base"):
        means = [np.mean(groups[group]) for groups in rows.values()]
        errors = [_spread(groups[group]) or 0 for groups in rows.values()]
        axes.errorbar(means, range(len(rows)), xerr=errors, fmt="o", capsize=3, color=COLOURS[group])
        if means:  # the two names, away from one another
            lower = means[0] <= np.mean(next(iter(rows.values()))["base" if group == "novel" else "novel"])
            axes.annotate(f"{group} classes", (means[0], 0), (8 if lower else -8, 10), textcoords="offset points",
                          ha="right" if lower else "left", weight="bold", color=COLOURS[group])  # fmt: skip
    seeds = max((len(groups["novel"]) for groups in rows.values()), default=1)
    axes.set_xlabel("box AP50" + (f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"))
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -1.2)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    with written_whole(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=110)


def _spread(values: Sequence[float]) -> float | None:
    return np.std(values, ddof=1) if len(values) > 1 else None
