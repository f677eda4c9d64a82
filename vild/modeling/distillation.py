"""The distillation loss: from the distilled regions of a step to one loss per objective.

Shapes: M distilled regions of B images, D embedding width, F features of the head, T channels of the teacher's maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn
from torchvision.ops import roi_align

from vild.modeling.classifier import TextClassifier
from vild.modeling.extra_teachers import ExtraTeachers
from vild.modeling.objectives import Objective, RegionBatch, load_word_lists, parse_objectives
from vild.vocabulary.vocabulary import Vocabulary


def distill_weight(given: float, width: int) -> float:
    """``DISTILL_WEIGHT``, or where that is 0 the paper's 0.5 (table 3) brought from its CLIP's width to the teacher's:
    the L1 distance of unit vectors, and its gradient, grow with sqrt(width)."""
    return given or 0.5 * math.sqrt(512 / width)


class Distillation(nn.Module):
    """What the distilled regions learn.

    Args:
        objectives: each gives one loss.
        weight: multiplies all of them (``DISTILL_WEIGHT``).
        word_lists: text embeddings [K, D] of the vocabulary files that objectives refer to, by file. They move with
            the module and are not saved.
    """

    def __init__(self, objectives: list[Objective], weight: float, word_lists: dict[str, Tensor]):
        super().__init__()
        self.objectives, self.weight, self.files = objectives, weight, tuple(word_lists)
        for number, rows in enumerate(word_lists.values()):
            self.register_buffer(f"words{number}", rows, persistent=False)

    @classmethod
    def from_config(cls, cfg, vocabulary: Vocabulary) -> Distillation:
        objectives = parse_objectives(cfg.MODEL.VILD.OBJECTIVES)
        weight = distill_weight(cfg.MODEL.VILD.DISTILL_WEIGHT, vocabulary.width)
        return cls(objectives, weight, load_word_lists(objectives, vocabulary))

    def losses(
        self,
        embeddings: Tensor,
        features: Tensor,
        distill: Sequence[Instances],
        classifier: TextClassifier,
        extra_teachers: ExtraTeachers | None,
        progress: float,
        maps: dict[str, Tensor | None],
    ) -> dict[str, Tensor]:
        """The weighted losses: ``loss_<name>`` per objective, and those of :meth:`ExtraTeachers.losses`.

        Args:
            embeddings: unit [M, D], of the distilled head.
            features: [M, F], which ``embeddings`` are projected from.
            distill: each image's ``embeddings``, and ``embeddings_<number>`` of extra teachers.
            progress: of the training, 0 to 1.
            maps: of :func:`region_maps` and :func:`image_maps`.
        """
        regions = self.regions(embeddings, distill, classifier, maps)
        if extra_teachers is None:
            losses = {f"loss_{o.name}": o(regions, progress) for o in self.objectives}
        else:
            numbers = range(1, len(extra_teachers) + 1)
            targets = [torch.cat([d.get(f"embeddings_{n}") for d in distill]) for n in numbers]
            base = classifier.base_rows
            losses = extra_teachers.losses(regions, features, targets, base, self.objectives, progress)
        return {name: self.weight * value for name, value in losses.items()}

    def regions(
        self,
        embeddings: Tensor,
        distill: Sequence[Instances],
        classifier: TextClassifier,
        maps: dict[str, Tensor | None],
    ) -> RegionBatch:
        """What the objectives look at; arguments as of :meth:`losses`."""
        text = classifier.text[classifier.base_rows]
        word_lists = {file: self.get_buffer(f"words{number}") for number, file in enumerate(self.files)}
        return RegionBatch(
            embeddings,
            torch.cat([d.embeddings for d in distill]),
            tuple(map(len, distill)),
            {"base": text, "background": classifier.matrix(text), **word_lists},
            classifier.temperature,
            **maps,
        )


def region_maps(
    roi_features: Tensor, distill: Sequence[Instances], adapter: nn.Module | None
) -> dict[str, Tensor | None]:
    """The feature maps of regions in a :class:`RegionBatch`, from RoI features [M, C, H, W] and ``distill.maps``."""
    teacher = torch.cat([d.maps for d in distill])
    # resizing and adapting are linear and commute; the adapter's output is the wider one
    student = F.interpolate(roi_features.float(), teacher.shape[-2:], mode="bilinear", antialias=True)
    adapted = None if adapter is None else adapter(student)
    return {"student_maps": student, "adapted_maps": adapted, "teacher_maps": teacher}


def image_maps(
    level: Tensor, stride: int, windows_and_maps: Sequence[tuple[tuple[int, ...], Tensor]], adapter: nn.Module
) -> dict[str, Tensor]:
    """The feature maps of whole images in a :class:`RegionBatch`, from an FPN level [B, C, H, W] of this stride.

    Args:
        windows_and_maps: per image its window in the batch's tensor (xyxy; the rest is padding) and the teacher's map
            [T, h, w] of it.
    """
    teacher = torch.stack([teacher_map for _, teacher_map in windows_and_maps])
    windows = [torch.tensor([window], dtype=torch.float32, device=level.device) for window, _ in windows_and_maps]
    pooled = roi_align(level.float(), windows, teacher.shape[-2:], 1 / stride, aligned=True)
    return {"adapted_images": adapter(pooled), "teacher_images": teacher}
