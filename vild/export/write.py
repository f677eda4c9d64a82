"""Write a detector as an ONNX file or a ``torch.export`` archive, with a manifest and the base names of training."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from vild.export.detector import ALL, AXES, ExportedDetector
from vild.export.released import ExportedReleased
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling.released.rcnn import ReleasedRCNN
from vild.utils.errors import UserError
from vild.utils.files import write_json, written_whole

if TYPE_CHECKING:
    from onnxscript.onnx_opset import Opset18


def write_model(detector: OpenVocabularyDetector, path: str | Path) -> None:
    """Write ``path`` (ONNX, or a ``torch.export`` archive if it ends in ``.pt2``) and next to it the manifest
    ``NAME.json`` and ``context.safetensors``, the base names of training as a vocabulary.

    ONNX's ``shown`` is optional and defaults to all names. An archive needs ``import vild.export.boxes`` before it is
    loaded (for :func:`nms_by_class`), and images whose sides exceed the stride of the coarsest feature map.

    Raises:
        UserError: the packages for writing ONNX files are not installed.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        onnx_packages()  # before the minute that tracing takes
    kind = ExportedReleased if isinstance(detector.model, ReleasedRCNN) else ExportedDetector
    wrapped = kind(detector.model)
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
    """What a program needs to run the file: the teacher of fitting vocabularies, image preprocessing (normalisation and
    padding are in the graph), and the meaning of the scores."""
    cfg, heads = detector.cfg, detector.model.roi_heads
    return {
        "variant": heads.variant,
        "teacher": detector.trained.fingerprint,
        "novel": sorted(
            spelling
            for i, split in enumerate(detector.trained.splits)
            if split == "novel"
            for spelling in detector.trained.spellings(i)
        ),
        "width": detector.trained.width,
        "temperature": heads.classifier.test_temperature,
        "calibration": None if heads.calibration is None else heads.calibration.state(),
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


def onnx_packages() -> tuple[ModuleType, Opset18]:
    """``onnx_ir`` and onnxscript's operators; UserError if they are not installed."""
    try:
        import onnx_ir as ir
        from onnxscript import opset18 as op
    except ImportError as error:
        raise UserError(f"ONNX: {error.name} is not installed; pip install -e '.[export]'") from error
    return ir, op


def to_onnx(program: ExportedProgram, wrapped: ExportedDetector) -> bytes:
    """The bytes of an ONNX file."""
    ir, op = onnx_packages()

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
    for value in graph.inputs:  # names instead of the tracer's symbols
        value.shape = ir.Shape(AXES[value.name].get(i, n) for i, n in enumerate(value.shape))
    for value in graph.outputs:
        value.shape = ir.Shape(("detections", *value.shape[1:]))
    shown = next(value for value in graph.inputs if value.name == "shown")
    shown.const_value = ir.tensor(ALL, dtype=ir.DataType.INT64, name="shown")  # the default
    graph.register_initializer(shown)
    return exported.model_proto.SerializeToString()
