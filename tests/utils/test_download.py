"""Downloads: resumed, bounded, whole or not there, and one line for what goes wrong."""

import errno
import os
import re

import numpy as np
import pytest

from tests.loopback import serving
from vild.utils import download as module
from vild.utils.download import download
from vild.utils.errors import NotAvailable, UserError

CONTENT = np.random.default_rng(0).bytes(2_000_000)


@pytest.fixture
def server():
    with serving({"/a.bin": CONTENT, "/empty": b""}) as server:
        yield server


def line_of(url, path, most=2_000_000, kind=NotAvailable) -> str:
    with pytest.raises(UserError) as caught:
        download(url, path, most)
    assert type(caught.value) is kind and "\n" not in str(caught.value) and not path.exists()
    return str(caught.value)


@pytest.mark.parametrize("sized", [True, False])
def test_a_file_arrives_whole(server, tmp_path, sized):
    server.sized = sized
    download(f"{server.url}/a.bin", tmp_path / "new" / "a.bin", len(CONTENT))
    assert (tmp_path / "new" / "a.bin").read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.bin"]
    download(f"{server.url}/empty", tmp_path / "empty", 10)
    assert (tmp_path / "empty").read_bytes() == b""


def test_what_broke_off_goes_on_where_it_was(server, tmp_path):
    server.cut = 700_000
    line = line_of(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert "a.bin: broke off after 700,000 of 2,000,000 bytes; the same command fetches the rest" in line
    line_of(f"{server.url}/a.bin", tmp_path / "a.bin")
    server.cut = None
    download(f"{server.url}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=700000-", "bytes=1400000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"something else")
    server.ranges = False
    download(f"{server.url}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more"])
def test_a_part_with_nothing_after_it(server, tmp_path, part):
    """Killed before it was renamed; or of another file."""
    (tmp_path / "a.bin.part").write_bytes(part)
    download(f"{server.url}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.asked) == (1 if part == CONTENT else 2)


@pytest.mark.parametrize("sized", [True, False])
def test_a_file_that_is_too_large_is_not_kept(server, tmp_path, sized):
    server.sized = sized
    line = line_of(f"{server.url}/a.bin", tmp_path / "a.bin", len(CONTENT) - 1, UserError)
    assert "has more than 1,999,999 bytes" in line and not list(tmp_path.iterdir())


def test_what_cannot_be_had(server, tmp_path):
    path = tmp_path / "a.bin"
    assert "/none: cannot be downloaded (HTTP 404 Not Found)" in line_of(f"{server.url}/none", path)
    assert "is not an http or https address" in line_of(f"file://{__file__}", path, kind=UserError)
    assert "cannot be downloaded (" in line_of("http://a b/c", path)
    assert re.search(r"/a.bin: cannot be downloaded \(.*refused", line_of("http://127.0.0.1:1/a.bin", path))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_there_is(server, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        line = line_of(f"{server.url}/a.bin", tmp_path / "a.bin", kind=UserError)
    assert line.endswith("a.bin.part cannot be written: No space left on device")
    download(f"{server.url}/a.bin", tmp_path / "a.bin", len(CONTENT))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and len(server.asked) == 2
