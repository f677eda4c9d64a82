"""What a user gets wrong in training and evaluation is one line, in Python and on the command line."""

import json

import pytest
import torch

from tests.engine.test_train import run
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.data import datasets
from vild.engine.sources import check_classes
from vild.engine.trainer import Trainer
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary


def test_a_vocabulary_in_another_order_is_refused(world, vocabulary):
    order = list(range(len(vocabulary)))
    order[2], order[3] = 3, 2
    with pytest.raises(UserError, match=r"60 classes, the vocabulary 60; they first differ at number 2: 'star' and"):
        check_classes(vocabulary.take(order), "glyphs_val", marks=False)
    with pytest.raises(UserError, match="60 classes, the vocabulary 5"):
        check_classes(vocabulary.take(range(5)), "glyphs_val", marks=False)
    marks = ("base",) * len(vocabulary)
    unmarked = Vocabulary(vocabulary.names, vocabulary.embeddings, marks)
    check_classes(unmarked, "glyphs_val", marks=False)
    with pytest.raises(UserError, match="marks differ"):
        check_classes(unmarked, "glyphs_train", marks=True)


def test_a_test_set_of_other_classes_is_refused_before_the_training(make_cfg, vocabulary, tmp_path, world, monkeypatch):
    document, file = datasets.read_annotations("glyphs_val"), tmp_path / "short.json"
    first, *others = document["categories"]
    annotations = [a for a in document["annotations"] if a["category_id"] != first["id"]]
    file.write_text(json.dumps({**document, "categories": others, "annotations": annotations}))
    entry = datasets.Entry(str(file), "glyphs/val", "everything")
    monkeypatch.setattr(datasets, "BUILTIN", {**datasets.BUILTIN, "short": entry})
    words = "'short' has 59 classes, the vocabulary 60; they first differ at number 0: .*MODEL.VILD.TEST_VOCABULARY"
    with pytest.raises(UserError, match=words):
        Trainer(make_cfg("text", "DATASETS.TEST", "('short',)"))
    vocabulary.take(range(1, 60)).save(own := tmp_path / "short.safetensors")
    Trainer(make_cfg("text", "DATASETS.TEST", "('short',)", "MODEL.VILD.TEST_VOCABULARY", str(own)))
    file.unlink()
    Trainer(make_cfg("text", "DATASETS.TEST", "('short',)"))  # where only the training set is


def mistakes(tmp_path, vocabulary):
    """What a user gets wrong in training: overrides, and what the one line says."""
    narrow = Vocabulary(vocabulary.names, torch.eye(60, 61), vocabulary.splits, fingerprint={
        **vocabulary.fingerprint, "width": 61, "weights": "1" * 16})  # fmt: skip
    narrow.save(tmp_path / "narrow.safetensors")
    return {
        "missing data set": (["DATASETS.TRAIN", "('lvis_v2',)"], "data set 'lvis_v2' is not known"),
        "missing store": (["MODEL.VILD.STORE", "/nowhere"], "store /nowhere: /nowhere/manifest.json does not exist"),
        "no store": (["MODEL.VILD.STORE", ""], "MODEL.VILD.STORE is empty"),
        "missing vocabulary": (["MODEL.VILD.VOCABULARY", "/v.safetensors"], "/v.safetensors does not exist"),
        "width": (["MODEL.VILD.VOCABULARY", str(tmp_path / "narrow.safetensors")], "width 64.*width 61"),
        "novel annotations": (["DATASETS.TRAIN", "('glyphs_val',)"], "'glyphs_val' keeps novel annotations"),
        "unknown key": (["MODEL.VILD.TEMPERATUR", "1"], "MODEL.VILD.TEMPERATUR"),
        "missing weights": (["MODEL.WEIGHTS", "/w.pth"], "MODEL.WEIGHTS: /w.pth does not exist"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "missing data set",
        "missing store",
        "no store",
        "missing vocabulary",
        "width",
        "unknown key",
        "missing weights",
        "novel annotations",
    ],
)
def test_a_mistake_ends_in_one_line(make_cfg, vocabulary, tmp_path, case):
    overrides, message = mistakes(tmp_path, vocabulary)[case]
    with pytest.raises(UserError, match=message) as caught:
        Trainer(make_cfg("vild", *overrides)).resume_or_load(resume=False)
    assert "\n" not in str(caught.value)


def test_the_command_line_prints_that_line_and_no_traceback(command, tmp_path, tool, capsys):
    done = run(command(tmp_path / "o", "MODEL.VILD.STORE", "/nowhere"))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert lines == [
        "error: store /nowhere: /nowhere/manifest.json does not exist; tools/build_teacher_store.py makes a store"
    ]
    assert "Traceback" not in done.stderr + done.stdout
    assert tool("train_net.py", "--config-file", "none.yaml") == 2
    assert capsys.readouterr().err.strip().endswith("error: config none.yaml does not exist")


@pytest.mark.parametrize(
    "command_line", ["train_net.py", "train_net.py --resume", "train_net.py --eval-only", "transfer.py"]
)
@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.WEIGHTS", "/w.pth"), ("MODEL.DEVICE", "cuda:99"), ("DATASETS.TEST", "('nowhere',)")]
)
def test_a_mistake_in_the_config_leaves_no_folder(
    make_cfg, checkpoint_file, tmp_path, world, tool, capsys, command_line, key, value
):
    vocabulary, output = make_cfg("vild").MODEL.VILD.VOCABULARY, tmp_path / "new" / "o"
    keys = {"MODEL.WEIGHTS": checkpoint_file, "MODEL.VILD.VOCABULARY": vocabulary, "OUTPUT_DIR": output, key: value}
    name, *flags = command_line.split()
    done = tool(name, "--config-file", "Glyphs/vild.yaml", *flags, *(x for pair in keys.items() for x in pair))
    line = capsys.readouterr().err.splitlines()[-1]
    assert done == 2 and line.startswith("error: data set 'nowhere'" if key == "DATASETS.TEST" else f"error: {key}")
    assert not (tmp_path / "new").exists()


def test_finetuning_with_wrong_weights_leaves_no_folder(checkpoint_file, teacher_folder, tmp_path, world, tool, capsys):
    opts = ["MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}", "MODEL.WEIGHTS", "/w.pth"]
    given = ["--config-file", "Glyphs/vild.yaml", "--weights", checkpoint_file, "--dataset", "glyphs_train"]
    assert tool("finetune.py", *given, "--output-dir", tmp_path / "new", "--opts", *opts) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: MODEL.WEIGHTS: /w.pth does not exist"
    assert not (tmp_path / "new").exists()


def test_a_teacher_that_is_not_the_vocabularys_is_told(make_cfg, world, caplog):
    Trainer(make_cfg("vild"))
    assert "MODEL.VILD.TEACHER.NAME" not in caplog.text
    Trainer(make_cfg("vild", "MODEL.VILD.TEACHER.NAME", "RN50"))
    assert "MODEL.VILD.TEACHER.NAME is RN50, but vocabulary and detector are of local-dir:" in caplog.text


def test_a_mistake_inside_a_loader_worker_is_one_line_too(command, tmp_path, world, monkeypatch):
    """An image that cannot be read, met by a worker process during training."""
    root = tmp_path / "datasets"
    (root / "glyphs").mkdir(parents=True)
    (root / "glyphs" / "annotations").symlink_to(world / "glyphs" / "annotations")
    (root / "glyphs" / "train").mkdir()
    for image in (world / "glyphs" / "train").iterdir():
        (root / "glyphs" / "train" / image.name).write_bytes(b"broken")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    done = run(command(tmp_path / "o"))
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("error: image ")
    assert "cannot be read" in done.stderr


def test_weights_of_another_teacher_or_variant_are_refused_everywhere(command, make_cfg, vocabulary, tmp_path):
    """Also with --eval-only and as a start, where Detectron2 loads nothing but the weights."""
    VildCheckpointer(Trainer.build_model(make_cfg("vild")), str(tmp_path)).save("vild")
    other = Vocabulary(vocabulary.names, vocabulary.embeddings, vocabulary.splits,
                       fingerprint={**vocabulary.fingerprint, "weights": "0" * 16})  # fmt: skip
    other.save(tmp_path / "other.safetensors")
    weights = ("MODEL.WEIGHTS", str(tmp_path / "vild.pth"))
    done = run(command(tmp_path / "o", *weights, "MODEL.VILD.VOCABULARY", str(tmp_path / "other.safetensors"),
                       flags=("--num-gpus", "0", "--eval-only")))  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "vild.pth is of teacher" in done.stderr
    with pytest.raises(UserError, match=r"vild\.pth is of variant 'vild', MODEL.VILD.VARIANT is 'ensemble'"):
        Trainer(make_cfg("ensemble", *weights)).resume_or_load(resume=False)


def test_an_evaluation_of_random_weights_is_refused(command, make_cfg, tmp_path, tool, capsys):
    """Without weights, and with those of a backbone alone, of which the heads would be random."""
    flags = ("--num-gpus", "0", "--eval-only")
    assert tool("train_net.py", *command(tmp_path / "o", flags=flags)[2:]) == 2
    assert "error: --eval-only: MODEL.WEIGHTS is empty: " in capsys.readouterr().err.splitlines()[-1]
    assert tool("train_net.py", *command(tmp_path / "o", flags=(*flags, "--resume"))[2:]) == 2
    assert "and OUTPUT_DIR" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "o").exists()
    model = Trainer.build_model(make_cfg("vild"))
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match=r"backbone\.pth lacks \d+ of the network's parameters, first "):
        VildCheckpointer(model, trained=True).load(str(tmp_path / "backbone.pth"))
    VildCheckpointer(model).load(str(tmp_path / "backbone.pth"))  # a training starts from them
