"""Detectron2's GeneralizedRCNN, which also hands the distilled regions to the RoI heads: those that came with a
image, else those of a live teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor

from vild.modeling.classifier import Offered
from vild.modeling.loss_weights import weigh
from vild.vocabulary.vocabulary import Vocabulary


@META_ARCH_REGISTRY.register()
class ViLDRCNN(GeneralizedRCNN):
    """In training every input may carry ``distill``: Instances with ``proposal_boxes`` and ``embeddings``. For
    those that do not, a live teacher is asked."""

    # no part of the module: neither saved, nor moved, nor trained with it
    live_teacher: Callable[[Tensor, tuple[int, ...], Instances], Instances] | None = None

    def set_live_teacher(self, targets: Callable[[Tensor, tuple[int, ...], Instances], Instances]) -> None:
        """Take the targets of images without ``distill`` from ``targets(image, window, proposals)``: the input's
        uint8 ``image`` [3, H, W], its ``window`` and the RPN's proposals to what ``distill`` would hold."""
        self.live_teacher = targets

    old_student: list[GeneralizedRCNN] = []  # noqa: RUF012  (none or one; in a list, nn.Module does not see it)

    def set_old_student(self, detector: GeneralizedRCNN) -> None:
        """Remember what a trained detector of the same teacher says of the sampled regions (learning without
        forgetting; Li & Hoiem 2016): ``loss_old_student``. It stays as it is."""
        self.old_student = [detector.eval().requires_grad_(False)]

    def _remembered(self, image: Tensor, boxes: list[Boxes]) -> Tensor:
        """The old student's unit region embeddings [R, D]: of its only head, or of the text head."""
        (old,) = self.old_student
        with torch.no_grad():
            return old.roi_heads.embedding(old.roi_heads._pool(old.backbone(image), boxes))[0]

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes the detector knows at present."""
        return self.roi_heads.classifier.vocabulary

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Swap the classes; no weight changes."""
        self.roi_heads.set_vocabulary(vocabulary)

    def detect(self, batched_inputs: list[dict], offered: Offered) -> list[Instances]:
        """What :meth:`inference` gives, of these classes; the detector's own stay as they are (for calls from several
        threads)."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        results = self.roi_heads.detect(features, proposals, offered)
        return [r["instances"] for r in self._postprocess(results, batched_inputs, images.image_sizes)]

    def forward(self, batched_inputs: list[dict]):
        """As :meth:`GeneralizedRCNN.forward`."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, proposal_losses = self.proposal_generator(images, features, targets)
        distill = None
        if self.roi_heads.variant != "text":
            distill = [self._distilled(x, p) for x, p in zip(batched_inputs, proposals, strict=True)]
        remembered = partial(self._remembered, images.tensor) if self.old_student else None
        image_maps = None
        if self.roi_heads.picture_adapter is not None:
            image_maps = [
                (x["window"], self.live_teacher.image_map(x["image"].to(self.device), x["window"]))
                for x in batched_inputs
            ]
        _, detector_losses = self.roi_heads(images, features, proposals, targets, distill, remembered, image_maps)
        losses, heads = {**detector_losses, **proposal_losses}, self.roi_heads
        return weigh(losses, heads.loss_weights, heads.progress) if heads.loss_weights else losses

    def _distilled(self, x: dict, proposals: Instances) -> Instances:
        """One image's distilled regions, on the detector's device."""
        if "distill" in x:
            return x["distill"].to(self.device)
        assert self.live_teacher is not None, "neither distilled regions nor a live teacher"
        return self.live_teacher(x["image"].to(self.device), x["window"], proposals)
