"""What several benchmarks use: a timer, rows, and images, boxes, stores and detectors with random contents."""

from __future__ import annotations

import argparse
import tempfile
import timeit
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import timer

from vild.config import load_config
from vild.modeling import build_model
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

CLASSES, WIDTH = 1203, 512  # LVIS, CLIP ViT-B/32


def timed(
    functions: Sequence[Callable[[], object]],
    repeats: int,
    setup: Callable[[], object] = lambda: None,
    summary: Callable[[Iterable[float]], float] = min,
) -> list[float]:
    """Seconds of each function: by default the least, as whatever else the machine does only adds time.

    Of ``repeats`` calls, after one to warm up. The functions take turns, since the speed of a machine changes;
    ``setup`` is called before each call, untimed.
    """
    timers = [timeit.Timer(function, setup, timer) for function in functions]
    _, *rounds = [[each.timeit(1) for each in timers] for _ in range(repeats + 1)]
    return [summary(seconds) for seconds in zip(*rounds, strict=True)]


def set_sizes(args: argparse.Namespace, on_gpu: dict[str, object], on_cpu: dict[str, object]) -> None:
    """Set the flags that were not given to the device's defaults."""
    for name, size in (on_cpu if args.device == "cpu" else on_gpu).items():
        if getattr(args, name) is None:
            setattr(args, name, size)


def row(what: str, baseline: str, baseline_s: float, ours_s: float, **measures: object) -> dict:
    seconds = {"baseline_s": baseline_s, "ours_s": ours_s, "ratio": baseline_s / ours_s}
    return {"what": what, "baseline": baseline, **seconds, **measures}


def random_boxes(rng: np.random.Generator, count: int, height: float, width: float, smallest: float) -> np.ndarray:
    """xyxy float64 [count, 4] inside an image. Sides are log-uniform from ``smallest`` pixels to the image's and
    independent of each other, so that some boxes are long and thin; every fourth box is in a corner."""
    sides = np.exp(rng.uniform(np.log(smallest), np.log([width, height]), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2))
    corner[::4] = corner[::4].round()
    corner *= np.array([width, height]) - sides
    return np.concatenate([corner, corner + sides], 1)


def list_images(folder: Path) -> list[Path]:
    """UserError if there are none."""
    files = sorted(f for f in folder.glob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise UserError(f"--images {folder}: not a folder with .jpg, .jpeg or .png files")
    return files


def random_regions(seed: int, count: int, size: float = 300, width: int = WIDTH) -> StoredRegions:
    """Random boxes in a square image, unit embeddings and scores."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.from_numpy(random_boxes(np.random.default_rng(seed), count, size, size, size / 16)).float()
    embeddings = F.normalize(torch.randn(count, width, generator=generator), dim=1)
    return StoredRegions(boxes, embeddings, torch.rand(count, generator=generator))


def write_store(
    folder: Path, image_ids: Iterable[int], regions: Callable[[int], StoredRegions], width: int = WIDTH, **settings
) -> EmbeddingStore:
    """A store of ``regions(image_id)``; ``settings``: of :class:`StoreWriter`."""
    fingerprint = {"name": "synthetic", "pretrained": "", "weights": "", "width": width}
    writer = StoreWriter(folder, {"fingerprint": fingerprint}, list(image_ids), **settings)
    for index, _ in writer.missing():
        writer.write_shard(index, regions)
    writer.finish()
    return EmbeddingStore(folder)


def random_vocabulary(names: int, width: int = WIDTH) -> Vocabulary:
    """Random unit embeddings; every fourth class is novel."""
    rows = torch.randn(names, width, generator=torch.Generator().manual_seed(0))
    splits = tuple("novel" if n % 4 == 3 else "base" for n in range(names))
    return Vocabulary(tuple(f"name {n}" for n in range(names)), F.normalize(rows, dim=1), splits)


def build_detector(config_file: str, names: int, device: str, *overrides: object) -> nn.Module:
    """A detector of a config with random weights (seed 0) and a random vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.safetensors"
        random_vocabulary(names).save(vocabulary)
        own = ["MODEL.VILD.VOCABULARY", str(vocabulary), "MODEL.DEVICE", device, "MODEL.WEIGHTS", ""]
        torch.manual_seed(0)
        return build_model(load_config(config_file, [*own, *overrides]))


def min_cosine(a: Tensor, b: Tensor) -> float:
    """The least cosine of the rows of two [N, D]."""
    return F.cosine_similarity(a, b).min().item()
