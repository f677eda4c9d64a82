"""The images that a detector takes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from detectron2.data.transforms import Augmentation
from PIL import Image
from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.images import read_image, to_array

ImageInput = str | Path | Image.Image | np.ndarray | Tensor


def as_array(image: ImageInput, image_format: str, channels: str | None = None) -> np.ndarray:
    """uint8 [H, W, 3] in ``image_format``; ``channels`` ("RGB" or "BGR") are those of an array or tensor."""
    if channels not in (None, "RGB", "BGR"):
        raise UserError(f"channels {channels!r}: must be 'RGB' or 'BGR'")
    if isinstance(image, str | Path):
        return read_image(image, image_format)
    if isinstance(image, Image.Image):
        try:
            return to_array(image, image_format)
        except (OSError, ValueError) as error:  # PIL decodes lazily
            raise UserError(f"image cannot be read: {error}") from error
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3 or 0 in image.shape:
            raise UserError(f"image: a tensor must be uint8 RGB [3, H, W], not {image.dtype} {[*image.shape]}")
        image, channels = image.permute(1, 2, 0).cpu().numpy(), channels or "RGB"
    if not isinstance(image, np.ndarray):
        raise UserError(f"image: {type(image).__name__} is not a path, PIL image, array or tensor")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"image: an array must be uint8 [H, W, 3], not {image.dtype} {[*image.shape]}")
    if channels is None:
        raise UserError("image: an array does not tell RGB from BGR: give channels='RGB', or 'BGR' if it is OpenCV's")
    return image if channels == image_format else image[:, :, ::-1]


def rgb_tensor(image: ImageInput) -> Tensor:
    """uint8 [3, H, W], RGB, as a teacher takes it."""
    return torch.from_numpy(as_array(image, "RGB").copy()).permute(2, 0, 1)


def stamp_of(image: ImageInput) -> tuple[int, int] | None:
    """Size and time of change of an image's file, which tell whether it was written again; None if it has none."""
    if isinstance(image, str | Path):
        with suppress(OSError, ValueError):
            status = os.stat(image)
            return status.st_size, status.st_mtime_ns
    return None


def to_input(array: np.ndarray, resize: Augmentation) -> dict:
    """The input of Detectron2's meta-architectures: ``array`` as ``image``, resized, with its own height and width."""
    resized = resize.get_transform(array).apply_image(array)
    resized = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
    return {"image": resized, "height": array.shape[0], "width": array.shape[1]}
