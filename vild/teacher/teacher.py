"""The :class:`Teacher` protocol, and :func:`build_teacher`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch
from torch import Tensor

from vild.teacher.crops import SCALES, check_mode, crop_batch, cut_crops, fuse_scales, normalise
from vild.utils.errors import UserError
from vild.utils.untrusted import refused_as
from vild.vocabulary.prompts import LearnedPrompts

PART = 1024  # crops that the image tower gets at once, outside the teacher pass
KINDS: dict[str, type[Teacher]] = {}


class Teacher(ABC):
    """A frozen model that embeds images and texts in one space, as unit vectors of ``width`` without gradients.

    To add a kind of teacher, write ``vild/teacher/<kind>.py`` with a subclass ``class ...(Teacher, kind="<kind>")``;
    the name ``<kind>:ANYTHING`` then works wherever a teacher is named. The subclass implements

    * ``__init__``, with the arguments of :func:`build_teacher` (``name`` includes ``<kind>:``), which calls this
      class's constructor;
    * :meth:`encode_image` and :meth:`encode_text`;
    * :meth:`encode_image_and_maps`, only for the objectives on feature maps;
    * :meth:`save`, only for exported detectors that carry the teacher.

    CONTRIBUTING.md has an example. ``clip.py`` is the kind without a prefix.

    Args:
        name, pretrained, device, crop: as :func:`build_teacher` got them.
        weights: identifies the weights: the same text for the same weights, wherever they are stored.
        width: D of the embeddings.
        size: (height, width) of the image input.
        mean, std: RGB, normalise the input in 0..1.
        interpolation: "bicubic" or "bilinear", for crops.
        logit_scale, logit_bias: learned with the contrastive loss: an image and a text match with the logit
            logit_scale * cosine + logit_bias. CLIP's are 100 and 0; None if unknown.

    Raises:
        UserError: another interpolation.
    """

    def __init_subclass__(cls, kind: str = "", **kwargs):
        super().__init_subclass__(**kwargs)
        if kind:
            KINDS[kind] = cls

    def __init__(
        self,
        name: str,
        pretrained: str,
        device: str | torch.device,
        crop: str,
        *,
        weights: str,
        width: int,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        logit_scale: float | None = None,
        logit_bias: float = 0.0,
    ):
        if interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"teacher '{name}': interpolation '{interpolation}' is not supported")
        self.name, self.pretrained, self.device, self.crop = name, pretrained, torch.device(device), crop
        self.width, self.size, self.mean, self.std = width, tuple(size), tuple(mean), tuple(std)
        self.interpolation = interpolation
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        # saved in stores, vocabularies and checkpoints; compared by vild/utils/fingerprint.py
        self.fingerprint = {
            "name": name,
            "pretrained": pretrained,
            "weights": weights,
            "width": width,
            "preprocess": {
                "size": list(self.size),
                "mean": list(self.mean),
                "std": list(self.std),
                "interpolation": interpolation,
                "crop": crop,
            },
        }

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised float [N, 3, *size] to unit float32 [N, D] on the teacher's device; N may be 0."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str], *, prompts: LearnedPrompts | None = None) -> Tensor:
        """T texts to unit float32 [T, D]. ``prompts``: learned context (CoOp) in place of each text's first words;
        UserError if it was learned for another teacher, or is not supported by this one."""

    def encode_image_and_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`encode_image` for N > 0, and the image tower's last feature map, float32 [N, T, h, w]."""
        raise UserError(f"teacher '{self.name}': its image tower gives no feature map")

    def save(self, folder: Path) -> None:
        """Write the model as open_clip's ``local-dir:`` folder, a teacher with the same fingerprint."""
        raise UserError(f"teacher '{self.name}': cannot be saved beside a detector")

    @cached_property
    def map_shape(self) -> tuple[int, int, int]:
        """(T, h, w) of the image tower's last feature map.

        Raises:
            UserError: the tower has none, or returns another embedding with it than :meth:`encode_image`.
        """
        probe = torch.linspace(-1, 1, 3 * self.size[0] * self.size[1]).view(1, 3, *self.size)
        with refused_as(f"teacher '{self.name}': its image tower gives no feature map"):
            embedding, maps = self.encode_image_and_maps(probe)
        if maps.dim() != 4 or not torch.allclose(embedding, self.encode_image(probe), atol=1e-3):
            raise UserError(f"teacher '{self.name}': its image tower gives no feature map beside its embedding")
        return tuple(maps.shape[1:])

    def cut(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """The crops of several images' boxes, uint8 [sum of N_i, S, 3, *size] on the teacher's device (see
        ``crop_batch``)."""
        return crop_batch(images, boxes, self.size, self.mean, self.interpolation, mode=self.crop, device=self.device)

    def cut_planned(self, images: Sequence[Tensor], plans: Sequence[Tensor], memory: int) -> Tensor:
        """:meth:`cut`, of crops that ``crops.plan_crops`` has planned; ``memory``: see ``crops.cut_crops``."""
        crops = cut_crops(images, plans, self.size, self.mean, self.interpolation, self.device, memory)
        return crops.unflatten(0, (-1, len(SCALES)))

    def encode_regions(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Distillation target of each box: its 1x and 1.5x crops, fused (paper, section 3.3).

        Args:
            image: uint8 RGB [3, H, W].
            boxes: float [N, 4], xyxy in its pixels.

        Returns:
            unit float32 [N, D]
        """
        return self.encode_batch([image], [boxes])

    def encode_batch(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """:meth:`encode_regions` of several images in turn, cropped together: unit float32 [sum of N_i, D]."""
        return self._fuse(torch.cat([self.encode_image(part) for part in self._inputs(images, boxes)]))

    def encode_batch_and_maps(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """:meth:`encode_batch`, to the last bit, and the feature map of each box's 1x crop, [sum of N_i, T, h, w].

        Raises:
            UserError: see :attr:`map_shape`.
        """
        if not any(map(len, boxes)):
            return self.encode_batch(images, boxes), torch.zeros((0, *self.map_shape), device=self.device)
        found = [self.encode_image_and_maps(part) for part in self._inputs(images, boxes)]
        embeddings, maps = (torch.cat(parts) for parts in zip(*found, strict=True))
        return self._fuse(embeddings), maps[:: len(SCALES)]

    def _inputs(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> Iterator[Tensor]:
        for part in self.cut(images, boxes).flatten(0, 1).split(PART):
            yield normalise(part, self.mean, self.std)

    def _fuse(self, embeddings: Tensor) -> Tensor:
        return fuse_scales(embeddings.unflatten(0, (-1, len(SCALES))))


def build_teacher(
    name: str,
    pretrained: str = "",
    device: str | torch.device = "cpu",
    crop: str = "squash",
    precision: str = "fp32",
    compile: bool = False,
) -> Teacher:
    """Load a teacher by name, frozen.

    Args:
        name: an open_clip model name, ``local-dir:FOLDER``, ``hf-hub:REPOSITORY`` (``clip.py``), or ``KIND:ANYTHING``
            for another kind of teacher (a module of vild.teacher).
        pretrained: open_clip's tag or a file of weights, or "random"; other kinds may ignore it.
        device: of the model.
        crop: how a region becomes its input, one of crops.MODES (see ``crops.input_windows``).
        precision: of the image tower's arithmetic (autocast), one of clip.PRECISIONS.
        compile: compile the image tower: takes minutes, pays off over millions of crops on a GPU.

    Raises:
        UserError: unknown name or crop mode, or weights that cannot be loaded.
    """
    check_mode(crop)  # before weights are loaded
    return _find_kind(name)(name, pretrained, device, crop, precision, compile)


def _find_kind(name: str) -> type[Teacher]:
    """The class for a name. A name can come from an untrusted config: only modules of this package are imported."""
    kind, colon, _ = name.partition(":")
    kind = kind if colon and re.fullmatch("[a-z0-9_]+", kind) else "clip"
    modules = sorted((m.name for m in iter_modules([str(Path(__file__).parent)])), key=lambda module: module != kind)
    while kind not in KINDS and modules:
        import_module(f"vild.teacher.{modules.pop(0)}")
    if kind not in KINDS:
        others = [f"{known}:..." for known in sorted(KINDS.keys() - {"clip"})]
        kinds = ", ".join(["model names of open_clip", "local-dir:FOLDER", "hf-hub:REPOSITORY", *others])
        raise UserError(f"teacher '{name}': there is no kind of teacher '{kind}' (there are: {kinds})")
    return KINDS[kind]
