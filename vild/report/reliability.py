"""The reliability diagram: is a detection with the score 0.7 right in 7 of 10 cases?"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image as Picture

from vild.evaluation.metrics import decimal
from vild.evaluation.reliability import BINS, Judged, diagram
from vild.inference.drawing import COLOURS
from vild.report.page import Block, Heading, Image, Paragraph, Table
from vild.utils.files import write_image

TEXT = """The share of right boxes (IoU 0.5; a second box on an object is wrong) by score. On the diagonal a score is
the probability that the box is right; below it, scores promise too much. tools/calibrate.py fits them."""


def reliability_blocks(name: str, judged: Judged, splits: Sequence[str], folder: Path) -> list[Block]:
    """The diagram of the data set ``name``, by base and novel (of all classes, if none is marked): an image in
    ``folder``, and a table."""
    groups = {split: np.array([s == split for s in splits]) for split in ("base", "novel") if split in splits}
    groups = groups or {"": np.ones(len(splits), bool)}
    lines = {split: diagram(judged.of(members)) for split, members in groups.items()}
    write_image(folder / (file := f"reliability_{name}.png"), draw_diagram(lines))
    rows = []
    for number in range(BINS):
        row = [f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}"]
        for bins in lines.values():
            count, _, right = bins[number]
            row += [str(count), decimal(100 * right)]
        rows.append(row)
    headers = ["score", *(f"{name} {split}".strip() for split in lines for name in ("boxes", "% right"))]
    return [Heading("Reliability"), Paragraph(TEXT), Image(file, "share of right boxes over score"),
            Table(headers, rows, folded="by score")]  # fmt: skip


def draw_diagram(lines: dict[str, list[tuple[int, float, float]]]) -> Picture.Image:
    """A line for each split, from :func:`vild.evaluation.reliability.diagram`; a larger point stands for more boxes."""
    figure = Figure(figsize=(4.2, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    for number, (split, bins) in enumerate(lines.items()):
        count, score, right = np.array([row for row in bins if row[0]], float).reshape(-1, 3).T
        axes.plot(score, right, color=COLOURS[split], linewidth=1.5)
        axes.scatter(score, right, 8 + 60 * np.sqrt(count / max(count.max(initial=1), 1)), color=[COLOURS[split]])
        axes.text(0.04, 0.94 - 0.06 * number, split or "all", color=COLOURS[split], weight="bold", va="center")
    axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="score", ylabel="share of right boxes", aspect="equal")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(content := io.BytesIO(), format="png")
    return Picture.open(content).convert("RGB")
