"""For the leakage audit: what is novel in the tiny world, and the tools without a process of their own."""

from __future__ import annotations

import runpy
import sys

import pytest

from tests.conftest import REPOSITORY
from vild.data.leakage import Benchmark


@pytest.fixture(scope="session")
def benchmark(world) -> Benchmark:
    return Benchmark.read("glyphs_train", "", "glyphs_train_all")


@pytest.fixture
def tool(monkeypatch):
    """Run a tool in this process (starting one takes seconds); its exit status."""

    def run(name, *arguments):
        path = str(REPOSITORY / "tools" / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    return run
