"""Detectron2's GeneralizedRCNN, which also hands the distilled regions to the RoI heads."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN

from vild.vocabulary import Vocabulary


@META_ARCH_REGISTRY.register()
class ViLDRCNN(GeneralizedRCNN):
    """In training every input may carry ``distill``: Instances with ``proposal_boxes`` and ``embeddings``."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The classes the detector knows at present."""
        return self.roi_heads.classifier.vocabulary

    def set_vocabulary(self, vocabulary: Vocabulary, shown: int | None = None) -> None:
        """Swap the classes; no weight changes. Only the first ``shown`` are detected (None: all)."""
        self.roi_heads.set_vocabulary(vocabulary, shown)

    def forward(self, batched_inputs: list[dict]):
        """As :meth:`GeneralizedRCNN.forward`."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        targets = [x["instances"].to(self.device) for x in batched_inputs]
        distill = None
        if "distill" in batched_inputs[0]:
            distill = [x["distill"].to(self.device) for x in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, proposal_losses = self.proposal_generator(images, features, targets)
        _, detector_losses = self.roi_heads(images, features, proposals, targets, distill)
        return {**detector_losses, **proposal_losses}
