"""Atomic file writes: to a temporary file beside the target, synced to disk, renamed. A file that already has the
content to be written is left alone."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vild.utils.errors import UserError

if TYPE_CHECKING:  # torch and Pillow would slow down every tool's --help
    from PIL import Image
    from torch import Tensor

ATTEMPTS = 20  # to create what another process may remove at the same moment


@contextmanager
def cannot_write(path: str | Path) -> Iterator[None]:
    """Turn an OSError in the block (full disk, read-only or missing folder) into a one-line UserError with ``path``."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and not str(error.filename).startswith(str(path))
        raise UserError(f"{path} cannot be written: {error if elsewhere else error.strerror or error}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Create ``folder`` and those above it. If the block raises, those that are new and still empty are removed.

    Raises:
        UserError: the file system refuses (:func:`cannot_write`).
    """
    created: list[Path] = []
    try:
        with cannot_write(folder):
            make_folder(folder, created)
        yield
    except BaseException:
        for each in reversed(created):
            with suppress(OSError):  # something is in it
                each.rmdir()
        raise


def make_folder(folder: Path, created: list[Path] | None = None) -> None:
    """Create ``folder`` and those above it, even while other processes make or, failing, remove them
    (:func:`new_folder`). ``created`` receives the new ones, from the top."""
    created = [] if created is None else created
    for attempt in range(1, ATTEMPTS + 1):
        try:
            for each in (*reversed(folder.parents), folder):
                if each.is_file():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(each))
                if not each.is_dir():
                    each.mkdir()
                    created.append(each)
            return
        except (FileExistsError, FileNotFoundError):
            if attempt == ATTEMPTS:
                raise


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Write ``path`` atomically: yields the temporary name ``path.tmp`` to write to; creates the folder.

    At the end of the block the temporary file and then the folder's entry are synced, so neither a killed process nor
    a power cut leaves a partial file at ``path``. Where ``path`` already has the same bytes, it is not touched; where
    it is a device or a pipe, the bytes are written to it. If the block raises, the temporary file is removed and
    ``path`` is unchanged. A killed process leaves the temporary file behind; the next write to ``path`` overwrites or
    removes it.

    Raises:
        UserError: the file system refuses (:func:`cannot_write`).
    """
    path = Path(path)
    temporary = _temporary(path)
    with cannot_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if _same_content(path, temporary):
                temporary.unlink()
                return
            if path.exists() and not path.is_file():  # a device or a pipe must not be replaced by a regular file
                path.write_bytes(temporary.read_bytes())
                temporary.unlink()
                return
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # of a missing or read-only folder: the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise
    with suppress(OSError):  # some network file systems cannot sync a folder; the file itself is complete
        _sync(path.parent)


@contextmanager
def written_whole_folder(path: Path) -> Iterator[Path]:
    """Write a folder that does not exist: yields ``path.tmp`` to write to, which becomes ``path`` at the end, or is
    removed if the block raises. UserError if the file system refuses."""
    temporary = _temporary(path)
    with cannot_write(path):
        shutil.rmtree(temporary, ignore_errors=True)  # from a killed process
        temporary.mkdir(parents=True)
        try:
            yield temporary
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _sync(path: Path) -> None:
    """fsync a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _same_content(path: Path, temporary: Path) -> bool:
    filecmp.clear_cache()  # its key is the modification time, which is too coarse here
    with suppress(OSError):  # ``path`` does not exist or cannot be read
        return filecmp.cmp(path, temporary, shallow=False)
    return False


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically; a file that has this content already is not touched."""
    path = Path(path)
    if path.is_file() and path.read_bytes() == content:
        with cannot_write(path):
            _temporary(path).unlink(missing_ok=True)  # from a killed process
        return
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, document: object) -> None:
    """Write a JSON file atomically. NaN and infinite numbers, which JSON does not have, are written as null."""
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(document), indent=1, allow_nan=False)
    write_text(path, text)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_partial_line(path: str | Path) -> None:
    """Truncate a file of lines, if it exists, after its last complete line: a killed process may have left part of one.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    if path.is_file():
        with cannot_write(path):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def write_image(path: str | Path, image: Image.Image, **options: object) -> None:
    """Write an image atomically, in the format of the file's suffix. ``options``: of Pillow's ``save``."""
    from PIL import Image

    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[Path(path).suffix.lower()], **options)
    write_bytes(path, content.getvalue())


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    safetensors' ``save_file`` (0.8) writes to a randomly named file, which a killed process would leave behind.
    """
    from safetensors.torch import save

    write_bytes(path, save(tensors, metadata))


def sha256(path: str | Path) -> str:
    """A file's SHA-256 in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def hash_file(path: str | Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    return sha256(path)[:16]


def cache_folder() -> Path:
    """``$VILD_CACHE``, else ``vild`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VILD_CACHE") or Path(home) / "vild")
