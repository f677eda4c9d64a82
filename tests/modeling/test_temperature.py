"""The softmax temperature: the config's number, or 1 over the teacher's learned logit scale."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling.classifier import TextClassifier, softmax_settings
from vild.teacher.clip import learned_logits
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary


@pytest.fixture
def words():
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(5, 8), dim=1)
    return Vocabulary(tuple("abcde"), rows, ("base",) * 5, logit_scale=24.4, logit_bias=-3.0)


def model(scale, bias=None):
    return SimpleNamespace(
        logit_scale=nn.Parameter(torch.tensor(math.log(scale))),
        **({} if bias is None else {"logit_bias": nn.Parameter(torch.tensor(bias))}),
    )


def test_clips_own_scale_is_exactly_the_papers_temperature(words):
    """e^ln(100) is 100.00000762939453 in float32."""
    learned = learned_logits(model(100))
    assert learned == {"logit_scale": 100.0, "logit_bias": 0.0}
    assert softmax_settings(0.0, replace(words, **learned)) == (0.01, 0.0)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("TEMPERATURE", -0.04, "below 0"),
        ("TEMPERATURE", math.inf, "below 0 or not finite"),
        ("TEST_TEMPERATURE", math.nan, "below 0 or not finite"),
        ("ENSEMBLE_WEIGHT", 3.0, "not within 0 and 1"),
        ("PRE_NMS_TOPK", 0, "below 1"),
    ],
)
def test_a_number_that_would_turn_the_scores_round_is_refused_at_test_too(make_cfg, checkpoint_file, key, value, why):
    with pytest.raises(UserError, match=f"^MODEL.VILD.{key}: {value} is {why}"):
        OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(checkpoint_file), f"MODEL.VILD.{key}", value))


def test_siglips_bias_is_kept():
    assert learned_logits(model(117.33, -12.93)) == {"logit_scale": 117.33, "logit_bias": -12.93}


def test_a_number_overrides_the_teachers(words, caplog):
    assert softmax_settings(0.0, words) == (1 / 24.4, -3.0)
    assert softmax_settings(0.02, words) == (0.02, 0.0)
    assert not caplog.records
    assert softmax_settings(0.0, replace(words, logit_scale=None)) == (0.01, 0.0)
    assert "does not record its teacher's logit scale" in caplog.text


def test_logits_are_the_teachers(words):
    """Of a class: scale * cosine + bias; of the background: scale * cosine."""
    classifier = TextClassifier(words, *softmax_settings(0.0, words))
    regions = F.normalize(torch.randn(3, 8), dim=1)
    logits = classifier(regions)
    background = F.normalize(classifier.background, dim=1)
    torch.testing.assert_close(logits[:, :-1], regions @ words.embeddings.T * 24.4 - 3.0)
    torch.testing.assert_close(logits[:, -1:], regions @ background.T * 24.4)
    (at_test,) = next(classifier.blocks([regions], words.embeddings))
    assert at_test.equal(logits)


def test_another_temperature_at_test_leaves_training_alone(words):
    classifier = TextClassifier(words, 0.04, test_temperature=0.08)
    regions = F.normalize(torch.randn(3, 8), dim=1)
    (at_test,) = next(classifier.blocks([regions], words.embeddings))
    torch.testing.assert_close(at_test * 2, classifier(regions))


def test_a_vocabulary_file_carries_them(tmp_path, words):
    words.save(path := tmp_path / "words.safetensors")
    assert (loaded := Vocabulary.load(path)).logit_scale == 24.4 and loaded.logit_bias == -3.0
    assert loaded.take([2, 1]).logit_scale == loaded.marked_by(words).logit_scale == 24.4


@pytest.mark.parametrize(("key", "value"), [("logit_scale", "24"), ("logit_scale", 0.0), ("logit_bias", None)])
def test_a_broken_scale_is_refused(words, key, value):
    with pytest.raises(UserError, match="is not a teacher's"):
        Vocabulary.from_state({**words.state(), key: value})
