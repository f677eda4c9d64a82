"""Cache of text embeddings: in memory, and in one SQLite file per teacher.

Keys: hash of the teacher's weights, hash of the prompt templates, normalised name.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vild.vocabulary.prompts import clean_name

logger = logging.getLogger(__name__)

AT_ONCE = 500  # names per query; SQLite limits the number of parameters
IN_MEMORY = 100_000  # embeddings: 200 MB at width 512; then the oldest are dropped


class TextCache:
    """Text embeddings by name, safe for threads and processes.

    If the cache file cannot be used, a warning is logged once and only memory is used.

    Args:
        fingerprint: of the teacher; for {} (unknown) only memory is used.
        folder: of the SQLite files; None: memory only.
    """

    def __init__(self, fingerprint: dict, folder: Path | None):
        self.width = fingerprint.get("width")
        weights = fingerprint.get("weights")
        self.path = None if folder is None or not weights else Path(folder) / f"text-{weights}.sqlite"
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._lock = threading.Lock()

    def get(self, spellings: Sequence[str], templates: Sequence[str], embed: Callable[[list[str]], Tensor]) -> Tensor:
        """Unit float32 [S, D] of names; ``embed`` computes those that are not cached. For learned prompts,
        ``templates`` includes their hash."""
        prompts = hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]
        keys = [clean_name(spelling) for spelling in spellings]
        with self._lock:
            found = {key: self._memory[prompts, key] for key in keys if (prompts, key) in self._memory}
        missing = list(dict.fromkeys(key for key in keys if key not in found))
        if missing:
            new = self._read(prompts, missing)
            unknown = [key for key in missing if key not in new]
            if unknown:
                rows = dict(zip(unknown, embed(unknown).float().cpu(), strict=True))
                self._write(prompts, rows)
                new |= rows
            found |= new
            with self._lock:
                self._memory |= {(prompts, key): row for key, row in new.items()}
                while len(self._memory) > IN_MEMORY:
                    del self._memory[next(iter(self._memory))]
        return torch.stack([found[key] for key in keys])

    def _read(self, prompts: str, keys: list[str]) -> dict[str, Tensor]:
        found = {}
        try:
            if self.path is None or not self.path.is_file():
                return {}
            with closing(sqlite3.connect(self.path, timeout=10)) as file:
                for start in range(0, len(keys), AT_ONCE):
                    some = keys[start : start + AT_ONCE]
                    marks = ", ".join("?" * len(some))
                    query = f"SELECT name, embedding FROM texts WHERE prompts = ? AND name IN ({marks})"
                    for name, blob in file.execute(query, (prompts, *some)):
                        row = torch.from_numpy(np.frombuffer(blob, "<f4").astype(np.float32))
                        if len(row) == self.width:
                            found[name] = row
        except (sqlite3.Error, OSError, ValueError) as error:
            self._give_up(error)
        return found

    def _write(self, prompts: str, rows: dict[str, Tensor]) -> None:
        try:
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=10)) as file, file:
                file.execute(
                    "CREATE TABLE IF NOT EXISTS texts"
                    " (prompts TEXT, name TEXT, embedding BLOB, PRIMARY KEY (prompts, name)) WITHOUT ROWID"
                )
                values = ((prompts, name, row.numpy().astype("<f4").tobytes()) for name, row in rows.items())
                file.executemany("INSERT OR IGNORE INTO texts VALUES (?, ?, ?)", values)
        except (sqlite3.Error, OSError, ValueError) as error:  # a name that is not valid Unicode
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("text embedding cache %s is not used: %s", self.path, error)
        self.path = None
