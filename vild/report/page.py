"""Report pages, in Markdown and in HTML, from one list of blocks. The templates are in ``templates/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from tabulate import tabulate

from vild.evaluation.metrics import decimal, title
from vild.utils.files import write_text


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """A long table can be ``folded``: hidden behind this title."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""

    @property
    def markdown(self) -> str:
        return markdown_table(self.headers, self.rows)


@dataclass(frozen=True)
class Image:
    """An image file next to the page. One of several images side by side (``columns``) is scrolled on a phone."""

    file: str
    caption: str
    columns: int = 1


@dataclass(frozen=True)
class Verbatim:
    """Preformatted text, hidden behind its title."""

    title: str
    text: str


Block = Heading | Paragraph | Table | Image | Verbatim


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a bar or a line break in a cell stays in its cell."""
    headers, *rows = ([" ".join(str(cell).split()).replace("|", r"\|") for cell in row] for row in (headers, *rows))
    return tabulate(rows, headers, "pipe", disable_numparse=True)


def metric_table(rows: Mapping[str, Mapping[str, float | None]], columns: Sequence[str]) -> Table:
    """A row for each name, with its metrics of ``columns`` ("<IoU type>/<metric>"); "-" for missing ones."""
    cells = [[name, *(decimal(values.get(column)) for column in columns)] for name, values in rows.items()]
    return Table(["", *map(title, columns)], cells)


def write_page(folder: Path, heading: str, blocks: Sequence[Block]) -> Path:
    """Write ``report.md`` and ``report.html`` to ``folder``; return the path of the first."""
    environment = Environment(
        loader=PackageLoader("vild.report"),
        autoescape=lambda name: name.endswith(".html"),  # class and file names come from untrusted files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("report.html", "report.md"):
        write_text(folder / name, environment.get_template(name).render(heading=heading, blocks=blocks))
    return folder / "report.md"
