"""Whatever file a user has is read upright in 8 bits of RGB, or refused in one line."""

import struct
import zlib

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as detectron2_image
from PIL import Image

from vild.utils.errors import UserError
from vild.utils.images import read_image


@pytest.fixture
def ramp() -> np.ndarray:
    rows, columns = np.mgrid[0:40, 0:60]
    return np.stack([rows * 6, columns * 4, np.full_like(rows, 90)], 2).astype(np.uint8)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_as_detectron2_reads(ramp, tmp_path, image_format):
    Image.fromarray(ramp).save(tmp_path / "a.jpg")
    path = str(tmp_path / "a.jpg")
    assert np.array_equal(read_image(path, image_format), detectron2_image(path, image_format))


def test_turned_upright(ramp, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(ramp).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png", "RGB"), np.rot90(ramp, -1))


def test_sixteen_bits(ramp, tmp_path):
    grey = ramp[:, :, 1]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.repeat(grey[:, :, None], 3, 2))


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_floating_point(ramp, tmp_path, white):
    """White is 1, as in most files of this kind, or that of 8 or 16 bits."""
    grey = ramp[:, :, 1].astype(np.float32)
    Image.fromarray(grey / grey.max() * np.float32(white)).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "F"
    expected = (grey / grey.max() * 255).round()
    assert np.abs(read_image(tmp_path / "a.tif")[:, :, 0] - expected).max() <= 1


def test_cmyk_palette_grey_and_alpha(ramp, tmp_path):
    image = Image.fromarray(ramp)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "cmyk.jpg", "RGB").astype(int) - ramp).max() < 16
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.convert("P").save(tmp_path / "palette.png")
    assert read_image(tmp_path / "grey.png").shape == ramp.shape
    assert np.array_equal(read_image(tmp_path / "alpha.png", "RGB"), ramp)
    assert read_image(tmp_path / "palette.png").shape == ramp.shape


def test_the_first_frame_of_an_animation(ramp, tmp_path):
    frames = [Image.fromarray(np.full_like(ramp, value)) for value in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "a.gif") == 50).all()


def huge_png() -> bytes:
    """A header of 50,000 x 50,000 pixels, and nothing behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def bad_images(ramp: np.ndarray, folder) -> dict:
    """Files that are no images, by what is wrong with them."""
    Image.fromarray(ramp).save(folder / "whole.jpg")
    contents = {
        "text": b"not an image\n" * 20,
        "empty": b"",
        "truncated": (folder / "whole.jpg").read_bytes()[:-200],
        "huge": huge_png(),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "page": b"\r\n<!DOCTYPE html>\n<html><title>404</title></html>",
        "heic": b"\x00\x00\x00\x18ftypheic" + b"\x00" * 64,
    }
    for name, content in contents.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return {name: folder / f"{name}.jpg" for name in contents} | {"missing": folder / "missing.jpg"}


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("text", "identify"),
        ("empty", "identify"),
        ("truncated", "truncated"),
        ("huge", "limit"),
        ("missing", "No such"),
        ("pointer", "it is a Git LFS pointer, not the file itself"),
        ("page", "it is a web page"),
        ("heic", "it is a HEIC image, which is not supported"),
    ],
)
def test_bad_files_are_one_line(ramp, tmp_path, which, reason):
    path = bad_images(ramp, tmp_path)[which]
    with pytest.raises(UserError, match=reason) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
