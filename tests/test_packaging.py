"""The wheel, installed in another environment outside the repository."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import vild
from tests.checkpoint import released_checkpoint as reference
from tests.checkpoint.bundle_writer import write_bundle
from tests.checkpoint.hub import hub
from tests.checkpoint.test_pretrained import pack
from tests.conftest import REPOSITORY
from tests.loopback import serving
from vild.checkpoint.crc32c import masked_crc32c
from vild.checkpoint.released_archives import RELEASED

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


def started(python: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {"cwd": python.parent, "env": os.environ | environment, "capture_output": True, "text": True}
    return subprocess.run([python, "-I", "-c", code], **settings)


def run(python: Path, code: str, **environment: str) -> str:
    done = started(python, code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_there_and_load_lazily(installed):
    heavy = "[m for m in ('torch', 'detectron2', 'open_clip', 'numpy') if m in sys.modules]"
    code = f"import sys, vild; print(vild.__file__); print({heavy}); print(sorted(dir(vild)))"
    found = run(installed, code).split("\n")
    assert found[0].startswith(str(installed.parent.parent)) and found[1] == "[]"
    assert "OpenVocabularyDetector" in found[2]
    done = started(installed, f"from vild import {', '.join(n for n in vild.__all__ if n[0] != '_')}")
    assert done.returncode == 0 and done.stderr == ""  # no warnings of what it imports


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


DETECT = """
import sys
sys.modules["tensorflow"] = None  # cannot be imported
import numpy as np
from vild import OpenVocabularyDetector
from vild.checkpoint.pretrained import find_weights

def detect(*name):
    image = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
    found = OpenVocabularyDetector.from_pretrained(*name, device="cpu")(image, threshold=0, channels="RGB")
    print("found", found.labels, found.pred_boxes.tensor.tolist(), found.scores.tolist())
"""
BY_NAME = """
folder = find_weights("vild-r50")
config, text = folder / "config.yaml", (folder / "config.yaml").read_text()
for key, value in (("MAX_SIZE_TEST: 1024", 128), ("POST_NMS_TOPK_TEST: 1000", 20), ("DETECTIONS_PER_IMAGE: 300", 20)):
    assert key in text
    text = text.replace(key, f"{key.split()[0]} {value}")  # a small canvas: it is all the same for what is tested
config.write_text(text)
detect("vild-r50")
detect(folder)
detect(folder / "model.safetensors", config)
"""


def test_a_name_a_folder_a_file_and_a_repository_detect_the_same(installed, tmp_path):
    """From the wheel, without TensorFlow: one of the authors' detectors, from an archive on a server here."""
    arrays = reference.variables("vild")
    write_bundle(tmp_path / "model.ckpt-180000", arrays, checksum=masked_crc32c)
    archive = pack({f"resnet50_vild/{p.name}": p.read_bytes() for p in sorted(tmp_path.glob("model.ckpt*"))})
    places = {"VILD_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
    with serving({f"/{RELEASED['vild-r50'].file}": archive}) as server:
        said = run(installed, DETECT + BY_NAME, VILD_RELEASED_URL=server.url, HF_HUB_OFFLINE="1", **places)
    files = {p.name: p.read_bytes() for p in (tmp_path / "cache/detectors/vild-r50").iterdir()}
    with hub("me/kites", files) as url:
        said += run(installed, DETECT + 'detect("hf-hub:me/kites")', HF_ENDPOINT=url, HF_HUB_OFFLINE="0", **places)
    found = [line for line in said.splitlines() if line.startswith("found ")]
    assert len(found) == 4 and len({*found}) == 1 and not found[0].startswith("found []")


def test_nothing_in_the_package_imports_what_stays_in_the_repository():
    for path in (REPOSITORY / "vild").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"tools", "tests", "experiments", "benchmarks"}, path
