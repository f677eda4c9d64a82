"""Unpack an untrusted ``.tar.gz``: chosen plain files, into one folder, within bounds."""

from __future__ import annotations

import gzip
import re
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from vild.utils.files import cannot_write
from vild.utils.untrusted import refused_as

PIECE = 1 << 20
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
LONG_NAMES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
LONGEST_NAME = 1 << 16  # bytes of such a header, which tarfile reads into memory


class _Member(tarfile.TarInfo):
    """A header; ValueError for a link, a device, or anything else that is not a plain file or folder."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        named = member.type in LONG_NAMES and 0 <= member.size <= LONGEST_NAME
        if not named and (member.type not in PLAIN or member.size < 0):
            raise ValueError(f"its member '{member.name}' is not a plain file")
        return member


class _Bounded:
    """A stream of at most ``most`` bytes: a few of an archive can become any number."""

    def __init__(self, file, most: int):
        self.file, self.most, self.left = file, most, most

    def read(self, size: int) -> bytes:
        piece = self.file.read(size)
        self.left -= len(piece)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {self.most:,} bytes")
        return piece


def unpack(archive: str | Path, folder: str | Path, wanted: re.Pattern, most: int) -> list[Path]:
    """Write the files whose names, without their folders, match ``wanted`` into ``folder``, flat.

    Args:
        most: bytes that the whole archive may unpack to.

    Returns:
        the files written, in the archive's order.

    Raises:
        UserError: damaged, cut off, or too large; a member that leaves the folder, is not a plain file or folder, or
            occurs twice; or the disk refuses.
    """
    folder, found = Path(folder), []
    with cannot_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with refused_as(f"{archive}: cannot be unpacked"), gzip.open(archive) as file:
        stream = _Bounded(file, most)
        with tarfile.open(fileobj=stream, mode="r|", bufsize=PIECE, tarinfo=_Member) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"its member '{member.name}' leaves the folder")
                if not member.isreg() or not wanted.fullmatch(path.name):
                    continue
                if member.issparse() or (target := folder / path.name) in found:
                    raise ValueError(f"its member '{member.name}' is sparse or occurs twice")
                with cannot_write(target), open(target, "xb") as out:
                    shutil.copyfileobj(tar.extractfile(member), out, PIECE)
                found.append(target)
        while stream.read(PIECE):  # to the end, where gzip's checksum is
            pass
    return found
