"""Data mappers: augment an image together with its annotations and its stored regions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor

from vild.data.unreadable import REASON, check_size, skips
from vild.utils.errors import BadImage
from vild.utils.images import read_image

if TYPE_CHECKING:
    from vild.store.store import EmbeddingStore, StoredRegions


def visible_regions(boxes: Tensor, window: Sequence[float], min_visible: float) -> tuple[Tensor, Tensor]:
    """Select regions [N, 4] with at least ``min_visible`` (0 to 1) of their area inside a window (xyxy).

    Returns:
        boxes [K, 4] clipped to the window; row indices, int64 [K].
    """
    low, high = boxes.new_tensor(window).view(2, 2).repeat(1, 2)
    clipped = torch.minimum(torch.maximum(boxes, low), high)
    area, sides = (boxes[:, 2:] - boxes[:, :2]).prod(1), clipped[:, 2:] - clipped[:, :2]
    # regions thinner than a pixel have no content
    rows = ((sides.prod(1) >= min_visible * area) & (sides >= 1).all(1)).nonzero()[:, 0]
    return clipped[rows], rows


def visible_window(size: tuple[int, int], transforms: T.TransformList, image_size: tuple[int, int]) -> tuple[int, ...]:
    """The part of an augmented image that is not padding (as of large-scale jitter), xyxy; ``size`` and ``image_size``
    are (height, width) before and after augmentation."""
    corners = transforms.apply_box(np.array([[0.0, 0.0, size[1], size[0]]])).reshape(2, 2)
    return tuple(corners.round().clip(0, image_size[::-1]).astype(int).flatten().tolist())


def transform_regions(
    boxes: Tensor, transforms: T.TransformList, image_size: tuple[int, int], min_visible: float
) -> tuple[Tensor, Tensor]:
    """Apply an augmentation to boxes [N, 4], xyxy in the original image; :func:`visible_regions` of the augmented one,
    whose size is (height, width)."""
    moved = torch.from_numpy(transforms.apply_box(boxes.numpy())).float()
    return visible_regions(moved, (0, 0, image_size[1], image_size[0]), min_visible)


def training_augmentations(cfg) -> list[T.Augmentation]:
    """Large-scale jitter if enabled in the config, else Detectron2's resize and crop; then flipping."""
    jitter, augmentations = cfg.INPUT.LARGE_SCALE_JITTER, utils.build_augmentation(cfg, is_train=True)
    if jitter.ENABLED:
        side = jitter.SIZE
        augmentations[0:1] = [T.ResizeScale(jitter.MIN, jitter.MAX, side, side), T.FixedSizeCrop((side, side))]
    elif cfg.INPUT.CROP.ENABLED:
        augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    return augmentations


class ViLDMapper(DatasetMapper):
    """Map a training record to ``image``, ``window`` (:func:`visible_window`), ``instances`` and, with a store,
    ``distill``.

    Args:
        store: the teacher's embeddings (None: no ``distill``).
        distill_per_image: maximum number of distilled regions per image, sampled from the visible ones.
        min_visible: see :func:`visible_regions`.
        mixed: images without regions in the store have no ``distill`` (the model computes their targets live).
        kwargs: of Detectron2's mapper.
    """

    def __init__(
        self, *, store: EmbeddingStore | None, distill_per_image: int, min_visible: float, mixed: bool = False, **kwargs
    ):
        super().__init__(True, **kwargs)
        self.store = store
        self.distill_per_image = distill_per_image
        self.min_visible = min_visible
        self.mixed = mixed

    @classmethod
    def from_config(cls, cfg, store: EmbeddingStore | None) -> ViLDMapper:
        """Build the training mapper."""
        return cls(
            augmentations=training_augmentations(cfg),
            image_format=cfg.INPUT.FORMAT,
            use_instance_mask=cfg.MODEL.MASK_ON and not cfg.MODEL.VILD.OLD_STUDENT.HEAD_ONLY,
            instance_mask_format=cfg.INPUT.MASK_FORMAT,
            store=store,
            distill_per_image=cfg.MODEL.VILD.DISTILL_PER_IMAGE,
            min_visible=cfg.MODEL.VILD.MIN_VISIBLE,
            mixed=cfg.MODEL.VILD.DISTILL_FROM == "mixed",
        )

    def __call__(self, record: dict) -> dict:
        result = copy.deepcopy(record)
        image = read_image(record["file_name"], self.image_format)
        check_size(image, record)
        inputs = T.AugInput(image)
        try:
            transforms = self.augmentations(inputs)
        except ValueError as error:  # of Pillow, for a side of 0 pixels
            size = f"{image.shape[1]} x {image.shape[0]}"
            raise BadImage(f"image {record['file_name']} of {size} pixels cannot be resized: {error}") from error
        image_size = inputs.image.shape[:2]
        result["image"] = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        result["window"] = visible_window(image.shape[:2], transforms, image_size)
        self._transform_annotations(result, transforms, image_size)
        image_id = record["image_id"]
        if self.store is not None and (image_id in self.store or not self.mixed):
            regions = self.store[image_id]
            if len(regions.boxes) or not self.mixed:
                result["distill"] = self.distilled(regions, transforms, image_size)
        return result

    def distilled(self, regions: StoredRegions, transforms: T.TransformList, image_size: tuple[int, int]) -> Instances:
        """Apply the image's augmentation to its stored regions and sample up to ``distill_per_image`` of them."""
        boxes, rows = transform_regions(regions.boxes, transforms, image_size, self.min_visible)
        if len(rows) > self.distill_per_image:
            chosen = np.sort(np.random.choice(len(rows), self.distill_per_image, replace=False))
            boxes, rows = boxes[chosen], rows[chosen]
        others = {f"embeddings_{n}": e[rows] for n, e in enumerate(regions.others, 1)}
        return Instances(image_size, proposal_boxes=Boxes(boxes), embeddings=regions.embeddings[rows], **others)


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, but no side becomes 0 pixels, as that of an image of 3 x 3000 would."""

    def get_transform(self, image):
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        return transform


def resize_at_test(cfg) -> T.Augmentation:
    """The resizing of ``INPUT.*_TEST``."""
    return ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST)


class InferenceMapper:
    """Map a record to ``image``, resized according to ``INPUT.*_TEST``.

    With ``INPUT.UNREADABLE: "skip"``, an unreadable image is replaced by a grey one whose record has
    ``unreadable.REASON``; its results must be ignored.
    """

    def __init__(self, cfg):
        self.resize = resize_at_test(cfg)
        self.image_format = cfg.INPUT.FORMAT
        self.skip = skips(cfg)

    def __call__(self, record: dict) -> dict:
        try:
            inputs = T.AugInput(read_image(record["file_name"], self.image_format))
        except BadImage as error:
            if not self.skip:
                raise
            grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
            return {**record, "image": grey, REASON: {record["file_name"]: str(error)}}
        self.resize(inputs)
        return {**record, "image": torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))}
