"""What tests of exported detectors share."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from pycocotools import mask as mask_api
from torchvision.ops import box_iou

from tests.conftest import REPOSITORY
from vild.vocabulary.vocabulary import Vocabulary

NMS_THRESHOLDS = (0.5, 0.7)  # ROI_HEADS.NMS_THRESH_TEST of configs/Glyphs and the default across names
BLOCKED = ("torch", "torchvision", "detectron2", "vild", "safetensors", "pycocotools")


def bare_runner(*arguments):
    """Run tools/run_onnx.py, by default with threshold 0, where the ``BLOCKED`` packages cannot be imported."""
    argv = [str(REPOSITORY / "tools" / "run_onnx.py"), "--threshold", "0", *map(str, arguments)]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({BLOCKED})); sys.argv = {argv};"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1500)


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


def random_vocabulary(detector, names: int) -> Vocabulary:
    rows = torch.randn(names, detector.trained.width, generator=torch.Generator().manual_seed(names))
    rows = torch.nn.functional.normalize(rows, dim=1)
    splits = tuple(("base", "novel")[i % 2] for i in range(names))
    names = tuple(f"name {i}" for i in range(names))
    return Vocabulary(names, rows, splits, fingerprint=detector.trained.fingerprint)


def records(boxes, scores, classes) -> list[dict]:
    return [
        {"box": b, "score": float(s), "name": int(c)} for b, s, c in zip(boxes.tolist(), scores, classes, strict=True)
    ]


def check_same(mine: list[dict], expected: list[dict]) -> None:
    """One detection for one. Alone may be only one that overlaps a better one of its list by an NMS threshold (a
    class's, or across names), to the last bits: rounding then says whether it is kept."""
    left = list(expected)
    alone = []
    for found in mine:
        twin = next((other for other in left if _alike(found, other)), None)
        if twin is None:
            alone.append((found, mine))
        else:
            left.remove(twin)
            _check_beside(found, twin)
    for found, among in [*alone, *((other, expected) for other in left)]:
        better = [other["box"] for other in among if other["score"] > found["score"]]
        overlaps = box_iou(torch.tensor([found["box"]]), torch.tensor(better).reshape(-1, 4))
        tie = any(torch.isclose(overlaps, torch.tensor(limit), rtol=0, atol=1e-4).any() for limit in NMS_THRESHOLDS)
        assert tie, f"alone: {found['name']} {found['score']} {found['box']}"


def _alike(one: dict, two: dict) -> bool:
    """Name, score (also a small one: to 1%) and box are the same but for rounding."""
    close = abs(one["score"] - two["score"]) <= min(1e-4, 0.01 * two["score"])
    return one["name"] == two["name"] and close and np.abs(np.subtract(one["box"], two["box"])).max() < 1e-2


def _check_beside(one: dict, two: dict) -> None:
    """Alternatives, split and mask of two detections that are alike."""
    for a, b in zip(one.get("alternatives", []), two.get("alternatives", []), strict=True):
        assert a["name"] == b["name"] and abs(a["score"] - b["score"]) < 1e-4
    assert one.get("split") == two.get("split") and ("mask" in one) == ("mask" in two)
    if "mask" in one:
        assert (mask_api.decode(one["mask"]) != mask_api.decode(two["mask"])).sum() <= 2
