"""``python -m vild.env``: versions, GPUs and where Detectron2 comes from, to paste into a report of a fault."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, distribution

import vild

PACKAGES = (
    "torch", "torchvision", "open_clip_torch", "timm", "numpy", "pillow", "pycocotools", "hotcoco", "safetensors",
    "onnxruntime", "gradio", "transformers", "av",
)  # fmt: skip
DETECTRON2 = {"detectron2": "the official source", "sal-detectron2": "the package index, pure Python"}


def environment() -> list[tuple[str, str]]:
    """Names and versions, in the order in which they are printed. Loads PyTorch, not Detectron2."""
    rows = [("vild", vild.__version__), ("Python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, version(name)) for name in PACKAGES]
    found = [f"{version(name)} ({origin})" for name, origin in DETECTRON2.items() if version(name) != "-"]
    rows.append(("detectron2", ", ".join(found) or "-"))
    try:
        import torch
    except ImportError:
        return rows
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*rows, ("CUDA of PyTorch", torch.version.cuda or "-"), ("GPUs", ", ".join(gpus) or "-")]


def version(name: str) -> str:
    """Of an installed package; "-" if it is not."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return "-"


if __name__ == "__main__":
    for row in environment():
        print(f"{row[0]:16} {row[1]}")
