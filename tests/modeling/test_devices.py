"""Distillation, the losses of classes, scores and calibration stay on their device and do not wait for it: no tensor of
another one, nothing that needs a value or a count from there. PyTorch's fake tensors (a device, no values) show it."""

import copy

import pytest
import torch
from benchmarks.launches import Launches
from detectron2.structures import Boxes, Instances
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorDeviceMismatchError, FakeTensorMode

from tests.modeling.test_objectives import COUNTS, MAPS, STUDENT, TEACHER, D, unit
from vild.modeling import fusion, losses
from vild.modeling.calibration import Calibration, evidence
from vild.modeling.classifier import TextClassifier
from vild.modeling.distillation import Distillation, image_maps, region_maps
from vild.modeling.extra_teachers import ExtraTeachers
from vild.modeling.familiarity import Familiarity, image_statistics
from vild.modeling.objectives import OBJECTIVES, parse_objectives
from vild.modeling.schedule import parse_loss_weights, weigh
from vild.vocabulary.vocabulary import Vocabulary

M, WIDTH, FEATURES = sum(COUNTS), 6, 9
SPLITS = ("base", "base", "novel", "base", "novel")


@pytest.fixture
def fake():
    return FakeTensorMode()


def gpu(fake, x):
    """A copy of a tensor, an array, a module or regions on a GPU."""
    if isinstance(x, nn.Module):
        x = copy.deepcopy(x)
        for part in x.modules():
            for key, value in part._buffers.items():
                part._buffers[key] = gpu(fake, value)
            for key, value in part._parameters.items():
                part._parameters[key] = None if value is None else nn.Parameter(gpu(fake, value.detach()))
        return x
    if isinstance(x, Instances):
        return Instances(x.image_size, **{key: gpu(fake, value) for key, value in x.get_fields().items()})
    if isinstance(x, Boxes):
        return Boxes(gpu(fake, x.tensor))
    x = torch.as_tensor(x)
    x = fake.from_tensor(x.float() if x.dtype == torch.float64 else x)
    with fake:
        return x.to("cuda")


def words(width=D):
    return Vocabulary(tuple("abcde"), torch.from_numpy(unit(5, width)).float(), SPLITS)


def test_another_device_and_a_wait_are_seen(fake):
    x = gpu(fake, torch.ones(3))
    with fake, pytest.raises(FakeTensorDeviceMismatchError):
        x + torch.ones(3)
    with fake, pytest.raises(DynamicOutputShapeException):
        x[x > 0]


@pytest.mark.parametrize("by", ["projections", "average", None])
def test_distillation(fake, by):
    """All objectives at once, with a list of words, maps, an extra teacher and weights of losses."""
    over = {} if by else {"OVER": "concepts"}
    objectives = parse_objectives([{"NAME": n, **(over if n == "soft_targets" else {})} for n in OBJECTIVES])
    if by:
        objectives = [o for o in objectives if not (o.function.needs_maps or o.function.pairwise)]
    module = gpu(fake, Distillation(objectives, 0.5, {"concepts": torch.ones(4, D)}))
    classifier = gpu(fake, TextClassifier(words(), 0.01, bias=1.0))
    extra = by and gpu(fake, ExtraTeachers(FEATURES, [words(WIDTH)], [2.0], words().names, 0.01, by, "confidence"))
    fields = {"embeddings": TEACHER, "embeddings_1": unit(M, WIDTH), "maps": MAPS[2]}
    parts = zip(*(torch.from_numpy(value).split(COUNTS) for value in fields.values()), strict=True)
    distill = [gpu(fake, Instances((64, 64), **dict(zip(fields, part, strict=True)))) for part in parts]
    roi_features, level = gpu(fake, MAPS[0]), gpu(fake, torch.ones(len(COUNTS), 7, 8, 8))
    of_images = [((0, 0, 60, 50), gpu(fake, torch.ones(5, 2, 3)))] * len(COUNTS)
    roi_adapter, image_adapter = (gpu(fake, nn.Conv2d(channels, 5, 1)) for channels in (6, 7))
    student, features = gpu(fake, STUDENT), gpu(fake, torch.ones(M, FEATURES))
    with fake:
        maps = region_maps(roi_features, distill, roi_adapter) | image_maps(level, 8, of_images, image_adapter)
        found = module.losses(student, features, distill, classifier, extra, 0.5, maps)
        found = weigh(found, parse_loss_weights([{"LOSS": "loss_l1", "WEIGHT": {"FROM": 1, "TO": 0}}]), 0.5)
    assert len(found) == len(objectives) * (2 if by == "projections" else 1)
    assert {value.device.type for value in found.values()} == {"cuda"}


def test_losses_of_sampled_regions(fake):
    classifier, labels = gpu(fake, TextClassifier(words(), 0.01, bias=1.0)), gpu(fake, torch.arange(M) % 6)
    student, old = gpu(fake, STUDENT), gpu(fake, TEACHER)
    with fake:
        loss = losses.text_loss(classifier(student), labels, classifier.base) + losses.image_loss(student, old)
    assert loss.device.type == "cuda"


@pytest.mark.parametrize("variant", ["text", "vild", "image", "ensemble"])
@pytest.mark.parametrize("extra", [0, 1])
def test_scores_and_calibration(fake, variant, extra):
    classifier, text = gpu(fake, TextClassifier(words(), 0.01, bias=1.0)), gpu(fake, unit(5, WIDTH))
    own, boxes = [gpu(fake, STUDENT)] * (2 if variant == "ensemble" else 1), gpu(fake, torch.ones(M, 4))
    others, level = [gpu(fake, unit(M, WIDTH))] * extra, gpu(fake, torch.ones(1, 3, 4, 4))
    numbers = (1.0, 0.5, 0.0), (1.0, 0.5, -1.0, 0.0)
    novel_numbers = numbers if variant == "ensemble" else None
    calibration = Calibration(*numbers, 0.01, "dev", 100, 50, Familiarity((0.0,) * 6, (1.0,) * 6, 1.0), novel_numbers)
    with fake:
        (block,) = classifier.blocks(own + others, classifier.text, [text] * extra)
        logits, of_others, novel = block[: len(own)], block[len(own) :], ~classifier.base
        scores = fusion.variant_scores(variant, logits, novel, 2 / 3, of_others)
        odds, margin = evidence(variant, logits, novel, 2 / 3, of_others)
        calibrated = calibration.scores(boxes, odds[:, 0], margin[:, 0], novel[scores.argmax(1)])
        alone = calibration.alone_scores(odds, margin, novel)
        distance = calibration.images.distance(image_statistics([level]))
    assert {x.device.type for x in (scores, calibrated, alone, distance)} == {"cuda"}


def test_scores_send_no_numbers_to_the_device():
    """Fake tensors do not show ``new_tensor``, after whose copy the host waits."""
    scores, novel = torch.zeros(7, 5, device="meta"), torch.zeros(5, dtype=torch.bool, device="meta")
    with Launches() as counter:
        fusion.ensemble_scores(scores, scores, novel)
        fusion._kth_at_least(scores, 100)
    assert counter.launches and not counter.transfers
