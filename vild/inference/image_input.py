"""The images that a detector takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.images import read_image, to_array

ImageInput = str | Path | Image.Image | np.ndarray | Tensor


def as_array(image: ImageInput, image_format: str) -> np.ndarray:
    """uint8 [H, W, 3] in ``image_format``."""
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
        array = image.permute(1, 2, 0).cpu().numpy()
        return array if image_format == "RGB" else array[:, :, ::-1]
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"image: an array must be uint8 [H, W, 3], not {image.dtype} {[*image.shape]}")
        return image
    raise UserError(f"image: {type(image).__name__} is not a path, PIL image, array or tensor")
