"""Download a file over HTTP: bounded, resumable, and whole or not there."""

from __future__ import annotations

import http.client
import os
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vild.utils.errors import NotAvailable, UserError, first_line
from vild.utils.files import cannot_write

TIMEOUT = 60  # seconds without a byte
PIECE = 1 << 18


def download(url: str, path: str | Path, most: int) -> None:
    """Write what ``url`` (http or https) returns to ``path``; the folder is created.

    The bytes are collected in ``path.part``. After a kill or a broken connection the next call asks for the rest only
    (HTTP ``Range``). Whether the whole is the right file is for the caller to check: the server's may have changed in
    between.

    Args:
        most: bytes that the file may have.

    Raises:
        NotAvailable: the server cannot be reached, has no such file, or broke off.
        UserError: the file is larger than ``most``, or cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with cannot_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.is_file() else 0
    try:
        with _open(url, have) as response:
            have = have if _continues(response, have) else 0
            length = response.headers["Content-Length"]
            total = None if length is None else have + int(length)
            _check_size(url, part, total or 0, most)
            have = _append(response, url, part, have, total, most)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise NotAvailable(f"{url}: cannot be downloaded (HTTP {error.code} {error.reason})") from error
        if error.headers["Content-Range"] != f"bytes */{have}":  # the part is of another file
            part.unlink()
            return download(url, path, most)
        total = have
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = first_line(getattr(error, "reason", error))
        raise NotAvailable(f"{url}: cannot be downloaded ({reason}); is there a network?") from None
    if total not in (None, have):
        raise NotAvailable(f"{url}: broke off after {have:,} of {total:,} bytes; the same command fetches the rest")
    with cannot_write(path):
        os.replace(part, path)


def _open(url: str, have: int):
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: is not an http or https address")
    return urlopen(Request(url, headers={"Range": f"bytes={have}-"} if have else {}), timeout=TIMEOUT)


def _continues(response, have: int) -> bool:
    """Whether the response starts after the first ``have`` bytes; a server may ignore ``Range``."""
    return have > 0 and response.status == 206 and str(response.headers["Content-Range"]).startswith(f"bytes {have}-")


def _check_size(url: str, part: Path, size: int, most: int) -> None:
    if size > most:
        part.unlink(missing_ok=True)
        raise UserError(f"{url}: has more than {most:,} bytes, the most that is expected of it")


def _append(response, url: str, part: Path, have: int, total: int | None, most: int) -> int:
    """Write the body behind the first ``have`` bytes, with a progress bar; the number of bytes that are there then."""
    from tqdm import tqdm

    bar = tqdm(desc=url.rpartition("/")[2], initial=have, total=total, unit="B", unit_scale=True, unit_divisor=1024)
    with bar, cannot_write(part), open(part, "ab" if have else "wb") as file:
        while piece := _read(response, url, have):
            have += len(piece)
            _check_size(url, part, have, most)
            file.write(piece)
            bar.update(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return have


def _read(response, url: str, have: int) -> bytes:
    try:
        return response.read(PIECE)
    except (OSError, http.client.HTTPException) as error:
        reason = first_line(error)
        raise NotAvailable(f"{url}: broke off after {have:,} bytes ({reason}); the same command goes on") from error
