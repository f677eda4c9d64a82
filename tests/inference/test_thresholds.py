"""Score thresholds of all words and of single ones, as numbers of any kind."""

import numpy as np
import pytest
import torch

from tests.inference.test_predictor import random_vocabulary, same
from vild.utils.command_line import THRESHOLD
from vild.utils.errors import UserError


def test_thresholds(detector, image):
    words = random_vocabulary(20, detector.trained.width)
    everything = detector(image, words, threshold=0)
    middle = everything.scores.median().item()
    over = detector.with_vocabulary(words)(image, threshold=middle)
    assert same(over, everything[everything.scores > middle])
    counts = torch.bincount(everything.pred_classes, minlength=20)
    often, name = int(counts.argmax()), words.names[int(counts.argmax())]
    limit = everything.scores[everything.pred_classes == often].median().item()
    own = detector.with_vocabulary(words, thresholds={name: limit})(image, threshold=0)
    kept = own.scores[own.pred_classes == often]
    assert 0 < len(kept) < counts[often] and (kept > limit).all()
    assert (own.pred_classes != often).any() and own.scores.min() < limit
    # of a word's threshold and the call's the higher one holds
    for low, high in ((limit, 1e-4), (1e-4, limit)):
        both = detector.with_vocabulary(words, thresholds={name: low})(image, threshold=high)
        scores = both.scores[both.pred_classes == often]
        assert len(scores) and (scores > limit).all()
    # the places that were taken by the suppressed word are others' now
    assert len(own) >= int((everything.pred_classes != often).sum())


def test_numbers_of_any_kind_between_0_and_1(detector, image):
    words = random_vocabulary(3, detector.trained.width)
    name, asked = words.names[0], detector.with_vocabulary(words)
    expected = asked(image, threshold=0.25, across_names=0.5)
    for kind in (np.float32, np.float64, torch.tensor, np.array):
        assert same(asked(image, threshold=kind(0.25), across_names=kind(0.5)), expected)
        own = [detector.with_vocabulary(words, thresholds={name: x})(image) for x in (kind(0.25), 0.25)]
        assert same(*own)
    for wrong in ("0.5", -1, 2, float("nan"), np.float32("nan"), [0.5], torch.ones(2), 10**400, "x\ny"):
        for call, what in (
            (lambda x: asked(image, threshold=x), "threshold "),
            (lambda x: asked(image, across_names=x), "across_names "),
            (lambda x: detector.with_vocabulary(words, thresholds={name: x}), f"thresholds: '{name}' has "),
        ):
            with pytest.raises(UserError, match=r"must be a number between 0 and 1$") as caught:
                call(wrong)
            assert str(caught.value).startswith(what)
    for wrong in ([(name, 0.3)], 0.3, "kite=0.3", np.zeros(3)):
        with pytest.raises(UserError, match="^thresholds: .* is not a dict such as"):
            detector.with_vocabulary(words, thresholds=wrong)


def test_the_default_threshold_is_that_of_the_tools(detector, image):
    words = random_vocabulary(3, detector.trained.width)
    detector = detector.with_vocabulary(words)
    scores = detector(image, threshold=0).scores
    assert THRESHOLD == 0.4 and len(detector(image)) == (scores > 0.4).sum() < len(scores)
    least = dict.fromkeys(words.names, 0.0)
    assert len(detector.with_vocabulary(words, thresholds=least)(image)) == len(scores)  # a word's own comes first
