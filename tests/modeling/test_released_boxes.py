"""The released model's boxes, proposals, pooling, scores and masks against a few lines of NumPy. The similar
convention of Detectron2 or PyTorch must fail the same comparison."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torchvision.ops import roi_align

from tests.modeling.agreement import agrees
from vild.modeling import fusion
from vild.modeling.released.boxes import ReleasedBoxTransform, clip, upright
from vild.modeling.released.masks import paste_masks
from vild.modeling.released.pooler import ReleasedPooler, assign_levels
from vild.modeling.released.roi_heads import ReleasedROIHeads
from vild.modeling.released.rpn import choose_proposals

RNG = np.random.default_rng(0)


def random(*shape) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


# boxes


def decoded(deltas, boxes, weights):
    """(dx, dy, dw, dh) and xyxy; from x1 to x2 a box is x2 - x1 + 1 wide."""
    out = np.empty_like(boxes, dtype=np.float64)
    for axis in (0, 1):
        size = boxes[:, axis + 2] - boxes[:, axis] + 1.0
        centre = boxes[:, axis] + size / 2 + deltas[:, axis] / weights[axis] * size
        new = size * np.exp(np.minimum(deltas[:, axis + 2] / weights[axis + 2], np.log(1000 / 16)))
        out[:, axis], out[:, axis + 2] = centre - new / 2, centre + new / 2 - 1
    return out


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_boxes_hold_their_last_pixel(weights):
    corner = RNG.uniform(0, 500, (200, 2))
    boxes = np.concatenate([corner, corner + RNG.uniform(0, 60, (200, 2))], 1).astype(np.float32)
    deltas = random(200, 4) * np.float32(weights) * 0.5
    deltas[:3, 2:] = 100 * np.float32(weights[2:])  # more than the clamp
    expected = decoded(deltas, boxes, weights)
    mine, theirs = ReleasedBoxTransform(weights), Box2BoxTransform(weights)
    deltas, boxes = torch.from_numpy(deltas), torch.from_numpy(boxes)
    assert agrees(mine.apply_deltas(deltas, boxes), expected, 1e-5)
    assert not agrees(theirs.apply_deltas(deltas, boxes), expected, 1e-5)
    back = mine.get_deltas(boxes[3:], mine.apply_deltas(deltas, boxes)[3:])
    assert torch.allclose(back, deltas[3:], atol=2e-3)


def test_boxes_end_at_the_last_pixel():
    boxes = torch.tensor([[-3.0, -4.0, 500.0, 600.0], [10.0, 20.0, 30.0, 40.0]])
    assert clip(boxes, (100, 200)).tolist() == [[0, 0, 199, 99], [10, 20, 30, 40]]


def test_corners_come_in_order():
    """TensorFlow's NMS accepts a box's corners in any order, torchvision's does not: only with ordered corners does one
    of two similar boxes, inverted by half a pixel, suppress the other."""
    boxes = torch.tensor([[10.0, 5, 9.5, 60], [10, 5.5, 9.5, 60], [30, 30, 40, 40]])
    assert upright(boxes).tolist() == [[9.5, 5, 10, 60], [9.5, 5.5, 10, 60], [30, 30, 40, 40]]
    heads = object.__new__(ReleasedROIHeads)
    kept = [fusion.best_detections(b, torch.ones(3, 1), 0, 0.5, 300)[3].tolist() for b in (
        ReleasedROIHeads._clip(heads, boxes, (64, 64)), clip(boxes, (64, 64)))]  # fmt: skip
    assert kept[0] == [0, 2] != kept[1]


# proposals


def overlap(a, b):
    size = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    inside = size[0] * size[1]
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inside / (sum(area) - inside + 1e-8)


def chosen(levels, logits, before, after, threshold, fill):
    """Greedy, one box after the other, in Python."""
    everything = []
    for boxes, scores in zip(levels, logits, strict=True):
        scores = (1 / (1 + np.exp(-scores.astype(np.float32)))).astype(np.float32)
        kept = []
        for i in sorted(range(len(boxes)), key=lambda i: -scores[i])[:before]:
            if boxes[i].any() and all(overlap(boxes[i], boxes[j]) < threshold for j in kept):
                kept.append(i)
        everything += [(scores[i], boxes[i]) for i in kept[:after]]
    found = [box for _, box in sorted(everything, key=lambda pair: -pair[0])[:after]]
    return np.array(found + [np.zeros(4)] * ((after - len(found)) if fill else 0))


def test_proposals_are_chosen_as_released():
    levels, logits = [], []
    for count in (120, 40):
        corner = RNG.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corner, corner + RNG.uniform(-0.5, 30, (count, 2))], 1).astype(np.float32)
        boxes[3] = 0
        boxes[4] = [5, 9, 5, 30]  # empty, but kept
        levels.append(boxes)
        logits.append(random(count) * 4)
        logits[-1][::5] = 30 + random(len(logits[-1][::5]))  # their sigmoids are 1: the first is the best
    tensors = [[torch.from_numpy(x) for x in xs] for xs in (levels, logits)]
    for before, after, fill in ((1000, 1000, True), (1000, 1000, False), (50, 30, True), (100, 60, False)):
        expected = chosen(levels, logits, before, after, 0.7, fill)
        boxes, logit = choose_proposals(*tensors, before, after, 0.7, fill)
        assert boxes.shape == expected.shape and np.array_equal(boxes.numpy(), expected.astype(np.float32))
        assert len(logit) == len(boxes) and torch.equal(logit.isinf(), ~boxes.any(1))
        if after == 1000:
            assert (boxes == torch.tensor([5.0, 9, 5, 30])).all(1).any()


# pooling


def pooled(maps, box, size):
    """One box [x1, y1, x2, y2] from {level: [C, H, W]}, sample by sample."""
    width, height = box[2] - box[0], box[3] - box[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        level = np.floor(np.log(np.sqrt(np.float32(width * height)) / 224) / np.log(np.float32(2))) + 4
    level = int(np.clip(2 if np.isnan(level) else level, 2, 6))
    feature, stride = maps[level], 2**level
    out = np.empty((len(feature), size, size))
    for i in range(size):
        for j in range(size):
            y, x = (box[1] + (i + 0.5) * height / size) / stride, (box[0] + (j + 0.5) * width / size) / stride
            (y0, x0), last = np.maximum(np.floor([y, x]), 0).astype(int), np.array(feature.shape[1:]) - 1
            y0, x0 = min(y0, last[0]), min(x0, last[1])
            y1, x1, a, b = min(y0 + 1, last[0]), min(x0 + 1, last[1]), y - y0, x - x0
            top = (1 - b) * feature[:, y0, x0] + b * feature[:, y0, x1]
            out[:, i, j] = (1 - a) * top + a * ((1 - b) * feature[:, y1, x0] + b * feature[:, y1, x1])
    return out


BOXES = np.float32(
    [
        [0, 0, 40, 30],  # at two borders
        [200, 180, 255, 255],  # at the others: the last pixel of a canvas of 256
        [31.3, 47.9, 111.2, 93.1],
        [0, 0, 255, 255],
        [17, 20, 17.4, 200],  # thin
        [50, 60, 50, 90],  # empty
        [0, 0, 0, 0],
        [90, 40, 89.4, 80],  # inverted by less than a pixel, as decoding can leave it
        [90, 40, 89.4, 39.5],  # in both directions
        [10, 10, 122, 122],  # a side of 112 exactly
    ]
)


def test_levels():
    sides = np.float32([1, 55.9, 56, 111.9, 112, 224, 447.9, 448, 896, 4000])
    boxes = torch.from_numpy(np.stack([0 * sides, 0 * sides, sides, sides], 1))
    assert assign_levels(boxes, 2, 6).tolist() == [2, 2, 2, 2, 3, 4, 4, 5, 6, 6]
    odd = torch.tensor([[5.0, 5, 5, 9], [5, 5, 4, 9], [0, 0, 0, 0], [5, 5, 4.5, 4.5]])
    assert assign_levels(odd, 2, 6).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("size", [7, 14])
def test_pooling(size):
    maps = {level: random(3, 256 // 2**level, 256 // 2**level) for level in range(2, 7)}
    strides, tensors = [2**level for level in maps], [torch.from_numpy(x)[None] for x in maps.values()]
    expected = np.stack([pooled(maps, box.astype(np.float64), size) for box in BOXES])
    boxes = [Boxes(torch.from_numpy(BOXES))]
    mine = ReleasedPooler(size, strides)
    assert agrees(mine(tensors, boxes), expected)
    assert mine(tensors, [Boxes(torch.zeros(0, 4))]).shape == (0, 3, size, size)
    two = mine([torch.cat([x, 2 * x]) for x in tensors], [boxes[0][:4], boxes[0][4:]])
    assert agrees(two[:4], expected[:4]) and agrees(two[4:], 2 * expected[4:])

    class TwoSamples(ReleasedPooler):
        def pool_level(self, feature, rois, stride):
            rois = rois + rois.new_tensor([0, 1, 1, 1, 1]) * (stride / 2)
            return roi_align(feature, rois, self.output_size, 1 / stride, sampling_ratio=2, aligned=True)

    assert not agrees(TwoSamples(size, strides)(tensors, boxes), expected)
    sound = [0, 1, 2, 3, 9]  # Detectron2's levels of inverted boxes are undefined
    unmoved = ROIPooler(size, [1 / s for s in strides], 1, "ROIAlignV2")(tensors, [boxes[0][sound]])
    assert not agrees(unmoved, expected[sound])


# scores and masks


def test_the_released_fusion_is_equation_5():
    c, d = RNG.uniform(size=(2, 6, 9)).astype(np.float32)
    m = (np.arange(9) % 3 > 0).astype(np.float32)  # 1 on base names
    released = (d * c * ((1 - m) * d + m * c)) ** (1 / 3)
    mine = fusion.ensemble_scores(torch.from_numpy(c), torch.from_numpy(d), torch.from_numpy(m == 0))
    assert agrees(mine, released, 1e-5)


def pasted(mask, box, height, width):
    """One mask, with OpenCV."""
    side = len(mask)
    half, centre = (box[2:] - box[:2]) / 2 * (side + 2) / side, (box[:2] + box[2:]) / 2
    x0, y0, x1, y1 = (int(v) for v in (*(centre - half), *(centre + half)))
    w, h = max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)
    inside = cv2.resize(np.pad(mask, 1), (w, h)) > 0.5
    whole = np.zeros((height + 600, width + 600), bool)  # with a margin for boxes outside of the image
    whole[y0 + 300 : y0 + 300 + h, x0 + 300 : x0 + 300 + w] = inside
    return whole[300 : 300 + height, 300 : 300 + width]


def test_masks_are_pasted_as_released():
    boxes = np.float32(
        [[10.3, 20.8, 90.2, 70.6], [-20, -9.5, 40, 30], [100, 80, 170, 140], [30, 30, 38.5, 37], [50, 9, 50, 60],
         [60, 60, 59.5, 70], [200, 200, 260, 260], [0, 0, 119, 99]]
    )  # fmt: skip
    smooth = F.interpolate(torch.from_numpy(random(len(boxes), 1, 5, 5)), (28, 28), mode="bicubic")[:, 0]
    masks = (smooth * 3).sigmoid()
    expected = np.stack([pasted(m, b.astype(np.float64), 100, 120) for m, b in zip(masks.numpy(), boxes, strict=True)])
    mine = paste_masks(masks, torch.from_numpy(boxes), 100, 120).numpy()
    assert mine.shape == expected.shape and (mine != expected).sum() <= 2 and expected[:4].any((1, 2)).all()
    theirs = paste_masks_in_image(masks[:4], Boxes(torch.from_numpy(boxes[:4])), (100, 120), 0.5).numpy()
    assert (theirs != expected[:4]).sum() > 50
    assert paste_masks(masks[:0], torch.zeros(0, 4), 9, 8).shape == (0, 9, 8)
