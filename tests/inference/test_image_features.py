"""Boxes and detections from one pass of the backbone are those of the detector."""

import torch
import torch.nn.functional as F

from vild.inference.image_features import ImageFeatures


def test_detections_are_those_of_a_call(detector, image):
    features = ImageFeatures(detector, image)
    found, whole = features.detect(detector._offered), detector(image, threshold=0, across_names=1.0)
    assert len(found) and found.image_size == (100, 150)
    torch.testing.assert_close(found.pred_boxes.tensor, whole.pred_boxes.tensor)
    torch.testing.assert_close(found.scores, whole.scores)
    assert torch.equal(found.pred_classes, whole.pred_classes)


def test_boxes_scale_with_the_image(detector, image):
    features = ImageFeatures(detector, image)
    height, width = features.given["image"].shape[1:]
    assert (height, width) != (100, 150)
    corner = features.scaled(torch.tensor([[0.0, 0, 150, 100], [75, 50, 150, 100]]))
    expected = [[0, 0, width, height], [width / 2, height / 2, width, height]]
    torch.testing.assert_close(corner, torch.tensor(expected, dtype=torch.float32))
    ours, many = features.embed(corner), features.embed(features.proposals.proposal_boxes.tensor)
    assert ours.shape == (2, 64) and torch.allclose(many, F.normalize(many, dim=1), atol=1e-6)
    assert features.embed(corner[:0]).shape == (0, 64)
