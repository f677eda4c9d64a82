"""Distillation targets computed by the teacher while the detector trains, without a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from vild.data.mapper import visible_regions
from vild.utils.errors import UserError


@dataclass
class LiveTargets:
    """The best proposals of images with the teacher's embeddings, in the form in which the mapper reads a store.

    Args:
        encode: :meth:`~vild.teacher.teacher.Teacher.encode_batch` of the teacher; with ``map_channels``
            :meth:`~vild.teacher.teacher.Teacher.encode_batch_and_maps`.
        image_format: of the detector's input, "BGR" or "RGB".
        per_image: at most so many regions an image.
        min_visible: see :func:`vild.data.mapper.visible_regions`.
        map_channels: T; 0 where no objective looks at maps.
    """

    encode: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor | tuple[Tensor, Tensor]]
    _: KW_ONLY
    image_format: str
    per_image: int
    min_visible: float
    map_channels: int = 0

    def __post_init__(self):
        if self.image_format not in ("BGR", "RGB"):
            raise UserError(f"INPUT.FORMAT: the teacher cannot look at '{self.image_format}' images; use BGR or RGB")

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Tensor], windows: Sequence[tuple[int, ...]], proposals: Sequence[Instances]
    ) -> list[Instances]:
        """Each image's ``proposal_boxes``, ``embeddings`` and, with ``map_channels``, ``maps``.

        Args:
            images: uint8 [3, H, W], as augmented, not normalised.
            windows: where in it the image lies (xyxy), the rest being padding, into which no crop may reach.
            proposals: ``proposal_boxes``, the best first.
        """
        boxes = [
            visible_regions(found.proposal_boxes.tensor.float(), window, self.min_visible)[0][: self.per_image]
            for found, window in zip(proposals, windows, strict=True)
        ]
        found = self._look(images, windows, boxes)
        fields = dict(zip(("embeddings", "maps"), found, strict=True)) if self.map_channels else {"embeddings": found}
        # cloned, as autograd refuses tensors made in inference mode
        fields = {key: value.clone().split([len(b) for b in boxes]) for key, value in fields.items()}
        return [
            Instances(p.image_size, proposal_boxes=Boxes(b), **{key: parts[n] for key, parts in fields.items()})
            for n, (p, b) in enumerate(zip(proposals, boxes, strict=True))
        ]

    @torch.no_grad()
    def image_map(self, image: Tensor, window: tuple[int, ...]) -> Tensor:
        """The teacher's feature map [T, h, w] of the whole image as one crop."""
        box = torch.tensor([window], dtype=torch.float32, device=image.device)
        return self._look([image], [window], [box])[1][0].clone()

    def _look(
        self, images: Sequence[Tensor], windows: Sequence[tuple[int, ...]], boxes: Sequence[Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        visible = [image[:, y0:y1, x0:x1] for image, (x0, y0, x1, y1) in zip(images, windows, strict=True)]
        if self.image_format == "BGR":
            visible = [image.flip(0) for image in visible]
        moved = [b - b.new_tensor([x0, y0, x0, y0]) for b, (x0, y0, _, _) in zip(boxes, windows, strict=True)]
        # the detector's mixed precision must not apply to the teacher, which computes in its own
        with torch.autocast(images[0].device.type, enabled=False):
            return self.encode(visible, moved)
