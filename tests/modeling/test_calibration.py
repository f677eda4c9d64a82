"""Calibrated scores: exact log-odds, crowding, the fit, and what calibration may not change."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.ops import box_iou

from vild.checkpoint.checkpointer import VildCheckpointer, save_weights
from vild.inference.display import DisplayRules
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import fusion
from vild.modeling.calibration import Calibration, crowding, evidence, fit, log_odds
from vild.modeling.familiarity import Familiarity
from vild.utils.errors import UserError

MONOTONE = Calibration((1.0, 0.0, 0.0), (0.5, 0.0, 0.0, -1.0), 0.01, "dev", 100, 50)
FULL = Calibration((0.8, 0.1, -3.0), (0.5, 0.3, -4.0, -1.0), 0.01, "dev", 100, 50)


def exact_odds(p: np.ndarray) -> np.ndarray:
    return np.log(p) - np.log1p(-p)


@pytest.mark.parametrize("spread", [1, 5, 100])
def test_log_odds_are_exact_even_where_the_score_is_one(spread):
    """Against float64, and where float64 saturates too, against the difference to the runner-up."""
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * spread
    double = x.double()
    rest = torch.stack([double[:, [j for j in range(7) if j != k]].logsumexp(1) for k in range(7)], 1)
    torch.testing.assert_close(log_odds(x), (double - rest).clamp(-30, 30).float(), rtol=1e-4, atol=1e-4)
    if spread == 100:
        assert (x.softmax(1) == 1).any()


@pytest.mark.parametrize("variant", ["text", "vild", "image", "ensemble"])
@pytest.mark.parametrize("extra", [0, 1])
def test_evidence_is_of_the_variants_own_score(variant, extra):
    torch.manual_seed(0)
    logits = [torch.randn(20, 6) * 2 for _ in range(2 if variant == "ensemble" else 1)]
    others, novel = [torch.randn(20, 5) for _ in range(extra)], torch.tensor([False, True, False, True, False])
    odds, margin = evidence(variant, logits, novel, 2 / 3, others)
    scores = fusion.variant_scores(variant, logits, novel, 2 / 3, others)
    expected = logits[0][:, :-1] - logits[0][:, -1:]
    if variant == "image":
        expected = torch.zeros(20, 5)
    elif variant == "ensemble" or extra:  # novel classes are the image heads' alone
        scores[:, novel] = fusion.variant_scores("image", logits[1:], novel, 0, others)[:, novel]
        expected[:, novel] = 0
    np.testing.assert_allclose(odds, exact_odds(scores.double().numpy()), rtol=2e-3, atol=2e-3)
    assert margin.equal(expected)


def test_crowding_is_the_best_better_detections_overlap_times_score():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60], [0, 0, 10, 10]])
    assert crowding(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6])).tolist() == pytest.approx([0, 0.45, 0, 0.9])
    assert crowding(boxes[:0], torch.zeros(0)).shape == (0,)
    assert crowding(boxes[[0, 0]], torch.tensor([0.5, 0.5])).tolist() == [0, 0]  # neither is better
    order = torch.tensor([2, 0, 3, 1])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert crowding(boxes[order], scores[order]).equal(crowding(boxes, scores)[order])


def test_the_fit_finds_the_probabilities_that_made_the_data():
    """A thousand images of far-apart boxes that are right with sigmoid(0.7 log-odds + 0.2 margin - 1)."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[100.0 * n, 0, 100 * n + 10, 10] for n in range(20)])
    odds = torch.randn(1000, 20, generator=generator) * 2
    margins = torch.randn(1000, 20, generator=generator) * 2
    right = torch.rand(1000, 20, generator=generator) < (0.7 * odds + 0.2 * margins - 1).sigmoid()
    found = fit([boxes] * 1000, odds, margins, lambda _: (right.flatten(), torch.ones(20_000, dtype=torch.bool)),
                temperature=0.01, data_set="made")  # fmt: skip
    assert found.alone == pytest.approx((0.7, 0.2, -1.0), abs=0.06)
    assert (found.final[0], found.final[1], found.final[3]) == pytest.approx((0.7, 0.2, -1.0), abs=0.06)
    assert found.detections == 20_000 and found.right == int(right.sum())


def test_separable_data_give_finite_weights():
    boxes, odds = torch.tensor([[0.0, 0, 10, 10]]), torch.linspace(-5, 5, 200)[:, None]
    right = odds[:, 0] > 0
    found = fit([boxes] * 200, odds, torch.zeros_like(odds), lambda _: (right, torch.ones(200, dtype=torch.bool)),
                temperature=0.01, data_set="made")  # fmt: skip
    assert all(np.isfinite(found.alone + found.final)) and found.alone[1] == 0


@pytest.fixture
def calibrated(make_cfg, checkpoint_file):
    def make(calibration):
        found = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(checkpoint_file)))
        found.model.roi_heads.calibration = calibration
        return found

    return make


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)[:, :, ::-1].copy())


def test_a_monotone_map_of_the_score_keeps_boxes_classes_and_order(calibrated, image):
    """And so AP: it depends on the order alone."""
    before, after = (calibrated(c)(image, threshold=0) for c in (None, MONOTONE))
    assert len(before) == len(after) > 20
    assert (after.scores.diff() <= 0).all()
    key = lambda found, i: (*found.pred_boxes.tensor[i].tolist(), int(found.pred_classes[i]))  # noqa: E731
    places = {key(after, i): i for i in range(len(after))}
    ranks = [places[key(before, i)] for i in range(len(before))]
    distinct = before.scores.diff() < -1e-6  # equal or saturated scores may change places
    assert all(b > a for (a, b), d in zip(pairwise(ranks), distinct, strict=True) if d)
    expected = 0.5 * exact_odds(before.scores.double().numpy()) - 1
    middle = (before.scores > 0.01) & (before.scores < 0.99)
    np.testing.assert_allclose(
        exact_odds(after.scores.double().numpy()[[ranks[i] for i in middle.nonzero()[:, 0]]]),
        expected[middle.numpy()], atol=1e-3,
    )  # fmt: skip


def test_names_that_are_not_shown_compete(calibrated, image):
    """A word's boxes get less where a name of the context is surer: scores are those among all names."""
    detector = calibrated(FULL)
    names = detector.trained
    asked = detector.with_vocabulary(names.take([3]))
    asked._offered = detector.model.roi_heads.classifier.class_set([names.take([3]), names.take([0, 1, 2, 4, 5])])
    together = detector.with_vocabulary(names.take([3, 0, 1, 2, 4, 5]), context=False)
    whole = together(image, across_names=1.0, threshold=0)
    mine = whole.scores[whole.pred_classes == 0]
    assert asked(image, across_names=1.0, threshold=0).scores.equal(mine) and len(mine)


def test_calibrated_scores_are_those_beside_the_names_of_training(calibrated, image):
    """Of a vocabulary, too: without them absent words were found ten times as often. Without calibration a vocabulary
    is used as it is."""
    for detector in (calibrated(FULL), calibrated(None)):
        few = detector.trained.take(detector(image, threshold=0).pred_classes.unique()[:2].tolist())
        asked = (detector.with_vocabulary(few, context=context) for context in (None, True, False))
        default, beside, alone = (each(image, across_names=1.0, threshold=0).scores for each in asked)
        is_calibrated = detector.model.roi_heads.calibration is not None
        assert default.equal(beside if is_calibrated else alone)
        assert len(default) and beside.max() < alone.max()


def test_thresholds_are_of_calibrated_scores(calibrated, image):
    whole = calibrated(FULL)
    names = whole.trained.take(range(10))
    detector = partial(whole.with_vocabulary(names), across_names=1.0)
    found = detector(image, threshold=0)
    middle = found.scores.median().item()
    some = detector(image, threshold=middle)
    assert 0 < len(some) < len(found) and some.scores.equal(found.scores[found.scores > middle])
    number = int(found.pred_classes[0])
    own = whole.with_vocabulary(names, thresholds={names.names[number]: 1.0})(image, across_names=1.0, threshold=0)
    assert number not in own.pred_classes and len(own) == (found.pred_classes != number).sum()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_carry_it_and_a_key_turns_it_off(calibrated, make_cfg, image, tmp_path, suffix):
    full = replace(FULL, images=Familiarity((0.0,) * 384, (1.0,) * 384, 1.5))
    mine, path = calibrated(full), tmp_path / f"model{suffix}"
    if suffix == ".pth":
        VildCheckpointer(mine.model, str(tmp_path)).save("model")
    else:
        save_weights(path, mine.model)
    again = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(path)))
    assert again.model.roi_heads.calibration == full and again(image, threshold=0).scores.equal(
        mine(image, threshold=0).scores
    )
    off = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(path), "MODEL.VILD.CALIBRATION", False))
    assert off(image, threshold=0).scores.equal(calibrated(None)(image, threshold=0).scores)


def test_training_from_calibrated_weights_starts_without(calibrated, make_cfg, tmp_path):
    """Its scores will be others."""
    detector = calibrated(FULL)
    save_weights(tmp_path / "model.safetensors", detector.model)
    detector.model.roi_heads.calibration = None
    VildCheckpointer(detector.model).load(str(tmp_path / "model.safetensors"), checkpointables=[])
    assert detector.model.roi_heads.calibration is None


@pytest.mark.parametrize(
    "broken",
    [
        3,
        {},
        {**FULL.state(), "alone": [1, 2]},
        {**FULL.state(), "final": [1, 2, 3, float("nan")]},
        {**FULL.state(), "novel": [[1, 2, 3], [1, 2, 3]]},
        {**FULL.state(), "examples": {"image": [1.0] * 3, "word": [1.0] * 3, "slope": 1.0, "near": 0.5}},
        {**FULL.state(), "images": {"mean": [1.0], "spread": [], "limit": 1.0}},
        {**FULL.state(), "images": {"mean": [1.0] * 3, "spread": [1.0] * 3, "limit": 1.0}},
        {**FULL.state(), "images": {"mean": [1.0] * 384, "spread": [1.0] * 384, "limit": 0.0}},
    ],
)
def test_a_broken_calibration_is_one_line(calibrated, make_cfg, tmp_path, monkeypatch, broken):
    detector = calibrated(FULL)
    monkeypatch.setattr(Calibration, "state", lambda _: broken)
    save_weights(tmp_path / "model.safetensors", detector.model)
    with pytest.raises(UserError, match=r"model\.safetensors: its calibration"):
        OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(tmp_path / "model.safetensors")))


@pytest.fixture
def ensemble(make_cfg, vocabulary_file, tmp_path):
    from vild.modeling import build_model

    torch.manual_seed(0)
    save_weights(tmp_path / "m.safetensors", build_model(make_cfg("ensemble")))
    return OpenVocabularyDetector(make_cfg("ensemble", "MODEL.WEIGHTS", str(tmp_path / "m.safetensors")))


@pytest.fixture(params=["vild", "ensemble"])
def either(request, calibrated):
    """A calibrated detector; the ensemble's novel names have numbers of their own."""
    if request.param == "vild":
        return calibrated(FULL)
    found = request.getfixturevalue("ensemble")
    found.model.roi_heads.calibration = replace(FULL, novel=((0.6, 0.0, -2.0), (0.4, 0.0, -2.0, 0.5)))
    return found


def test_permuting_the_words_permutes_the_result(either, image):
    order = torch.randperm(len(either.trained), generator=torch.Generator().manual_seed(0)).tolist()
    one, other = either(image, threshold=0), either(image, either.trained.take(order), threshold=0)
    torch.testing.assert_close(other.scores, one.scores, rtol=1e-3, atol=1e-4)
    assert sorted(other.labels) == sorted(one.labels) and len(set(one.labels)) > 3


def test_batched_equals_one_by_one(either, image):
    images = [image, ImageOps.flip(image), image.resize((90, 60)), ImageOps.mirror(image)]
    for found, alone in zip(either(images, threshold=0), (either(i, threshold=0) for i in images), strict=True):
        assert found.labels == alone.labels and len(found) > 3
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=0, atol=1e-3)


def test_scores_do_not_depend_on_what_another_thread_asks(either, image):
    """Each asks for its own words, half of them another one's too."""
    words = [either.trained.take(range(n, n + 20)) for n in range(0, 40, 10)]
    expected = [either(image, w, threshold=0) for w in words]

    def ask(n: int) -> list:
        return [either(image, words[n], threshold=0) for _ in range(2)]

    with ThreadPoolExecutor(len(words)) as pool:
        for alone, answers in zip(expected, pool.map(ask, range(len(words))), strict=True):
            for found in answers:
                assert found.labels == alone.labels and found.scores.equal(alone.scores) and len(found) > 3


def check_papers_scores(detector, image, monkeypatch) -> None:
    """Without calibration a score is eq. 2 or 5 of the region embeddings at CLIP's 0.01, to the last bit."""
    heads, seen = detector.model.roi_heads, []
    embed = heads._embed
    monkeypatch.setattr(heads, "_embed", lambda pooled: seen.append(embed(pooled)) or seen[-1])
    found = detector(image, threshold=0, across_names=1.0)
    background = F.normalize(heads.classifier.background.detach(), dim=1)
    logits = [(e @ torch.cat([detector.trained.embeddings, background]).T) / 0.01 for e in seen[0][0]]
    expected = logits[0].softmax(1)[:, :-1]
    if heads.variant == "ensemble":
        weight = torch.where(detector.trained.mask("novel"), 1 - 2 / 3, 2 / 3)
        expected = expected**weight * logits[1][:, :-1].softmax(1) ** (1 - weight)
    assert heads.calibration is None and len(found) > 10
    for score, number in zip(found.scores, found.pred_classes, strict=True):
        assert (expected[:, number] == score).any()


@pytest.mark.parametrize("variant", ["vild", "ensemble"])
def test_without_calibration_scores_are_the_papers(variant, calibrated, request, image, monkeypatch):
    detector = calibrated(None) if variant == "vild" else request.getfixturevalue("ensemble")
    check_papers_scores(detector, image, monkeypatch)


def test_the_ensemble_is_calibrated_too(ensemble, image):
    """The identity keeps base scores; those of novel classes become the image head's."""
    is_base = ensemble.trained.mask("base")
    of_base = lambda found: found.scores[is_base[found.pred_classes]]  # noqa: E731
    before = of_base(ensemble(image, across_names=1.0, threshold=0))
    ensemble.model.roi_heads.calibration = replace(MONOTONE, final=(1.0, 0.0, 0.0, 0.0))
    after = of_base(ensemble(image, across_names=1.0, threshold=0))
    count = min(len(before), len(after))
    middle = (before[:count] > 1e-4) & (before[:count] < 0.999)
    assert middle.sum() > 5
    torch.testing.assert_close(after[:count][middle], before[:count][middle], rtol=2e-3, atol=1e-5)


def test_novel_classes_of_an_ensemble_have_numbers_of_their_own(ensemble, image):
    heads = ensemble.model.roi_heads
    heads.calibration = replace(MONOTONE, novel=((1.0, 0.0, 0.0), (0.0, 0.0, 0.0, -2.0)))
    found = ensemble(image, across_names=1.0, threshold=0)
    novel = ensemble.trained.mask("novel")[found.pred_classes]
    torch.testing.assert_close(found.scores[novel], torch.full((int(novel.sum()),), -2.0).sigmoid())
    assert 0 < novel.sum() < len(found) and found.scores[~novel].unique().numel() > 5
    others = torch.tensor([[score for _, score in rows] for rows in found.alternatives])
    assert others.unique().numel() > 5 and (others.diff(dim=1) <= 0).all()
    assert Calibration.from_state(heads.calibration.state()) == heads.calibration
    older = {k: v for k, v in heads.calibration.state().items() if k != "novel"}
    assert Calibration.from_state(older) == replace(heads.calibration, novel=None)


def test_one_box_a_thing_with_alternatives(calibrated, image):
    """No two boxes overlap by more than the limit, whatever their names; each lists the next names of its box."""
    for calibration in (None, FULL):
        detector = calibrated(calibration)
        found, all_of_them = detector(image, threshold=0), detector(image, across_names=1.0, threshold=0)
        overlaps = box_iou(found.pred_boxes.tensor, found.pred_boxes.tensor).fill_diagonal_(0)
        assert overlaps.max() <= DisplayRules.across_names and 0 < len(found) < len(all_of_them)
        for name, others in zip(found.labels, found.alternatives, strict=True):
            (first, high), (second, low) = others
            assert len({name, first, second}) == 3 and 1 >= high >= low >= 0
        assert found.to_dict()["detections"][0]["alternatives"][0].keys() == {"name", "score"}
    alone = detector(image, detector.trained.take([4]), threshold=0)
    assert alone.alternatives == [[]] * len(alone)


def test_another_temperature_than_the_calibrations_is_said(calibrated, make_cfg, tmp_path, caplog):
    save_weights(tmp_path / "model.safetensors", calibrated(FULL).model)
    cfg = ("vild", "MODEL.WEIGHTS", str(tmp_path / "model.safetensors"))
    OpenVocabularyDetector(make_cfg(*cfg))
    assert "was calibrated at temperature" not in caplog.text
    OpenVocabularyDetector(make_cfg(*cfg, "MODEL.VILD.TEST_TEMPERATURE", 0.02))
    assert "was calibrated at temperature 0.01, not 0.02" in caplog.text
