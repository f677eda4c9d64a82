"""Reading image files of any common format, with limits; errors are one line."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from vild.utils.errors import BadImage, first_line
from vild.utils.untrusted import what_it_is

# Left out: EPS, which Pillow hands to Ghostscript; ICO, which it decodes before the size is known; and many rarely
# maintained formats.
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff",
            ".webp")  # fmt: skip
MOST_PIXELS = 89_478_485  # Pillow's limit for its warning (it raises at twice this); 0.3 GB when decoded


class TooManyPixels(ValueError):
    """An image with more pixels than the limit."""


def images_below(folder: Path) -> list[Path]:
    """Files with an image suffix below a folder, sorted, without hidden ones (macOS's ``._a.jpg``)."""
    return sorted(p for p in folder.rglob("*")
                  if p.name.lower().endswith(SUFFIXES) and not is_hidden(p, folder) and p.is_file())  # fmt: skip


def is_hidden(path: Path, folder: Path) -> bool:
    """Does the name of a file, or of a folder between it and ``folder``, begin with a dot?"""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_image(file_name: str | Path, image_format: str = "BGR") -> np.ndarray:
    """Read an image as uint8 [H, W, 3], RGB or BGR: rotated by its EXIF tag; the first frame of an animation; the upper
    8 of 16 bits; floating point, whatever its range (see :func:`_eight_bits`); converted from any colour space.

    Raises:
        BadImage: not an image of FILE_FORMATS, truncated, or larger than MOST_PIXELS.
    """
    try:
        with open_image(file_name) as image:
            return to_array(image, image_format)
    except Exception as error:  # a broken file can raise anything in a decoder
        raise BadImage(f"image {file_name} cannot be read: {_what(file_name) or _reason(error)}") from error


def upright_size(file_name: str | Path) -> tuple[int, int]:
    """Width and height of an image rotated by its EXIF tag, without decoding it; BadImage as :func:`read_image`."""
    try:
        with open_image(file_name) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Exception as error:  # as above
        raise BadImage(f"image {file_name} cannot be read: {_what(file_name) or _reason(error)}") from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)  # not the file's name again


def _what(file_name: str | Path) -> str:
    if not os.path.isfile(file_name):
        return ""
    with suppress(OSError), open(file_name, "rb") as file:
        return what_it_is(file.read(512))
    return ""


@contextmanager
def open_image(
    file_name: str | Path, formats: tuple[str, ...] = FILE_FORMATS, most: int = MOST_PIXELS
) -> Iterator[Image.Image]:
    """Open an image file and check its size, without decoding it.

    Raises:
        TooManyPixels: more pixels than ``most``.
        Exception: whatever Pillow raises for a file that is not an image.
    """
    if not stat.S_ISREG(os.stat(file_name).st_mode):
        raise ValueError("not a regular file")  # a pipe or a device may never end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is as low
        Image.init()  # fills Image.OPEN; builds of Pillow differ
        with Image.open(file_name, formats=[f for f in formats if f in Image.OPEN]) as image:
            if image.width * image.height > most:
                limit = f"the limit of {most // 10**6} million"
                raise TooManyPixels(f"{image.width:,} x {image.height:,} pixels, more than {limit}")
            yield image


def to_array(image: Image.Image, image_format: str = "BGR") -> np.ndarray:
    """Convert a PIL image as :func:`read_image` does."""
    assert image_format in ("BGR", "RGB"), image_format
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    array = np.asarray(image.convert("RGB"))
    return array if image_format == "RGB" else np.ascontiguousarray(array[:, :, ::-1])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey (also stored as 32 bits) to 8 bits; Pillow's own conversion saturates. White is 1 in a
    floating-point image whose values are at most 1."""
    values = np.asarray(image)
    if not 0 <= values.min() <= values.max() < 2**16:
        raise ValueError(f"grey values from {values.min()} to {values.max()}; at most 16 bits are read")
    if image.mode == "F" and values.max() <= 1:
        values = values * 255
    is_16_bit = image.mode.startswith("I;16") or values.max() > 255
    return Image.fromarray((values / 257 if is_16_bit else values).round().astype(np.uint8))
