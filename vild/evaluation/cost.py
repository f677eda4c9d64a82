"""What a detector costs: parameters, operations and seconds an image. Of the network alone, whatever its weights."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vild.config import load_config
from vild.modeling import build_model
from vild.utils.errors import UserError

logger = logging.getLogger("vild")
PARTS = ("backbone", "FPN", "RPN", "heads")


def parameters(model: nn.Module) -> dict[str, int]:
    """Of each part of a detector with an FPN (heads: all that looks at regions), and of ``all``."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    body = count(model.backbone.bottom_up)
    counts = (body, count(model.backbone) - body, count(model.proposal_generator), count(model.roi_heads))
    return dict(zip(PARTS, counts, strict=True)) | {"all": sum(counts)}


@torch.no_grad()
def flops(model: nn.Module, size: int) -> dict[str, int]:
    """Operations of convolutions and matrix products (a multiplication and an addition are two) on one image of
    ``size`` x ``size`` pixels, of each part and of ``all``. The heads see as many proposals, and the mask head as many
    detections, as the config lets them, so that the number is the same whatever the weights."""
    device, heads, rpn = model.device, model.roi_heads, model.proposal_generator
    divisor = max(model.backbone.size_divisibility, 1)
    side = -(-size // divisor) * divisor  # padded, as in detection
    image = torch.zeros(1, 3, side, side, device=device)
    box = torch.tensor([[0.0, 0.0, size / 2, size / 2]], device=device)

    def masks() -> None:
        count = heads.per_image
        classes = torch.zeros(count, dtype=torch.int64, device=device)
        found = Instances((size, size), pred_boxes=Boxes(box.repeat(count, 1)), pred_classes=classes)
        heads.forward_with_given_boxes(features, [found])

    mode = model.training
    model.eval()
    features = model.backbone(image)
    proposals = [Boxes(box.repeat(rpn.post_nms_topk[False], 1))]
    body = _count(lambda: model.backbone.bottom_up(image))
    pyramid = _count(lambda: model.backbone(image)) - body
    anchors = _count(lambda: rpn.rpn_head([features[f] for f in rpn.in_features]))
    regions = _count(lambda: heads.scores(heads._pool(features, proposals))) + _count(masks)
    model.train(mode)
    counts = (body, pyramid, anchors, regions)
    return dict(zip(PARTS, counts, strict=True)) | {"all": sum(counts)}


def _count(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@torch.inference_mode()
def latency(model: nn.Module, size: int, runs: int = 5) -> float:
    """Median seconds of so many detections in an image of noise, alone, after one that is not counted."""
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    inputs, seconds, mode = [{"image": image, "height": size, "width": size}], [], model.training
    model.eval()
    for _ in range(runs + 1):
        start = time.perf_counter()
        model(inputs)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    model.train(mode)
    return statistics.median(seconds[1:])


def detector_of_run(run: Path, *overrides: object) -> tuple[nn.Module, int] | None:
    """The detector of an output folder's config with random weights, and its test size in pixels; None where neither
    its vocabulary nor a checkpoint of it is left, or it cannot be built any more for another reason (a further
    teacher's vocabulary is gone, say), which the log tells. Draws no random number of the caller's."""
    config = str(run / "config.yaml")
    if not Path(config).is_file():
        return None
    try:
        return _built(run, config, overrides)
    except UserError as error:
        logger.warning("%s: what the network costs cannot be measured any more: %s", run, error)
        return None


def _built(run: Path, config: str, overrides: Sequence[object]) -> tuple[nn.Module, int] | None:
    cfg = load_config(config, list(overrides))
    vocabularies = (cfg.MODEL.VILD.VOCABULARY, run / "model_final.pth", cfg.MODEL.WEIGHTS)
    vocabulary = next((str(v) for v in vocabularies if v and Path(v).is_file()), None)
    if vocabulary is None:
        return None
    with torch.random.fork_rng(devices=[]):
        model = build_model(load_config(config, [*overrides, "MODEL.VILD.VOCABULARY", vocabulary]))
    return model, cfg.INPUT.MIN_SIZE_TEST or cfg.INPUT.MAX_SIZE_TEST  # 0: the released detector resizes to its canvas
