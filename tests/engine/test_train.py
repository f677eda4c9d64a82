"""The trainer: resume after a kill or signal, the checkpoint's contents."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import get_event_storage

from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.engine.trainer import Trainer
from vild.modeling.rcnn import ViLDRCNN
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary


def run(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def never_stopped(command, tmp_path_factory) -> Path:
    """The output of a training."""
    folder = tmp_path_factory.mktemp("never_stopped")
    assert run(command(folder)).returncode == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_resume_after_a_signal_equals_never_stopped(command, never_stopped, tmp_path, number):
    """SIGTERM goes to the loader's worker too, as a scheduler's does, and leaves a checkpoint of the step it comes in,
    whatever the period."""
    waits = {signal.SIGKILL: ("3", "last_checkpoint", ""), signal.SIGTERM: ("100", "log.txt", "Starting training")}
    period, file, sign = waits[number]
    sign_of_start = tmp_path / "killed" / file
    process = subprocess.Popen(command(tmp_path / "killed", "SOLVER.CHECKPOINT_PERIOD", period), text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    while process.poll() is None and not (sign_of_start.exists() and sign in sign_of_start.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    told = process.communicate(timeout=1500)[1].strip().splitlines()
    assert not (tmp_path / "killed" / "model_final.pth").exists(), "it ended before it could be stopped"
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, told
        last = (tmp_path / "killed" / "last_checkpoint").read_text()
        assert last in [f"model_{n:07d}.pth" for n in range(5)]
        assert told[-1] == f"ended by SIGTERM; --resume continues from {tmp_path}/killed/{last}"
        assert not any("Traceback" in line for line in told)
    resumed = run(command(tmp_path / "killed", flags=("--num-gpus", "0", "--resume")))
    assert resumed.returncode == 0, resumed.stderr
    folders = never_stopped, tmp_path / "killed"
    whole, killed = (torch.load(folder / "model_final.pth", weights_only=True) for folder in folders)
    assert whole["iteration"] == killed["iteration"] == 5
    assert whole["trained_on"] == killed["trained_on"] and whole["trained_on"]["data_sets"][0]["keep"] == "base"
    assert all(torch.equal(v, killed["model"][k]) for k, v in whole["model"].items())
    last = [json.loads((folder / "metrics.json").read_text().splitlines()[-1]) for folder in folders]
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
