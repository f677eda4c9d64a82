"""The region proposal network: one set of BatchNorms per level, inclusive box widths, another proposal selection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, RPN_HEAD_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import nms

from vild.modeling.released.boxes import ReleasedBoxTransform, clip


@RPN_HEAD_REGISTRY.register()
class ReleasedRPNHead(StandardRPNHead):
    """Detectron2's head, with convolutions shared by all levels, each followed by a BatchNorm that is not shared.

    The norm is the FPN's (``FPN.NORM``).
    """

    @configurable
    def __init__(self, *, norm: str, levels: int, **kwargs):
        super().__init__(**kwargs)
        convs = [layer for layer in self.conv.modules() if isinstance(layer, nn.Conv2d)]
        self.norms = nn.ModuleList(
            nn.ModuleList(get_norm(norm, layer.out_channels) for layer in convs) for _ in range(levels)
        )

    @classmethod
    def from_config(cls, cfg, input_shape: list[ShapeSpec]):
        settings = super().from_config(cfg, input_shape)
        return {**settings, "norm": cfg.MODEL.FPN.NORM, "levels": len(input_shape)}

    def _get_rpn_conv(self, in_channels: int, out_channels: int) -> nn.Conv2d:
        return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """As :meth:`StandardRPNHead.forward`."""
        convs = self.conv if isinstance(self.conv, nn.Sequential) else [self.conv]
        logits, deltas = [], []
        for x, norms in zip(features, self.norms, strict=True):
            for conv, norm in zip(convs, norms, strict=True):
                x = F.relu_(norm(conv(x)))
            logits.append(self.objectness_logits(x))
            deltas.append(self.anchor_deltas(x))
        return logits, deltas


@PROPOSAL_GENERATOR_REGISTRY.register()
class ReleasedRPN(RPN):
    """Detectron2's RPN (with its losses) for inclusive box widths and :func:`choose_proposals`."""

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]):
        transform = ReleasedBoxTransform(weights=cfg.MODEL.RPN.BBOX_REG_WEIGHTS)
        return {**super().from_config(cfg, input_shape), "box2box_transform": transform}

    @torch.no_grad()
    def predict_proposals(self, anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes) -> list[Instances]:
        """As :meth:`RPN.predict_proposals`."""
        boxes = self._decode_proposals(anchors, pred_anchor_deltas)
        before, after = self.pre_nms_topk[self.training], self.post_nms_topk[self.training]
        results = []
        for n, size in enumerate(image_sizes):
            levels = [clip(b[n], size) for b in boxes]
            logits = [x[n].float() for x in pred_objectness_logits]
            found, logit = choose_proposals(levels, logits, before, after, self.nms_thresh, fill=not self.training)
            results.append(Instances(size, proposal_boxes=Boxes(found), objectness_logits=logit))
        return results


def choose_proposals(
    boxes: list[Tensor], logits: list[Tensor], before: int, after: int, threshold: float, fill: bool
) -> tuple[Tensor, Tensor]:
    """NMS over the best ``before`` boxes of each level, then the best ``after`` of all levels.

    Boxes are ranked by the sigmoid in float32, which is 1 for all large logits; the earlier anchor wins a tie. Unlike
    in Detectron2, boxes without an area stay. Only [0, 0, 0, 0] is dropped, because the original marks suppressed boxes
    with it. (The original also suppresses at an IoU of exactly ``threshold``.)

    Args:
        boxes: clipped boxes [N_l, 4] of each level.
        fill: pad the result to ``after`` boxes with [0, 0, 0, 0]; these are classified like any other.

    Returns:
        boxes [R, 4] and logits [R] by descending score; the padding has logit -inf.
    """
    kept = []
    for box, logit in zip(boxes, logits, strict=True):
        score, order = logit.sigmoid().sort(descending=True, stable=True)
        score, order = score[:before], order[:before]
        box, logit = box[order], logit[order]
        keep = nms(box, score, threshold)[:after]
        keep = keep[box[keep].any(1)]
        kept.append((box[keep], score[keep], logit[keep]))
    box, score, logit = (torch.cat(x) for x in zip(*kept, strict=True))
    order = score.sort(descending=True, stable=True).indices[:after]
    missing = after - len(order) if fill else 0
    return F.pad(box[order], (0, 0, 0, missing)), F.pad(logit[order], (0, missing), value=float("-inf"))
