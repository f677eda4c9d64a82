"""The detector as one graph whose vocabulary is an input: :class:`ExportedDetector`, for ONNX and ``torch.export``.

Detectron2's control flow around the trained modules (anchors, proposals, level assignment) is restated here with
tensors alone; every weight is used through the module that was trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.ops import batched_nms

from vild.errors import UserError
from vild.files import write_json, written_whole
from vild.modeling import fusion
from vild.modeling.rcnn import ViLDRCNN
from vild.modeling.released.rcnn import ReleasedRCNN
from vild.predictor import OpenVocabularyDetector

AXES = {"picture": {0: "height", 1: "width"}, "text": {0: "names"}, "shown": {}, "base": {0: "names"}}  # that vary
LOWEST = torch.finfo(torch.float32).min
ALL = 2**63 - 1


def write_model(detector: OpenVocabularyDetector, path: str | Path) -> None:
    """Write ``path`` (ONNX, or a ``torch.export`` archive if it ends in ``.pt2``) and, beside it, the manifest
    ``NAME.json`` and ``context.safetensors``, the base names of training as a vocabulary.

    ONNX's ``shown`` may be left out: all names are detected then. An archive wants ``import vild.export`` before it is
    loaded (for :func:`nms_by_class`), and pictures with sides longer than the stride of its coarsest feature map.

    Raises:
        UserError: the packages that ONNX files are made with are not there.
    """
    path, wrapped = Path(path), wrap(detector.model)
    program = wrapped.program()
    with written_whole(path) as aside:
        if path.suffix == ".pt2":
            with open(aside, "wb") as file:
                torch.export.save(program, file)
        else:
            aside.write_bytes(to_onnx(program, wrapped))
    base = detector.trained.mask("base").nonzero()[:, 0].tolist()
    if base:
        detector.trained.take(base).save(path.with_name("context.safetensors"))
    write_json(path.with_suffix(".json"), manifest(detector))


def manifest(detector: OpenVocabularyDetector) -> dict:
    """What a program must know to run the file: the teacher whose vocabularies fit, how a picture is prepared
    (normalisation and padding are in the graph), and what the scores are."""
    cfg, heads = detector.cfg, detector.model.roi_heads
    return {
        "variant": heads.variant,
        "teacher": detector.trained.fingerprint,
        "width": detector.trained.width,
        "temperature": heads.classifier.temperature,
        "score_threshold": heads.score_threshold,
        "detections": heads.per_image,
        "mask_side": 2 * heads.mask_pooler.output_size[0] if heads.mask_on else 0,
        "picture": {
            "format": cfg.INPUT.FORMAT,
            "shortest_edge": cfg.INPUT.MIN_SIZE_TEST,  # 0: not resized
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "interpolation": "Pillow's bilinear",
            "size_divisibility": max(detector.model.backbone.size_divisibility, 1),
        },
    }


@torch.library.custom_op("vild::nms_by_class", mutates_args=())
def nms_by_class(boxes: Tensor, scores: Tensor, iou: float, threshold: float, limit: int) -> Tensor:
    """NMS of each class over the same boxes: what ONNX calls NonMaxSuppression.

    Args:
        boxes: [R, 4] xyxy.
        scores: [C, R]; those not above ``threshold`` are out.
        limit: no more than so many of a class are needed.

    Returns:
        int64 [K, 2], class and box of those that are left, in no particular order.
    """
    classes, rows = (scores > threshold).nonzero(as_tuple=True)
    keep = batched_nms(boxes[rows].double(), scores[classes, rows].double(), classes, iou)
    return torch.stack([classes, rows], 1)[keep]


@nms_by_class.register_fake
def _(boxes, scores, iou, threshold, limit):
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 2), dtype=torch.int64)


class ExportedDetector(nn.Module):
    """A trained :class:`ViLDRCNN` (on the CPU, in evaluation mode) for one picture, without a vocabulary of its own.

    Inputs:
        picture: uint8 [H, W, 3] in the config's ``INPUT.FORMAT``, resized.
        text: unit float32 [C, D].
        shown: int64 [], only the first so many classes are detected; the others take part in the softmax.
        base: bool [C]; only the ensemble has this input.

    Outputs, N detections by falling score: boxes float32 [N, 4] (xyxy, pixels of ``picture``), scores [N], classes
    int64 [N], and mask probabilities [N, M, M] within the boxes where the detector has masks.
    """

    def __init__(self, model: ViLDRCNN):
        super().__init__()
        self.model = model

    @property
    def input_names(self) -> list[str]:
        return ["picture", "text", "shown"] + ["base"] * (self.model.roi_heads.variant == "ensemble")

    @property
    def output_names(self) -> list[str]:
        return ["boxes", "scores", "classes"] + ["masks"] * self.model.roi_heads.mask_on

    @torch.no_grad()
    def program(self) -> ExportedProgram:
        """Traced, for pictures and vocabularies of any size."""
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

    def forward(self, picture: Tensor, text: Tensor, shown: Tensor, base: Tensor | None = None) -> tuple[Tensor, ...]:
        size = self._size(picture)
        features = self.model.backbone(self._normalise(picture))
        proposals = self._proposals(features, *size)
        boxes, scores, classes = self._detections(features, proposals, size, text, shown, base)
        heads, placed = self.model.roi_heads, self._placed(boxes, picture)
        if not heads.mask_on:
            return placed, scores, classes
        pooled = self._pool(heads.mask_pooler, [features[f] for f in heads.mask_in_features], boxes)
        return placed, scores, classes, heads.mask_head.layers(pooled)[:-1, 0].sigmoid()

    def _size(self, picture: Tensor) -> tuple[int, int]:
        """Height and width that boxes are clipped to."""
        return picture.shape[0], picture.shape[1]

    def _placed(self, boxes: Tensor, picture: Tensor) -> Tensor:
        """The network's boxes in pixels of the picture."""
        return boxes

    def _clip(self, boxes: Tensor, height: int, width: int) -> Tensor:
        return clip(boxes, height, width)

    def _decoded(self, deltas: Tensor, proposals: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes [R, 4] of the box head."""
        return self._clip(self.model.roi_heads.box2box_transform.apply_deltas(deltas, proposals), *size)

    def _pool(self, pooler: nn.Module, maps: list[Tensor], boxes: Tensor) -> Tensor:
        return pool(pooler, maps, boxes)

    def _normalise(self, picture: Tensor) -> Tensor:
        """Float [1, 3, H', W'], padded right and below to a multiple of what the backbone needs."""
        x = (picture.permute(2, 0, 1).float() - self.model.pixel_mean) / self.model.pixel_std
        step = max(self.model.backbone.size_divisibility, 1)
        height, width = x.shape[1:]
        right, below = (width + step - 1) // step * step - width, (height + step - 1) // step * step - height
        return F.pad(x, (0, right, 0, below))[None]

    def _proposals(self, features: dict[str, Tensor], height: int, width: int) -> Tensor:
        """The RPN's boxes [R, 4] by falling objectness, R at most RPN.POST_NMS_TOPK_TEST."""
        rpn = self.model.proposal_generator
        maps = [features[f] for f in rpn.in_features]
        logits, deltas = rpn.rpn_head(maps)
        boxes, scores, levels = [], [], []
        for level, (x, logit, delta) in enumerate(zip(maps, logits, deltas, strict=True)):
            anchors = grid_anchors(rpn.anchor_generator, level, x)
            score = logit[0].permute(1, 2, 0).flatten()
            delta = delta[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
            score, best = self._rank(score).topk(torch.sym_min(score.shape[0], rpn.pre_nms_topk[False]))
            boxes.append(self._clip(rpn.box2box_transform.apply_deltas(delta[best], anchors[best]), height, width))
            scores.append(score)
            levels.append(torch.full_like(best, level))
        box, score, level = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        of_level = self._valid(box, score) & (level == torch.arange(len(maps))[:, None])
        limit = rpn.post_nms_topk[False]
        kept = nms_by_class(box, torch.where(of_level, score, -torch.inf), rpn.nms_thresh, LOWEST, limit)[:, 1]
        return box[kept[score[kept].argsort(descending=True)[:limit]]]

    def _rank(self, logits: Tensor) -> Tensor:
        """What proposals are ranked by."""
        return logits

    def _valid(self, boxes: Tensor, score: Tensor) -> Tensor:
        """bool [R]: the boxes that may become proposals."""
        sides = boxes[:, 2:] - boxes[:, :2]
        return (sides > self.model.proposal_generator.min_box_size).all(1) & score.isfinite()  # no side of NaN is

    def _detections(self, features, proposals, size, text, shown, base) -> tuple[Tensor, Tensor, Tensor]:
        """What ``fusion.best_detections`` gives: boxes, scores and classes by falling score."""
        heads = self.model.roi_heads
        pooled = self._pool(heads.box_pooler, [features[f] for f in heads.box_in_features], proposals)
        embeddings, deltas = heads._embed(pooled)
        boxes = self._decoded(deltas[:-1], proposals, size)
        matrix = heads.classifier.matrix(text)
        logits = [heads.classifier._logits(head[:-1], matrix) for head in embeddings]
        novel = None if base is None else ~base
        scores = fusion.variant_scores(heads.variant, logits, novel, heads.ensemble_weight)
        scores = scores.masked_fill(torch.arange(text.shape[0]) >= shown, -1)
        least = F.pad(scores.flatten(), (0, heads.pre_nms_topk), value=-1.0).topk(heads.pre_nms_topk).values[-1]
        scores = scores.masked_fill(scores < least, -1).T
        found = nms_by_class(boxes, scores, heads.nms_threshold, heads.score_threshold, heads.per_image)
        score = scores[found[:, 0], found[:, 1]]
        order = score.argsort(descending=True)[: heads.per_image]
        return boxes[found[order, 1]], score[order], found[order, 0]


def wrap(model: ViLDRCNN) -> ExportedDetector:
    """The model as it is exported."""
    if isinstance(model, ReleasedRCNN):
        from vild.modeling.released.export import ExportedReleased

        return ExportedReleased(model)
    return ExportedDetector(model)


def to_onnx(program: ExportedProgram, wrapped: ExportedDetector) -> bytes:
    """The bytes of an ONNX file."""
    try:
        import onnx_ir as ir
        from onnxscript import opset18 as op
    except ImportError as error:
        raise UserError(f"ONNX: {error.name} is not installed; pip install -e '.[export]'") from error

    def nms(boxes, scores, iou: float, threshold: float, limit: int):
        limits = op.Constant(value_ints=[limit]), op.Constant(value_floats=[iou]), op.Constant(value_floats=[threshold])
        found = op.NonMaxSuppression(op.Unsqueeze(boxes, [0]), op.Unsqueeze(scores, [0]), *limits)
        return op.Slice(found, [1], [3], [1])

    exported = torch.onnx.export(
        program,
        custom_translation_table={torch.ops.vild.nms_by_class.default: nms},
        input_names=wrapped.input_names,
        output_names=wrapped.output_names,
        verbose=False,
    )
    graph = exported.model.graph
    for value in graph.inputs:  # names in place of the tracer's symbols
        value.shape = ir.Shape(AXES[value.name].get(i, n) for i, n in enumerate(value.shape))
    for value in graph.outputs:
        value.shape = ir.Shape(("detections", *value.shape[1:]))
    shown = next(value for value in graph.inputs if value.name == "shown")
    shown.const_value = ir.tensor(ALL, dtype=ir.DataType.INT64, name="shown")  # what it is when nobody says
    graph.register_initializer(shown)
    return exported.model_proto.SerializeToString()


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """xyxy [R, 4] within a picture."""
    return torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], 2).flatten(1)


def grid_anchors(generator: nn.Module, level: int, x: Tensor) -> Tensor:
    """Detectron2's anchors [H * W * A, 4] of a feature map [1, F, H, W]."""
    stride = generator.strides[level]
    rows, columns = ((torch.arange(n) + generator.offset) * stride for n in x.shape[2:])
    shifts = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), 2).flatten(0, 1).repeat(1, 2)
    return (shifts[:, None] + list(generator.cell_anchors)[level]).flatten(0, 1)


def pool(pooler: ROIPooler, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """Detectron2's pooling of one picture's boxes [R, 4] from a pyramid, [R + 1, F, S, S]: the last is of no box, and
    makes sure that no batch is empty (neither exporter nor ONNX runtimes bear that everywhere)."""
    rois = F.pad(boxes, (1, 0, 0, 1))  # the picture's index, 0, before each
    if len(maps) == 1:
        return pooler.level_poolers[0](maps[0], rois)
    side = (rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt()
    levels = (pooler.canonical_level + torch.log2(side / pooler.canonical_box_size + 1e-8)).floor()
    levels = levels.clamp(pooler.min_level, pooler.max_level) - pooler.min_level
    pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *pooler.output_size)
    for level, (x, align) in enumerate(zip(maps, pooler.level_poolers, strict=True)):
        here = (levels == level).nonzero()[:, 0]
        pooled = pooled.index_put((here,), align(x, rois[here]))
    return pooled
