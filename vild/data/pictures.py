"""Picture files to arrays: whatever people have, or one line about what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vild.errors import UserError

FORMATS = ("BGR", "RGB")


def read_picture(file_name: str | Path, image_format: str = "BGR") -> np.ndarray:
    """uint8 [H, W, 3]: turned upright by its EXIF tag, of an animation the first frame, of 16 bits the upper 8, any
    colour space as RGB (or BGR).

    Raises:
        UserError: no picture, a truncated one, or one of more pixels than Pillow opens (179 million).
    """
    try:
        with Image.open(file_name) as picture:
            return to_array(picture, image_format)
    except Exception as error:  # a broken file can fail anywhere in the decoders
        lines = str(error).strip().splitlines()
        raise UserError(f"picture {file_name} cannot be read: {lines[0] if lines else type(error).__name__}") from error


def to_array(picture: Image.Image, image_format: str = "BGR") -> np.ndarray:
    """A PIL picture as :func:`read_picture` gives it."""
    assert image_format in FORMATS, image_format
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _eight_bits(picture)
    array = np.asarray(picture.convert("RGB"))
    return array if image_format == "RGB" else np.ascontiguousarray(array[:, :, ::-1])


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits (or of 32 that hold 16) to 8; Pillow's own conversion would saturate."""
    values = np.asarray(picture)
    if not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError(f"grey values from {values.min()} to {values.max()}; at most 16 bits are read")
    is_16_bit = picture.mode.startswith("I;16") or values.max() > 255
    return Image.fromarray((values / 257 if is_16_bit else values).round().astype(np.uint8))
