"""ViLD's RoI heads with the released pooling and box coding."""

from __future__ import annotations

from detectron2.modeling import ROI_HEADS_REGISTRY
from torch import Tensor

from vild.modeling.released.boxes import ReleasedBoxTransform, clip, upright
from vild.modeling.released.pooler import ReleasedPooler
from vild.modeling.roi_heads import ViLDROIHeads


@ROI_HEADS_REGISTRY.register()
class ReleasedROIHeads(ViLDROIHeads):
    """Heads, classifier, scores, NMS and losses are those of :class:`ViLDROIHeads`."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        transform = ReleasedBoxTransform(weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
        return {**super().from_config(cfg, input_shape), "box2box_transform": transform}

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        pooler = _pooler(cfg, input_shape, cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION)
        return {**super()._init_box_head(cfg, input_shape), "box_pooler": pooler}

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        settings = super()._init_mask_head(cfg, input_shape)
        if settings:  # MASK_ON
            settings["mask_pooler"] = _pooler(cfg, input_shape, cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION)
        return settings

    def _clip(self, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Clipped to the image and with corners in order. TensorFlow 1's NMS reads boxes like this but returns them
        unordered, and evaluation here accepts no negative width. (TensorFlow 2.15 orders all boxes of a class like its
        best one, so one inverted box disables the NMS of its class; the RPN's NMS orders none.)"""
        return upright(clip(boxes, image_size))


def _pooler(cfg, input_shape, resolution: int) -> ReleasedPooler:
    return ReleasedPooler(resolution, [input_shape[f].stride for f in cfg.MODEL.ROI_HEADS.IN_FEATURES])
