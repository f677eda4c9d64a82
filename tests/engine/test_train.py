"""The trainer from the command line: resume after a kill, the checkpoint's contents, a user's mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import get_event_storage

from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.engine.sources import check_classes
from vild.engine.trainer import Trainer
from vild.modeling.rcnn import ViLDRCNN
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

TINY = [
    "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.WARMUP_ITERS", "2", "SOLVER.IMS_PER_BATCH", "2",
    "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "1",
]  # fmt: skip


@pytest.fixture
def command(vocabulary_file, store_folder, teacher_folder, world):
    """tools/train_net.py over the tiny files."""

    def make(output, *overrides, config="vild", flags=("--num-gpus", "0")):
        return [
            sys.executable, str(REPOSITORY / "tools/train_net.py"),
            "--config-file", str(REPOSITORY / "configs/Glyphs" / f"{config}.yaml"), *flags, *TINY,
            "MODEL.VILD.VOCABULARY", str(vocabulary_file), "MODEL.VILD.STORE", str(store_folder),
            "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}", "OUTPUT_DIR", str(output), *overrides,
        ]  # fmt: skip

    return make


def run(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_resume_after_a_signal_equals_never_stopped(command, tmp_path, number):
    """SIGTERM goes to the loader's worker too, as a scheduler's does."""
    assert run(command(tmp_path / "whole")).returncode == 0
    process = subprocess.Popen(command(tmp_path / "killed", "SOLVER.CHECKPOINT_PERIOD", "3"), text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    while process.poll() is None and not (tmp_path / "killed" / "last_checkpoint").exists():
        time.sleep(0.05)
    os.killpg(process.pid, number)
    told = process.communicate(timeout=1500)[1].strip().splitlines()
    assert not (tmp_path / "killed" / "model_final.pth").exists(), "it ended before it could be stopped"
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, told
        last = (tmp_path / "killed" / "last_checkpoint").read_text()
        assert last in ("model_0000003.pth", "model_0000004.pth")  # of the step it was asked in, not of the period
        assert told[-1] == f"ended by SIGTERM; --resume continues from {tmp_path}/killed/{last}"
        assert not any("Traceback" in line for line in told)
    resumed = run(command(tmp_path / "killed", flags=("--num-gpus", "0", "--resume")))
    assert resumed.returncode == 0, resumed.stderr
    whole, killed = (torch.load(tmp_path / n / "model_final.pth", weights_only=True) for n in ("whole", "killed"))
    assert whole["iteration"] == killed["iteration"] == 5
    assert whole["trained_on"] == killed["trained_on"] and whole["trained_on"]["data_sets"][0]["keep"] == "base"
    assert all(torch.equal(v, killed["model"][k]) for k, v in whole["model"].items())
    last = [json.loads((tmp_path / n / "metrics.json").read_text().splitlines()[-1]) for n in ("whole", "killed")]
    losses = [k for k in last[0] if "loss" in k and k in last[1]]
    assert len(losses) >= 6


def losses_of(cfg, resume, until):
    """The total loss of each step that is trained."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    rows = []
    step = trainer.run_step

    def spy():
        step()
        rows.append(trainer.storage.latest()["total_loss"][0])

    trainer.run_step = spy
    trainer.max_iter = until
    trainer.train()
    return rows


def losses_with_a_resume(make_cfg, tmp_path, variant, *settings):
    """The losses of four steps, and those of the last two after a resume."""
    settings += ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
    whole = losses_of(make_cfg(variant, *settings, "OUTPUT_DIR", str(tmp_path / "a")), False, 4)
    os.makedirs(tmp_path / "b")
    second = make_cfg(variant, *settings, "OUTPUT_DIR", str(tmp_path / "b"))
    os.link(tmp_path / "a" / "model_0000001.pth", tmp_path / "b" / "model_0000001.pth")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000001.pth")
    return whole, losses_of(second, True, 4)


@pytest.mark.parametrize(("variant", "source"), [("ensemble", "store"), ("vild", "teacher")])
def test_losses_of_every_step_are_the_same_after_a_resume(make_cfg, tmp_path, variant, source):
    whole, resumed = losses_with_a_resume(make_cfg, tmp_path, variant, "MODEL.VILD.DISTILL_FROM", source)
    assert resumed == whole[2:] and len(set(whole)) == 4


def test_a_resume_between_steps_of_several_parts(make_cfg, tmp_path):
    """With SOLVER.ACCUMULATE, a checkpoint is of a whole step."""
    whole, resumed = losses_with_a_resume(make_cfg, tmp_path, "ensemble", "SOLVER.ACCUMULATE", 2)
    assert resumed == whole[2:] and len(set(whole)) == 4


def test_a_resume_across_batches_without_foreground(make_cfg, tmp_path, monkeypatch):
    """Steps 1 and 2 of four have neither objects nor distilled regions; norms of the heads as in the LVIS configs."""
    heads = load_config("LVIS/ensemble.yaml").MODEL
    norms = ("MODEL.ROI_BOX_HEAD.NORM", heads.ROI_BOX_HEAD.NORM, "MODEL.ROI_MASK_HEAD.NORM", heads.ROI_MASK_HEAD.NORM)
    forward, empty = ViLDRCNN.forward, []

    def without(self, inputs):
        if get_event_storage().iter in (1, 2):
            empty.append(get_event_storage().iter)
            inputs = [{**x, "instances": x["instances"][:0], "distill": x["distill"][:0]} for x in inputs]
        return forward(self, inputs)

    monkeypatch.setattr(ViLDRCNN, "forward", without)
    whole, resumed = losses_with_a_resume(make_cfg, tmp_path, "ensemble", *norms)
    assert empty == [1, 2, 2] and resumed == whole[2:] and len(set(whole)) == 4


def test_the_checkpoint_holds_vocabulary_and_fingerprint(make_cfg, vocabulary, tmp_path):
    cfg = make_cfg("text", "MODEL.VILD.STORE", "")
    model = Trainer.build_model(cfg)
    VildCheckpointer(model, str(tmp_path)).save("model")
    inside = Vocabulary.load(tmp_path / "model.pth")
    assert inside.names == vocabulary.names and inside.fingerprint == vocabulary.fingerprint
    assert torch.equal(inside.embeddings, vocabulary.embeddings)

    other = Vocabulary(vocabulary.names, vocabulary.embeddings, vocabulary.splits,
                       fingerprint={**vocabulary.fingerprint, "weights": "0" * 16})  # fmt: skip
    other.save(tmp_path / "other.safetensors")
    second = Trainer.build_model(make_cfg("text", "MODEL.VILD.VOCABULARY", str(tmp_path / "other.safetensors")))
    with pytest.raises(UserError, match=r"checkpoint .*model\.pth is of teacher .* config's vocabulary is of teacher"):
        VildCheckpointer(second).load(str(tmp_path / "model.pth"))


def test_a_kill_between_the_last_two_checkpoints_loses_neither(make_cfg, tmp_path):
    """The last step's is there, ``model_final.pth`` or its being the last one is not."""
    cfg = make_cfg("vild", "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    folder = Path(cfg.OUTPUT_DIR)
    final = folder / "model_final.pth"
    whole = torch.load(final, weights_only=True)["model"]
    final.unlink()
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    again = torch.load(final, weights_only=True)["model"]
    assert again.keys() == whole.keys() and all(torch.equal(again[k], v) for k, v in whole.items())


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


def test_the_command_line_prints_that_line_and_no_traceback(command, tmp_path):
    done = run(command(tmp_path / "o", "MODEL.VILD.STORE", "/nowhere"))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert lines == [
        "error: store /nowhere: /nowhere/manifest.json does not exist; tools/build_teacher_store.py makes a store"
    ]
    assert "Traceback" not in done.stderr + done.stdout
    missing = run([sys.executable, str(REPOSITORY / "tools/train_net.py"), "--config-file", "none.yaml"])
    assert missing.returncode == 2 and missing.stderr.strip().endswith("error: config none.yaml does not exist")


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


def test_an_evaluation_of_random_weights_is_refused(command, make_cfg, tmp_path):
    """Without weights, and with those of a backbone alone, of which the heads would be random."""
    flags = ("--num-gpus", "0", "--eval-only")
    done = run(command(tmp_path / "o", flags=flags))
    assert done.returncode == 2 and "error: --eval-only: MODEL.WEIGHTS is empty: " in done.stderr.splitlines()[-1]
    done = run(command(tmp_path / "o", flags=(*flags, "--resume")))
    assert done.returncode == 2 and "and OUTPUT_DIR" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "o").exists()
    model = Trainer.build_model(make_cfg("vild"))
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match=r"backbone\.pth lacks \d+ of the network's parameters, first "):
        VildCheckpointer(model, trained=True).load(str(tmp_path / "backbone.pth"))
    VildCheckpointer(model).load(str(tmp_path / "backbone.pth"))  # a training starts from them


def test_detectron2_conventions(make_cfg):
    cfg = make_cfg("vild")
    assert cfg.MODEL.DEVICE in ("cpu", "cuda") and cfg.SOLVER.AMP.ENABLED is False
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        if path.parent.name != "ablations":
            load_config(str(path))


def test_half_a_line_of_metrics_does_not_stay(make_cfg, world, tmp_path):
    """As a process killed while it wrote leaves it; what reads the file would take it and the next for one line."""
    log = tmp_path / "metrics.json"
    for left, stays in (('{"a": 1}\n{"b"', '{"a": 1}\n'), ('{"b"', ""), ('{"a": 1}\n', '{"a": 1}\n')):
        log.write_text(left)
        Trainer(make_cfg("text", "OUTPUT_DIR", str(tmp_path)))
        assert log.read_text() == stays
