"""What several benchmarks use: one timer, one generator of boxes, a store and a detector with random contents."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.config import load_config
from vild.modeling import build_model
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

CLASSES, WIDTH = 1203, 512  # LVIS, CLIP ViT-B/32


def interleaved(
    functions: Sequence[Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    prepare: Callable[[Callable], Callable[[], object]] = lambda function: function,
) -> list[list[float]]:
    """Seconds of ``repeats`` calls of each function after one call to warm up. The functions take turns, since the
    speed of a machine changes.

    ``prepare`` is called before each call, untimed, and returns what is timed in the function's place.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, measured in zip(functions, seconds, strict=True):
            call = prepare(function)
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            measured.append(time.perf_counter() - start)
            del call
    return [measured[1:] for measured in seconds]


def least(*args: object, **kwargs: object) -> list[float]:
    """The least seconds of each function (see :func:`interleaved`): whatever else the machine does only adds time."""
    return [min(seconds) for seconds in interleaved(*args, **kwargs)]


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def ratio(baseline_s: float, ours_s: float) -> dict[str, float]:
    return {"baseline_s": baseline_s, "ours_s": ours_s, "ratio": baseline_s / ours_s}


def random_boxes(rng: np.random.Generator, count: int, height: float, width: float, smallest: float) -> np.ndarray:
    """xyxy float64 [count, 4] inside an image. Sides are log-uniform from ``smallest`` pixels to the image's and
    independent of each other, so that some boxes are long and thin; every fourth box is in a corner."""
    sides = np.exp(rng.uniform(np.log(smallest), np.log([width, height]), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2))
    corner[::4] = corner[::4].round()
    corner *= np.array([width, height]) - sides
    return np.concatenate([corner, corner + sides], 1)


def list_images(folder: Path) -> list[Path]:
    files = (
        sorted(f for f in folder.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png")) if folder.is_dir() else []
    )
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


def build_detector(config_file: str, names: int, device: str, overrides: Sequence[object] = ()) -> nn.Module:
    """A detector of a config with random weights (seed 0) and a random vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocabulary.safetensors"
        random_vocabulary(names).save(vocabulary)
        own = ["MODEL.VILD.VOCABULARY", str(vocabulary), "MODEL.DEVICE", device, "MODEL.WEIGHTS", ""]
        torch.manual_seed(0)
        return build_model(load_config(str(config_file), [*own, *overrides]))


def min_cosine(a: Tensor, b: Tensor) -> float:
    """The least cosine of the rows of two [N, D]."""
    return F.cosine_similarity(a, b).min().item()
