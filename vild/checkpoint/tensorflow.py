"""Convert the variables of a released TensorFlow checkpoint to weights of the detector in ``vild/modeling/released``.

Parameters that Detectron2's layers do not have are folded into those they have, without changing an output: the bias of
a convolution before a BatchNorm is subtracted from its mean, and the BatchNorms behind the fully connected layers and
the mask head's deconvolution go into their weights. (Fine-tuning therefore continues without these BatchNorms.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from torch import Tensor

from vild.data.classes import make_classes, read_split
from vild.data.datasets import root
from vild.modeling.released.rcnn import EPS
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

BLOCKS = {50: (3, 4, 6, 3), 152: (3, 8, 36, 3)}  # bottlenecks per stage, by depth
LEVELS = (2, 3, 4, 5, 6)
CHANNELS, HIDDEN, WIDTH, BINS, ANCHORS = 256, 1024, 512, 7, 3
HEAD = "frcnn_layer_0/fast_rcnn_head"
SIM_CLR = "_sim_clr"  # in the BatchNorms' names of the authors' ResNet-152 checkpoints, and of no meaning here
TO_XY = [1, 0, 3, 2]  # (dy, dx, dh, dw) to (dx, dy, dw, dh)


class Variables:
    """The variables of a checkpoint, with a record of which have been used.

    Args:
        arrays: by name; read one at a time, when they are used.
        where: the file, for error messages.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str):
        self.arrays, self.where = arrays, where
        self.stored = plain_names(arrays, where)
        self.left = set(self.stored)

    def take(self, name: str, *shape: int) -> Tensor:
        """A variable as float32. UserError if it is missing or has another shape."""
        if name not in self.stored:
            raise UserError(f"{self.where}: the variable '{name}' is missing")
        array = np.asarray(self.arrays[self.stored[name]])
        if array.shape != shape:
            raise UserError(f"{self.where}: the variable '{name}' has the shape {list(array.shape)}, not {list(shape)}")
        self.left.discard(name)
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))

    def kernel(self, name: str, *shape: int) -> Tensor:
        """A kernel of this shape with the output channels, its last axis, first: [after, before, height, width] of a
        convolution, [after, before] of a fully connected layer."""
        kernel = self.take(f"{name}/kernel", *shape)
        return kernel.permute(3, 2, 0, 1) if len(shape) == 4 else kernel.T

    def layer(self, name: str, *shape: int) -> dict[str, Tensor]:
        """The state of a layer with a bias; the kernel as in :meth:`kernel`."""
        return {"weight": self.kernel(name, *shape), "bias": self.take(f"{name}/bias", shape[-1])}

    def conv_norm(self, name: str, norm: str, width: int) -> dict[str, Tensor]:
        """The state of a 3x3 convolution with a bias and the BatchNorm behind it."""
        conv = self.layer(name, 3, 3, width, width)
        return {"weight": conv["weight"], **_prefixed("norm.", self.norm(norm, width, conv["bias"]))}

    def norm(self, name: str, width: int, bias: Tensor | float = 0.0) -> dict[str, Tensor]:
        """A BatchNorm's state, with the ``bias`` of the convolution before it folded in."""
        gamma, beta, mean, variance = (
            self.take(f"{name}/{leaf}", width) for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return {"weight": gamma, "bias": beta, "running_mean": mean - bias, "running_var": variance}

    def folded(self, name: str, width: int, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A BatchNorm behind a layer with this ``bias``, as a factor on its output weights and a new bias."""
        norm = self.norm(name, width, bias)
        factor = norm["weight"] / (norm["running_var"] + EPS).sqrt()
        return factor, norm["bias"] - norm["running_mean"] * factor

    def left_out(self) -> tuple[str, ...]:
        """The names in the checkpoint of the variables that have not been used."""
        return tuple(sorted(self.stored[name] for name in self.left))


def convert_variables(
    arrays: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, Tensor], Vocabulary, str, int, tuple[str, ...]]:
    """Weights by Detectron2's names, vocabulary, variant ("vild" or "ensemble"), depth of the ResNet, and the names of
    the variables that are not part of the detector.

    Raises:
        UserError: a variable that is missing or of another shape.
    """
    variables = Variables(arrays, where)
    depth = find_depth(variables.stored, where)
    variant = "ensemble" if any("/distill_" in name or "/distill-" in name for name in variables.stored) else "vild"
    state = {
        **_prefixed("backbone.bottom_up.", resnet(variables, depth)),
        **_prefixed("backbone.", fpn(variables)),
        **_prefixed("proposal_generator.rpn_head.", rpn(variables)),
        **_prefixed("roi_heads.", box_head(variables, variant)),
        **_prefixed("roi_heads.mask_head.", mask_head(variables)),
    }
    vocabulary = lvis_vocabulary(variables)
    state = {key: value.contiguous() for key, value in state.items()}
    counters = {key[: -len("running_var")] + "num_batches_tracked" for key in state if key.endswith(".running_var")}
    state |= {key: torch.tensor(0) for key in counters}
    return state, vocabulary, variant, depth, variables.left_out()


def plain_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Each name in the checkpoint by its name without SIM_CLR. UserError if two become one."""
    plain: dict[str, str] = {}
    for name in names:
        if (other := plain.setdefault(name.replace(SIM_CLR, ""), name)) != name:
            raise UserError(f"{where}: the variables '{other}' and '{name}' differ only in '{SIM_CLR}'")
    return plain


def find_depth(names: Iterable[str], where: str) -> int:
    """The depth of the ResNet, from the scope of its variables."""
    found = {int(match[1]) for name in names if (match := re.match(r"resnet(\d+)/", name))}
    if len(found) != 1 or not found <= set(BLOCKS):
        depths = ", ".join(f"resnet{depth}" for depth in sorted(found)) or "none"
        raise UserError(f"{where}: the variables belong to {depths}, not to resnet50 or resnet152")
    return found.pop()


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def _numbered(name: str, index: int) -> str:
    """TensorFlow's name of the n-th layer that was not given one."""
    return f"{name}_{index}" if index else name


def resnet(variables: Variables, depth: int) -> dict[str, Tensor]:
    """Layers are numbered in the order of creation: the first block of a stage creates its shortcut first."""
    layers = [("stem.conv1", 7, 7, 3, 64)]
    before = 64
    for stage, blocks in enumerate(BLOCKS[depth], 2):
        inner, after = 16 * 2**stage, 64 * 2**stage
        for block in range(blocks):
            where = f"res{stage}.{block}"
            layers += [(f"{where}.shortcut", 1, 1, before, after)] if block == 0 else []
            layers += [(f"{where}.conv1", 1, 1, before, inner), (f"{where}.conv2", 3, 3, inner, inner)]
            layers += [(f"{where}.conv3", 1, 1, inner, after)]
            before = after
    state = {}
    for index, (key, *shape) in enumerate(layers):
        state[f"{key}.weight"] = variables.kernel(f"resnet{depth}/{_numbered('conv2d', index)}", *shape)
        norm = variables.norm(f"resnet{depth}/{_numbered('batch_normalization', index)}", shape[-1])
        state |= _prefixed(f"{key}.norm.", norm)
    return state


def fpn(variables: Variables) -> dict[str, Tensor]:
    state = {}
    for level in LEVELS:
        layers = [(f"fpn_lateral{level}", f"l{level}", 1, 64 * 2**level)]
        layers += [(f"fpn_output{level}", f"post_hoc_d{level}", 3, CHANNELS)]
        if level == 6:
            layers = [("top_block.conv", "p6", 3, CHANNELS)]
        for key, name, side, before in layers:
            state |= _prefixed(f"{key}.", variables.layer(f"fpn/{name}", side, side, before, CHANNELS))
        state |= _prefixed(f"norms.p{level}.", variables.norm(f"fpn/p{level}-bn", CHANNELS))
    return state


def rpn(variables: Variables) -> dict[str, Tensor]:
    boxes = torch.arange(4 * ANCHORS).view(ANCHORS, 4)[:, TO_XY].flatten()
    deltas = variables.layer("rpn_head/rpn-box", 1, 1, CHANNELS, 4 * ANCHORS)
    state = _prefixed("anchor_deltas.", {key: value[boxes] for key, value in deltas.items()})
    state |= _prefixed("objectness_logits.", variables.layer("rpn_head/rpn-class", 1, 1, CHANNELS, ANCHORS))
    for n, end in enumerate(("", "-1")):
        state |= _prefixed(f"conv.conv{n}.", variables.layer(f"rpn_head/rpn{end}", 3, 3, CHANNELS, CHANNELS))
        for index, level in enumerate(LEVELS):
            state |= _prefixed(f"norms.{index}.{n}.", variables.norm(f"rpn_head/rpn-l{level}-bn{end}", CHANNELS))
    return state


def box_head(variables: Variables, variant: str) -> dict[str, Tensor]:
    """Unnamed BatchNorms 0 to 5 belong to the main branch, 6 to 11 to the distilled one."""
    state = _prefixed("embedding.", branch(variables, "", 0))
    if variant == "ensemble":
        state |= _prefixed("image_embedding.", branch(variables, "distill", 6))
    deltas = variables.layer(f"{HEAD}/box-predict", HIDDEN, 4)
    state |= _prefixed("bbox_pred.", {key: value[TO_XY] for key, value in deltas.items()})
    return state | {"classifier.background": variables.kernel(f"{HEAD}/background-class-predict", WIDTH, 1)}


def branch(variables: Variables, prefix: str, first_norm: int) -> dict[str, Tensor]:
    """Four convolutions, two fully connected layers (the first over height, width, channel) and the projection."""
    named = f"{prefix}_" if prefix else ""
    state = {}
    for n in range(4):
        norm = f"{HEAD}/{_numbered('batch_normalization', first_norm + n)}"
        state |= _prefixed(f"head.conv{n + 1}.", variables.conv_norm(f"{HEAD}/{named}conv_{n}", norm, CHANNELS))
    for n, before in enumerate((BINS * BINS * CHANNELS, HIDDEN)):
        layer = variables.layer(f"{HEAD}/{named}fc{n + 6}", before, HIDDEN)
        weight = layer["weight"]
        if n == 0:
            weight = weight.unflatten(1, (BINS * BINS, CHANNELS)).transpose(1, 2).flatten(1)
        norm = f"{HEAD}/{_numbered('batch_normalization', first_norm + 4 + n)}"
        factor, bias = variables.folded(norm, HIDDEN, layer["bias"])
        state |= {f"head.fc{n + 1}.weight": weight * factor[:, None], f"head.fc{n + 1}.bias": bias}
    name = f"{HEAD}/{prefix}-project-to-clip" if prefix else f"{HEAD}/project-to-clip"
    return state | _prefixed("projection.", variables.layer(name, HIDDEN, WIDTH))


def mask_head(variables: Variables) -> dict[str, Tensor]:
    state = {}
    for n in range(4):
        norm = f"mask_head/{_numbered('batch_normalization', n)}"
        state |= _prefixed(f"mask_fcn{n + 1}.", variables.conv_norm(f"mask_head/mask-conv-l{n}", norm, CHANNELS))
    deconv = variables.layer("mask_head/conv5-mask", 2, 2, CHANNELS, CHANNELS)  # its kernel: [before, after, 2, 2]
    factor, bias = variables.folded("mask_head/batch_normalization_4", CHANNELS, deconv["bias"])
    state |= {"deconv.weight": deconv["weight"] * factor[:, None, None], "deconv.bias": bias}
    return state | _prefixed("predictor.", variables.layer("mask_head/mask_fcn_logits", 1, 1, CHANNELS, 1))


def lvis_vocabulary(variables: Variables) -> Vocabulary:
    """The text matrix [WIDTH, 1203] as a vocabulary: LVIS's names in order of their ids, rare ones novel."""
    classes = make_classes(LVIS_CATEGORIES, read_split("lvis_v1", root()))
    text = variables.kernel(f"{HEAD}/class-predict", WIDTH, len(classes.names))
    return Vocabulary(classes.names, F.normalize(text, dim=1), classes.splits, classes.synonyms)
