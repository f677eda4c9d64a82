"""Atomic writes; a file that already has its content is left alone."""

import json
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vild.data.proposals import save_proposals
from vild.utils.errors import UserError
from vild.utils.files import (
    new_folder,
    write_bytes,
    write_image,
    write_json,
    write_tensors,
    write_text,
    written_whole,
)

FORK = multiprocessing.get_context("fork")


def write_whole(path, content: bytes) -> None:
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


WRITERS = {
    "bytes": (write_bytes, b"a" * 9_000_000, b"a" * 8_999_999 + b"b"),  # more than one piece
    "text": (write_text, "ä\n", "o\n"),
    "json": (write_json, {"a": [1, 2.5]}, {"a": [1, 2.0]}),
    "png": (write_image, Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")),
    "tensors": (write_tensors, {"x": torch.arange(3)}, {"x": torch.arange(1, 4)}),
    "proposals": (save_proposals, {1: (torch.ones(2, 4), torch.ones(2))}, {1: (torch.ones(2, 4), torch.zeros(2))}),
    "whole": (write_whole, b"a" * 9_000_000, b"a" * 8_999_999 + b"b"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_content_is_not_written_again(tmp_path, kind):
    write, content, other = WRITERS[kind]
    path = tmp_path / f"file.{kind}"
    write(path, content)
    before, first = path.stat(), path.read_bytes()
    (tmp_path / f"{path.name}.tmp").write_bytes(b"left by a killed process")
    write(path, content)
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns, path.read_bytes()) == (before.st_ino, before.st_mtime_ns, first)
    assert os.listdir(tmp_path) == [path.name]
    (tmp_path / f"{path.name}.tmp").write_bytes(b"left by a killed process")
    write(path, other)
    assert path.read_bytes() != first and path.stat().st_ino != before.st_ino
    assert os.listdir(tmp_path) == [path.name]


def test_what_json_does_not_have_is_null(tmp_path):
    """Other programs refuse a file with NaN."""
    rows = {"a": [1, np.float64("nan"), (float("inf"), "NaN")], "b": {"c": float("nan"), "d": 0.1}}
    write_json(tmp_path / "file.json", rows)
    assert json.loads((tmp_path / "file.json").read_text(), parse_constant=pytest.fail) == {
        "a": [1, None, [None, "NaN"]], "b": {"c": None, "d": 0.1}}  # fmt: skip
    assert np.isnan(rows["b"]["c"])


def write_and_die(path, content: bytes, event: str) -> None:
    """SIGKILL at the first ``event`` of Python's audit hooks that concerns the file or its temporary file."""
    sys.addaudithook(lambda e, a: os.kill(os.getpid(), signal.SIGKILL) if e == event and str(path) in str(a) else None)
    write_bytes(path, content)


@pytest.mark.parametrize("event", ["open", "os.rename"])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path, event):
    path = tmp_path / "file.json"
    for content in (b"first", b"second"):
        process = FORK.Process(target=write_and_die, args=(path, content, event))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        write_bytes(path, content)
        assert os.listdir(tmp_path) == ["file.json"] and path.read_bytes() == content


def test_what_is_above_a_folder_that_stays_is_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="wrong"), new_folder(tmp_path / "new" / ".." / "kept" / "more"):
        raise UserError("wrong")
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]
