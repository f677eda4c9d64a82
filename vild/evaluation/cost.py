"""Parameters, FLOPs and latency of a detector. They depend on its architecture alone, not on its weights."""

from __future__ import annotations

import logging
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.evaluation import inference_context
from detectron2.structures import Boxes, Instances
from fvcore.nn import parameter_count
from torch import nn
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode

from vild.config import load_config
from vild.modeling import build_model
from vild.utils.errors import UserError

logger = logging.getLogger("vild")
PARTS = ("backbone", "FPN", "RPN", "heads")


def parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each part of a detector with an FPN (heads: box, mask and embedding heads), and of
    ``all``."""
    counts = parameter_count(model)
    body = counts["backbone.bottom_up"]
    return _by_part(body, counts["backbone"] - body, counts["proposal_generator"], counts["roi_heads"])


@torch.no_grad()
def flops(model: nn.Module, size: int) -> dict[str, int]:
    """FLOPs of convolutions and matrix products on one image of ``size`` x ``size`` pixels, of each part and of
    ``all``. A multiplication and an addition count as two (fvcore's ``FlopCountAnalysis`` counts one).

    The heads run on as many proposals, and the mask head on as many detections, as the config allows, so that the
    number does not depend on the weights."""
    heads, rpn = model.roi_heads, model.proposal_generator
    divisor = max(model.backbone.size_divisibility, 1)
    side = -(-size // divisor) * divisor  # padded, as in detection
    image = torch.zeros(1, 3, side, side, device=model.device)
    box = torch.tensor([[0.0, 0.0, size / 2, size / 2]], device=model.device)
    proposals = [Boxes(box.repeat(rpn.post_nms_topk[False], 1))]
    found = Instances((size, size), pred_boxes=Boxes(box.repeat(heads.per_image, 1)))
    found.pred_classes = torch.zeros(heads.per_image, dtype=torch.int64, device=model.device)
    with inference_context(model):
        features = model.backbone(image)
        body = count_flops(lambda: model.backbone.bottom_up(image))
        return _by_part(
            body,
            count_flops(lambda: model.backbone(image)) - body,
            count_flops(lambda: rpn.rpn_head([features[f] for f in rpn.in_features])),
            count_flops(lambda: heads.scores(heads._pool(features, proposals)))
            + count_flops(lambda: heads.forward_with_given_boxes(features, [found])),
        )


def _by_part(*counts: int) -> dict[str, int]:
    return dict(zip(PARTS, counts, strict=True)) | {"all": sum(counts)}


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of convolutions and matrix products during a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@torch.inference_mode()
def latency(model: nn.Module, size: int, runs: int = 5) -> float:
    """Median seconds of ``runs`` detections in an image of random noise, batch size 1, after a warm-up run."""
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    inputs = [{"image": image, "height": size, "width": size}]
    with inference_context(model):
        _, *seconds = timeit.repeat(lambda: model(inputs), timer=timer, repeat=runs + 1, number=1)
    return statistics.median(seconds)


def detector_of_run(run: Path, *overrides: object) -> tuple[nn.Module, int] | None:
    """The detector of an output folder's config with random weights, and its test size in pixels.

    None if the folder has no config, if neither its vocabulary nor its checkpoint is left, or, with a warning, if the
    config cannot be built any more (an extra teacher's vocabulary was removed, say). The caller's random state does
    not change.
    """
    config = str(run / "config.yaml")
    if not Path(config).is_file():
        return None
    try:
        cfg = load_config(config, overrides)
        vocabularies = (cfg.MODEL.VILD.VOCABULARY, run / "model_final.pth", cfg.MODEL.WEIGHTS)
        vocabulary = next((str(v) for v in vocabularies if v and Path(v).is_file()), None)
        if vocabulary is None:
            return None
        with torch.random.fork_rng(devices=[]):
            model = build_model(load_config(config, [*overrides, "MODEL.VILD.VOCABULARY", vocabulary]))
    except UserError as error:
        logger.warning("%s: the cost of the network cannot be measured any more: %s", run, error)
        return None
    return model, cfg.INPUT.MIN_SIZE_TEST or cfg.INPUT.MAX_SIZE_TEST  # 0: the released detector resizes to its canvas
