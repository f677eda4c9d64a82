"""Cache of text embeddings: in memory, and in one SQLite file per teacher.

Keys: hash of the teacher's weights, hash of the prompt templates, normalised name.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vild.vocabulary.prompts import clean_name

logger = logging.getLogger(__name__)

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
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._lock = threading.Lock()

    def keep(self, spellings: Sequence[str], templates: Sequence[str], rows: Tensor) -> None:
        """Answer these names with these embeddings [S, D], which are neither dropped nor written to disk."""
        self._kept |= {(_hash(templates), clean_name(name)): row for name, row in zip(spellings, rows, strict=True)}

    def get(self, spellings: Sequence[str], templates: Sequence[str], embed: Callable[[list[str]], Tensor]) -> Tensor:
        """Unit float32 [S, D] of names; ``embed`` computes those that are not cached. For learned prompts,
        ``templates`` includes their hash."""
        prompts = _hash(templates)
        keys = [clean_name(spelling) for spelling in spellings]
        with self._lock:
            rows = ((key, self._kept.get((prompts, key), self._memory.get((prompts, key)))) for key in keys)
            found = {key: row for key, row in rows if row is not None}
        if missing := list(dict.fromkeys(key for key in keys if key not in found)):
            new = self._read(prompts, missing)
            if unknown := [key for key in missing if key not in new]:
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
        found, query = {}, "SELECT embedding FROM texts WHERE prompts = ? AND name = ?"
        with self._disabled_on_error():
            if self.path is None or not self.path.is_file():
                return {}
            with closing(sqlite3.connect(self.path, timeout=10)) as file:
                for key in keys:
                    for (blob,) in file.execute(query, (prompts, key)):
                        row = torch.from_numpy(np.frombuffer(blob, "<f4").astype(np.float32))
                        if len(row) == self.width:
                            found[key] = row
        return found

    def _write(self, prompts: str, rows: dict[str, Tensor]) -> None:
        if self.path is None:
            return
        with self._disabled_on_error():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=10)) as file, file:
                file.execute(
                    "CREATE TABLE IF NOT EXISTS texts"
                    " (prompts TEXT, name TEXT, embedding BLOB, PRIMARY KEY (prompts, name)) WITHOUT ROWID"
                )
                values = ((prompts, name, row.numpy().astype("<f4").tobytes()) for name, row in rows.items())
                file.executemany("INSERT OR IGNORE INTO texts VALUES (?, ?, ?)", values)

    @contextmanager
    def _disabled_on_error(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:  # ValueError: a name that is not valid Unicode
            logger.warning("text embedding cache %s is not used: %s", self.path, error)
            self.path = None


def _hash(templates: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]
