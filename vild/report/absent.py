"""The table of tools/absent_words.py."""

from __future__ import annotations

from collections.abc import Mapping

from vild.evaluation.metrics import decimal
from vild.report.page import Table

COLUMNS = {  # key to title and decimals
    "false_boxes_novel": ("false boxes, novel word", 3),
    "false_boxes_base": ("false boxes, base word", 3),
    "recall": ("recall of what is there", 1),
    "image_precision": ("image precision", 1),
    "image_recall": ("image recall", 1),
}


def absent_table(rows: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> Table:
    """A row for each detector and kind of absent words, from {detector: {kind: summary}}."""
    cells = [
        [name, kind, *(decimal(summary.get(key), digits) for key, (_, digits) in COLUMNS.items())]
        for name, by_kind in rows.items()
        for kind, summary in by_kind.items()
    ]
    return Table(["", "absent words", *(title for title, _ in COLUMNS.values())], cells)
