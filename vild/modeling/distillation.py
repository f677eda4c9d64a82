"""What the distilled regions of a step learn: from heads and teachers to losses by name.

Shapes: M distilled RoIs of B images, D embedding width, F features of the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn
from torchvision.ops import roi_align

from vild.modeling.classifier import TextClassifier
from vild.modeling.extra_teachers import OtherTeachers
from vild.modeling.objectives import Objective, RegionBatch


def feature_maps(
    roi_features: Tensor, distill: Sequence[Instances], adapter: nn.Module | None
) -> dict[str, Tensor | None]:
    """Student's and teacher's feature maps, as ``RegionBatch`` has them. ``roi_features``: [M, C, H, W]."""
    teacher = torch.cat([d.maps for d in distill])
    # resized first: both are linear and commute, and the adapter's output is the wider one
    student = F.interpolate(roi_features.float(), teacher.shape[-2:], mode="bilinear", antialias=True)
    adapted = None if adapter is None else adapter(student)
    return {"student_maps": student, "adapted_maps": adapted, "teacher_maps": teacher}


def image_maps(
    level: Tensor, stride: int, windows_and_maps: Sequence[tuple[tuple[int, ...], Tensor]], adapter: nn.Module
) -> dict[str, Tensor]:
    """The same of whole images, from a level [B, C, H, W] of the FPN.

    Args:
        windows_and_maps: where each lies in its image (xyxy) and the teacher's map [T, h, w] of it.
    """
    teacher = torch.stack([of_teacher for _, of_teacher in windows_and_maps])
    windows = [torch.tensor([window], dtype=torch.float32, device=level.device) for window, _ in windows_and_maps]
    pooled = roi_align(level.float(), windows, teacher.shape[-2:], 1 / stride, aligned=True)
    return {"adapted_images": adapter(pooled), "teacher_images": teacher}


def gather(
    embeddings: Tensor,
    distill: Sequence[Instances],
    classifier: TextClassifier,
    concepts: Mapping[str, Tensor],
    maps: Mapping[str, Tensor | None],
) -> RegionBatch:
    """What the objectives look at. ``embeddings``: unit [M, D]; ``concepts``: text embeddings [K, D] by file."""
    text = classifier.text[classifier.base]
    concepts = {path: rows.to(text.device) for path, rows in concepts.items()}
    return RegionBatch(
        embeddings,
        torch.cat([d.embeddings for d in distill]),
        tuple(map(len, distill)),
        {"base": text, "background": classifier.matrix(text), **concepts},
        classifier.temperature,
        **maps,
    )


def distill_losses(
    regions: RegionBatch,
    features: Tensor,
    distill: Sequence[Instances],
    base: Tensor,
    objectives: Sequence[Objective],
    progress: float,
    others: OtherTeachers | None,
) -> dict[str, Tensor]:
    """Every objective's loss by name, with what further teachers add (``other_teachers.py``).

    Args:
        features: [M, F], of the head that is distilled.
        base: bool [C].
        progress: of the training, 0 to 1.
    """
    if others is None:
        return {f"loss_{o.name}": o(regions, progress) for o in objectives}
    targets = [torch.cat([d.get(f"embeddings_{n}") for d in distill]) for n in range(1, len(others) + 1)]
    return others.losses(regions, features, targets, base, objectives, progress)
