"""What a report of a fault should contain."""

import subprocess
import sys
from importlib import metadata

import torch

import vild


def test_the_environment_is_printed():
    done = subprocess.run([sys.executable, "-m", "vild.env"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if not line.startswith("CUDA"))
    assert rows["vild"] == vild.__version__
    assert rows["torch"] == metadata.version("torch") == torch.__version__.split("+")[0]
    assert rows["detectron2"].endswith(("(the package index, pure Python)", "(the official source)"))
