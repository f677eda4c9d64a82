"""Run lengths, which C code would walk along without looking."""

import numpy as np
import pytest
from pycocotools import mask as mask_api

from vild.data.annotations import check_annotations
from vild.data.rle import fit_many, fits, run_lengths
from vild.utils.errors import UserError


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for n in range(60):
        height, width = rng.integers(1, 90, 2).tolist()
        mask = np.zeros((height, width), np.uint8, order="F")
        if n % 3:
            mask[rng.random((height, width)) < rng.random()] = 1
        else:
            mask[height // 3 : height // 2 + 1, width // 4 :] = 1
        text = mask_api.encode(mask)["counts"].decode()
        flat = np.concatenate([[0], mask.T.ravel(), [2]])
        assert run_lengths(text) == np.diff((flat[1:] != flat[:-1]).nonzero()[0], prepend=0).tolist()
        assert fits(text, height, width) and fits(run_lengths(text), height, width)
        assert not fits(text, height, width + 1) and not fits("", height, width)


@pytest.mark.parametrize("counts", ["o", "1o", "\u20ac", "~~", "P" * 40, [5, -1, 12], [16], [1 << 70], "0" * 9])
def test_masks_fit_their_image(counts):
    record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}
    document = {
        "images": [{"id": 1, "height": 4, "width": 5, "file_name": "a"}],
        "categories": [{"id": 1, "name": "a"}],
    }
    document["annotations"] = [{**record, "segmentation": {"size": [4, 5], "counts": counts}}]
    with pytest.raises(UserError, match="RLE") as caught:
        check_annotations(document, "f")
    assert "\n" not in str(caught.value)
    document["annotations"] = [{**record, "segmentation": {"size": [4, 5], "counts": [3, 17]}}]
    check_annotations(document, "f")


def test_many_masks_are_checked_as_one_is():
    """Encodings of pycocotools, half of them with a few characters changed, added or taken away."""
    rng = np.random.default_rng(0)
    counts, sizes = [b"", b"P" * 9, b"0" * 9, b"7a0", "€".encode()], [(4, 5)] * 5
    for n in range(1000):
        height, width = rng.integers(1, 40, 2).tolist()
        share = rng.integers(0, 2) if n % 3 else rng.random()  # one run, two, or many
        mask = np.asfortranarray(rng.random((height, width)) < share, np.uint8)
        text = bytearray(mask_api.encode(mask)["counts"])
        for place in rng.integers(0, len(text), rng.integers(0, 3) * (n % 2)).tolist():
            text[place : place + rng.integers(0, 2)] = rng.integers(40, 120, rng.integers(0, 2), np.uint8).tobytes()
        counts.append(bytes(text))
        sizes.append((height, width))

    def alone(text: bytes, height: int, width: int) -> bool:
        try:
            return fits(text.decode("latin1"), height, width)
        except ValueError:
            return False

    expected = [alone(text, *size) for text, size in zip(counts, sizes, strict=True)]
    assert 500 < sum(expected) < 900
    pixels = np.prod(sizes, axis=1)
    assert fit_many(counts, pixels).tolist() == expected
    for size in (1, 2, 3, 7, 64):
        parts = [slice(start, start + size) for start in range(0, len(counts), size)]
        assert np.concatenate([fit_many(counts[part], pixels[part]) for part in parts]).tolist() == expected, size
    assert fit_many([], pixels[:0]).tolist() == []
