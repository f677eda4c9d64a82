"""Distillation targets computed by the teacher while the detector trains, without a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from vild.data.mapper import visible_regions
from vild.utils.errors import UserError


@dataclass
class LiveTargets:
    """The best proposals of an image with the teacher's embeddings, in the form in which the mapper reads a store.

    Args:
        encode: :meth:`~vild.teacher.teacher.Teacher.encode_regions` of the teacher; with ``map_channels``
            :meth:`~vild.teacher.teacher.Teacher.encode_regions_and_maps`.
        image_format: of the detector's input, "BGR" or "RGB".
        per_image: at most so many regions an image.
        min_visible: see :func:`vild.data.mapper.visible_regions`.
        map_channels: T; 0 where no objective looks at maps.
    """

    encode: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
    _: KW_ONLY
    image_format: str
    per_image: int
    min_visible: float
    map_channels: int = 0

    def __post_init__(self):
        if self.image_format not in ("BGR", "RGB"):
            raise UserError(f"INPUT.FORMAT: the teacher cannot look at '{self.image_format}' images; use BGR or RGB")

    @torch.no_grad()
    def __call__(self, image: Tensor, window: tuple[int, ...], proposals: Instances) -> Instances:
        """One image's ``proposal_boxes``, ``embeddings`` and, with ``map_channels``, ``maps``.

        Args:
            image: uint8 [3, H, W], as augmented, not normalised.
            window: where in it the image lies (xyxy), the rest being padding, into which no crop may reach.
            proposals: ``proposal_boxes``, the best first.
        """
        boxes, _ = visible_regions(proposals.proposal_boxes.tensor.float(), window, self.min_visible)
        boxes = boxes[: self.per_image]
        found = self._look(image, window, boxes)
        fields = dict(zip(("embeddings", "maps"), found, strict=True)) if self.map_channels else {"embeddings": found}
        # cloned, as autograd refuses tensors made in inference mode
        fields = {key: value.clone() for key, value in fields.items()}
        return Instances(proposals.image_size, proposal_boxes=Boxes(boxes), **fields)

    @torch.no_grad()
    def image_map(self, image: Tensor, window: tuple[int, ...]) -> Tensor:
        """The teacher's feature map [T, h, w] of the whole image as one crop."""
        return self._look(image, window, torch.tensor([window], dtype=torch.float32, device=image.device))[1][0].clone()

    def _look(self, image: Tensor, window: tuple[int, ...], boxes: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x0, y0, x1, y1 = window
        visible = image[:, y0:y1, x0:x1]
        if self.image_format == "BGR":
            visible = visible.flip(0)
        # the detector's mixed precision must not apply to the teacher, which computes as it does for a store
        with torch.autocast(image.device.type, enabled=False):
            return self.encode(visible, boxes - boxes.new_tensor([x0, y0, x0, y0]))
