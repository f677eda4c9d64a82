"""Files that appear whole or not at all: written aside, brought to the disk, renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image
from safetensors.torch import save
from torch import Tensor

from vild.utils.errors import UserError


@contextmanager
def cannot_write(path: str | Path) -> Iterator[None]:
    """What the system refuses in the block (a full disk, a read-only or vanished folder) is told in one line that
    names ``path``.

    Raises:
        UserError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not str(error.filename).startswith(str(path))
        raise UserError(f"{path} cannot be written: {error if elsewhere else error.strerror or error}") from error


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """The name to write to instead of ``path``; makes its folder.

    When the block ends the file is synced and renamed, and so is its folder's entry, so that neither a killed process
    nor a power cut leaves a part under the name. When the block raises, the file aside is removed and what was at
    ``path`` is as it was. A killed process leaves the file aside, under a name that its next run writes again.

    Raises:
        UserError: the system does not let it be written (:func:`cannot_write`).
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    with cannot_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            _sync(aside)
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):  # of a vanished or read-only folder: the first error is the one to tell
                aside.unlink(missing_ok=True)
            raise
    with suppress(OSError):  # not every network's file system can; the file itself is whole
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as aside:
        aside.write_text(text)


def write_json(path: str | Path, document: object) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(document, indent=1))


def drop_partial_line(path: str | Path) -> None:
    """Cut a text file that is added to, if there is one, after its last whole line: a killed process may have left a
    part of another.

    Raises:
        UserError: the system does not let it be written.
    """
    path = Path(path)
    if path.is_file():
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with cannot_write(path):
                os.truncate(path, whole)


def write_image(path: str | Path, image: Image.Image, **options: object) -> None:
    """Write an image whole, in the format of the name's ending. ``options``: of Pillow's ``save``."""
    path = Path(path)
    with written_whole(path) as aside:
        image.save(aside, Image.registered_extensions()[path.suffix.lower()], **options)


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole.

    The bytes are made in memory: safetensors' own ``save_file`` (0.8) writes to a file of a random name beside
    ``path``, which a killed process leaves behind for ever.
    """
    with written_whole(path) as aside:
        aside.write_bytes(save(tensors, metadata))


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, first 16 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """``$VILD_CACHE``, else ``~/.cache/vild`` (or where XDG_CACHE_HOME says)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VILD_CACHE") or Path(home) / "vild")
