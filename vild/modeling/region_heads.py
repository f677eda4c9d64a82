"""ViLD's RoI heads: their parts, and from RoI features to region embeddings and scores over any vocabulary.

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
from detectron2.structures import Boxes
from torch import Tensor, nn

from vild.modeling import fusion
from vild.modeling.calibration import Calibration
from vild.modeling.classifier import ClassSet, RegionEmbedding, TextClassifier, softmax_settings
from vild.modeling.extra_teachers import ExtraTeachers
from vild.modeling.objectives import parse_objectives
from vild.modeling.pooler import make_precise
from vild.modeling.schedule import NOT_NEGATIVE, PROBABILITY, check_ranges
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

VARIANTS = ("text", "image", "vild", "ensemble")
RANGES_AT_TEST = {  # of keys below MODEL.VILD
    "TEMPERATURE": NOT_NEGATIVE,
    "TEST_TEMPERATURE": NOT_NEGATIVE,
    "ENSEMBLE_WEIGHT": PROBABILITY,
    "PRE_NMS_TOPK": (lambda x: x >= 1, "below 1"),
}


class RegionHeads(StandardROIHeads):
    """Detectron2's standard heads with the classifier replaced by region embeddings and a vocabulary. What is made of
    the scores is the subclasses' business."""

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
        check_ranges(keys, RANGES_AT_TEST)
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
