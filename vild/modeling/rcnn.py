"""Detectron2's GeneralizedRCNN that also passes distilled regions to the RoI heads: those in the input, or those of a
live teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from vild.modeling.classifier import ClassSet
from vild.modeling.familiarity import image_statistics
from vild.modeling.schedule import weigh
from vild.vocabulary.vocabulary import Vocabulary


@META_ARCH_REGISTRY.register()
class ViLDRCNN(GeneralizedRCNN):
    """In training every input may contain ``distill``: Instances with ``proposal_boxes`` and ``embeddings``. For other
    inputs the live teacher provides it. Inputs with ``distill_only`` have no part in the detection losses."""

    # not parts of the module: neither saved, nor moved, nor trained with it (nn.Module does not look into lists)
    live_teacher: Callable[[list[Tensor], list[tuple[int, ...]], list[Instances]], list[Instances]] | None = None
    old_student: list[GeneralizedRCNN] = []  # noqa: RUF012  (empty, or the only one)
    head_only = False

    def set_live_teacher(
        self, targets: Callable[[list[Tensor], list[tuple[int, ...]], list[Instances]], list[Instances]]
    ) -> None:
        """For the images without ``distill`` call ``targets(images, windows, proposals)``, with the inputs' uint8
        ``image`` [3, H, W], their ``window`` and the RPN's proposals; it returns what their ``distill`` would contain.
        """
        self.live_teacher = targets

    def set_old_student(self, detector: GeneralizedRCNN) -> None:
        """Imitate a trained detector of the same teacher on the sampled regions (learning without forgetting; Li &
        Hoiem 2016): ``loss_old_student``. Its weights stay as they are."""
        self.old_student = [detector.eval().requires_grad_(False)]

    def train_head_only(self) -> None:
        """Train the box head with its projection into the teacher's space (an ensemble's text head) and the background
        only, on labels and the old student. Proposals, masks and feature maps stay as they are, with the statistics of
        BatchNorms and the layer that the boxes come from; nothing is distilled from the teacher."""
        heads = self.roi_heads
        self.head_only = heads.head_only = True
        self.requires_grad_(False)
        for part in (heads.embedding, heads.classifier.background):
            part.requires_grad_()

    def train(self, mode: bool = True) -> ViLDRCNN:
        super().train(mode)
        if self.head_only:
            self.backbone.eval()
            self.proposal_generator.eval()
            self.roi_heads.embedding.head.eval()
        return self

    @torch.no_grad()
    def _old_embeddings(self, images: Tensor, boxes: list[Boxes]) -> Tensor:
        """The old student's unit region embeddings [R, D], from its only head or its text head."""
        (old,) = self.old_student
        return old.roi_heads.embedding(old.roi_heads._pool(old.backbone(images), boxes))[0]

    @property
    def vocabulary(self) -> Vocabulary:
        """The current classes."""
        return self.roi_heads.classifier.vocabulary

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Replace the classes; no weight changes."""
        self.roi_heads.set_vocabulary(vocabulary)

    def detect(self, batched_inputs: list[dict], classes: ClassSet, objectness: float = 0.0) -> list[Instances]:
        """As :meth:`inference`, for these classes. The detector's own stay as they are, so that threads can detect
        different classes at the same time.

        Args:
            objectness: classify only proposals that are an object with at least this probability, by the RPN.
        """
        return self._detect(batched_inputs, classes, False, objectness)[0]

    def detect_and_compare(
        self, batched_inputs: list[dict], classes: ClassSet, evidence: bool = False, objectness: float = 0.0
    ) -> tuple[list[Instances], Tensor]:
        """:meth:`detect`, and the statistics of each image's features [N, S] (``familiarity.py``). ``evidence``: see
        ``OpenVocabularyROIHeads.detect_evidence``."""
        found, features = self._detect(batched_inputs, classes, evidence, objectness)
        return found, image_statistics([features[level] for level in self.roi_heads.box_in_features])

    def _detect(
        self, batched_inputs: list[dict], classes: ClassSet, evidence: bool, objectness: float
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """The detections, and the features they were made from."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        if objectness:
            proposals = [p[p.objectness_logits.sigmoid() >= objectness] for p in proposals]
        detect = self.roi_heads.detect_evidence if evidence else self.roi_heads.detect
        results = detect(features, proposals, classes)
        return self.onto_images(results, batched_inputs, images), features

    def scaled_size(self, x: dict) -> tuple[int, int]:
        """Height and width that an input's image has inside the network, at test."""
        return x["image"].shape[1:]

    def onto_images(self, found: list[Instances], batched_inputs: list[dict], images: ImageList) -> list[Instances]:
        """Detections inside the network as those in the images, of their ``height`` and ``width``."""
        return [r["instances"] for r in self._postprocess(found, batched_inputs, images.image_sizes)]

    def forward(self, batched_inputs: list[dict]):
        """As :meth:`GeneralizedRCNN.forward`."""
        if not self.training:
            return self.inference(batched_inputs)
        batched_inputs = sorted(batched_inputs, key=lambda x: "distill_only" in x)  # stable: those come last
        images, heads = self.preprocess_image(batched_inputs), self.roi_heads
        targets = [x["instances"].to(self.device) for x in batched_inputs if "distill_only" not in x]
        all_features, number = self.backbone(images.tensor), len(targets)
        features = {name: level[:number] for name, level in all_features.items()}
        labelled = ImageList(images.tensor[:number], images.image_sizes[:number])
        proposals, proposal_losses = self.proposal_generator(labelled, features, targets)
        distill = old_student = windows_and_maps = None
        if heads.distils:
            distill = self._distilled(batched_inputs, proposals)
        if self.old_student:
            old_student = partial(self._old_embeddings, labelled.tensor)
        if heads.picture_adapter is not None:
            windows_and_maps = [
                (x["window"], self.live_teacher.image_map(x["image"].to(self.device), x["window"]))
                for x in batched_inputs
            ]
        _, head_losses = heads(labelled, all_features, proposals, targets, distill, old_student, windows_and_maps)
        losses = {**head_losses, **proposal_losses}
        return weigh(losses, heads.loss_weights, heads.progress) if heads.loss_weights else losses

    def _move_to_current_device(self, x: Tensor) -> Tensor:
        """Detectron2's, without waiting for the copy of an image that the loader has pinned."""
        return x.to(self.device, non_blocking=True) if x.is_pinned() else super()._move_to_current_device(x)

    def _distilled(self, batched_inputs: list[dict], proposals: list[Instances]) -> list[Instances]:
        """The distilled regions of each image, on the detector's device; the live teacher is called once."""
        found = [x["distill"].to(self.device) if "distill" in x else None for x in batched_inputs]
        if asked := [n for n, regions in enumerate(found) if regions is None]:
            assert self.live_teacher is not None, "an input has no 'distill' and the detector no live teacher"
            images = [self._move_to_current_device(batched_inputs[n]["image"]) for n in asked]
            windows = [batched_inputs[n]["window"] for n in asked]
            taught = self.live_teacher(images, windows, [proposals[n] for n in asked])
            for n, regions in zip(asked, taught, strict=True):
                found[n] = regions
        return found
