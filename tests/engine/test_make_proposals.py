"""Proposals in the precision of training."""

import pytest
import torch
from torchvision.ops import box_iou

from vild.data.proposals import load_proposals
from vild.engine.make_proposals import make_proposals


@pytest.mark.parametrize("config", ["proposals", "vild"])
def test_proposals_in_half_precision(make_cfg, checkpoint_file, tmp_path, capsys, config):
    """A config for a GPU, here on a CPU (autocast's bfloat16): the convolutions alone are rounded, so boxes are near
    those of float32 and not on bfloat16's grid, which is half a pixel wide beyond 64."""
    found = {}
    for amp in (False, True):
        cfg = make_cfg(config, "MODEL.WEIGHTS", str(checkpoint_file))
        cfg.defrost()
        cfg.SOLVER.AMP.ENABLED = amp
        make_proposals(cfg, "glyphs_val", tmp_path / "p.safetensors")
        assert f"on cpu, in {'bfloat16' if amp else 'float32'}" in capsys.readouterr().out
        found[amp] = load_proposals(tmp_path / "p.safetensors")
    assert found[True].keys() == found[False].keys()
    boxes, expected = (torch.cat([rows for rows, _ in found[amp].values()]) for amp in (True, False))
    assert not torch.equal(boxes, expected) and not torch.equal(boxes, boxes.bfloat16().float())
    ious = [box_iou(found[True][i][0], rows).amax(0) for i, (rows, _) in found[False].items()]
    assert torch.cat(ious).mean() > 0.9
