"""Overrides and devices that cannot be used: one line that says what fits. (The files: test_configs.py.)"""

import pytest

from vild.config import load_config, pick_device
from vild.utils.errors import UserError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["DATASETS.TRAIN", "mine"], r"""DATASETS.TRAIN: 'mine' is no tuple, such as "\('mine',\)"$"""),
        (["SOLVER.MAX_ITER", "abc"], r"SOLVER.MAX_ITER: 'abc' is no int, such as \d+$"),
        (["SEED", "1.5"], "SEED: '1.5' is no int$"),
        (["MODEL.RPN", "1"], "MODEL.RPN: is a group of keys, MODEL.RPN.HEAD_NAME for one$"),
        (["SEED", "1", "OUTPUT_DIR"], "the last, 'OUTPUT_DIR', has no value$"),
        (["SOLVER.MAX_ITERS", "1"], "SOLVER.MAX_ITERS is not a config key; did you mean SOLVER.MAX_ITER or"),
    ],
)
def test_a_wrong_override_says_what_fits(given, message):
    with pytest.raises(UserError, match=f"overrides: .*{message}"):
        load_config("Glyphs/vild.yaml", given)


def test_devices_that_are_none():
    for name, message in (("gpu", "is no device, such as cpu, cuda"), ("", "is no device"), ("meta", "meta")):
        with pytest.raises(UserError, match=f"MODEL.DEVICE '?{name}'?: .*{message}"):
            pick_device(name, "MODEL.DEVICE")
