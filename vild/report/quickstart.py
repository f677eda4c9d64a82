"""The report of the quickstart: both detectors' metrics, an image, diagnostics and the time of every stage."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from vild.evaluation.metrics import DIAGNOSTICS, TABLES, decimal
from vild.report.absent import absent_table
from vild.report.page import Block, Heading, Image, Paragraph, Table, metric_table, write_page
from vild.utils.command_line import THRESHOLD
from vild.utils.files import write_image, write_json

RULES = "AP by COCO's rules, on glyphs_val (LVIS's rules, of glyphs_lvis_val, give other numbers):"
SCORES = f"""How far the scores can be believed: at the default threshold of {THRESHOLD}, the share of reported boxes
that are right (precision), the share of objects that are found (recall), and how far score and share of right boxes are
apart (calibration error); in percent."""
CAPTION = "base names in blue, novel names in orange; ✓ right, ✗ wrong"
ABSENT = """Asked for words that are not in the image (random ones, and those whose text is nearest to a word that is),
beside words that are: boxes an image that are reported for an absent word, and in percent what is found of the rest."""


def absent_blocks(found: dict) -> list[Block]:
    """Summaries of absent words by detector; none if nothing was asked."""
    return [Paragraph(ABSENT), absent_table(found)] if found else []


def quickstart_table(metrics: dict[str, dict[str, float | None]]) -> Table:
    """The metrics {"<IoU type>/<metric>": percent} of each detector, by its name."""
    return metric_table(metrics, TABLES["quickstart"])


def trust_table(metrics: dict[str, dict[str, float | None]]) -> Table:
    """How far the scores of each detector can be believed, at the default threshold."""
    return metric_table(metrics, TABLES["trust"])


def write_quickstart_report(folder: Path, document: dict, text: str, image: PIL.Image.Image) -> Path:
    """Write ``report.md``, ``report.html``, ``report.json`` and ``report.png`` to ``folder``; return the first's path.

    Args:
        document: metrics of each detector, by its name; beside them "absent" (summaries of absent words, by
            detector), "gauges" (diagnostics, each by base and novel) and "seconds" (by stage).
        text: the introduction.
        image: of :func:`vild.report.images.comparison`.
    """
    write_image(folder / "report.png", image)
    write_json(folder / "report.json", document)
    detectors = {name: values for name, values in document.items() if name not in ("absent", "gauges", "seconds")}
    diagnostics = [
        [name, *(decimal(values[group], DIAGNOSTICS[name]) for group in ("base", "novel"))]
        for name, values in document["gauges"].items()
    ]
    return write_page(
        folder,
        "ViLD on the built-in world",
        [
            Paragraph(text),
            Paragraph(RULES),
            quickstart_table(detectors),
            Paragraph(SCORES),
            trust_table(detectors),
            *absent_blocks(document["absent"]),
            Image("report.png", CAPTION, columns=3),
            Heading("Diagnostics"),
            Paragraph("On the same images, in percent; the cosine as it is:"),
            Table(["", "base", "novel"], diagnostics),
            Heading("Time"),
            Paragraph("In seconds (some stages ran in parallel):"),
            Table(["stage", "s"], [[stage, f"{seconds:.0f}"] for stage, seconds in document["seconds"].items()]),
        ],
    )
