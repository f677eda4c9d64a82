"""The detector as one graph whose vocabulary is an input: :class:`ExportedDetector`, for ONNX and ``torch.export``.

Detectron2's control flow around the trained modules (anchors, proposals, level assignment) is rewritten here as tensor
operations; every weight is used through its trained module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import clip_boxes_to_image

from vild.export.boxes import nms_by_class, pool
from vild.modeling import fusion
from vild.modeling.calibration import evidence
from vild.modeling.detection_heads import ALTERNATIVES
from vild.modeling.rcnn import ViLDRCNN

AXES = {"picture": {0: "height", 1: "width"}, "text": {0: "names"}, "shown": {}, "base": {0: "names"}}  # dynamic ones
LOWEST = torch.finfo(torch.float32).min
ALL = 2**63 - 1


class ExportedDetector(nn.Module):
    """A trained :class:`ViLDRCNN` (on the CPU, in evaluation mode) for one image, with the vocabulary as an input.

    Inputs:
        image: uint8 [H, W, 3] in the config's ``INPUT.FORMAT``, resized.
        text: unit float32 [C, D].
        shown: int64 [], only the first ``shown`` classes are detected; the others take part in the softmax.
        base: bool [C]; an input of the ensemble only.

    Outputs, N detections by descending score: boxes float32 [N, 4] (xyxy, pixels of ``image``), scores [N], classes
    int64 [N], mask probabilities [N, M, M] within the boxes if the detector has masks, and the shown classes that are
    next for each box: other_classes int64 [N, A], and their other_scores [N, A], -1 where there is no other class.
    """

    def __init__(self, model: ViLDRCNN):
        super().__init__()
        self.model = model

    @property
    def input_names(self) -> list[str]:
        return ["picture", "text", "shown"] + ["base"] * (self.model.roi_heads.variant == "ensemble")

    @property
    def output_names(self) -> list[str]:
        masks = ["masks"] * self.model.roi_heads.mask_on
        return ["boxes", "scores", "classes", *masks, "other_classes", "other_scores"]

    @torch.no_grad()
    def program(self) -> ExportedProgram:
        """Traced, for images and vocabularies of any size."""
        example = {
            "picture": torch.zeros(320, 384, 3, dtype=torch.uint8),
            "text": torch.zeros(5, self.model.vocabulary.width),
            "shown": torch.tensor(ALL),
            "base": torch.ones(5, dtype=torch.bool),
        }
        return torch.export.export(
            self,
            tuple(example[name] for name in self.input_names),
            dynamic_shapes=tuple(dict.fromkeys(AXES[name], Dim.DYNAMIC) for name in self.input_names),
            prefer_deferred_runtime_asserts_over_guards=True,
        )

    def forward(self, image: Tensor, text: Tensor, shown: Tensor, base: Tensor | None = None) -> tuple[Tensor, ...]:
        size = self._size(image)
        features = self.model.backbone(self._normalise(image))
        proposals = self._proposals(features, *size)
        boxes, scores, classes, *others = self._detections(features, proposals, size, text, shown, base)
        heads, placed = self.model.roi_heads, self._placed(boxes, image)
        if not heads.mask_on:
            return placed, scores, classes, *others
        pooled = self._pool(heads.mask_pooler, [features[f] for f in heads.mask_in_features], boxes)
        return placed, scores, classes, heads.mask_head.layers(pooled)[:-1, 0].sigmoid(), *others

    def _size(self, image: Tensor) -> tuple[int, int]:
        """Height and width to clip boxes to."""
        return image.shape[0], image.shape[1]

    def _placed(self, boxes: Tensor, image: Tensor) -> Tensor:
        """The network's boxes in pixels of the image."""
        return boxes

    def _clip(self, boxes: Tensor, height: int, width: int) -> Tensor:
        return clip_boxes_to_image(boxes, (height, width))

    def _decoded(self, deltas: Tensor, proposals: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes [R, 4] from the deltas of the box head."""
        return self._clip(self.model.roi_heads.box2box_transform.apply_deltas(deltas, proposals), *size)

    def _pool(self, pooler: nn.Module, maps: list[Tensor], boxes: Tensor) -> Tensor:
        return pool(pooler, maps, boxes)

    def _normalise(self, image: Tensor) -> Tensor:
        """Float [1, 3, H', W'], padded on the right and below to a multiple of the backbone's divisibility."""
        x = (image.permute(2, 0, 1).float() - self.model.pixel_mean) / self.model.pixel_std
        step = max(self.model.backbone.size_divisibility, 1)
        height, width = x.shape[1:]
        return F.pad(x, (0, -width % step, 0, -height % step))[None]

    def _proposals(self, features: dict[str, Tensor], height: int, width: int) -> Tensor:
        """The RPN's boxes [R, 4] by descending objectness, at most RPN.POST_NMS_TOPK_TEST."""
        rpn = self.model.proposal_generator
        maps = [features[f] for f in rpn.in_features]
        logits, deltas = rpn.rpn_head(maps)
        boxes, scores, levels = [], [], []
        for level, (grid, logit, delta) in enumerate(zip(rpn.anchor_generator(maps), logits, deltas, strict=True)):
            score = logit[0].permute(1, 2, 0).flatten()
            delta = delta[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            score, best = self._rank(score).topk(torch.sym_min(score.shape[0], rpn.pre_nms_topk[False]))
            boxes.append(self._clip(rpn.box2box_transform.apply_deltas(delta[best], grid.tensor[best]), height, width))
            scores.append(score)
            levels.append(torch.full_like(best, level))
        box, score, level = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        of_level = self._valid(box, score) & (level == torch.arange(len(maps))[:, None])
        limit = rpn.post_nms_topk[False]
        kept = nms_by_class(box, torch.where(of_level, score, -torch.inf), rpn.nms_thresh, LOWEST, limit)[:, 1]
        return box[kept[score[kept].argsort(descending=True)[:limit]]]

    def _rank(self, logits: Tensor) -> Tensor:
        """Scores to rank proposals by."""
        return logits

    def _valid(self, boxes: Tensor, score: Tensor) -> Tensor:
        """bool [R]: boxes that can become proposals."""
        sides = boxes[:, 2:] - boxes[:, :2]
        return (sides > self.model.proposal_generator.min_box_size).all(1) & score.isfinite()  # false for NaN

    def _detections(self, features, proposals, size, text, shown, base) -> tuple[Tensor, ...]:
        """Boxes, scores and classes by descending score, as ``fusion.best_detections``; other classes and scores."""
        heads = self.model.roi_heads
        pooled = self._pool(heads.box_pooler, [features[f] for f in heads.box_in_features], proposals)
        embeddings, deltas = heads._embed(pooled)
        boxes = self._decoded(deltas[:-1], proposals, size)
        matrix = heads.classifier.matrix(text)
        classifier = heads.classifier
        logits = [classifier.logits(head[:-1], matrix, classifier.test_temperature) for head in embeddings]
        novel = None if base is None else ~base
        scores = fusion.variant_scores(heads.variant, logits, novel, heads.ensemble_weight)
        is_shown = torch.arange(text.shape[0]) < shown
        every = scores.masked_fill(~is_shown, -1)
        if heads.calibration is None:  # else all classes compete
            scores = every
        least = F.pad(scores.flatten(), (0, heads.pre_nms_topk), value=-1.0).topk(heads.pre_nms_topk).values[-1]
        scores = scores.masked_fill(scores < least, -1).T
        found = nms_by_class(boxes, scores, heads.nms_threshold, heads.score_threshold, heads.per_image)
        score = scores[found[:, 0], found[:, 1]]
        order = score.argsort(descending=True)[: heads.per_image]
        classes, rows = found[order, 0], found[order, 1]
        other, others = every[rows].scatter(1, classes[:, None], -1.0).topk(torch.sym_min(text.shape[0], ALTERNATIVES))
        if heads.calibration is None:
            return boxes[rows], score[order], classes, others, other
        odds, margin = evidence(heads.variant, logits, novel, heads.ensemble_weight)  # of all: their number is known
        of_others = [x[rows].gather(1, others) for x in (odds, margin)]
        alone = heads.calibration.alone_scores(*of_others, None if novel is None else novel[others])
        other, by_score = torch.where(other < 0, other, alone).topk(torch.sym_min(text.shape[0], ALTERNATIVES))
        others = others.gather(1, by_score)
        both = [values[rows, classes] for values in (odds, margin)]
        score = heads.calibration.scores(boxes[rows], *both, None if novel is None else novel[classes])
        score = torch.where(is_shown[classes] & (score > heads.score_threshold), score, -1.0)
        order = score.argsort(descending=True)
        order = order[(score[order] >= 0).nonzero()[:, 0]]
        return boxes[rows[order]], score[order], classes[order], others[order], other[order]
