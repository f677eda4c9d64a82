"""Broken and hostile files of every kind that vild reads: each ends in success or in one line for the user.

``make fuzz`` (VILD_FUZZ=nightly) runs 10,000 cases; the tests run a fixed few hundred.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.guard import forget_peak, peak, watched
from tests.fuzz.mutations import HOSTILE, broken
from tests.fuzz.targets import TARGETS
from vild.config import load_config
from vild.data import datasets
from vild.inference.thresholds import parse_thresholds
from vild.inference.words import read_words
from vild.utils.errors import UserError
from vild.vocabulary.prompts import clean_name
from vild.vocabulary.words import parse_negatives

MOST_MEMORY = 1 << 30
TEXTS = 3  # targets below that take texts, not files

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", derandomize=True, max_examples=12, **COMMON)
settings.register_profile("nightly", max_examples=math.ceil(10_000 / (len(TARGETS) + TEXTS)), print_blob=True, **COMMON)
settings.load_profile(os.environ.get("VILD_FUZZ", "ci"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The root of the data sets is a case's folder, and only for the case; nobody logs thousands of warnings."""
    monkeypatch.setenv("DETECTRON2_DATASETS", "nowhere")
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
    datasets.forget()


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """All cases together need less than 1 GB beside what was there before: the process may have run other tests."""
    try:
        forget_peak()
    except OSError:
        pytest.skip("this system does not tell a process's peak of memory")
    before = peak()
    yield
    assert peak() - before < MOST_MEMORY


def ends_well(call: Callable[[], object], folder: Path) -> None:
    """Success, or a UserError of one line; see ``watched`` for the rest."""
    with watched(folder):
        try:
            call()
        except UserError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_file_ends_in_one_line(target, tmp_path):
    name, make, read = TARGETS[target]
    whole = tmp_path / "whole"
    whole.mkdir()
    make(whole)
    content = (whole / name).read_bytes()
    read(whole)  # a reader that refuses everything would pass
    work = tmp_path / "work"

    @given(broken(name, content))
    def case(changed: bytes) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        (work / name).write_bytes(changed)
        ends_well(lambda: read(work), work)

    case()


@given(st.text(max_size=40), st.lists(st.text(max_size=20), max_size=3))
def test_texts_of_the_command_line(words, thresholds):
    def call():
        found = read_words(words)
        parse_thresholds([f"{t}=0.5" for t in found.names] + thresholds, found.names)

    ends_well(call, Path("/nowhere"))


SOME_WORDS = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(st.text("aA_ |,;#[]{}\"'\n\ufeff", max_size=8), st.sampled_from(HOSTILE)), max_size=4),
    st.dictionaries(st.one_of(st.integers(-1, 3), st.text(max_size=3)), st.text(max_size=8), max_size=3),
    st.sampled_from(HOSTILE),
)


@given(SOME_WORDS, SOME_WORDS)
def test_words_of_the_api(words, negatives):
    def call():
        found = read_words(words)
        assert len(found.names) == len(found.synonyms) == len({clean_name(name) for name in found.names})
        parse_negatives(negatives, files=True)

    ends_well(call, Path("/nowhere"))


KEYS = ("MODEL.VILD.OBJECTIVES", "SOLVER.STEPS", "MODEL.DEVICE", "INPUT.UNREADABLE", "MODEL", "SEED", "_BASE_", "")


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.text(max_size=30)), max_size=3))
def test_overrides_of_the_command_line(tmp_path_factory, overrides):
    folder = tmp_path_factory.getbasetemp() / "overrides"
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text("VERSION: 2\n")
    ends_well(lambda: load_config(str(folder / "c.yaml"), [part for pair in overrides for part in pair]), folder)


def test_the_guard_sees_what_it_is_to_see(tmp_path, monkeypatch):
    """Each of these would fail a case."""
    import subprocess

    for call in (
        lambda: (tmp_path.parent / "elsewhere").write_text("x"),
        lambda: subprocess.run(["true"]),
        lambda: os.mkdir(tmp_path.parent / "other"),
    ):
        with pytest.raises(AssertionError, match="outside its folder"):
            ends_well(call, tmp_path)
    with pytest.raises(KeyError):
        ends_well(lambda: {}["a"], tmp_path)
    monkeypatch.setattr("tests.fuzz.guard.CPU_SECONDS", 0.2)
    with pytest.raises(BaseException, match="does not end"):
        ends_well(lambda: any(False for _ in iter(int, 1)), tmp_path)
    ends_well(lambda: (tmp_path / "a").write_text("x"), tmp_path)
