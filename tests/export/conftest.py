"""A detector to export, and images of several sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import REPOSITORY
from vild.config import load_config
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.images import read_image
from vild.vocabulary.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def trained(checkpoint_file) -> OpenVocabularyDetector:
    overrides = ["MODEL.WEIGHTS", str(checkpoint_file)]
    return OpenVocabularyDetector(load_config(str(REPOSITORY / "configs/Glyphs/vild.yaml"), overrides))


@pytest.fixture(scope="module")
def images(world, tmp_path_factory) -> list[Path]:
    """Images of several sizes and formats."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    noise = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in [(100, 150), (300, 40), (9, 7)]]
    upright = Image.Exif()
    upright[0x0112] = 6
    Image.fromarray(noise[0]).save(folder / "a.png")
    Image.fromarray(noise[1]).convert("CMYK").save(folder / "b.jpg", exif=upright)
    Image.fromarray(noise[2]).save(folder / "c.png")
    Image.fromarray(noise[0][:, :, 0].astype(np.uint16) * 257).save(folder / "d.png")
    return [*sorted(folder.iterdir()), *sorted((world / "glyphs" / "val").glob("*.jpg"))[:2]]


@pytest.fixture(scope="module")
def by_example(teacher, images) -> Vocabulary:
    """Two classes by example, one of a name of ``random_vocabulary``."""
    image = torch.from_numpy(read_image(images[0], "RGB").copy()).permute(2, 0, 1)
    boxes = torch.tensor([[5.0, 5, 40, 60], [20, 30, 90, 80], [0, 0, 50, 50]])
    return Vocabulary.from_regions(teacher, ["name 1", "kite", "kite"], [image] * 3, boxes)
