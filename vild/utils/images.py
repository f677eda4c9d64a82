"""Picture files to arrays: whatever people have, or one line about what is wrong with it."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vild.utils.errors import BadPicture

FORMATS = ("BGR", "RGB")
# Pillow would hand an EPS to Ghostscript, decodes an ICO before its size can be looked at, and reads many formats that
# nobody has looked at for years
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
MOST_PIXELS = 89_478_485  # Pillow's own limit, which warns there and refuses twice as much; 0.3 GB as they are decoded


class TooManyPixels(ValueError):
    """A picture whose pixels would fill the memory."""


def read_picture(file_name: str | Path, image_format: str = "BGR") -> np.ndarray:
    """uint8 [H, W, 3]: turned upright by its EXIF tag, of an animation the first frame, of 16 bits the upper 8, any
    colour space as RGB (or BGR).

    Raises:
        BadPicture: no picture of FILE_FORMATS, a truncated one, or one of more than MOST_PIXELS.
    """
    try:
        with open_picture(file_name) as picture:
            return to_array(picture, image_format)
    except Exception as error:  # a broken file can fail anywhere in the decoders
        lines = str(error).strip().splitlines()
        raise BadPicture(
            f"picture {file_name} cannot be read: {lines[0] if lines else type(error).__name__}"
        ) from error


@contextmanager
def open_picture(
    file_name: str | Path, formats: tuple[str, ...] = FILE_FORMATS, most: int = MOST_PIXELS
) -> Iterator[Image.Image]:
    """A picture's file, its size looked at and nothing decoded yet.

    Raises:
        TooManyPixels: more than ``most``.
        Exception: whatever Pillow raises for what is no picture.
    """
    if not stat.S_ISREG(os.stat(file_name).st_mode):
        raise ValueError("not a regular file")  # a pipe or a device might not end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is no higher
        Image.init()  # a build of Pillow may lack some
        with Image.open(file_name, formats=[f for f in formats if f in Image.OPEN]) as picture:
            check_size(*picture.size, most)
            yield picture


def check_size(width: int, height: int, most: int = MOST_PIXELS) -> None:
    """TooManyPixels for a picture of more pixels than are decoded."""
    if width * height > most:
        raise TooManyPixels(f"{width:,} x {height:,} pixels, more than the limit of {most // 10**6} million")


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
