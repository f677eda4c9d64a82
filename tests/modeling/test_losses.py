"""Losses and fusion against independent NumPy of the released TensorFlow formulas, and by property."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vild.modeling import fusion, losses

R, C, D = 12, 9, 16
RNG = np.random.default_rng(0)
TAU = 0.01


def unit(*shape):
    values = RNG.normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def tensor(array):
    return torch.from_numpy(np.asarray(array, np.float64))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


REGIONS, TEXT, BACKGROUND = unit(R, D), unit(C, D), unit(1, D)
LOGITS = REGIONS @ np.concatenate([TEXT, BACKGROUND]).T / TAU
NOVEL = np.arange(C) % 3 == 1
LABELS = np.array([c for c in range(C + 1) if c == C or not NOVEL[c]] * 2)[:R]


def test_cosine_logits():
    mine = losses.cosine_logits(tensor(REGIONS), tensor(TEXT), TAU)
    np.testing.assert_allclose(mine.numpy(), LOGITS[:, :C], rtol=1e-10)


def test_text_loss_leaves_novel_names_out():
    keep = np.append(~NOVEL, True)
    shifted = LOGITS - LOGITS.max(1, keepdims=True)
    denominator = np.log((np.exp(shifted) * keep).sum(1))
    expected = (denominator - shifted[np.arange(R), LABELS]).mean()
    mine = losses.text_loss(tensor(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(~NOVEL))
    np.testing.assert_allclose(mine.item(), expected, rtol=1e-10)


def test_text_loss_does_not_see_novel_logits():
    changed = LOGITS.copy()
    changed[:, :C][:, NOVEL] += 1000
    a, b = (losses.text_loss(tensor(x), torch.from_numpy(LABELS), torch.from_numpy(~NOVEL)) for x in (LOGITS, changed))
    assert a.item() == b.item()


def test_text_loss_differs_from_the_released_masking_by_its_extra_zeros():
    """The released code multiplies novel logits by 0: e^0 each stays in the denominator."""
    released = LOGITS.copy()
    released[:, :C][:, NOVEL] = 0
    probability = softmax(released)[np.arange(R), LABELS]
    keep = np.append(~NOVEL, True)
    extra = np.log((np.exp(LOGITS) * keep).sum(1) + NOVEL.sum()) - np.log((np.exp(LOGITS) * keep).sum(1))
    mine = losses.text_loss(tensor(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(~NOVEL)).item()
    np.testing.assert_allclose(-np.log(probability).mean(), mine + extra.mean(), rtol=1e-8)


def test_image_loss_is_l1_summed_over_dimensions_mean_over_regions():
    targets = unit(R, D)
    expected = np.mean(
        [sum(abs(a - b) for a, b in zip(r, t, strict=True)) for r, t in zip(REGIONS, targets, strict=True)]
    )
    np.testing.assert_allclose(losses.image_loss(tensor(REGIONS), tensor(targets)).item(), expected, rtol=1e-10)


def test_empty_input_gives_a_zero_with_a_gradient():
    logits = torch.zeros(0, C + 1, requires_grad=True)
    embeddings = torch.zeros(0, D, requires_grad=True)
    total = losses.text_loss(logits, torch.zeros(0, dtype=torch.int64), torch.ones(C, dtype=torch.bool))
    total = total + losses.image_loss(embeddings, torch.zeros(0, D))
    total.backward()
    assert total.item() == 0 and logits.grad is not None and embeddings.grad is not None


def test_scores_of_each_variant():
    for variant, expected in (("text", softmax(LOGITS)[:, :C]), ("image", softmax(LOGITS[:, :C]))):
        found = fusion.variant_scores(variant, [tensor(LOGITS)], torch.from_numpy(NOVEL), 2 / 3)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_ensemble_is_the_released_cube_root():
    """Released: (d * c * ((1 - m) * d + m * c)) ^ (1/3), m = 1 for base; the paper's eq. 5 with 2/3."""
    c, d, m = softmax(LOGITS)[:, :C], softmax(REGIONS @ unit(C, D).T / TAU), (~NOVEL).astype(float)
    expected = np.cbrt(d * c * ((1 - m) * d + m * c))
    mine = fusion.ensemble_scores(tensor(c), tensor(d), torch.from_numpy(NOVEL))
    np.testing.assert_allclose(mine.numpy(), expected, rtol=1e-9)


def test_permuting_the_vocabulary_permutes_the_scores():
    order = torch.from_numpy(RNG.permutation(C))
    text, image = tensor(softmax(LOGITS)[:, :C]), tensor(softmax(LOGITS[:, :C]))
    novel = torch.from_numpy(NOVEL)
    straight = fusion.ensemble_scores(text, image, novel)[:, order]
    torch.testing.assert_close(straight, fusion.ensemble_scores(text[:, order], image[:, order], novel[order]))


def boxes_and_scores(rows=60, classes=7):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(rows, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 10 + torch.rand(rows, 2, generator=generator) * 20], 1)
    return boxes, torch.rand(rows, classes, generator=generator).softmax(1)


def test_detections_equal_nms_class_by_class():
    boxes, scores = boxes_and_scores()
    kept, score, classes, rows = fusion.best_detections(boxes, scores, 0.0, 0.5, 1000)
    for c in range(scores.shape[1]):
        alive, expected = scores[:, c].argsort(descending=True).tolist(), []
        while alive:
            best = alive.pop(0)
            expected.append(best)
            alive = [i for i in alive if iou(boxes[best], boxes[i]) <= 0.5]
        assert rows[classes == c].tolist() == expected
    assert (score[:-1] >= score[1:]).all()
    assert torch.equal(kept, boxes[rows]) and torch.equal(score, scores[rows, classes])


def iou(a, b):
    w, h = (min(a[2], b[2]) - max(a[0], b[0])).clamp(min=0), (min(a[3], b[3]) - max(a[1], b[1])).clamp(min=0)
    area = lambda x: (x[2] - x[0]) * (x[3] - x[1])  # noqa: E731
    return w * h / (area(a) + area(b) - w * h)


def test_the_short_way_through_nms_is_exact_while_enough_survive():
    boxes, scores = boxes_and_scores()
    whole = fusion.best_detections(boxes, scores, 0.0, 0.5, 30)
    short = fusion.best_detections(boxes, scores, 0.0, 0.5, 30, pre_nms=200)
    for a, b in zip(whole, short, strict=True):
        assert torch.equal(a, b)


def test_no_proposals_and_no_score_above_the_threshold():
    boxes, scores = boxes_and_scores()
    for b, s, t in ((boxes[:0], scores[:0], 0.0), (boxes, scores, 2.0)):
        assert [len(x) for x in fusion.best_detections(b, s, t, 0.5, 10)] == [0, 0, 0, 0]


def test_temperature_only_sharpens():
    warm = losses.cosine_logits(tensor(REGIONS), tensor(TEXT), 0.04)
    cold = losses.cosine_logits(tensor(REGIONS), tensor(TEXT), 0.01)
    assert torch.equal(warm.argmax(1), cold.argmax(1))
    assert (F.softmax(cold, 1).max(1).values >= F.softmax(warm, 1).max(1).values).all()


def test_base_accuracy_is_of_the_best_base_class_over_the_foreground():
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    labels, base = torch.arange(20) % 5, torch.tensor([True, False, True, True])
    known = [0, 2, 3]
    pairs = [(row[known], label) for row, label in zip(logits.numpy(), labels.tolist(), strict=True) if label < 4]
    expected = np.mean([known[row.argmax()] == label for row, label in pairs])
    assert 0 < expected < 1 and abs(losses.base_accuracy(logits, labels, base) - expected) < 1e-9
    assert losses.base_accuracy(logits, torch.full((20,), 4), base) is None
    assert losses.base_accuracy(logits[:0], labels[:0], base) is None


UNLABELLED = ~NOVEL & (np.arange(C) % 2 == 0)


def test_what_has_no_annotation_may_be_of_a_class_without_annotations():
    """Background regions: -log of the summed probability of the background and the unlabelled classes."""
    keep, rest = np.append(~NOVEL, True), np.append(UNLABELLED, True)
    e = np.exp(LOGITS - LOGITS.max(1, keepdims=True)) * keep
    p = e / e.sum(1, keepdims=True)
    expected = np.where(LABELS == C, -np.log((p * rest).sum(1)), -np.log(p[np.arange(R), LABELS])).mean()
    arguments = tensor(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(~NOVEL)
    mine = losses.text_loss(*arguments, torch.from_numpy(UNLABELLED))
    np.testing.assert_allclose(mine.item(), expected, rtol=1e-10)
    assert (LABELS == C).any() and mine < losses.text_loss(*arguments)
    none = losses.text_loss(*arguments, torch.zeros(C, dtype=torch.bool))
    torch.testing.assert_close(none, losses.text_loss(*arguments), rtol=1e-12, atol=0)


@pytest.mark.parametrize("unlabelled", [(), (UNLABELLED,)])
def test_text_loss_does_not_wait_for_the_device(unlabelled):
    """On the meta device tensors have no values: to ask for one is an error."""
    given = tensor(LOGITS), *map(torch.from_numpy, (LABELS, ~NOVEL, *unlabelled))
    assert losses.text_loss(*(t.to("meta") for t in given)).shape == ()


def test_a_background_region_does_not_move_unlabelled_classes_against_the_background():
    """Their odds stay: the gradient is proportional to their probabilities. Without the mask it is not."""
    background = torch.full((R,), C)
    rest = torch.from_numpy(np.append(UNLABELLED, True))

    def pull(*unlabelled) -> torch.Tensor:
        logits = tensor(LOGITS).requires_grad_()
        losses.text_loss(logits, background, torch.from_numpy(~NOVEL), *unlabelled).backward()
        return (logits.grad / logits.detach().softmax(1))[:, rest]

    ratio = pull(torch.from_numpy(UNLABELLED))
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-6, atol=1e-9)
    assert (pull() - pull()[:, :1]).abs().max() > 0.01
