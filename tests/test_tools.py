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


def tool(name, *arguments):
    command = [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def weights(vocabulary_file, store_folder, teacher_folder, tmp_path_factory):
    from vild.config import load_config

    folder = tmp_path_factory.mktemp("weights")
    cfg = load_config(str(REPOSITORY / "configs/Glyphs/vild.yaml"), ["MODEL.VILD.VOCABULARY", str(vocabulary_file)])
    torch.manual_seed(0)
    VildCheckpointer(Trainer.build_model(cfg), str(folder)).save("model")
    return folder / "model.pth"


def test_store_from_proposals_goes_on_and_refuses_another_teacher(world, proposals_file, teacher_folder, tmp_path):
    arguments = ["--dataset", "glyphs_train", "--proposals", proposals_file, "--output-dir", tmp_path / "store",
                 "--shard-images", 16, "--max-per-image", 3]  # fmt: skip
    done = tool("build_teacher_store.py", *arguments, "--teacher", f"local-dir:{teacher_folder}")
    assert done.returncode == 0, done.stderr
    assert "as float16; a sample of 1 took" in done.stdout
    assert f"teacher local-dir:{teacher_folder} on cpu, in fp32" in done.stdout
    store = EmbeddingStore(tmp_path / "store")
    assert len(store) == 40 and all(len(store[i].boxes) <= 3 for i in range(1, 41))
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    shard = tmp_path / "store" / "shard-00001.safetensors"
    shard.write_bytes(before[shard.name][:-9])
    done = tool("inspect_store.py", tmp_path / "store", "--verify")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1 and f"{shard.name} is broken" in done.stdout
    assert tool("inspect_store.py", tmp_path / "store", "--repair").returncode == 0 and not shard.exists()
    assert tool("build_teacher_store.py", *arguments, "--teacher", f"local-dir:{teacher_folder}").returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    done = tool("inspect_store.py", tmp_path / "store", "--verify", "--coverage", "glyphs_train")
    assert done.returncode == 0 and "'glyphs_train': 40 images, 0 missing, 0 without a region" in done.stdout
    done = tool("build_teacher_store.py", *arguments, "--teacher", "RN50-quickgelu", "--pretrained", "random")
    assert done.returncode == 2 and "it was begun with fingerprint" in done.stderr


def test_vocabulary_and_proposals_tools(world, weights, teacher_folder, tmp_path):
    done = tool("build_vocabulary.py", "--vocabulary", "glyphs_val", "--teacher", f"local-dir:{teacher_folder}",
                "--prompts", "photo", "--output", tmp_path / "v.safetensors")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Vocabulary.load(tmp_path / "v.safetensors").splits.count("novel") == 20
    done = tool("build_vocabulary.py", "--vocabulary", "a,b", "--output", tmp_path / "w.safetensors")
    assert done.returncode == 2 and "give --teacher, or --npy, or both" in done.stderr
    done = tool(
        "make_proposals.py", "--config-file", REPOSITORY / "configs/Glyphs/vild.yaml", "--dataset", "glyphs_val",
        "--output", tmp_path / "p.safetensors", "--weights", weights, "--opts", "MODEL.VILD.VOCABULARY", weights,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.safetensors").is_file()


def test_install_detectron2_keeps_the_one_that_is_there():
    done = subprocess.run([sys.executable, "-m", "vild.install_detectron2"], capture_output=True, text=True)
    assert done.returncode == 0 and "kept the one that imports" in done.stdout


def test_a_data_set_of_ones_own_joins_by_one_command(world):
    arguments = ["--name", "own", "--images", "glyphs/train", "--split", "lvis", "--keep", "base"]
    done = tool("add_dataset.py", "--json", "glyphs/annotations/lvis_train_all.json", *arguments)
    assert done.returncode == 0 and "40 base and 20 novel names" in done.stdout
    assert "own" in datasets.entries() and len(datasets.load_dicts("own")) == 40
    done = tool("add_dataset.py", "--json", "none.json", *arguments)
    assert done.returncode == 2 and "none.json does not exist" in done.stderr


def test_a_builder_killed_after_its_first_shard_ends_in_the_same_bytes(world, proposals_file, teacher_folder, tmp_path):
    arguments = ["--dataset", "glyphs_train", "--proposals", proposals_file, "--teacher", f"local-dir:{teacher_folder}",
                 "--shard-images", 4, "--dtype", "int8", "--nms", 0.5, "--min-size", 20]  # fmt: skip
    assert tool("build_teacher_store.py", *arguments, "--output-dir", tmp_path / "whole").returncode == 0
    arguments += ["--output-dir", tmp_path / "killed"]
    process = subprocess.Popen([sys.executable, REPOSITORY / "tools/build_teacher_store.py", *map(str, arguments)])
    while process.poll() is None and not (tmp_path / "killed" / "shard-00000.safetensors").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and "false" in (tmp_path / "killed" / "manifest.json").read_text()
    assert tool("build_teacher_store.py", *arguments).returncode == 0
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
