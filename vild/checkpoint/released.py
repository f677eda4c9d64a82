"""A checkpoint that the authors of ViLD released, as a detector's weights and vocabulary."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from vild.checkpoint.checkpointer import write_weights
from vild.checkpoint.tensorflow import convert_variables
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary


@dataclass(frozen=True)
class Released:
    """A converted detector. ``state``: weights by Detectron2's names; ``variant``: "vild" or "ensemble"; ``depth``: of
    the ResNet, 50 or 152; ``left_out``: variables of the checkpoint that are not part of the detector."""

    state: dict[str, Tensor]
    vocabulary: Vocabulary
    variant: str
    depth: int
    left_out: tuple[str, ...] = ()

    @property
    def config(self) -> str:
        """The built-in config that it belongs to, for ``vild.config.load_config``."""
        return f"LVIS/released/{self.variant}_R{self.depth}.yaml"

    def write(self, path: str | Path) -> None:
        """Write weights and vocabulary as one file, ``.safetensors`` or ``.pth`` (see ``write_weights``)."""
        write_weights(path, self.state, self.vocabulary, self.variant)


def convert(checkpoint: str | Path, config: str | None = None) -> Released:
    """Read and convert a TensorFlow checkpoint; writes nothing.

    Args:
        checkpoint: the common prefix of its files (.index, .data-...), or the folder that holds one checkpoint.
        config: the built-in config that is expected, such as "LVIS/released/vild_R50.yaml". Default: the variables
            decide.

    Raises:
        UserError: unreadable; a variable that is missing or misshapen; another config's detector.
    """
    found = Released(*convert_variables(read_variables(find_prefix(checkpoint)), str(checkpoint)))
    if config not in (None, found.config):
        raise UserError(f"{checkpoint}: the checkpoint belongs to {found.config}, not to {config}")
    return found


def find_prefix(checkpoint: str | Path) -> Path:
    """The prefix of a checkpoint's files. UserError unless there is one."""
    prefix = Path(checkpoint)
    if prefix.is_dir():
        found = sorted(prefix.glob("*.index"))
        if len(found) != 1:
            raise UserError(f"{prefix}: the folder holds {len(found)} checkpoints (*.index), not one; name it")
        return found[0].with_suffix("")
    if not prefix.with_name(prefix.name + ".index").is_file():
        raise UserError(f"{prefix}: no such checkpoint ({prefix.name}.index is not there)")
    return prefix


def read_variables(prefix: Path) -> dict[str, np.ndarray]:
    """All variables by name."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its log messages
    try:
        import tensorflow
    except ImportError as error:
        raise UserError("the checkpoint is read with TensorFlow: pip install -e '.[tensorflow]'") from error
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except (tensorflow.errors.OpError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{prefix}: not a checkpoint that TensorFlow can read ({reason})") from error
