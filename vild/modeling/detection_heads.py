"""What ViLD's RoI heads do at test: region embeddings to scores over any vocabulary, boxes and masks.

Shapes: R regions, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_box_head
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from vild.modeling import fusion
from vild.modeling.calibration import Calibration, evidence
from vild.modeling.classifier import ClassSet, RegionEmbedding, TextClassifier, softmax_settings
from vild.modeling.extra_teachers import ExtraTeachers
from vild.modeling.objectives import parse_objectives
from vild.modeling.pooler import make_precise
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

ALTERNATIVES = 2  # names beside a detection's own
VARIANTS = ("text", "image", "vild", "ensemble")


class OpenVocabularyROIHeads(StandardROIHeads):
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
        box2box_transform: Box2BoxTransform,
        extra_teachers: ExtraTeachers | None,
        ensemble_weight: float,
        score_threshold: float,
        nms_threshold: float,
        per_image: int,
        pre_nms_topk: int,
        **kwargs,
    ):
        """
        Args:
            embedding: region embedding of the only head, or of the ensemble's text head.
            image_embedding: that of the ensemble's image head; None in other variants.
            bbox_pred: features of ``embedding`` to 4 class-agnostic deltas.
            kwargs: of :class:`StandardROIHeads`; its ``box_head`` is inside ``embedding``.
        """
        super().__init__(box_head=None, box_predictor=None, **kwargs)
        if variant not in VARIANTS:
            raise UserError(f"MODEL.VILD.VARIANT: '{variant}' is not one of {', '.join(VARIANTS)}")
        self.variant = variant
        self.embedding, self.image_embedding = embedding, image_embedding
        self.classifier = classifier
        self.bbox_pred, self.box2box_transform = bbox_pred, box2box_transform
        self.others = extra_teachers  # the name in checkpoints
        self.ensemble_weight = ensemble_weight
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.per_image, self.pre_nms_topk = per_image, pre_nms_topk
        self.calibration: Calibration | None = None  # the checkpointer sets it
        if variant == "image":  # it has no background class
            self.classifier.background.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        if not (cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG and cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK):
            raise UserError("ViLD's boxes and masks are class-agnostic: set both CLS_AGNOSTIC_* keys to True")
        keys = cfg.MODEL.VILD
        vocabulary, objectives = Vocabulary.load(keys.VOCABULARY), parse_objectives(keys.OBJECTIVES)
        temperature, bias = softmax_settings(keys.TEMPERATURE, vocabulary)
        settings = super().from_config(cfg, input_shape)
        shape = settings.pop("pooled_shape")

        def region_embedding() -> RegionEmbedding:
            return RegionEmbedding(build_box_head(cfg, shape), vocabulary.width)

        embedding = region_embedding()  # layers draw their first weights in the order in which they are made
        features = embedding.projection.in_features
        bbox_pred = nn.Linear(features, 4)
        nn.init.normal_(bbox_pred.weight, std=0.001)
        nn.init.zeros_(bbox_pred.bias)
        return {
            **settings,
            "num_classes": len(vocabulary),
            "variant": keys.VARIANT,
            "embedding": embedding,
            "image_embedding": region_embedding() if keys.VARIANT == "ensemble" else None,
            "classifier": TextClassifier(vocabulary, temperature, bias, keys.TEST_TEMPERATURE),
            "bbox_pred": bbox_pred,
            "box2box_transform": Box2BoxTransform(weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS),
            "extra_teachers": ExtraTeachers.from_config(cfg, features, vocabulary.names, objectives, temperature),
            "ensemble_weight": keys.ENSEMBLE_WEIGHT,
            "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pre_nms_topk": keys.PRE_NMS_TOPK,
        }

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        """The pooler; the heads behind it are built in :meth:`from_config`."""
        settings = super()._init_box_head(cfg, input_shape)
        side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        shape = ShapeSpec(channels=channels, height=side, width=side)
        pooler = make_precise(settings["box_pooler"])
        return {"box_in_features": settings["box_in_features"], "box_pooler": pooler, "pooled_shape": shape}

    @classmethod
    def _init_mask_head(cls, cfg, input_shape):
        settings = super()._init_mask_head(cfg, input_shape)
        if settings.get("mask_pooler") is not None:
            make_precise(settings["mask_pooler"])
        return settings

    @property
    def fuses(self) -> bool:
        """Whether scores come from a text and an image head (eq. 5), with base and novel classes weighted
        differently."""
        return self.variant == "ensemble" or bool(self.variant == "vild" and self.others and self.others.projections)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Replace the classes; no weight changes."""
        self.classifier.set_vocabulary(vocabulary)
        self.num_classes = len(vocabulary)

    def _pool(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        return self.box_pooler([features[f] for f in self.box_in_features], boxes)

    def scores(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled RoI features to scores [R, C] of the variant and box deltas [R, 4]."""
        heads, deltas = self._embed(pooled)
        return torch.cat(list(self._score_blocks(heads, self.classifier.current_classes))), deltas

    def _embed(self, pooled: Tensor) -> tuple[list[Tensor], Tensor]:
        """Region embeddings [R, D] of the only head or (ensemble) of the text and the image head, then [R, D_k] in the
        spaces of extra teachers; and box deltas."""
        embeddings, box_features = self.embedding(pooled)
        heads, features = [embeddings], box_features
        if self.image_embedding is not None:
            image, features = self.image_embedding(pooled)
            heads.append(image)
        heads += [] if self.others is None else self.others(features)
        return heads, self.bbox_pred(box_features)

    def _logit_blocks(self, heads: list[Tensor], classes: ClassSet) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Logits of the own heads and those of extra teachers, for successive blocks of regions."""
        own = 1 if self.image_embedding is None else 2
        # the extra teachers' vocabularies have the classes of training only
        extra = self.others.texts if len(heads) > own and classes.names == self.others.names else []
        for logits in self.classifier.blocks(heads[: own + len(extra)], classes.text, extra):
            yield logits[:own], logits[own:]

    def _score_blocks(self, heads: list[Tensor], classes: ClassSet) -> Iterator[Tensor]:
        """Scores of successive blocks of regions, to bound memory: [r, C] for detections to be calibrated, else
        [r, shown], -1 where they are not above their class's threshold."""
        for logits, extra in self._logit_blocks(heads, classes):
            scores = self._variant_scores(logits, extra, classes)
            if self.calibration is None:
                scores = scores[:, : classes.shown]
                if classes.thresholds is not None:
                    scores = scores.masked_fill(scores <= classes.thresholds, -1)
            yield scores

    def _variant_scores(self, logits: list[Tensor], extra: list[Tensor], classes: ClassSet) -> Tensor:
        return fusion.variant_scores(self.variant, logits, ~classes.base, self.ensemble_weight, extra)

    def region_embeddings(self, features: dict[str, Tensor], boxes: list[Boxes]) -> Tensor:
        """Unit embeddings [sum of N, D] of given boxes, from the image head if there is one."""
        pooled = self._pool(features, boxes)
        return (self.image_embedding or self.embedding)(pooled)[0]

    def detect(self, features, proposals: list[Instances], classes: ClassSet) -> list[Instances]:
        """Boxes and masks of these classes; :meth:`forward` detects those of the current vocabulary. Each detection has
        ``other_classes`` [K, A] and ``other_scores`` [K, A], the shown classes that are next for its box."""
        found = self._forward_box(features, proposals, classes, others=True)
        return self.forward_with_given_boxes(features, found)

    def _forward_box(
        self, features, proposals: list[Instances], classes: ClassSet | None = None, others: bool = False
    ) -> list[Instances]:
        """Detections without masks. :meth:`StandardROIHeads.forward` calls it at test."""
        classes = classes or self.classifier.current_classes
        results = []
        for size, boxes, heads in self._by_image(features, proposals):
            if self.calibration is None:
                kept, score, found, rows = self._best(boxes, heads, classes, self._threshold(classes))
                result = Instances(size, pred_boxes=Boxes(kept), scores=score, pred_classes=found)
            else:
                result, rows = self._evidence(size, boxes, heads, classes)
                result, keep = self._calibrated(result, classes)
                rows = rows[keep]
            if others:
                self._add_others(result, [head[rows] for head in heads], classes)
            results.append(result)
        return results

    def detect_evidence(self, features, proposals: list[Instances], classes: ClassSet) -> list[Instances]:
        """Detections before calibration, with what a calibrated score is made of: ``log_odds`` and ``margin``."""
        return [self._evidence(*image, classes)[0] for image in self._by_image(features, proposals)]

    def _evidence(
        self, size: tuple[int, int], boxes: Tensor, heads: list[Tensor], classes: ClassSet
    ) -> tuple[Instances, Tensor]:
        """One image's detections before calibration and their regions. All classes compete, shown or not."""
        kept, score, found, rows = self._best(boxes, heads, classes, self.score_threshold)
        odds, margin = self._odds_and_margin([head[rows] for head in heads], classes, found[:, None])
        return Instances(size, pred_boxes=Boxes(kept), scores=score, pred_classes=found, log_odds=odds[:, 0],
                         margin=margin[:, 0]), rows  # fmt: skip

    def _odds_and_margin(self, heads: list[Tensor], classes: ClassSet, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`evidence` of regions for some classes of each, int64 [R, A]: both [R, A]."""
        odds, margins = [], []
        for logits, extra in self._logit_blocks(heads, classes):
            here, wanted = wanted[: len(logits[0])], wanted[len(logits[0]) :]
            both = evidence(self.variant, logits, ~classes.base, self.ensemble_weight, extra)
            for columns, values in zip((odds, margins), both, strict=True):
                columns.append(values.gather(1, here))
        return torch.cat(odds), torch.cat(margins)

    def _calibrated(self, found: Instances, classes: ClassSet) -> tuple[Instances, Tensor]:
        """The shown classes' detections above their thresholds, by descending calibrated score, and their indices."""
        boxes, number = found.pred_boxes.tensor, found.pred_classes
        score = self.calibration.scores(boxes, found.log_odds, found.margin)
        least = score.new_full((len(classes.text),), torch.inf)
        least[: classes.shown] = self._threshold(classes) if classes.thresholds is None else classes.thresholds
        keep = (score > least[number]).nonzero()[:, 0]
        keep = keep[score[keep].argsort(descending=True, stable=True)]
        size = found.image_size
        return Instances(size, pred_boxes=Boxes(boxes[keep]), scores=score[keep], pred_classes=number[keep]), keep

    def _add_others(self, found: Instances, heads: list[Tensor], classes: ClassSet) -> None:
        """Add the shown classes that are next for each box, at most ALTERNATIVES, with the scores that a box alone
        would have (the better name of the same box does not count against them)."""
        blocks = self._logit_blocks(heads, classes)
        scores = torch.cat([self._variant_scores(*logits, classes)[:, : classes.shown] for logits in blocks])
        scores = scores.scatter(1, found.pred_classes[:, None], -1)
        count = min(ALTERNATIVES, classes.shown - 1)
        found.other_scores, found.other_classes = scores.topk(count, dim=1)
        if self.calibration is not None:
            both = self._odds_and_margin(heads, classes, found.other_classes)
            found.other_scores = self.calibration.alone_scores(*both)

    def _threshold(self, classes: ClassSet) -> float:
        return self.score_threshold if classes.least is None else classes.least

    def _by_image(self, features, proposals: list[Instances]) -> Iterator[tuple[tuple[int, int], Tensor, list[Tensor]]]:
        """For each image its size, the boxes [R, 4] and the embeddings of each head."""
        heads, deltas = self._embed(self._pool(features, [p.proposal_boxes for p in proposals]))
        rois = torch.cat([p.proposal_boxes.tensor for p in proposals])
        counts = [len(p) for p in proposals]
        boxes = self.box2box_transform.apply_deltas(deltas.float(), rois).split(counts)
        for p, b, e in zip(proposals, boxes, zip(*(head.split(counts) for head in heads), strict=True), strict=True):
            yield p.image_size, self._clip(b, p.image_size), list(e)

    def _best(self, boxes: Tensor, heads: list[Tensor], classes: ClassSet, threshold: float) -> tuple[Tensor, ...]:
        scores = self._score_blocks(heads, classes)
        return fusion.best_detections(boxes, scores, threshold, self.nms_threshold, self.per_image, self.pre_nms_topk)

    def _clip(self, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Boxes [R, 4] clipped to an image."""
        clipped = Boxes(boxes)
        clipped.clip(image_size)
        return clipped.tensor
