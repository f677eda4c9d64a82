import numpy as np
import pytest

from tests.apps.run_tool import runner
from tests.checkpoint.conftest import released_cfg, released_detector, released_weights  # noqa: F401  (fixtures)


@pytest.fixture
def demo(world, checkpoint_file, teacher_folder, capsys):
    return runner("demo", checkpoint_file, teacher_folder, capsys)


@pytest.fixture
def images(world):
    return sorted((world / "glyphs" / "val").glob("*.jpg"))


@pytest.fixture
def ramp() -> np.ndarray:
    rows, columns = np.mgrid[0:90, 0:120]
    return np.stack([rows * 2, columns * 2, np.full_like(rows, 90)], 2).astype(np.uint8)
