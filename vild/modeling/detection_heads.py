"""What ViLD's RoI heads do at test: the best boxes of each class by NMS, calibrated scores, masks.

Shapes: R regions, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from vild.modeling import fusion
from vild.modeling.calibration import evidence
from vild.modeling.classifier import ClassSet
from vild.modeling.region_heads import RegionHeads

ALTERNATIVES = 2  # names beside a detection's own


class OpenVocabularyROIHeads(RegionHeads):
    """The heads of test time."""

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
        return [self.classify(*image, classes, others) for image in self.embed_proposals(features, proposals)]

    def embed_proposals(
        self, features, proposals: list[Instances]
    ) -> Iterator[tuple[tuple[int, int], Tensor, list[Tensor]]]:
        """For each image its size, the boxes [R, 4] and the unit embeddings [R, D] of each head."""
        heads, deltas = self._embed(self._pool(features, [p.proposal_boxes for p in proposals]))
        rois = torch.cat([p.proposal_boxes.tensor for p in proposals])
        counts = [len(p) for p in proposals]
        boxes = self.box2box_transform.apply_deltas(deltas.float(), rois).split(counts)
        for p, b, e in zip(proposals, boxes, zip(*(head.split(counts) for head in heads), strict=True), strict=True):
            yield p.image_size, self._clip(b, p.image_size), list(e)

    def classify(
        self, size: tuple[int, int], boxes: Tensor, heads: list[Tensor], classes: ClassSet, others: bool = False
    ) -> Instances:
        """One image's detections from its boxes and their embeddings, see :meth:`embed_proposals`."""
        if self.calibration is None:
            kept, score, found, rows = self._best(boxes, heads, classes, self._threshold(classes))
            result = Instances(size, pred_boxes=Boxes(kept), scores=score, pred_classes=found)
        else:
            result, rows = self._evidence(size, boxes, heads, classes)
            result, keep = self._calibrated(result, classes)
            rows = rows[keep]
        if others:
            self._add_others(result, [head[rows] for head in heads], classes)
        return result

    def detect_evidence(self, features, proposals: list[Instances], classes: ClassSet) -> list[Instances]:
        """Detections before calibration, with what a calibrated score is made of: ``log_odds`` and ``margin``."""
        return [self._evidence(*image, classes)[0] for image in self.embed_proposals(features, proposals)]

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
        score = self.calibration.scores(boxes, found.log_odds, found.margin, ~classes.base[number])
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
            others = found.other_classes
            both = self._odds_and_margin(heads, classes, others)
            alone = self.calibration.alone_scores(*both, ~classes.base[others])
            # again by descending score: an ensemble's novel names have numbers of their own
            found.other_scores, order = alone.sort(dim=1, descending=True, stable=True)
            found.other_classes = others.gather(1, order)

    def _threshold(self, classes: ClassSet) -> float:
        return self.score_threshold if classes.least is None else classes.least

    def _best(self, boxes: Tensor, heads: list[Tensor], classes: ClassSet, threshold: float) -> tuple[Tensor, ...]:
        scores = self._score_blocks(heads, classes)
        return fusion.best_detections(boxes, scores, threshold, self.nms_threshold, self.per_image, self.pre_nms_topk)

    def _clip(self, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Boxes [R, 4] clipped to an image."""
        clipped = Boxes(boxes)
        clipped.clip(image_size)
        return clipped.tensor
