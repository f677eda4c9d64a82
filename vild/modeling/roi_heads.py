"""ViLD's RoI heads and their losses, in four variants (paper, section 3).

==========  ====================================  ====================================
variant     loss on the region embedding          score at test
==========  ====================================  ====================================
text        text loss                             softmax over vocabulary + background
image       image loss                            softmax over vocabulary
vild        both, one shared head                 as text
ensemble    text and image loss, two heads        geometric mean of the two
==========  ====================================  ====================================

Boxes and masks are class-agnostic in all of them.

Shapes: R sampled RoIs, M distilled regions, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from vild.modeling import losses
from vild.modeling.detection_heads import OpenVocabularyROIHeads
from vild.modeling.distillation import Distillation, image_maps, region_maps
from vild.modeling.schedule import Schedule, parse_loss_weights


@ROI_HEADS_REGISTRY.register()
class ViLDROIHeads(OpenVocabularyROIHeads):
    """The heads of test time and what only training needs."""

    head_only = False  # no losses of boxes and masks, no distillation

    @configurable
    def __init__(
        self,
        *,
        distillation: Distillation,
        adapter: nn.Conv2d | None,
        image_adapter: nn.Conv2d | None,
        stride: int,
        iterations: int,
        loss_weights: dict[str, Schedule],
        old_student_weight: float,
        box_loss_beta: float,
        **kwargs,
    ):
        """
        Args:
            adapter: RoI features to the channels of the teacher's feature maps, if an objective needs it.
            image_adapter: the same for the FPN's coarsest level, which has this ``stride``.
            iterations: of the whole training, for schedules.
            loss_weights: of any loss of the detector by name, applied by :class:`ViLDRCNN`.
            box_loss_beta: where the box loss changes from L2 to L1; 0 is L1.
        """
        super().__init__(**kwargs)
        self.distillation = distillation
        self.adapter, self.picture_adapter, self.stride = adapter, image_adapter, stride  # their names in checkpoints
        self.iterations, self.loss_weights = iterations, loss_weights
        self.old_student_weight, self.box_loss_beta = old_student_weight, box_loss_beta
        # bool [C], trained classes that the training set does not annotate, if there are any; attach_sources sets it
        self.register_buffer("unlabelled", None, persistent=False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        settings, keys = super().from_config(cfg, input_shape), cfg.MODEL.VILD
        distillation = Distillation.from_config(cfg, settings["classifier"].vocabulary)
        # made last, so that all other weights are those of a detector without adapters
        needed = {o.function.adapter for o in distillation.objectives} if keys.MAP_CHANNELS else set()
        level = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[-1]]
        adapter, image_adapter = (
            nn.Conv2d(level.channels, keys.MAP_CHANNELS, 1) if kind in needed else None for kind in ("roi", "image")
        )
        return {
            **settings,
            "distillation": distillation,
            "adapter": adapter,
            "image_adapter": image_adapter,
            "stride": level.stride,
            "iterations": cfg.SOLVER.MAX_ITER,
            "loss_weights": parse_loss_weights(keys.LOSS_WEIGHTS),
            "old_student_weight": keys.OLD_STUDENT.WEIGHT,
            "box_loss_beta": cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA,
        }

    @property
    def distils(self) -> bool:
        """Whether training has distilled regions."""
        return self.variant != "text" and not self.head_only

    @property
    def progress(self) -> float:
        """Of the training, 0 to 1. Needs its EventStorage."""
        return min(get_event_storage().iter / self.iterations, 1.0)

    def forward(
        self,
        images,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        distill: list[Instances] | None = None,
        old_student: Callable[[list[Boxes]], Tensor] | None = None,
        windows_and_maps: Sequence[tuple[tuple[int, ...], Tensor]] | None = None,
    ):
        """As :meth:`StandardROIHeads.forward`. The features may be of more images than the proposals: the last ones, of
        which only ``distill`` is used.

        Args:
            distill: in training, the distilled regions of each image: ``proposal_boxes``, unit ``embeddings`` [M, D]
                and, if an objective needs them, ``maps`` [M, T, h, w]. None unless the heads distil.
            old_student: boxes of each image to the old student's unit embeddings.
            windows_and_maps: of :func:`image_maps`, if there is an image adapter.
        """
        if not self.training:
            return super().forward(images, features, proposals)
        proposals = self.label_and_sample_proposals(proposals, targets)
        labelled = {name: level[: len(proposals)] for name, level in features.items()}
        if not self.distils:
            embeddings, box_features = self.embedding(self._pool(labelled, [p.proposal_boxes for p in proposals]))
        else:
            (embeddings, box_features), distilled, roi_features = self._embed_both(features, proposals, distill)
        loss_dict = self._detection_losses(embeddings, box_features, proposals)
        if old_student is not None:
            old = old_student([p.proposal_boxes for p in proposals])
            background = (torch.cat([p.gt_classes for p in proposals]) == self.num_classes).float()
            loss_dict["loss_old_student"] = self.old_student_weight * losses.image_loss(embeddings, old, background)
        if self.distils:
            get_event_storage().put_scalar("vild/num_distilled", len(distilled[0]))
            maps = {} if roi_features is None else region_maps(roi_features, distill, self.adapter)
            if windows_and_maps is not None:
                level = features[self.box_in_features[-1]]
                maps |= image_maps(level, self.stride, windows_and_maps, self.picture_adapter)
            loss_dict |= self.distillation.losses(
                *distilled, distill, self.classifier, self.others, self.progress, maps
            )
        return proposals, loss_dict if self.head_only else loss_dict | self._forward_mask(labelled, proposals)

    def _embed_both(self, features: dict[str, Tensor], proposals: list[Instances], distill: list[Instances]):
        """Embeddings [., D] and head features [., F] of the sampled RoIs, then of the distilled regions, and the RoI
        features of the latter if they are compared with the teacher's maps."""
        # pooled together: in the backward pass each pooling writes gradients as large as the feature maps
        none = Boxes(distill[0].proposal_boxes.tensor[:0])  # sampled of images that are only distilled from
        rois = [p.proposal_boxes for p in proposals] + [none] * (len(distill) - len(proposals))
        pairs = [(boxes, d.proposal_boxes) for boxes, d in zip(rois, distill, strict=True)]
        pooled = self._pool(features, [Boxes.cat([*pair]) for pair in pairs])
        lengths = [len(boxes) for pair in pairs for boxes in pair]  # selecting by a mask would wait for the GPU

        def parted(rows: Tensor) -> tuple[Tensor, Tensor]:
            parts = rows.split(lengths)
            return torch.cat(parts[::2]), torch.cat(parts[1::2])

        if self.variant == "ensemble":
            of_sampled, of_distilled = parted(pooled)
            sampled, distilled = self.embedding(of_sampled), self.image_embedding(of_distilled)
        else:  # one head, one batch (and one set of batch statistics)
            sampled, distilled = zip(*map(parted, self.embedding(pooled)), strict=True)
        return sampled, distilled, parted(pooled)[1] if distill[0].has("maps") else None

    def _detection_losses(
        self, embeddings: Tensor, box_features: Tensor, proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Box and text loss of the sampled RoIs."""
        labels = torch.cat([p.gt_classes for p in proposals])
        result = {}
        if not self.head_only:
            result["loss_box_reg"] = self._box_loss(self.bbox_pred(box_features), labels, proposals)
        if self.variant != "image":
            logits = self.classifier(embeddings)
            result["loss_text"] = losses.text_loss(logits, labels, self.classifier.base, self.unlabelled)
            if (accuracy := losses.base_accuracy(logits, labels, self.classifier.base)) is not None:
                get_event_storage().put_scalar("vild/fg_accuracy", accuracy)
        return result

    def _box_loss(self, deltas: Tensor, labels: Tensor, proposals: list[Instances]) -> Tensor:
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        matched = torch.cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
        foreground = (labels >= 0) & (labels < self.num_classes)
        return losses.box_loss(deltas, boxes, matched, foreground, self.box2box_transform, self.box_loss_beta)
