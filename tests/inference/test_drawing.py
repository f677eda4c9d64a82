"""Labels can be read: within the image, not over one another, whatever characters they have."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageDraw

from vild.inference import drawing
from vild.inference.drawing import WRONG, draw
from vild.inference.labels import FARTHEST, place_labels


def overlap(a, b) -> bool:
    """Of rectangles with both ends."""
    return min(a[2], b[2]) >= max(a[0], b[0]) and min(a[3], b[3]) >= max(a[1], b[1])


def instances(boxes, size=(60, 60), **fields) -> Instances:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Instances(size, pred_boxes=Boxes(boxes), pred_classes=torch.arange(len(boxes)), **fields)


@pytest.mark.parametrize(("count", "canvas"), [(12, (480, 480)), (50, (240, 240)), (100, (640, 300)), (40, (60, 30))])
def test_labels_lie_within_the_image_near_their_boxes_and_over_no_other(count, canvas):
    rng = np.random.default_rng(count)
    corner = rng.uniform(0, np.array(canvas) * 0.8, (count, 2))
    boxes = np.concatenate([corner, (corner + rng.uniform(5, 120, (count, 2))).clip(max=canvas)], 1)
    sizes = [(width, 18) for width in rng.integers(20, 150, count)]
    places = place_labels(boxes.tolist(), sizes, canvas)
    shown = [place for place in places if place is not None]
    assert len(shown) == count if count == 12 else 0 < len(shown) < count
    for place, (width, height), (x0, y0, x1, y1) in zip(places, sizes, boxes, strict=True):
        if place is not None:
            assert (place[2] - place[0], place[3] - place[1]) == (width, height)
            assert min(place) >= 0 and place[2] < canvas[0] and place[3] < canvas[1]
            across, down = max(x0 - place[2], place[0] - x1, 0), max(y0 - place[3], place[1] - y1, 0)
            assert np.hypot(across, down) <= FARTHEST * height + 1
    assert not any(overlap(a, b) for i, a in enumerate(shown) for b in shown[:i])


def test_a_label_alone_is_above_its_box_and_covers_no_object_where_it_need_not():
    assert place_labels([(50, 50, 150, 150)], [(40, 12)], (240, 240)) == [(50, 38, 90, 50)]
    (place, _) = place_labels([(50, 50, 150, 150), (40, 0, 150, 49)], [(40, 12)] * 2, (240, 240))
    assert not overlap(place, (40, 0, 150, 49)) and not overlap(place, (51, 51, 149, 149))


def test_no_place_and_no_boxes():
    assert place_labels([(0, 0, 5, 5)], [(50, 12)], (40, 40)) == [None] and place_labels([], [], (9, 9)) == []


def test_what_is_written_lies_within_its_label(monkeypatch):
    """Also the end of a name that is wider than the image."""
    rectangles, texts = [], []
    monkeypatch.setattr(drawing, "place_labels", lambda *args: rectangles.extend(place_labels(*args)) or rectangles)
    text = ImageDraw.ImageDraw.text

    def written(pen, at, label, **style):
        texts.append((label, pen.textbbox(at, label, style["font"])))
        text(pen, at, label, **style)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", written)
    found = instances([[5, 5, 40, 40], [30, 20, 60, 60]], scores=torch.tensor([0.5, 0.25]))
    draw(np.zeros((60, 60, 3), np.uint8), found, ["wide " * 40, "gypsum"])
    assert texts[0][0].startswith("wide wide") and texts[0][0].endswith("…") and texts[1][0] == "gypsum 0.25"
    for (label, extent), place in zip(texts, rectangles, strict=True):
        assert place[0] < extent[0] and extent[2] < place[2] and place[1] < extent[1] and extent[3] < place[3], label


def test_right_and_wrong_and_neither(monkeypatch):
    labels = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda p, at, label, **s: labels.append(label) or text(p, at, label, **s)
    )
    found = instances([[2, 2, 20, 20], [40, 2, 58, 20], [20, 40, 40, 58]], scores=torch.tensor([0.9, 0.8, 0.7]))
    drawn = draw(np.zeros((60, 60, 3), np.uint8), found, ["sun", "cow", "die"], right=[True, False, None])
    assert labels == ["✓ sun 0.90", "✗ cow 0.80", "die 0.70"]
    assert (np.asarray(drawn) == WRONG).all(2).any()


def test_masks_tint_what_they_cover():
    mask = np.zeros((1, 60, 60), bool)
    mask[0, 10:30, 10:30] = True
    found = instances([[10, 10, 30, 30]], pred_masks=torch.from_numpy(mask))
    drawn = np.asarray(draw(np.full((60, 60, 3), 100, np.uint8), found, ["sun"], ["novel"], min_side=0))
    assert (drawn[20, 20] == [146, 112, 78]).all() and (drawn[50, 50] == 100).all()  # 0.7 * 100 + 0.3 * (255, 140, 26)


def test_any_characters():
    found = instances([[5, 5, 40, 40]], scores=torch.tensor([0.5]))
    plain = draw(np.zeros((60, 60, 3), np.uint8), found, ["x"])
    for name in ("$x^2$", "a\nb", "\u30ab\u30e1\u30e9", "", "%s {} \\frac"):
        image = draw(np.zeros((60, 60, 3), np.uint8), found, [name])
        assert image.size == plain.size and np.asarray(image).any()


@pytest.mark.parametrize(("size", "drawn"), [((100, 200), (640, 1280)), ((3, 3000), (3, 3000)), ((3, 300), (26, 2560))])
def test_small_images_are_enlarged_within_bounds(size, drawn):
    assert draw(np.zeros((*size, 3), np.uint8), instances([], size), []).size == drawn[::-1]


def test_images_side_by_side():
    red, blue = (Image.new("RGB", (50, 40), colour) for colour in ("red", "blue"))
    sheet = np.asarray(drawing.side_by_side([[red, blue], [blue, red]], ["a", "b"], [["1", "2"], ["3", "4"]]))
    corners = [(y, x) for y in (36, 36 + 40 + 28 + 8) for x in (0, 58)]
    for (y, x), colour in zip(corners, ([255, 0, 0], [0, 0, 255], [0, 0, 255], [255, 0, 0]), strict=True):
        assert (sheet[y : y + 40, x : x + 50] == colour).all()
    assert sheet.shape == (36 + 2 * 76 - 8, 108, 3)
