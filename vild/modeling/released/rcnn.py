"""The released detector: preprocessing and postprocessing."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from vild.modeling.rcnn import ViLDRCNN
from vild.modeling.released.masks import paste_masks
from vild.modeling.released.preprocessing import onto_canvas, scaled_size

EPS = 1e-4  # of every BatchNorm; PyTorch's default is 1e-5


@META_ARCH_REGISTRY.register()
class ReleasedRCNN(ViLDRCNN):
    """At test it takes images in their original size (``INPUT.MIN_SIZE_TEST: 0``) and resizes each onto a canvas. The
    whole canvas counts as the image, so boxes may extend into its padding. In training, images have their final size.
    """

    @configurable
    def __init__(self, *, side: int, **kwargs):
        """
        Args:
            side: of the canvas, in pixels (``INPUT.MAX_SIZE_TEST``).
        """
        super().__init__(**kwargs)
        self.side = side
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d):
                module.eps = EPS

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "side": cfg.INPUT.MAX_SIZE_TEST}

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalised and, at test, resized."""
        if self.training:
            return super().preprocess_image(batched_inputs)
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        canvas = torch.stack([onto_canvas(image, self.side) for image in images])
        return ImageList(canvas, [(self.side, self.side)] * len(canvas))

    def scaled_size(self, x: dict) -> tuple[int, int]:
        return scaled_size(*x["image"].shape[1:], self.side)

    def inference(self, batched_inputs: list[dict], detected_instances=None, do_postprocess: bool = True):
        """As :meth:`GeneralizedRCNN.inference`."""
        assert detected_instances is None and do_postprocess, "not supported by the released detector"
        found = self.detect(batched_inputs, self.roi_heads.classifier.current_classes)
        return [{"instances": instances} for instances in found]

    @staticmethod
    def _postprocess(instances: list[Instances], batched_inputs: list[dict], image_sizes) -> list[dict]:
        """From the canvas to the image ("height", "width"). As in the authors' evaluation, detections without an area
        stay and boxes are not clipped to the image."""
        results = []
        for found, x, (side, _) in zip(instances, batched_inputs, image_sizes, strict=True):
            height, width = scaled_size(*x["image"].shape[1:], side)
            size = x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])
            scale = found.pred_boxes.tensor.new_tensor([size[1] / width, size[0] / height]).repeat(2)
            boxes = found.pred_boxes.tensor * scale
            result = Instances(size, **{**found.get_fields(), "pred_boxes": Boxes(boxes)})
            if found.has("pred_masks"):
                result.pred_masks = paste_masks(found.pred_masks[:, 0], boxes, *size)
            results.append({"instances": result})
        return results
