"""Strangers' files run no code. Each that would is one line for the user."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.grid import read_grid

from tests.utils.test_untrusted import one_line
from vild.config import load_config
from vild.teacher.teacher import build_teacher
from vild.utils.weight_files import load_weights
from vild.vocabulary.vocabulary import Vocabulary


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.pyth", "a.bin"])
@pytest.mark.parametrize("as_torch", [True, False])
def test_a_checkpoint_runs_nothing(tmp_path, name, as_torch):
    content = {"model": {"weight": np.zeros(3)}, "__author__": Attack(tmp_path / "ran")}
    if as_torch:
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    assert str(tmp_path / name) in one_line(load_weights, tmp_path / name, match="cannot be read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 5])
def test_the_model_zoo_can_still_be_read(tmp_path, protocol):
    """Arrays of every kind, Python 2's among them, are what Detectron2's .pkl hold."""
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(2), "c": np.asfortranarray(np.eye(3, dtype="f4"))}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}, protocol))
    read = load_weights(path)["model"]
    assert all(np.array_equal(read[key], value) for key, value in arrays.items())
    path.write_bytes(pickle.dumps({"blobs": {**arrays, "a_momentum": np.ones(2)}}, protocol))
    read = load_weights(path)
    assert read["matching_heuristics"] and read["__author__"] == "Caffe2" and set(read["model"]) == set(arrays)
    for content, reason in (([1], "contains list"), ({"model": {"a": "text"}, "__author__": ""}, "not a tensor"),
                            ({"model": {"a": np.array([None])}, "__author__": ""}, "objects")):  # fmt: skip
        path.write_bytes(pickle.dumps(content))
        one_line(load_weights, path, match=reason)


def test_the_checkpointer_reads_by_no_other_way(tmp_path):
    """Detectron2's own checkpointer would run the file."""
    from vild.checkpoint.checkpointer import VildCheckpointer

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {}, "__author__": Attack(tmp_path / "ran")}))
    one_line(VildCheckpointer(torch.nn.Linear(2, 2)).load, str(tmp_path / "a.pkl"), match="it would run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("inside", ["a.yaml", "base.yaml"])
def test_a_config_runs_nothing(tmp_path, inside):
    (tmp_path / "base.yaml").write_text("VERSION: 2\n")
    (tmp_path / "a.yaml").write_text("_BASE_: base.yaml\n")
    with open(tmp_path / inside, "a") as file:
        file.write(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    message = one_line(load_config, str(tmp_path / "a.yaml"), match="python/object/apply")
    assert str(tmp_path / inside) in message and not (tmp_path / "ran").exists()


def test_a_grid_runs_nothing(tmp_path):
    (tmp_path / "g.yaml").write_text(f"rows: !!python/object/apply:os.system ['touch {tmp_path}/ran']\n")
    one_line(read_grid, tmp_path / "g.yaml", match="python/object/apply")
    assert not (tmp_path / "ran").exists()


def test_a_matrix_runs_nothing(tmp_path):
    np.save(tmp_path / "a.npy", np.array([Attack(tmp_path / "ran")], object), allow_pickle=True)
    one_line(Vocabulary.from_npy, tmp_path / "a.npy", ["a"], match="cannot be read as .npy")
    assert not (tmp_path / "ran").exists()


def test_a_teacher_runs_no_code_of_its_own(teacher_folder, tmp_path):
    config = json.loads((teacher_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    os.link(teacher_folder / "open_clip_model.safetensors", tmp_path / "open_clip_model.safetensors")
    one_line(build_teacher, f"local-dir:{tmp_path}", match="trust_remote_code")
