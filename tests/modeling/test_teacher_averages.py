"""Weights and average distributions of several teachers, against independent NumPy and by property."""

import numpy as np
import pytest
import torch

from tests.modeling.test_objectives import CASES, COUNTS, LISTS, STUDENT, TAU, TEACHER, D, regions, softmax, unit
from vild.modeling.extra_teachers import confidence, region_shares
from vild.modeling.objectives import OBJECTIVES
from vild.modeling.objectives.regions import average_distributions

M, WIDTH, RNG = len(STUDENT), 5, np.random.default_rng(3)
SECOND, WORDS2 = unit(M, WIDTH), unit(len(LISTS["base"]), WIDTH)
SHARES = RNG.dirichlet([2, 2], M).T
ORDER = [2, 0, 3, 1, 6, 5, 4, 7]


def double(x):
    return torch.as_tensor(np.asarray(x), dtype=torch.float64)


def with_second(student=STUDENT, teacher=TEACHER, second=SECOND, words=WORDS2, given=SHARES, **kwargs):
    x = regions(student, teacher, **kwargs)
    cast = lambda y: torch.as_tensor(y, dtype=x.teacher.dtype)  # noqa: E731
    extra = ((cast(second), cast(words)),)
    return type(x)(**{**vars(x), "extra": extra, "shares": torch.as_tensor(given, dtype=torch.float32)})


def reference_confidence(logits):
    values = []
    for row in softmax(logits):
        entropy = -sum(p * np.log(p) for p in row if p > 0)
        values.append(min(max(1 - entropy / np.log(len(row)), 1e-3), 1))
    return np.array(values)


def test_confidence_against_numpy():
    logits = np.array([0.3, -1.2, 0.8, 0.1]) * np.array([0, 0.1, 1, 3, 30, 3000])[:, None]
    found = confidence(double(logits)).numpy()
    np.testing.assert_allclose(found, reference_confidence(logits), rtol=1e-9)
    assert found[0] == 1e-3 and found[-1] == 1 and (np.diff(found[1:]) >= 0).all()
    assert confidence(torch.randn(3, 1)).tolist() == [1, 1, 1]  # with a single word there is no doubt


def test_shares_against_numpy():
    logits = [RNG.normal(size=(5, 4)) * scale for scale in (1, 4, 9)]
    weights = np.array([1, 0.5, 2])
    sure = np.stack([reference_confidence(x) for x in logits]) * weights[:, None]
    found = region_shares([double(x) for x in logits], weights.tolist(), True).numpy()
    np.testing.assert_allclose(found, sure / sure.sum(0), rtol=1e-9)
    fixed = region_shares([double(x) for x in logits], weights.tolist(), False).numpy()
    np.testing.assert_allclose(fixed, np.repeat((weights / weights.sum())[:, None], 5, 1), rtol=1e-9)
    knows_nothing = region_shares([torch.zeros(2, 4)] * 2, [1, 3], True)
    assert torch.allclose(knows_nothing, torch.tensor([[0.25, 0.25], [0.75, 0.75]]))
    assert region_shares([torch.zeros(0, 4)] * 2, [1, 1], True).shape == (2, 0)


def test_average_against_numpy():
    logits = [RNG.normal(size=(M, 6)) * 5 for _ in range(2)]
    expected = sum(share[:, None] * softmax(x) for share, x in zip(SHARES, logits, strict=True))
    found = average_distributions([double(x) for x in logits], double(SHARES)).exp().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    only_first = torch.tensor([[1.0, 1, 1], [0, 0, 0]])
    extreme = average_distributions([torch.eye(3) * 1e4, torch.eye(3).flip(0) * 1e4], only_first)
    assert torch.equal(extreme.exp(), torch.eye(3))


def averages(teacher, second, t):
    """The mean distribution, in NumPy."""
    own, other = softmax(teacher @ LISTS["base"].T / TAU / t), softmax(second @ WORDS2.T / TAU / t)
    return SHARES[0][:, None] * own + SHARES[1][:, None] * other


def reference_soft(student, t):
    p, q = averages(TEACHER, SECOND, t), softmax(student @ LISTS["base"].T / TAU / t)
    return t**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()


def reference_hard(student, confidence):
    p, q = averages(TEACHER, SECOND, 1), softmax(student @ LISTS["base"].T / TAU)
    rows, best = np.arange(M), p.argmax(1)
    return -(np.log(q[rows, best]) * (p[rows, best] > confidence)).mean()


AVERAGED = {
    "soft_targets": ({"temperature": 3.0}, lambda s: reference_soft(s, 3.0)),
    "hard_targets": ({"confidence": 0.4}, lambda s: reference_hard(s, 0.4)),
}


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_distributions(name):
    parameters, reference = AVERAGED[name]
    value = OBJECTIVES[name](x := with_second(), **parameters)
    np.testing.assert_allclose(value.item(), reference(STUDENT), rtol=2e-5)
    value.backward()
    direction = RNG.normal(size=STUDENT.shape)
    slope = (reference(STUDENT + 1e-6 * direction) - reference(STUDENT - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose((x.student.grad.numpy() * direction).sum(), slope, rtol=2e-3, atol=1e-5)
    permuted = with_second(STUDENT[ORDER], TEACHER[ORDER], SECOND[ORDER], given=SHARES[:, ORDER])
    assert OBJECTIVES[name](permuted, **parameters).item() == pytest.approx(value.item(), rel=1e-5)
    twice = with_second(second=TEACHER, words=LISTS["base"])
    alone = OBJECTIVES[name](regions(), **parameters).item()
    assert OBJECTIVES[name](twice, **parameters).item() == pytest.approx(alone, rel=1e-5) != value.item()


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_distributions_at_the_edges(name):
    none = np.zeros((0, D))
    empty = with_second(
        none, none, np.zeros((0, WIDTH)), given=SHARES[:, :0], counts=(0, 0), maps=[np.zeros((0, 2, 1, 1))] * 3
    )
    (value := OBJECTIVES[name](empty)).backward()
    assert value.item() == 0 and empty.student.grad is not None
    half = with_second(dtype=torch.bfloat16, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        value = OBJECTIVES[name](half)
    value.backward()
    assert value.isfinite() and half.student.grad.isfinite().all() and half.student.grad.abs().sum() > 0


@pytest.mark.parametrize("case", [c for c in CASES if not OBJECTIVES[c.split()[0]].pairwise])
def test_a_teachers_weight_is_of_each_region(case):
    """A weighted mean over the regions: what each alone would cost, times its weight (0.5 everywhere: half)."""
    (parameters, reference), weights = CASES[case], RNG.uniform(size=M)

    def loss(given):
        x = regions(counts=COUNTS)
        return OBJECTIVES[case.split()[0]](type(x)(**{**vars(x), "weights": double(given)}), **parameters).item()

    if case == "contrast":  # a single region has no negatives
        alone = -np.log(softmax(STUDENT @ TEACHER.T / parameters["temperature"]).diagonal())
    else:
        alone = np.array([reference(STUDENT[i : i + 1], TEACHER[i : i + 1]) for i in range(M)])
    np.testing.assert_allclose(loss(weights), (alone * weights).mean(), rtol=2e-5)
    assert loss(np.full(M, 0.5)) == pytest.approx(OBJECTIVES[case.split()[0]](regions(), **parameters).item() / 2)
