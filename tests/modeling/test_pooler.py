"""Boxes keep their float32 coordinates when features are in half precision."""

import logging
import warnings
from contextlib import nullcontext

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from vild.modeling import build_model
from vild.utils.errors import silence_known_warnings


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_are_not_rounded_to_the_type_of_the_features(make_cfg, dtype, mixed):
    """Pooled half-precision features are those of the same features in float32, for boxes beyond 512 pixels."""
    model, generator = build_model(make_cfg("vild")), torch.Generator().manual_seed(0)
    heads = model.roi_heads
    strides = [model.backbone.output_shape()[level].stride for level in heads.box_in_features]
    corners = 520 + 400 * torch.rand(60, 2, generator=generator)
    boxes = torch.cat([corners, corners + 4 + 90 * torch.rand(60, 2, generator=generator)], 1)
    maps = [torch.randn(1, 2, 1024 // s, 1024 // s, generator=generator).to(dtype) for s in strides]
    for pooler in (heads.box_pooler, heads.mask_pooler):
        exact = ROIPooler(pooler.output_size, [1 / s for s in strides], 1, "ROIAlignV2")
        with torch.autocast("cpu", dtype) if mixed else nullcontext():
            pooled = pooler(maps, [Boxes(boxes)])
        assert pooled.dtype == dtype
        assert torch.equal(pooled, exact([m.float() for m in maps], [Boxes(boxes)]).to(dtype))
        rounded = exact([m.float() for m in maps], [Boxes(boxes.to(dtype).float())])
        assert (pooled.float() - rounded).abs().max() > 0.1  # what rounding the boxes would change


def test_tools_do_not_show_what_torch_logs_about_detectron2_s_pooler(monkeypatch, capfd):
    logger = logging.getLogger("torch.fx._symbolic_trace")
    monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setenv("PYTHONWARNINGS", "")
    pooler, seen = ROIPooler(1, [1.0], 1, "ROIAlignV2"), []
    with warnings.catch_warnings():
        for set_up in (lambda: logger.setLevel(logging.NOTSET), silence_known_warnings):
            set_up()
            torch.fx._symbolic_trace.is_fx_tracing_warning.cache_clear()  # it is logged once per process
            pooler([torch.zeros(1, 1, 4, 4)], [Boxes(torch.tensor([[0.0, 0, 2, 2]]))])
            seen.append(capfd.readouterr().err)
    assert "is_fx_tracing" in seen[0] and not seen[1]
