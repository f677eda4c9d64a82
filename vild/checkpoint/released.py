"""A checkpoint that the authors of ViLD released, as a detector's weights and vocabulary."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vild.checkpoint.checkpointer import write_weights
from vild.checkpoint.tensor_bundle import TensorBundle
from vild.checkpoint.tensorflow import convert_variables
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import Words

# Variables of training only, which any checkpoint may have: the optimizer's slots and the step counter
STEP = "global_step"
SLOTS = re.compile(r"/(Momentum|ExponentialMovingAverage|Adam(?:_1)?)$")
NAMED = 20  # other variables that a warning names
SAME_TEXT = 1e-5  # largest difference of elements of unit text embeddings that are taken as equal


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


def convert(checkpoint: str | Path, config: str | None = None, *, strict: bool = False) -> Released:
    """Read and convert a TensorFlow checkpoint; writes nothing. A warning names the variables that are left out.

    Args:
        checkpoint: the common prefix of its files (.index, .data-...) or the index, or the folder that holds one
            checkpoint (a SavedModel's too).
        config: the built-in config that is expected, such as "LVIS/released/vild_R50.yaml". Default: the variables
            decide.
        strict: refuse variables that are neither the detector's nor an optimizer's.

    Raises:
        UserError: unreadable; a variable that is missing or misshapen; another config's detector.
    """
    found = Released(*convert_variables(TensorBundle(find_prefix(checkpoint)), str(checkpoint)))
    if config not in (None, found.config):
        raise UserError(f"{checkpoint}: the checkpoint belongs to {found.config}, not to {config}")
    unknown = [name for name in found.left_out if name != STEP and not SLOTS.search(name)]
    if strict and unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"{checkpoint}: the variable '{unknown[0]}'{more} has no place in this detector")
    if left := summary(found.left_out):
        logging.getLogger(__name__).warning("%s: left out, no part of the detector: %s", checkpoint, left)
    return found


def summary(left_out: Sequence[str]) -> str:
    """Optimizer slots by their number, other variables by name; the step counter is not worth a word."""
    slots = Counter(match[1] for name in left_out if (match := SLOTS.search(name)))
    names = [name for name in left_out if name != STEP and not SLOTS.search(name)]
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*(f"{slot} of {count} variables" for slot, count in slots.items()), *names[:NAMED], *more])


def find_prefix(checkpoint: str | Path) -> Path:
    """The prefix of a checkpoint's files. UserError unless there is one."""
    prefix = Path(str(checkpoint).removesuffix(".index"))
    if prefix.is_dir():
        found = sorted(prefix.glob("*.index")) or sorted(prefix.glob("variables/variables.index"))
        if len(found) != 1:
            raise UserError(f"{prefix}: the folder holds {len(found)} checkpoints (*.index), not one; name it")
        return found[0].with_suffix("")
    if not prefix.with_name(prefix.name + ".index").is_file():
        raise UserError(f"{prefix}: no such checkpoint ({prefix.name}.index is not there)")
    return prefix


def compare_text(vocabulary: Vocabulary, path: str | Path) -> tuple[bool, str]:
    """Whether a published text matrix (.npy, [512, 1203]) is the checkpoint's, and a line that says so.

    Raises:
        UserError: the matrix cannot be read or has another shape.
    """
    given, own = Vocabulary.from_npy(path, vocabulary.names).embeddings, vocabulary.embeddings
    if given.shape != own.shape:
        raise UserError(f"{path}: the embeddings' width is {given.shape[1]}, the checkpoint's {own.shape[1]}")
    apart = (given - own).abs().max().item()
    if apart <= SAME_TEXT:
        return True, f"the text embeddings are those of {path}, to {apart:.0e}"
    nearest = ((given @ own.T).argmax(1) == torch.arange(len(own))).sum().item()
    cosine = (given * own).sum(1).mean().item()
    shares = f"mean cosine {cosine:.3f}, and {nearest:,} of {len(own):,} names are closest to themselves"
    return False, f"the text embeddings are not those of {path}: {shares}"


def with_teacher(vocabulary: Vocabulary, teacher, every: int = 80) -> Vocabulary:
    """The vocabulary with this teacher's fingerprint.

    Raises:
        UserError: the width differs; or, for more than half of a sample of names (one in ``every``), the teacher's
            embedding is closest to another name's: it is another teacher, or the names have another order.
    """
    where = f"teacher {teacher.fingerprint['name']}"
    if teacher.fingerprint["width"] != vocabulary.width:
        raise UserError(f"{where}: embedding width is {teacher.fingerprint['width']}, not {vocabulary.width}")
    sample = list(range(0, len(vocabulary), every))
    some = vocabulary.take(sample)
    own = Vocabulary.from_names(teacher, Words(some.names, some.synonyms)).embeddings
    nearest = (own @ vocabulary.embeddings.T).argmax(1)
    right = (nearest == torch.tensor(sample)).sum().item()
    if right * 2 < len(sample):
        raise UserError(f"{where}: only {right} of {len(sample)} names have similar text embeddings in the checkpoint")
    learned = {"logit_scale": teacher.logit_scale, "logit_bias": teacher.logit_bias}
    return replace(vocabulary, fingerprint=teacher.fingerprint, **learned)
