"""A report page from blocks, as Markdown and as HTML with the same content."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from vild.utils.files import write_text

_STYLE = """body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd }
td + td { text-align: right } img { max-width: 100% } details { margin: 1em 0 }"""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """``folded``: long; HTML shows it on a click on this title."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""


@dataclass(frozen=True)
class Image:
    """An image file beside the page."""

    file: str
    caption: str


@dataclass(frozen=True)
class Verbatim:
    """A text as it is, shown on a click on its title."""

    title: str
    text: str


Block = Heading | Paragraph | Table | Image | Verbatim


def markdown(title: str, blocks: Sequence[Block]) -> str:
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Paragraph(text):
                parts.append(text)
            case Table(headers, rows, _):
                parts.append(tabulate(rows, headers, "pipe", disable_numparse=True))
            case Image(file, caption):
                parts.append(f"![{caption}]({file})\n\n*{caption}*")
            case Verbatim(name, text):
                parts.append(f"<details><summary>{name}</summary>\n\n```\n{text.strip()}\n```\n\n</details>")
    return "\n\n".join(parts) + "\n"


def as_html(title: str, blocks: Sequence[Block]) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case Paragraph(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Table(headers, rows, folded):
                table = tabulate(rows, headers, "html", disable_numparse=True)
                parts.append(f"<details><summary>{html.escape(folded)}</summary>{table}</details>" if folded else table)
            case Image(file, caption):
                parts.append(f'<p><img src="{html.escape(file)}" alt=""><br>{html.escape(caption)}</p>')
            case Verbatim(name, text):
                summary = f"<summary>{html.escape(name)}</summary>"
                parts.append(f"<details>{summary}<pre>{html.escape(text)}</pre></details>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>" + "\n".join(parts) + "</body></html>\n"
    )


def write_page(folder: Path, title: str, blocks: Sequence[Block]) -> Path:
    """``report.md`` and ``report.html`` in ``folder``; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", as_html(title, blocks))
    path = folder / "report.md"
    write_text(path, markdown(title, blocks))
    return path
