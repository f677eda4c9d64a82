"""The wheel, installed in another environment outside the repository."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import vild
from tests.conftest import REPOSITORY

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "vild", "configs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of a fresh environment that holds the wheel and sees the packages of this one, but not its vild."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(wheel, cwd=folder, check=True, capture_output=True)
    venv.create(folder / "env", with_pip=False)
    packages = next((folder / "env").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(next((folder / "dist").glob("vild-*.whl"))) as archive:
        archive.extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "python"


def run(python: Path, code: str) -> str:
    done = subprocess.run([python, "-I", "-c", code], cwd=python.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_there_and_load_lazily(installed):
    heavy = "[m for m in ('torch', 'detectron2', 'open_clip', 'numpy') if m in sys.modules]"
    code = f"import sys, vild; print(vild.__file__); print({heavy}); print(sorted(dir(vild)))"
    found = run(installed, code).split("\n")
    assert found[0].startswith(str(installed.parent.parent)) and found[1] == "[]"
    assert "OpenVocabularyDetector" in found[2]
    run(installed, f"from vild import {', '.join(n for n in vild.__all__ if n[0] != '_')}")


def test_configs_and_data_files_travel_with_the_package(installed):
    names = [str(p.relative_to(REPOSITORY / "configs")) for p in (REPOSITORY / "configs").rglob("*.yaml")]
    names = [n for n in names if "ablations" not in n]
    code = f"""
from vild.config import load_config
for name in {names}:
    load_config(name)
from pathlib import Path
from vild.data.classes import read_split
from vild.glyphs import drawing
from vild.report import run_report
print(len(drawing.table()), read_split("lvis", Path()).path.name)
"""
    assert run(installed, code).split() == ["60", "lvis.json"]


def test_nothing_in_the_package_imports_what_stays_in_the_repository():
    for path in (REPOSITORY / "vild").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"tools", "tests", "experiments", "benchmarks"}, path
