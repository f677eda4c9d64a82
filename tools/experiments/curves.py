"""AP50 over the iterations of a training, from the checkpoints that it kept (SOLVER.CHECKPOINT_PERIOD)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.glyphs import GlyphsRun
from experiments.grid import Row
from vild.config import load_config
from vild.engine.best import HISTORY, evaluations_since_best, read_history

GROUPS = ("novel", "base")
LABEL = 4.5  # height of a name in the plot, in AP
COLUMNS = [f"bbox/AP50_{group}" for group in GROUPS]
Curve = dict[int, list[float]]  # AP50 of novel and of base classes, by iteration


def run_curve(run: GlyphsRun, row: Row) -> Curve:
    """Evaluate the checkpoints that a row's finished training kept. The row's own result is the last point or, after
    early stopping, that of the iteration of the best checkpoint, whose result it is."""
    folder, vocabulary = run.folder / row.stage, run.vocabulary()
    extra, _ = run.extra_teacher(row.teachers)  # the row's own result is scored with it, too
    cfg, stages = load_config(str(folder / "config.yaml")), {}
    end = own = cfg.SOLVER.MAX_ITER
    history, stopped = read_history(folder / HISTORY, cfg.TEST.BEST_METRIC, end)
    if stopped is not None:
        own = [*history][-1 - evaluations_since_best([*history.values()])] + 1
    for path in sorted(folder.glob("model_*.pth")):
        number = re.fullmatch(r"model_(\d{7})", path.stem)
        iteration = int(number[1]) + 1 if number else end
        if iteration < end and iteration != own:
            stages[iteration] = run.train(
                f"{row.stage}-{iteration}", row.config, *row.arguments, "MODEL.WEIGHTS", path,
                "MODEL.VILD.VOCABULARY", vocabulary.output, *extra, flags=("--eval-only",), needs=[],
            )  # fmt: skip
    run.run(*stages.values())
    found = {iteration: run.read_metrics(stage.name) for iteration, stage in stages.items()}
    found[own] = run.read_metrics(row.stage)
    return {iteration: [metrics[column] for column in COLUMNS] for iteration, metrics in sorted(found.items())}


def plot_curves(curves: Mapping[str, Sequence[Curve]]) -> Figure:
    """A panel each for novel and base classes; in it a line for each row, the mean over its seeds in a band of their
    standard deviation, with the row's name at its end. A row whose seeds have no iteration in common has no line.

    Args:
        curves: of each row, its curve of each seed.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(GROUPS), sharey=True)
    for n, (axes, group) in enumerate(zip(panels, GROUPS, strict=True)):
        ends = []
        for number, (name, seeds) in enumerate(curves.items()):
            steps = sorted(set.intersection(*map(set, seeds)))
            if not steps:  # they ended early, and kept nothing before
                continue
            values = np.array([[curve[step][n] for step in steps] for curve in seeds])
            mean = values.mean(0)
            axes.plot(steps, mean, marker="o", color=f"C{number}")
            if len(seeds) > 1:
                spread = values.std(0, ddof=1)
                axes.fill_between(steps, mean - spread, mean + spread, color=f"C{number}", alpha=0.15, linewidth=0)
            ends.append((mean[-1], name, f"C{number}", steps[-1]))
        above = np.inf
        for value, name, colour, step in sorted(ends, reverse=True):  # labels of near ends are moved apart, downwards
            above = min(value, above - LABEL)
            axes.annotate(name, (step, above), (8, 0), textcoords="offset points", va="center", color=colour)
        axes.set(title=f"{group} classes", xlabel="iterations", xlim=(0, None), ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("box AP50")
    return figure
