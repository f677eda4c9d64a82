"""A training of a few steps."""

import sys

import pytest

from tests.conftest import REPOSITORY

TINY = [
    "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.WARMUP_ITERS", "2", "SOLVER.IMS_PER_BATCH", "2",
    "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def command(vocabulary_file, store_folder, teacher_folder, world):
    """tools/train_net.py over the tiny files."""

    def make(output, *overrides, config="vild", flags=("--num-gpus", "0")):
        return [
            sys.executable, str(REPOSITORY / "tools/train_net.py"),
            "--config-file", str(REPOSITORY / "configs/Glyphs" / f"{config}.yaml"), *flags, *TINY,
            "MODEL.VILD.VOCABULARY", str(vocabulary_file), "MODEL.VILD.STORE", str(store_folder),
            "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}", "OUTPUT_DIR", str(output), *overrides,
        ]  # fmt: skip

    return make
