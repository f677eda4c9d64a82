"""A training that cannot go on: what it says, what it leaves behind."""

import itertools
import json
import multiprocessing
import os
import resource
import signal
import sys
import urllib.request
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from vild.checkpoint.checkpointer import VildCheckpointer
from vild.data.loader import Watched, WorkerDied
from vild.engine import dump, guards
from vild.engine.dump import pack, unpack
from vild.engine.guards import TrainingGuard, not_finite_part
from vild.engine.replay import main as replay_main
from vild.engine.replay import replay
from vild.engine.trainer import Trainer
from vild.utils.errors import Failure, UserError


class Before(HookBase):
    """Does something to the trainer before one step."""

    def __init__(self, iteration, function):
        self.iteration, self.function = iteration, function

    def before_step(self):
        if self.trainer.iter == self.iteration:
            self.function(self.trainer)


def start(cfg, iteration, function):
    trainer = Trainer(cfg)
    trainer.resume_or_load(False)
    trainer.register_hooks([Before(iteration, function)])
    return trainer


@pytest.mark.parametrize("distilled", [0, 2])
def test_a_loss_that_is_not_finite_is_told_and_can_be_computed_again(make_cfg, world, tmp_path, distilled):
    """All of it: the step, the term, the images; the weights as they were; the same losses from the folder alone."""
    seen = {}

    def spoil(trainer):
        trainer.model.roi_heads.bbox_pred.bias.data[0] = float("nan")
        seen.update({k: v.detach().clone() for k, v in trainer.model.named_parameters()})

    settings = ("SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()", "MODEL.VILD.DISTILL_IMAGES", distilled)
    trainer = start(make_cfg("vild", *settings), 1, spoil)
    with pytest.raises(Failure) as failure:
        trainer.train()
    line, folder = str(failure.value), tmp_path / "output" / "nan_0000001"
    assert line.startswith("step 1: loss_box_reg is nan; images ") and "\n" not in line
    assert line.endswith(f"compute it again: python -m vild.engine.replay {folder}")
    step = json.loads((folder / "step.json").read_text())
    assert len(step["pictures"]) == 2 + distilled and all(image in line for image in step["pictures"])
    kept = torch.load(folder / "weights.pth", weights_only=True)["model"]
    for weights in (kept, trainer.model.state_dict()):
        assert all(v.equal(weights[k]) for k, v in seen.items() if not torch.isnan(v).any())
    assert not (tmp_path / "output" / "last_checkpoint").exists()

    torch.manual_seed(99)
    again = replay(folder, "MODEL.VILD.VOCABULARY", str(folder / "weights.pth"), "MODEL.VILD.STORE", "")
    assert {k: str(v.item()) for k, v in again.items()} == step["losses"]
    assert list(not_finite_part([again])[1]) == ["loss_box_reg"] and len(again) >= 6
    assert replay(folder, "MODEL.VILD.STORE", "", "MODEL.DEVICE", "cpu:0").keys() == again.keys()  # as "cuda:1"


def test_boxes_that_are_not_finite_are_told_too(make_cfg, world, tmp_path):
    """Detectron2 stops at these before there is a loss."""

    def spoil(trainer):
        trainer.model.proposal_generator.rpn_head.anchor_deltas.bias.data[:] = float("inf")

    trainer = start(make_cfg("text", "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()", "MODEL.VILD.STORE", ""), 0, spoil)
    with pytest.raises(Failure, match=r"^step 0: Predicted boxes or scores contain Inf/NaN.*; images .*nan_0000000$"):
        trainer.train()
    with pytest.raises(FloatingPointError, match="Predicted boxes"):
        replay(tmp_path / "output" / "nan_0000000")


@pytest.mark.parametrize("mine", [False, True])
def test_ranks_end_together(monkeypatch, tmp_path, mine):
    """The rank that saw it tells, the other leaves without a word, both meet before."""
    met, dumped = [], []
    guard = TrainingGuard()
    guard.trainer = SimpleNamespace(iter=7, model=None, cfg=CfgNode({"OUTPUT_DIR": str(tmp_path)}))
    monkeypatch.setattr(guards.comm, "all_gather", lambda mine: [mine, (None, not mine[1])])
    monkeypatch.setattr(guards.comm, "synchronize", lambda: met.append(len(dumped)))
    monkeypatch.setattr(guards.comm, "get_rank", lambda: 1)
    monkeypatch.setattr(guards.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(dump, "write_dump", lambda folder, *rest: dumped.append(folder.name))
    guard._remember_inputs(SimpleNamespace(training=True), ([{"file_name": "a.jpg"}],))
    guard._remember_losses(SimpleNamespace(training=True), (), {"loss_text": torch.tensor(float("inf") if mine else 1)})
    if mine:
        with pytest.raises(Failure, match=r"step 7: loss_text is inf; images a\.jpg; .*nan_0000007_rank1"):
            guard._exchange()
    else:
        with pytest.raises(SystemExit) as left:
            guard._exchange()
        assert left.value.code == 1
    assert met == [len(dumped)] == [int(mine)]


def test_ranks_end_after_the_same_step(monkeypatch):
    """What one rank was asked counts for all, and only once all have told."""
    guard = TrainingGuard()
    monkeypatch.setattr(guards.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(guards.comm, "all_gather", lambda mine: [mine, (signal.SIGTERM, False)])
    monkeypatch.setattr(guards.signals, "pending", lambda: None)
    guard._parts = [([], {"loss": torch.tensor(1.0)})]
    guard.after_step()
    guard._exchange()
    with pytest.raises(guards.Ended, match="SIGTERM"):
        guard.after_step()
    assert guard.agreed


def test_structures_are_packed_as_plain_values():
    regions = Instances((5, 6), proposal_boxes=Boxes(torch.rand(2, 4)), gt_masks=BitMasks(torch.rand(2, 5, 6) > 0.5))
    again = unpack(pack(regions))
    assert again.image_size == (5, 6) and torch.equal(again.proposal_boxes.tensor, regions.proposal_boxes.tensor)
    assert torch.equal(again.gt_masks.tensor, regions.gt_masks.tensor)


def test_a_folder_without_a_step_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vild.engine.replay", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        replay_main()
    line = f"error: {tmp_path} contains no step: step.json does not exist\n"
    assert caught.value.code == 2 and capsys.readouterr().err == line


def test_a_worker_that_was_killed_is_told_after_a_whole_step(make_cfg, world, tmp_path):
    def kill(trainer):
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)

    settings = ("SOLVER.MAX_ITER", 40, "DATASETS.TEST", "()", "MODEL.VILD.STORE", "", "DATALOADER.NUM_WORKERS", 1)
    trainer = start(make_cfg("text", *settings), 1, kill)
    with pytest.raises(WorkerDied) as died:
        trainer.train()
    line = str(died.value)
    assert line.startswith("DataLoader worker") and "when memory is short" in line and "\n" not in line
    assert 0 <= trainer.whole < 10
    kept = tmp_path / "output" / f"model_{trainer.whole:07d}.pth"
    assert line.endswith(f"--resume continues from {kept}")
    assert torch.load(kept, weights_only=True)["iteration"] == trainer.whole
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def test_a_worker_that_dies_while_its_handler_is_replaced(monkeypatch):
    """PyTorch's handler runs within signal.signal when the signal is already pending there."""
    died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    batches = Watched(itertools.count())
    real, calls = signal.signal, []

    def pending(number, handler):
        calls.append(handler)
        if calls == ["a handler", signal.SIG_DFL]:  # the first batch is there, its handler not yet gone
            raise died
        return real(number, signal.SIG_DFL)

    stream = batches._watch(iter(batches.loader), "a handler")
    monkeypatch.setattr(signal, "signal", pending)
    with pytest.raises(WorkerDied, match="DataLoader worker .pid 7. is killed"):
        next(stream)
    assert calls == ["a handler", signal.SIG_DFL, signal.SIG_DFL]


def test_a_worker_that_dies_while_its_batch_goes_to_a_gpu():
    """PyTorch's thread that pins batches ends with a worker that dies while sending, and says nothing of the worker."""

    def batches():
        yield 1
        raise RuntimeError("Pin memory thread exited unexpectedly")

    stream = Watched(batches())._watch(batches(), signal.SIG_DFL)
    assert next(stream) == 1
    with pytest.raises(WorkerDied, match="^DataLoader worker: Pin memory thread exited unexpectedly .*memory is short"):
        next(stream)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("detectron2://ImageNetPretrained/none.pkl?x=1", "cannot be downloaded (URLError: <urlopen error no network>)"),
        ("detektron2://a.pkl", "not a URL that Detectron2 supports"),
    ],
)
def test_weights_that_cannot_be_had_are_told(tmp_path, monkeypatch, path, reason):
    def urlopen(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError) as told:
        VildCheckpointer(nn.Linear(1, 1)).load(path)
    assert str(told.value) == f"MODEL.WEIGHTS: {path}: {reason}"


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    """On a disk that takes no more (here: a file that may not grow) the one before stays and is the last."""
    checkpointer = VildCheckpointer(nn.Linear(300, 300), str(tmp_path), beside={"run": {"code": "x"}})
    checkpointer.save("model_0000001", iteration=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (50_000, 0):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises((OSError, UserError)) as told:
                checkpointer.save("model_0000002", iteration=2)
            assert "File too large" in str(told.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    again = VildCheckpointer(nn.Linear(300, 300), str(tmp_path))
    assert again.resume_or_load("")["iteration"] == 1
    assert torch.equal(again.model.weight, checkpointer.model.weight)
    checkpointer.save("model_0000002", iteration=2)
    assert again.resume_or_load("")["run"] == {"code": "x"}
