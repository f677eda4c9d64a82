"""Run lengths, which C code would walk along without looking."""

import numpy as np
import pytest
from pycocotools import mask as mask_api

from vild.data.annotations import check_annotations
from vild.data.rle import fits, run_lengths
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
