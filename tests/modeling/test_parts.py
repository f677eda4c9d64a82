"""Parts of the detector that only some configs need are imported for these alone."""

import subprocess
import sys
from importlib import import_module

import pytest
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    RPN_HEAD_REGISTRY,
)

from vild.modeling import OPTIONAL_PARTS

REGISTRIES = (
    BACKBONE_REGISTRY, META_ARCH_REGISTRY, PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY, RPN_HEAD_REGISTRY,
)  # fmt: skip


@pytest.mark.parametrize("name", OPTIONAL_PARTS)
def test_an_optional_part_is_registered_by_its_module(name):
    module = import_module(f"vild.modeling.{OPTIONAL_PARTS[name]}")
    (registry,) = [registry for registry in REGISTRIES if name in registry]
    assert registry.get(name).__module__ == module.__name__


@pytest.mark.slow
def test_a_detector_without_them_does_not_import_them():
    code = "import sys, vild.modeling, vild.checkpoint.checkpointer; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "vild.modeling.rcnn" in loaded and "timm" not in loaded
    assert not {f"vild.modeling.{part}" for part in OPTIONAL_PARTS.values()} & set(loaded)
