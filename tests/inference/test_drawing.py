"""Labels can be read: within the image, not over one another, whatever characters they have."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from vild.inference.drawing import draw, place_labels


def overlap(a, b) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_labels_lie_within_the_image_and_at_their_boxes():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 200, (50, 2))
    boxes = np.concatenate([corner, (corner + rng.uniform(5, 60, (50, 2))).clip(max=240)], 1).tolist()
    for place, (x0, y0, x1, y1) in zip(place_labels(boxes, [(70, 12)] * 50, (240, 240)), boxes, strict=True):
        assert min(place) >= 0 and max(place) < 240
        assert place[0] <= x1 and place[2] >= x0 - 71 and place[1] <= y1 and place[3] >= y0 - 13


def test_labels_of_one_box_do_not_cover_each_other():
    places = place_labels([(50, 50, 150, 150)] * 8, [(40, 12)] * 8, (240, 240))
    assert not any(overlap(places[i], places[j]) for i in range(8) for j in range(i))


def test_a_label_wider_than_the_image_begins_in_it():
    ((left, *_),) = place_labels([(60, 40, 90, 60)], [(500, 12)], (100, 100))
    assert left == 0


def test_any_characters():
    found = Instances((60, 60), pred_boxes=Boxes(torch.tensor([[5.0, 5, 40, 40]])), pred_classes=torch.tensor([0]),
                      scores=torch.tensor([0.5]))  # fmt: skip
    plain = draw(np.zeros((60, 60, 3), np.uint8), found, ["x"])
    for name in ("$x^2$", "a\nb", "\u30ab\u30e1\u30e9", "", "%s {} \\frac"):
        image = draw(np.zeros((60, 60, 3), np.uint8), found, [name])
        assert image.size == plain.size and np.asarray(image).any()


@pytest.mark.parametrize(("size", "drawn"), [((100, 200), (480, 960)), ((3, 3000), (3, 3000)), ((3, 300), (19, 1920))])
def test_small_images_are_enlarged_within_bounds(detector, size, drawn):
    nothing = detector(np.zeros((100, 100, 3), np.uint8))[:0]
    assert draw(np.zeros((*size, 3), np.uint8), nothing, ["sun"]).size == drawn[::-1]
