"""Image files to arrays: whatever people have, or one line about what is wrong with it."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vild.utils.errors import BadImage

FORMATS = ("BGR", "RGB")
# Pillow would hand an EPS to Ghostscript, decodes an ICO before its size can be looked at, and reads many formats that
# nobody has looked at for years
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
MOST_PIXELS = 89_478_485  # Pillow's own limit, which warns there and refuses twice as much; 0.3 GB as they are decoded


class TooManyPixels(ValueError):
    """An image whose pixels would fill the memory."""


def read_image(file_name: str | Path, image_format: str = "BGR") -> np.ndarray:
    """uint8 [H, W, 3]: turned upright by its EXIF tag, of an animation the first frame, of 16 bits the upper 8, any
    colour space as RGB (or BGR).

    Raises:
        BadImage: no image of FILE_FORMATS, a truncated one, or one of more than MOST_PIXELS.
    """
    try:
        with open_image(file_name) as image:
            return to_array(image, image_format)
    except Exception as error:  # a broken file can fail anywhere in the decoders
        lines = str(error).strip().splitlines()
        raise BadImage(f"image {file_name} cannot be read: {lines[0] if lines else type(error).__name__}") from error


@contextmanager
def open_image(
    file_name: str | Path, formats: tuple[str, ...] = FILE_FORMATS, most: int = MOST_PIXELS
) -> Iterator[Image.Image]:
    """An image's file, its size looked at and nothing decoded yet.

    Raises:
        TooManyPixels: more than ``most``.
        Exception: whatever Pillow raises for what is no image.
    """
    if not stat.S_ISREG(os.stat(file_name).st_mode):
        raise ValueError("not a regular file")  # a pipe or a device might not end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is no higher
        Image.init()  # a build of Pillow may lack some
        with Image.open(file_name, formats=[f for f in formats if f in Image.OPEN]) as image:
            check_size(*image.size, most)
            yield image


def check_size(width: int, height: int, most: int = MOST_PIXELS) -> None:
    """TooManyPixels for an image of more pixels than are decoded."""
    if width * height > most:
        raise TooManyPixels(f"{width:,} x {height:,} pixels, more than the limit of {most // 10**6} million")


def to_array(image: Image.Image, image_format: str = "BGR") -> np.ndarray:
    """A PIL image as :func:`read_image` gives it."""
    assert image_format in FORMATS, image_format
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    array = np.asarray(image.convert("RGB"))
    return array if image_format == "RGB" else np.ascontiguousarray(array[:, :, ::-1])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (or of 32 that hold 16) to 8; Pillow's own conversion would saturate."""
    values = np.asarray(image)
    if not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError(f"grey values from {values.min()} to {values.max()}; at most 16 bits are read")
    is_16_bit = image.mode.startswith("I;16") or values.max() > 255
    return Image.fromarray((values / 257 if is_16_bit else values).round().astype(np.uint8))
