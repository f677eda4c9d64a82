"""Every objective against independent NumPy, its gradient against finite differences, and its properties."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from tests.conftest import REPOSITORY
from vild.modeling.objectives import OBJECTIVES, RegionBatch, parse_objectives
from vild.modeling.objectives.registry import objective

D, TAU = 8, 0.1
COUNTS = (4, 3, 0, 1)
RNG = np.random.default_rng(0)


def unit(*shape):
    values = RNG.normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


STUDENT, TEACHER, WORDS, BACKGROUND = unit(sum(COUNTS), D), unit(sum(COUNTS), D), unit(5, D), unit(1, D)
LISTS = {"base": WORDS, "background": np.concatenate([WORDS, BACKGROUND]), "concepts.safetensors": unit(30, D)}

# RoI features (C = 6 channels), adapted RoI features and the teacher's maps (T = 5), all 2 x 3
MAPS = [RNG.normal(size=(sum(COUNTS), channels, 2, 3)) for channels in (6, 5, 5)]


def regions(student=STUDENT, teacher=TEACHER, counts=COUNTS, dtype=torch.float64, temperature=TAU, maps=MAPS):
    tensor = lambda x: torch.as_tensor(np.asarray(x), dtype=dtype)  # noqa: E731
    words = {key: tensor(rows) for key, rows in LISTS.items()}
    seen, adapted, of_teacher = map(tensor, maps)
    return RegionBatch(
        tensor(student).requires_grad_(), tensor(teacher), counts, words, temperature,
        seen.requires_grad_(), adapted.requires_grad_(), of_teacher,
    )  # fmt: skip


def trained(x):
    """The inputs with a gradient: embeddings, RoI features, adapted RoI features."""
    return [x.student, x.student_maps, x.adapted_maps]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def smooth_l1(a, b, beta=1.0):
    d = np.abs(a - b)
    return np.where(d < beta, d**2 / 2 / beta, d - beta / 2)


def split(rows):
    return np.split(rows, np.cumsum(COUNTS)[:-1])


def reference_soft(student, teacher, over, t):
    p, q = (softmax(x @ LISTS[over].T / TAU / t) for x in (teacher, student))
    return t**2 * (p * (np.log(p) - np.log(q))).sum(1).mean()


def reference_hard(student, teacher, over, confidence):
    p, q = (softmax(x @ LISTS[over].T / TAU) for x in (teacher, student))
    best = p.argmax(1)
    rows = np.arange(len(p))
    return -(np.log(q[rows, best]) * (p[rows, best] > confidence)).mean()


def reference_distances(student, teacher):
    values = []
    for s, t in zip(split(student), split(teacher), strict=True):
        pairs = [(i, j) for i in range(len(s)) for j in range(i)]
        if pairs:
            a, b = (np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs]) for x in (s, t))
            values.append(smooth_l1(a / a.mean(), b / b.mean()).mean())
    return np.mean(values)


def reference_angles(student, teacher):
    def angle(x, i, j, k):
        u, v = x[i] - x[j], x[k] - x[j]
        return u @ v / np.linalg.norm(u) / np.linalg.norm(v)

    values = []
    for s, t in zip(split(student), split(teacher), strict=True):
        n = len(s)
        triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if len({i, j, k}) == 3]
        if triples:
            values.append(np.mean([smooth_l1(angle(s, *ijk), angle(t, *ijk)) for ijk in triples]))
    return np.mean(values)


CASES = {
    "l1": ({}, lambda s, t: np.abs(s - t).sum(1).mean()),
    "smooth_l1": ({"beta": 0.2}, lambda s, t: smooth_l1(s, t, 0.2).sum(1).mean()),
    "squared": ({}, lambda s, t: ((s - t) ** 2).sum(1).mean()),
    "cosine": ({}, lambda s, t: 1 - (s * t).sum(1).mean()),
    "soft_targets": ({"temperature": 3.0}, lambda s, t: reference_soft(s, t, "base", 3.0)),
    "soft_targets background": ({"over": "background"}, lambda s, t: reference_soft(s, t, "background", 1.0)),
    "soft_targets concepts": (
        {"over": "concepts.safetensors"},
        lambda s, t: reference_soft(s, t, "concepts.safetensors", 1.0),
    ),
    "hard_targets": ({"confidence": 0.6}, lambda s, t: reference_hard(s, t, "base", 0.6)),
    "distances": ({}, reference_distances),
    "angles": ({}, reference_angles),
    "contrast": ({"temperature": 0.2}, lambda s, t: -np.log(softmax(s @ t.T / 0.2).diagonal()).mean()),
}


def reference_tokens(student, adapted, teacher):
    cosine = (adapted * teacher).sum(1) / np.linalg.norm(adapted, axis=1) / np.linalg.norm(teacher, axis=1)
    return 2 - 2 * cosine.mean()


def reference_attention(student, adapted, teacher):
    def where(maps):
        energy = np.array([[[f @ f for f in row] for row in m.transpose(1, 2, 0)] for m in maps])
        return energy / np.sqrt((energy**2).sum((1, 2), keepdims=True))

    return np.mean([np.linalg.norm(d) for d in where(student) - where(teacher)])


MAP_CASES = {"tokens": reference_tokens, "attention": reference_attention}


def test_every_objective_has_a_reference():
    assert {case.split()[0] for case in CASES} | set(MAP_CASES) | {"picture_tokens"} == set(OBJECTIVES)
    assert [o.name for o in parse_objectives([{"NAME": n} for n in OBJECTIVES])] == list(OBJECTIVES)
    assert {name for name in OBJECTIVES if OBJECTIVES[name].needs_maps} == {*MAP_CASES, "picture_tokens"}


def test_the_example_in_contributing_is_an_objective(monkeypatch):
    """Its code registers an objective that the config knows, with the value of its NumPy."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("## An objective")[2]
    code, _, case = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:3]
    known = OBJECTIVES["cosine"]
    monkeypatch.delitem(OBJECTIVES, "cosine")
    exec(code, {"objective": objective, "RegionBatch": RegionBatch, "Tensor": torch.Tensor})
    (parsed,) = parse_objectives([{"NAME": "cosine", "WEIGHT": 2}])
    assert parsed.function.function is not known.function
    assert parsed(regions(), 0.0).item() == pytest.approx(2 * eval(f"{{{case}}}")["cosine"][1](STUDENT, TEACHER))


@pytest.mark.parametrize("case", CASES)
def test_against_numpy(case):
    parameters, reference = CASES[case]
    mine = OBJECTIVES[case.split()[0]](regions(), **parameters)
    np.testing.assert_allclose(mine.item(), reference(STUDENT, TEACHER), rtol=2e-5)  # some are computed in float32


@pytest.mark.parametrize("case", CASES)
def test_gradient_by_finite_differences(case):
    parameters, reference = CASES[case]
    x = regions()
    OBJECTIVES[case.split()[0]](x, **parameters).backward()
    step, direction = 1e-6, RNG.normal(size=STUDENT.shape)
    slope = (reference(STUDENT + step * direction, TEACHER) - reference(STUDENT - step * direction, TEACHER)) / step / 2
    np.testing.assert_allclose((x.student.grad.numpy() * direction).sum(), slope, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_an_images_regions_does_not_matter(case):
    parameters, _ = CASES[case]
    order = [2, 0, 3, 1, 6, 5, 4, 7]
    a, b = (
        OBJECTIVES[case.split()[0]](regions(s, t), **parameters).item()
        for s, t in [(STUDENT, TEACHER), (STUDENT[order], TEACHER[order])]
    )
    assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("name", MAP_CASES)
def test_maps_against_numpy_and_finite_differences(name):
    x, reference = regions(), MAP_CASES[name]
    value = OBJECTIVES[name](x)
    np.testing.assert_allclose(value.item(), reference(*MAPS), rtol=2e-5)
    value.backward()
    for i, found in ((0, x.student_maps.grad), (1, x.adapted_maps.grad)):
        direction = RNG.normal(size=MAPS[i].shape)
        up, down = ([*MAPS[:i], MAPS[i] + s * direction, *MAPS[i + 1 :]] for s in (1e-6, -1e-6))
        slope = (reference(*up) - reference(*down)) / 2e-6
        mine = 0 if found is None else (found.numpy() * direction).sum()
        np.testing.assert_allclose(mine, slope, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whole_images_are_compared_as_regions_are(dtype):
    """Value and gradient of ``tokens``, with the maps of two images instead of regions, and without regions."""
    adapted, of_teacher = (torch.as_tensor(m[:2], dtype=dtype) for m in MAPS[1:])
    adapted.requires_grad_()
    x = regions(np.zeros((0, D)), np.zeros((0, D)), (0, 0), maps=[m[:0] for m in MAPS], dtype=dtype)
    x = replace(x, adapted_images=adapted, teacher_images=of_teacher)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = OBJECTIVES["picture_tokens"](x)
    value.backward()
    close = 2e-5 if dtype == torch.float64 else 2e-2
    np.testing.assert_allclose(value.item(), reference_tokens(None, MAPS[1][:2], MAPS[2][:2]), rtol=close)
    direction = RNG.normal(size=MAPS[1][:2].shape)
    up, down = (reference_tokens(None, MAPS[1][:2] + s * direction, MAPS[2][:2]) for s in (1e-6, -1e-6))
    np.testing.assert_allclose((adapted.grad.double().numpy() * direction).sum(), (up - down) / 2e-6, rtol=50 * close)


@pytest.mark.parametrize("name", MAP_CASES)
def test_maps_are_compared_position_by_position_and_without_their_scale(name):
    value = OBJECTIVES[name](regions()).item()
    mirrored = [m[..., ::-1].copy() for m in MAPS]
    assert OBJECTIVES[name](regions(maps=mirrored)).item() == pytest.approx(value)
    assert OBJECTIVES[name](regions(maps=[7 * m for m in MAPS])).item() == pytest.approx(value)
    like = regions(maps=[MAPS[2]] * 3)
    (same := OBJECTIVES[name](like)).backward()
    assert same.item() == 0 < 0.1 < OBJECTIVES[name](regions(maps=[mirrored[2], mirrored[2], MAPS[2]])).item()
    assert all(g.isfinite().all() for g in [x.grad for x in trained(like)] if g is not None)


@pytest.mark.parametrize("case", [*CASES, *MAP_CASES])
def test_no_region_is_zero_with_a_gradient(case):
    parameters, _ = CASES.get(case, ({}, None))
    x = regions(np.zeros((0, D)), np.zeros((0, D)), (0, 0), maps=[m[:0] for m in MAPS])
    value = OBJECTIVES[case.split()[0]](x, **parameters)
    value.backward()
    assert value.item() == 0 and all(leaf.grad is not None for leaf in trained(x) if case in MAP_CASES)
    assert x.student.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, *MAP_CASES])
def test_half_precision_at_temperature_one_hundredth(case, dtype):
    """With maps as large as a network's, whose sum of squares overflows in float16."""
    parameters, _ = CASES.get(case, ({}, None))
    x = regions(dtype=dtype, temperature=0.01, maps=[300 * m for m in MAPS])
    with torch.autocast("cpu", dtype):
        value = OBJECTIVES[case.split()[0]](x, **parameters)
    value.backward()
    (grad,) = [leaf.grad for leaf in trained(x) if leaf.grad is not None]
    assert value.isfinite() and grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, *MAP_CASES])
def test_autocast_does_not_change_the_loss_of_float32_inputs(case, dtype):
    parameters, _ = CASES.get(case, ({}, None))
    results = []
    for enabled in (False, True):
        x = regions(dtype=torch.float32, temperature=0.01)
        with torch.autocast("cpu", dtype, enabled=enabled):
            value = OBJECTIVES[case.split()[0]](x, **parameters)
        value.backward()
        results.append((value, *[leaf.grad for leaf in trained(x) if leaf.grad is not None]))
    for plain, cast in zip(*results, strict=True):
        torch.testing.assert_close(cast, plain, rtol=1e-5, atol=1e-6)


NOT_ZERO = {"hard_targets", "contrast"}


@pytest.mark.parametrize("case", sorted(set(CASES) - NOT_ZERO))
def test_a_student_equal_to_its_teacher_costs_nothing(case):
    parameters, _ = CASES[case]
    x = regions(TEACHER, TEACHER)
    value = OBJECTIVES[case.split()[0]](x, **parameters)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and x.student.grad.isfinite().all()


def test_soft_targets_at_a_high_temperature_match_logits():
    """T^2 KL tends to half the mean squared difference of centred logits (Hinton et al. 2015, section 2.1)."""
    a, b = (x @ WORDS.T / TAU for x in (STUDENT, TEACHER))
    centred = (a - a.mean(1, keepdims=True)) - (b - b.mean(1, keepdims=True))
    limit = (centred**2).mean(1).mean() / 2
    assert OBJECTIVES["soft_targets"](regions(), temperature=1e3).item() == pytest.approx(limit, rel=1e-2)


def test_hard_targets_of_a_teacher_without_confidence_are_zero():
    x = regions()
    value = OBJECTIVES["hard_targets"](x, confidence=1.0)
    value.backward()
    assert value.item() == 0 and not x.student.grad.any()


def test_relations_are_invariant_to_rotation():
    rotation = np.linalg.qr(RNG.normal(size=(D, D)))[0]
    for name in ("distances", "angles"):
        assert OBJECTIVES[name](regions(TEACHER @ rotation, TEACHER)).item() == pytest.approx(0, abs=1e-5)


def test_many_regions_are_subsampled():
    """To 64 evenly spaced ones, including the first and the last."""
    student, teacher = unit(127, D), unit(127, D)
    for name in ("distances", "angles"):
        all_of_them = OBJECTIVES[name](regions(student, teacher, (127,)))
        picked = OBJECTIVES[name](regions(student[::2], teacher[::2], (64,)))
        assert all_of_them.item() == pytest.approx(picked.item(), rel=1e-6), name


def test_coinciding_regions_do_not_explode_the_gradient():
    student = unit(16, D)
    student[1] = student[0]
    x = regions(student, unit(16, D), (16,))
    OBJECTIVES["angles"](x).backward()
    assert x.student.grad.norm() < 10


def test_two_ranks_contrast_as_one_batch(monkeypatch):
    """The losses of 5 and of 3 regions, weighted by their numbers, equal that of all 8; so do the gradients."""
    whole, parts = regions(), [regions(STUDENT[rows], TEACHER[rows], (5,)) for rows in (slice(5), slice(5, 8))]
    (loss := OBJECTIVES["contrast"](whole)).backward()
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)

    def all_gather(out, mine):
        """Of the numbers of regions, then of their embeddings, padded to one size."""
        if mine.dim() == 1:
            theirs = [torch.tensor([len(part.teacher)]) for part in parts]
        else:
            theirs = [torch.nn.functional.pad(part.teacher.float(), (0, 0, 0, 5 - len(part.teacher))) for part in parts]
        assert torch.equal(mine, theirs[comm.get_rank()])
        for each, values in zip(out, theirs, strict=True):
            each.copy_(values)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    values, gradients = [], []
    for rank, part in enumerate(parts):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        (value := OBJECTIVES["contrast"](part)).backward()
        values.append(value.item() * len(part.student) / 8)
        gradients.append(part.student.grad * len(part.student) / 8)
    assert sum(values) == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat(gradients), whole.student.grad, rtol=1e-4, atol=1e-5)
