"""ViLD's RoI heads: region embeddings, class-agnostic boxes and masks, four variants (paper, section 3).

==========  ====================================  ====================================
variant     what trains the region embedding      score at test
==========  ====================================  ====================================
text        text loss                             softmax over vocabulary + background
image       image loss                            softmax over vocabulary
vild        both, one shared head                 as text
ensemble    text and image loss, a head each      geometric mean of the two
==========  ====================================  ====================================

Shapes: R sampled RoIs, M distilled RoIs, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.config import configurable
from detectron2.modeling import ROI_HEADS_REGISTRY, build_box_head
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from vild.modeling import distillation, fusion, losses
from vild.modeling.classifier import Offered, RegionEmbedding, TextClassifier
from vild.modeling.extra_teachers import OtherTeachers, build_other_teachers, check_teachers
from vild.modeling.loss_weights import parse_loss_weights
from vild.modeling.objectives import Objective, adapters, load_concepts, parse_objectives
from vild.modeling.objectives.schedule import Schedule
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

VARIANTS = ("text", "image", "vild", "ensemble")


@ROI_HEADS_REGISTRY.register()
class ViLDROIHeads(StandardROIHeads):
    """Detectron2's standard heads with the classifier replaced by region embeddings and a vocabulary."""

    @configurable
    def __init__(
        self,
        *,
        variant: str,
        embedding: RegionEmbedding,
        image_embedding: RegionEmbedding | None,
        classifier: TextClassifier,
        bbox_pred: nn.Linear,
        adapter: nn.Conv2d | None,
        picture_adapter: nn.Conv2d | None,
        stride: int,
        box2box_transform: Box2BoxTransform,
        box_loss_beta: float,
        objectives: list[Objective],
        distill_weight: float,
        iterations: int,
        loss_weights: dict[str, Schedule],
        concepts: dict[str, Tensor],
        others: OtherTeachers | None,
        old_student_weight: float,
        ensemble_weight: float,
        score_threshold: float,
        nms_threshold: float,
        per_image: int,
        pre_nms_topk: int,
        **kwargs,
    ):
        """
        Args:
            embedding: the only head's region embedding; in the ensemble the text head's.
            image_embedding: the image head's, in the ensemble; else None.
            bbox_pred: features of ``embedding`` to 4 class-agnostic deltas.
            adapter: RoI features to the channels of the teacher's feature maps; in training with ``tokens`` only.
            picture_adapter: the same of the FPN's coarsest level, of this ``stride``; with ``picture_tokens`` only.
            objectives: what the distilled regions learn, together weighted by ``distill_weight``.
            iterations: of the whole training, for their schedules.
            loss_weights: of any loss of the detector, by name; the detector weighs.
            concepts: text embeddings [K, D] of their word lists, by file.
            others: the heads of further teachers.
            box_loss_beta: where the box loss turns from L2 into L1; 0 is L1.
            kwargs: :class:`StandardROIHeads`'s; its ``box_head`` is the one inside ``embedding``.
        """
        super().__init__(box_head=None, box_predictor=None, **kwargs)
        if variant not in VARIANTS:
            raise UserError(f"MODEL.VILD.VARIANT: '{variant}' is not one of {', '.join(VARIANTS)}")
        self.variant = variant
        self.embedding = embedding
        self.image_embedding = image_embedding
        self.classifier = classifier
        self.bbox_pred = bbox_pred
        self.adapter, self.picture_adapter, self.stride = adapter, picture_adapter, stride
        self.box2box_transform = box2box_transform
        self.box_loss_beta = box_loss_beta
        self.objectives, self.distill_weight, self.iterations = objectives, distill_weight, iterations
        self.loss_weights = loss_weights
        self.concepts, self.others, self.old_student_weight = concepts, others, old_student_weight
        self.ensemble_weight = ensemble_weight
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.per_image = per_image
        self.pre_nms_topk = pre_nms_topk
        if variant == "image":  # it has no background class
            self.classifier.background.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        if not (cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG and cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK):
            raise UserError("ViLD's boxes and masks are class-agnostic: set both CLS_AGNOSTIC_* keys to True")
        vild = cfg.MODEL.VILD
        vocabulary, objectives = Vocabulary.load(vild.VOCABULARY), parse_objectives(vild.OBJECTIVES)
        settings = super().from_config(cfg, input_shape)
        shape = settings.pop("pooled_shape")

        def embedding():
            return RegionEmbedding(build_box_head(cfg, shape), vocabulary.width)

        text_embedding, teachers = embedding(), check_teachers(vild.TEACHERS) if vild.VARIANT != "text" else []
        features = text_embedding.projection.in_features
        bbox_pred = nn.Linear(features, 4)
        nn.init.normal_(bbox_pred.weight, std=0.001)
        nn.init.zeros_(bbox_pred.bias)
        settings.update(
            num_classes=len(vocabulary),
            variant=vild.VARIANT,
            embedding=text_embedding,
            image_embedding=embedding() if vild.VARIANT == "ensemble" else None,
            classifier=TextClassifier(vocabulary, vild.TEMPERATURE),
            bbox_pred=bbox_pred,
            box2box_transform=Box2BoxTransform(weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS),
            box_loss_beta=cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA,
            objectives=objectives,
            distill_weight=vild.DISTILL_WEIGHT,
            iterations=cfg.SOLVER.MAX_ITER,
            loss_weights=parse_loss_weights(vild.LOSS_WEIGHTS),
            concepts=load_concepts(objectives, vocabulary),
            others=build_other_teachers(
                teachers,
                features,
                vocabulary.names,
                vild.TEMPERATURE,
                objectives,
                vild.SEVERAL_TEACHERS.BY,
                vild.SEVERAL_TEACHERS.WEIGHTS,
            ),
            old_student_weight=vild.OLD_STUDENT.WEIGHT,
            ensemble_weight=vild.ENSEMBLE_WEIGHT,
            score_threshold=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            nms_threshold=cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            pre_nms_topk=vild.PRE_NMS_TOPK,
        )
        # the last to draw its weights: all others are those of a detector without it
        for key, wanted in adapters(objectives).items():
            adapter = nn.Conv2d(shape.channels, vild.MAP_CHANNELS, 1) if wanted and vild.MAP_CHANNELS else None
            settings[key] = adapter
        settings["stride"] = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[-1]].stride
        return settings

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        """Detectron2's own pooler; the heads behind it are built in :meth:`from_config`."""
        settings = super()._init_box_head(cfg, input_shape)
        resolution = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        shape = type(input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]])(
            channels=channels, height=resolution, width=resolution
        )
        keep = ("box_in_features", "box_pooler")
        return {**{k: settings[k] for k in keep}, "pooled_shape": shape}

    @property
    def fuses(self) -> bool:
        """Do scores come of a text and an image head (eq. 5), which treats novel classes otherwise?"""
        return self.variant == "ensemble" or bool(self.variant == "vild" and self.others and self.others.projections)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Swap the classes; no weight changes."""
        self.classifier.set_vocabulary(vocabulary)
        self.num_classes = len(vocabulary)

    def forward(self, images, features, proposals, targets=None, distill=None, remembered=None, image_maps=None):
        """As :meth:`StandardROIHeads.forward`.

        ``distill``: in training, an image each, ``Instances`` with ``proposal_boxes`` and unit ``embeddings``
        [M, D] (and ``maps`` [M, T, h, w] where an objective looks at them); None for the text variant.
        ``remembered``: boxes of each image to the old student's embeddings.
        ``image_maps``: for ``picture_adapter``, see :func:`distillation.image_maps`.
        """
        if not self.training:
            return super().forward(images, features, proposals)
        proposals = self.label_and_sample_proposals(proposals, targets)
        loss_dict = self._box_losses(features, proposals, distill, remembered, image_maps)
        loss_dict.update(self._forward_mask(features, proposals))
        return proposals, loss_dict

    @property
    def progress(self) -> float:
        """Of the training, 0 to 1; within its EventStorage."""
        return min(get_event_storage().iter / self.iterations, 1.0)

    def _pool(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        return self.box_pooler([features[f] for f in self.box_in_features], boxes)

    def _box_losses(
        self, features, proposals: list[Instances], distill: list[Instances] | None, remembered, image_maps
    ):
        """The classification, distillation and box losses, by name, weighted."""
        labels = torch.cat([p.gt_classes for p in proposals])
        boxes = [p.proposal_boxes for p in proposals]
        distilled = features_distilled = None
        if self.variant == "text":
            embeddings, box_features = self.embedding(self._pool(features, boxes))
        else:
            # one pooling of both: in the backward pass each writes gradients as large as the feature maps
            boxes = [Boxes.cat([sampled, d.proposal_boxes]) for sampled, d in zip(boxes, distill, strict=True)]
            pooled = self._pool(features, boxes)
            parts = [torch.arange(sum(map(len, pair))) >= len(pair[0]) for pair in zip(proposals, distill, strict=True)]
            is_distilled = torch.cat(parts).to(pooled.device)
            if self.variant == "ensemble":
                embeddings, box_features = self.embedding(pooled[~is_distilled])
                distilled, features_distilled = self.image_embedding(pooled[is_distilled])
            else:  # one head, one batch (and one set of batch statistics)
                both, box_features = self.embedding(pooled)
                embeddings, distilled = both[~is_distilled], both[is_distilled]
                box_features, features_distilled = box_features[~is_distilled], box_features[is_distilled]

        result = {"loss_box_reg": self._box_loss(self.bbox_pred(box_features), labels, proposals)}
        if self.variant != "image":
            logits = self.classifier(embeddings)
            result["loss_text"] = losses.text_loss(logits, labels, self.classifier.base)
            if (accuracy := losses.base_accuracy(logits, labels, self.classifier.base)) is not None:
                get_event_storage().put_scalar("vild/fg_accuracy", accuracy)
        if remembered is not None:
            old = remembered([p.proposal_boxes for p in proposals])
            result["loss_old_student"] = self.old_student_weight * losses.image_loss(embeddings, old)
        if distilled is not None:
            maps = {}
            if distill[0].has("maps"):
                maps |= distillation.feature_maps(pooled[is_distilled], distill, self.adapter)
            if image_maps is not None:
                level = features[self.box_in_features[-1]]
                maps |= distillation.image_maps(level, self.stride, image_maps, self.picture_adapter)
            result |= self._distill_losses(distilled, features_distilled, distill, maps)
        return result

    def _box_loss(self, deltas: Tensor, labels: Tensor, proposals: list[Instances]) -> Tensor:
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])
        matched = torch.cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
        foreground = (labels >= 0) & (labels < self.num_classes)
        return losses.box_loss(deltas, boxes, matched, foreground, self.box2box_transform, self.box_loss_beta)

    def _distill_losses(
        self, embeddings: Tensor, features: Tensor, distill: list[Instances], maps: dict[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Every objective's loss by name, weighted. ``embeddings``: unit [sum of M, D]; ``features``: what they are
        projected from, [sum of M, F]; ``maps``: as ``Regions`` has them."""
        storage = get_event_storage()
        storage.put_scalar("vild/num_distilled", len(embeddings))
        regions = distillation.gather(embeddings, distill, self.classifier, self.concepts, maps)
        found = distillation.distill_losses(
            regions, features, distill, self.classifier.base, self.objectives, self.progress, self.others
        )
        return {name: self.distill_weight * value for name, value in found.items()}

    def scores(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled RoI features to scores [R, C] of the variant and box deltas [R, 4]."""
        heads, deltas = self._embed(pooled)
        return torch.cat(list(self._score_blocks(heads, self.classifier.offered))), deltas

    def _embed(self, pooled: Tensor) -> tuple[list[Tensor], Tensor]:
        """Region embeddings [R, D] of the one head or (ensemble) the text and the image head, then [R, D_k] in the
        spaces of further teachers; and box deltas."""
        embeddings, box_features = self.embedding(pooled)
        heads, features = [embeddings], box_features
        if self.image_embedding is not None:
            image, features = self.image_embedding(pooled)
            heads.append(image)
        heads += [] if self.others is None else self.others(features)
        return heads, self.bbox_pred(box_features)

    def _score_blocks(self, heads: list[Tensor], offered: Offered) -> Iterator[Tensor]:
        """Scores [r, shown] of successive regions: not all at once, to bound memory. Those below their class's own
        threshold are -1."""
        own = 1 if self.image_embedding is None else 2
        texts = [self.classifier.matrix(offered.text)] * own
        # further teachers know the classes of training only
        if len(heads) > own and offered.names == self.others.names:
            texts += self.others.texts
        for logits in self.classifier.blocks(heads[: len(texts)], texts):
            novel = ~offered.base
            scores = fusion.variant_scores(self.variant, logits[:own], novel, self.ensemble_weight, logits[own:])
            scores = scores[:, : offered.shown]
            yield scores if offered.thresholds is None else scores.masked_fill(scores <= offered.thresholds, -1)

    def region_embeddings(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Unit embeddings [sum of N, D] of given boxes: the image head's where there is one."""
        pooled = self._pool(features, boxes)
        return (self.image_embedding or self.embedding)(pooled)[0]

    def detect(self, features, proposals: list[Instances], offered: Offered) -> list[Instances]:
        """Detections of these classes, boxes and masks: what :meth:`forward` gives of the present vocabulary."""
        return self.forward_with_given_boxes(features, self._forward_box(features, proposals, offered))

    def _forward_box(self, features, proposals: list[Instances], offered: Offered | None = None) -> list[Instances]:
        """Detections at test without masks; :meth:`StandardROIHeads.forward` calls it too."""
        offered = offered or self.classifier.offered
        threshold = self.score_threshold if offered.least is None else offered.least
        heads, deltas = self._embed(self._pool(features, [p.proposal_boxes for p in proposals]))
        rois = torch.cat([p.proposal_boxes.tensor for p in proposals])
        boxes = self.box2box_transform.apply_deltas(deltas.float(), rois)
        counts = [len(p) for p in proposals]
        results = []
        by_image = zip(*(head.split(counts) for head in heads), strict=True)
        for p, b, e in zip(proposals, boxes.split(counts), by_image, strict=True):
            kept, score, found, _ = fusion.best_detections(
                self._clip(b, p.image_size),
                self._score_blocks(list(e), offered),
                threshold,
                self.nms_threshold,
                self.per_image,
                self.pre_nms_topk,
            )
            results.append(Instances(p.image_size, pred_boxes=Boxes(kept), scores=score, pred_classes=found))
        return results

    def _clip(self, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Boxes [R, 4] within an image."""
        clipped = Boxes(boxes)
        clipped.clip(image_size)
        return clipped.tensor
