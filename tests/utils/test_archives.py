"""Archives of strangers: the wanted files, and nothing else of them, anywhere."""

import gzip
import io
import re
import tarfile

import pytest

from vild.utils.archives import unpack
from vild.utils.errors import UserError

WANTED = re.compile(r"model\.\w+")
MOST = 1 << 20


def archive(path, *members, format=tarfile.PAX_FORMAT):
    """(name, content) or a TarInfo each."""
    with tarfile.open(path, "w:gz", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_wanted_files_alone_are_written(tmp_path, format):
    deep = "/".join(["folder" * 5] * 4)  # a name that needs a header of its own
    members = [special("r50", tarfile.DIRTYPE), ("r50/model.index", b"index"), (f"r50/{deep}/notes.txt", b"no"),
               ("./r50/model.data", b"data" * 1000), ("r50/._model.data", b"no")]  # fmt: skip
    found = unpack(archive(tmp_path / "a.tar.gz", *members, format=format), tmp_path / "out", WANTED, MOST)
    assert [(p.name, p.read_bytes()) for p in found] == [("model.index", b"index"), ("model.data", b"data" * 1000)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.data", "model.index"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("../model.x", b"x")], "'../model.x' leaves the folder"),
        ([("a/../../model.x", b"x")], "leaves the folder"),
        ([("/tmp/model.x", b"x")], "'/tmp/model.x' leaves the folder"),
        ([special("model.x", tarfile.SYMTYPE, "/etc/passwd")], "'model.x' is not a plain file"),
        ([special("model.x", tarfile.LNKTYPE, "../model.y")], "is not a plain file"),
        ([special("model.x", tarfile.FIFOTYPE)], "is not a plain file"),
        ([special("model.x", tarfile.CHRTYPE)], "is not a plain file"),
        ([special("model.x", tarfile.GNUTYPE_SPARSE)], "is not a plain file"),
        ([("a/model.x", b"x"), ("b/model.x", b"y")], "'b/model.x' is sparse or occurs twice"),
        ([("a/model.x", bytes(MOST))], "it unpacks to more than 1,048,576 bytes"),
        ([("a/other", bytes(MOST))], "it unpacks to more than 1,048,576 bytes"),
    ],
)
def test_hostile_members_are_one_line(tmp_path, members, reason):
    (tmp_path / "in").mkdir()
    archive(tmp_path / "in" / "a.tar.gz", *members)
    with pytest.raises(UserError, match="a.tar.gz: cannot be unpacked") as caught:
        unpack(tmp_path / "in" / "a.tar.gz", tmp_path / "in" / "out", WANTED, MOST)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.rglob("*") if not p.is_dir()} <= {"a.tar.gz", "model.x"}
    assert not (tmp_path / "model.x").exists() and not (tmp_path / "in" / "model.x").exists()


def test_a_sparse_file_of_few_bytes_and_an_endless_name(tmp_path):
    """tarfile would write the size that the first claims, and read the second into memory."""
    sparse = tarfile.TarInfo("model.x")
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
    named = special("model.x", tarfile.GNUTYPE_LONGNAME)
    named.size = 1 << 30
    for header, reason in ((sparse, "is sparse"), (named, "is not a plain file")):
        path = archive(tmp_path / "a.tar.gz", header)
        with pytest.raises(UserError, match=reason):
            unpack(path, tmp_path / "out", WANTED, MOST)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "checksum", "no gzip", "empty", "no tar"])
def test_a_damaged_archive_is_one_line(tmp_path, damage):
    path = archive(tmp_path / "a.tar.gz", ("r50/model.x", bytes(range(256)) * 400))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 255
    elif damage == "checksum":
        content[-8] ^= 1  # of gzip, behind the last member
    else:
        content = {"no gzip": b"model" * 100, "empty": b"", "no tar": gzip.compress(b"model" * 1000)}[damage]
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.tar.gz: cannot be unpacked") as caught:
        unpack(path, tmp_path / "out", WANTED, MOST)
    assert "\n" not in str(caught.value)
