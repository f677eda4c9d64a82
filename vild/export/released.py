"""The released detector as one graph (see ``detector.py``). The graph resizes the image itself: ``image`` and the boxes
are in the original size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vild.export.detector import ExportedDetector
from vild.modeling.released.boxes import clip, upright


class ExportedReleased(ExportedDetector):
    """As :class:`ExportedDetector`; boxes are not clipped to the image, and empty ones are kept."""

    def _size(self, image: Tensor) -> tuple[int, int]:
        return self.model.side, self.model.side

    def _scaled(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes (height, width) of the image and of its part of the canvas, float32 [2] each (``scaled_size``)."""
        size = torch.stack([image.new_ones(n, dtype=torch.float32).sum() for n in image.shape[:2]])
        return size, (size * (self.model.side / size).min()).round().clamp(min=1)

    def _normalise(self, image: Tensor) -> Tensor:
        """``onto_canvas`` with sizes as tensors: beyond the image its edge is sampled, then multiplied by 0."""
        x = (image.permute(2, 0, 1).float() - self.model.pixel_mean) / self.model.pixel_std
        size, scaled = self._scaled(image)
        place = torch.arange(self.model.side, dtype=torch.float32)
        for dim, axis in ((2, 1), (1, 0)):
            last = size[axis] - 1
            at = place * (size[axis] / scaled[axis])
            low = torch.minimum(at.floor(), last)
            high, share = torch.minimum(low + 1, last), at - low
            inside = (place < scaled[axis]).float()
            share, inside = (v[None, None, :] if dim == 2 else v[None, :, None] for v in (share, inside))
            first = x.index_select(dim, low.long())
            x = (first + (x.index_select(dim, high.long()) - first) * share) * inside
        return x[None]

    def _placed(self, boxes: Tensor, image: Tensor) -> Tensor:
        size, scaled = self._scaled(image)
        return boxes * (size / scaled).flip(0).repeat(2)

    def _clip(self, boxes: Tensor, height: int, width: int) -> Tensor:
        return clip(boxes, (height, width))

    def _decoded(self, deltas: Tensor, proposals: Tensor, size: tuple[int, int]) -> Tensor:
        return upright(super()._decoded(deltas, proposals, size))

    def _pool(self, pooler: nn.Module, maps: list[Tensor], boxes: Tensor) -> Tensor:
        return pooler.pool(maps, F.pad(boxes, (1, 0, 0, 1)))

    def _proposals(self, features: dict[str, Tensor], height: int, width: int) -> Tensor:
        """Always RPN.POST_NMS_TOPK_TEST boxes, padded with [0, 0, 0, 0]."""
        found, limit = super()._proposals(features, height, width), self.model.proposal_generator.post_nms_topk[False]
        return F.pad(found, (0, 0, 0, limit))[:limit]

    def _rank(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def _valid(self, boxes: Tensor, score: Tensor) -> Tensor:
        return (boxes != 0).any(1)
