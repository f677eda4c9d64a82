"""The report of the quickstart: both detectors' metrics, an image, diagnostics and the time of every stage."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from vild.evaluation.metrics import DIAGNOSTICS, TABLES, decimal
from vild.report.page import Heading, Image, Paragraph, Table, metric_table, write_page
from vild.utils.files import write_image, write_json


def quickstart_table(metrics: dict[str, dict[str, float | None]]) -> Table:
    """The metrics {"<IoU type>/<metric>": percent} of each detector, by its name."""
    return metric_table(metrics, TABLES["quickstart"])


def write_quickstart_report(folder: Path, document: dict, text: str, image: PIL.Image.Image) -> Path:
    """Write ``report.md``, ``report.html``, ``report.json`` and ``report.png`` to ``folder``; return the first's path.

    Args:
        document: metrics of each detector, by its name; beside them "gauges" (diagnostics, each by base and novel)
            and "seconds" (by stage).
        text: the introduction.
        image: of :func:`vild.report.images.comparison`.
    """
    write_image(folder / "report.png", image)
    write_json(folder / "report.json", document)
    detectors = {name: values for name, values in document.items() if name not in ("gauges", "seconds")}
    diagnostics = [
        [name, *(decimal(values[group], DIAGNOSTICS[name]) for group in ("base", "novel"))]
        for name, values in document["gauges"].items()
    ]
    return write_page(
        folder,
        "ViLD on the built-in world",
        [
            Paragraph(text),
            quickstart_table(detectors),
            Image("report.png", "ground truth, ViLD-text and ViLD; base names in blue, novel names in orange"),
            Heading("Diagnostics"),
            Paragraph("On the same images, in percent; the cosine as it is:"),
            Table(["", "base", "novel"], diagnostics),
            Heading("Time"),
            Paragraph("In seconds (some stages ran in parallel):"),
            Table(["stage", "s"], [[stage, f"{seconds:.0f}"] for stage, seconds in document["seconds"].items()]),
        ],
    )
