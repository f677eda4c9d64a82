"""The other tools from the command line, on the tiny world."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torchvision.ops import box_iou

from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.data import datasets
from vild.engine.trainer import Trainer
from vild.store.store import EmbeddingStore
from vild.vocabulary.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def weights(vocabulary_file, store_folder, teacher_folder, tmp_path_factory):
    from vild.config import load_config

    folder = tmp_path_factory.mktemp("weights")
    cfg = load_config(str(REPOSITORY / "configs/Glyphs/vild.yaml"), ["MODEL.VILD.VOCABULARY", str(vocabulary_file)])
    torch.manual_seed(0)
    VildCheckpointer(Trainer.build_model(cfg), str(folder)).save("model")
    return folder / "model.pth"


def test_store_from_proposals_goes_on_and_refuses_another_teacher(
    world, proposals_file, teacher_folder, tmp_path, tool, capsys
):
    arguments = ["--dataset", "glyphs_train", "--proposals", proposals_file, "--output-dir", tmp_path / "store",
                 "--shard-images", 16, "--max-per-image", 3, "--num-workers", 0]  # fmt: skip
    assert not tool("build_teacher_store.py", *arguments, "--teacher", f"local-dir:{teacher_folder}")
    told = capsys.readouterr().out
    assert "as float16; a sample of 1 took" in told
    assert f"teacher local-dir:{teacher_folder} on cpu, in fp32" in told
    store = EmbeddingStore(tmp_path / "store")
    assert len(store) == 40 and all(len(store[i].boxes) <= 3 for i in range(1, 41))
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    shard = tmp_path / "store" / "shard-00001.safetensors"
    shard.write_bytes(before[shard.name][:-9])
    assert tool("inspect_store.py", tmp_path / "store", "--verify") == 1
    told = capsys.readouterr().out
    assert len(told.splitlines()) == 1 and f"{shard.name} is broken" in told
    assert not tool("inspect_store.py", tmp_path / "store", "--repair") and not shard.exists()
    assert not tool("build_teacher_store.py", *arguments, "--teacher", f"local-dir:{teacher_folder}")
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    assert not tool("inspect_store.py", tmp_path / "store", "--verify", "--coverage", "glyphs_train")
    assert "'glyphs_train': 40 images, 0 missing, 0 without a region" in capsys.readouterr().out
    assert tool("build_teacher_store.py", *arguments, "--teacher", "RN50-quickgelu", "--pretrained", "random") == 2
    assert "it was begun with fingerprint" in capsys.readouterr().err


def test_vocabulary_and_proposals_tools(world, weights, teacher_folder, tmp_path, tool, capsys):
    assert not tool("build_vocabulary.py", "--vocabulary", "glyphs_val", "--teacher", f"local-dir:{teacher_folder}",
                    "--prompts", "photo", "--output", tmp_path / "v.safetensors")  # fmt: skip
    assert Vocabulary.load(tmp_path / "v.safetensors").splits.count("novel") == 20
    assert tool("build_vocabulary.py", "--vocabulary", "a,b", "--output", tmp_path / "w.safetensors") == 2
    assert "give --teacher, or --npy, or both" in capsys.readouterr().err
    assert not tool(
        "make_proposals.py", "--config-file", REPOSITORY / "configs/Glyphs/vild.yaml", "--dataset", "glyphs_val",
        "--output", tmp_path / "p.safetensors", "--weights", weights, "--opts", "MODEL.VILD.VOCABULARY", weights,
    )  # fmt: skip
    assert (tmp_path / "p.safetensors").is_file()


def test_install_detectron2_keeps_the_one_that_is_there():
    done = subprocess.run([sys.executable, "-m", "vild.install_detectron2"], capture_output=True, text=True)
    assert done.returncode == 0 and "kept the one that imports" in done.stdout


def test_a_data_set_of_ones_own_joins_by_one_command(world, tool, capsys):
    arguments = ["--name", "own", "--images", "glyphs/train", "--split", "lvis", "--keep", "base"]
    assert not tool("add_dataset.py", "--json", "glyphs/annotations/lvis_train_all.json", *arguments)
    assert "40 base and 20 novel names" in capsys.readouterr().out
    assert "own" in datasets.entries() and len(datasets.load_dicts("own")) == 40
    assert tool("add_dataset.py", "--json", "none.json", *arguments) == 2
    assert "none.json does not exist" in capsys.readouterr().err


def test_a_builder_killed_after_its_first_shard_ends_in_the_same_bytes(
    world, proposals_file, teacher_folder, tmp_path, tool
):
    arguments = ["--dataset", "glyphs_train", "--proposals", proposals_file, "--teacher", f"local-dir:{teacher_folder}",
                 "--shard-images", 4, "--dtype", "int8", "--nms", 0.5, "--min-size", 20]  # fmt: skip
    assert not tool("build_teacher_store.py", *arguments, "--num-workers", 0, "--output-dir", tmp_path / "whole")
    arguments += ["--output-dir", tmp_path / "killed"]
    process = subprocess.Popen([sys.executable, REPOSITORY / "tools/build_teacher_store.py", *map(str, arguments)])
    while process.poll() is None and not (tmp_path / "killed" / "shard-00000.safetensors").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and "false" in (tmp_path / "killed" / "manifest.json").read_text()
    assert not tool("build_teacher_store.py", *arguments, "--num-workers", 0)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()} == whole
    store = EmbeddingStore(tmp_path / "killed")
    dropped, left = store.plan["dropped"], sum(len(boxes) for _, boxes in store.boxes())
    assert dropped.keys() == {"min_size", "nms"} and left == 400 - sum(dropped.values()) < 400
    for _, boxes in store.boxes():
        assert (box_iou(boxes, boxes).fill_diagonal_(0) <= 0.5).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 20).all()


def test_every_tool_is_in_the_list():
    text = (REPOSITORY / "tools" / "README.md").read_text()
    missing = [
        path.name
        for path in (REPOSITORY / "tools").glob("*.py")
        if f"tools/{path.name} " not in text.replace("\n", " ")
    ]
    assert not missing


def test_every_tool_can_be_started_by_its_name():
    assert not [p.name for p in (REPOSITORY / "tools").glob("*.py") if not os.access(p, os.X_OK)]
