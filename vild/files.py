"""Files that appear whole or not at all: written aside, brought to the disk, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """The name to write to instead of ``path``; makes its folder.

    When the block ends the file is synced and renamed, so that neither a killed process nor a power cut leaves a part
    under the name. When the block raises, the file aside is removed and what was at ``path`` is as it was. A killed
    process leaves the file aside, under a name that its next run writes again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as aside:
        aside.write_text(text)


def write_json(path: str | Path, document: object) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(document, indent=1))


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole.

    The bytes are made in memory: safetensors' own ``save_file`` (0.8) writes to a file of a random name beside
    ``path``, which a killed process leaves behind for ever.
    """
    with written_whole(path) as aside:
        aside.write_bytes(save(tensors, metadata))
