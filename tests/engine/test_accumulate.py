"""Steps of several parts. (That they equal steps of the whole batch: test_distributed.py.)"""

import json
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import get_event_storage
from torch import nn

from vild.engine import accumulate
from vild.engine.replay import replay
from vild.engine.trainer import Trainer
from vild.utils.errors import Failure, UserError


def steps(parts, scaler=None, precision=torch.float16):
    """Three steps of six numbers on a linear model, whose loss is a mean; its weights and what was logged."""
    torch.manual_seed(0)
    linear, logged = nn.Linear(1, 1), []
    batches = iter(torch.randn(3, 6, 1).unbind())
    trainer = SimpleNamespace(
        model=lambda part: {"loss": (linear(part) - 1).square().mean()}, _data_loader_iter=batches,
        optimizer=torch.optim.SGD(linear.parameters(), 0.1), after_backward=lambda: None,
        _write_metrics=lambda losses, _: logged.append(losses["loss"].item()),
    )  # fmt: skip
    if scaler:
        trainer.grad_scaler, trainer.precision = scaler, precision
    for _ in range(3):
        accumulate.run_step(trainer, parts, lambda part: None)
    return torch.cat([linear.weight.flatten(), linear.bias]).detach(), torch.tensor(logged)


def test_parts_of_a_mean():
    """Weights and logged losses are those of the whole batch, with a gradient scaler, too."""
    whole, losses = steps(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for parts, settings in ((2, ()), (6, ()), (3, (scaler,))):
        theirs = steps(parts, *settings)
        torch.testing.assert_close(theirs[0], whole)
        torch.testing.assert_close(theirs[1], losses)


def test_images_that_cannot_be_parted_are_refused(make_cfg, world):
    with pytest.raises(UserError, match="ACCUMULATE: 3 parts of SOLVER.IMS_PER_BATCH 2 on 1 processes"):
        Trainer(make_cfg("vild", "SOLVER.ACCUMULATE", 3))
    with pytest.raises(UserError, match="ACCUMULATE: 0 parts"):
        Trainer(make_cfg("vild", "SOLVER.ACCUMULATE", 0))
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH: 0 is less than 1"):
        Trainer(make_cfg("vild", "SOLVER.IMS_PER_BATCH", 0))


def test_a_loss_of_one_part_that_is_not_finite(make_cfg, world, tmp_path):
    """It is reported before the weights change, with the images of its part, and can be computed again."""
    settings = ("SOLVER.ACCUMULATE", 2, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()")
    trainer, forwards = Trainer(make_cfg("vild", *settings)), []
    trainer.resume_or_load(False)

    def spoil(model, given):
        forwards.append(get_event_storage().iter)
        if len(forwards) == 4:  # the second part of step 1
            model.roi_heads.bbox_pred.bias.data[0] = float("nan")

    trainer.model.register_forward_pre_hook(spoil)
    with pytest.raises(Failure, match="step 1: loss_box_reg is nan; images ") as failure:
        trainer.train()
    folder = tmp_path / "output" / "nan_0000001"
    step = json.loads((folder / "step.json").read_text())
    assert forwards == [0, 0, 1, 1] and len(step["pictures"]) == 1 and step["pictures"][0] in str(failure.value)
    again = replay(folder, "MODEL.VILD.VOCABULARY", str(folder / "weights.pth"), "MODEL.VILD.STORE", "")
    assert {k: str(v.item()) for k, v in again.items()} == step["losses"]
