"""One pass of the backbone over an image: then the embeddings of any boxes, and the detections of any classes."""

from __future__ import annotations

from functools import cached_property

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from vild.inference.image_input import ImageInput
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling.classifier import ClassSet


class ImageFeatures:
    """A detector's features of an image, a file, PIL image or uint8 RGB tensor [3, H, W].

    Raises:
        UserError: the image cannot be read.
    """

    @torch.inference_mode()
    def __init__(self, detector: OpenVocabularyDetector, image: ImageInput):
        self.model, self.given = detector.model, detector.model_input(image)
        self.images = self.model.preprocess_image([self.given])
        self.features = self.model.backbone(self.images.tensor)

    def scaled(self, boxes: Tensor) -> Tensor:
        """Boxes [N, 4], xyxy in pixels of the image, as float32 ones of the image inside the network, on its device."""
        height, width = self.model.scaled_size(self.given)
        scale = torch.tensor([width / self.given["width"], height / self.given["height"]]).repeat(2)
        return (boxes.float() * scale).to(self.model.device)

    @cached_property
    @torch.inference_mode()
    def proposals(self) -> Instances:
        """The RPN's, best first: ``proposal_boxes`` [R, 4] of the image inside the network, ``objectness_logits``."""
        return self.model.proposal_generator(self.images, self.features, None)[0][0]

    @torch.inference_mode()
    def embed(self, boxes: Tensor) -> Tensor:
        """Unit float32 [N, D] on the CPU, by the head that learns from the teacher, of boxes [N, 4] as :meth:`scaled`
        returns them."""
        return self.model.roi_heads.region_embeddings(self.features, [Boxes(boxes)]).cpu()

    @torch.inference_mode()
    def detect(self, classes: ClassSet) -> Instances:
        """The detections of these classes, without masks: ``pred_boxes`` [K, 4] in pixels of the image, ``scores``,
        ``pred_classes``."""
        found = self.model.roi_heads.classify(*self._regions, classes)
        return self.model.onto_images([found], [self.given], self.images)[0]

    @cached_property
    def _regions(self) -> tuple[tuple[int, int], Tensor, list[Tensor]]:
        (regions,) = self.model.roi_heads.embed_proposals(self.features, [self.proposals])
        return regions
