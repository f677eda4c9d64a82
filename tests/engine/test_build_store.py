"""What the builder of a store takes by default."""

import json

import pytest
import torch


@pytest.fixture
def taken(tool, monkeypatch, tmp_path):
    """The builder's arguments on a machine with or without a GPU."""

    def run(gpu, bf16=True, *flags):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        seen = []
        monkeypatch.setattr("vild.engine.build_store.build_store", seen.append)
        arguments = ("--dataset", "d", "--proposals", "p", "--teacher", "t", "--output-dir", tmp_path / "store")
        assert tool("build_teacher_store.py", *arguments, *flags) == 0
        return seen[0].device, seen[0].precision, seen[0].batch_size

    return run


def test_precision_follows_the_device(taken):
    assert taken(True) == ("cuda", "bf16", 2048)
    assert taken(True, False) == ("cuda", "fp32", 2048)  # an older GPU
    assert taken(True, True, "--precision", "fp16")[1] == "fp16"
    assert taken(True, True, "--device", "cpu") == taken(False) == ("cpu", "fp32", 128)


def test_a_store_goes_on_in_its_own_precision(taken, store_folder, tmp_path):
    """One that was begun in fp32, on a machine without a GPU or before bf16 was the default."""
    manifest = json.loads((store_folder / "manifest.json").read_text())
    (tmp_path / "store").mkdir()
    for kept, precision in ((None, "fp32"), ("fp16", "fp16")):
        manifest["plan"]["precision"] = kept
        (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
        assert taken(True)[1] == precision
    assert taken(True, True, "--precision", "bf16")[1] == "bf16"  # which the store then refuses
