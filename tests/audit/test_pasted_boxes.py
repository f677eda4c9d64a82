"""Ground truth among proposals is distinguished from a detector's boxes."""

import pytest
import torch

from vild.audit.pasted_boxes import ImageTruth, chance_of, judge_boxes, measure_boxes


def noisy(truth: dict[int, ImageTruth], sigma: float, seed: int = 0) -> dict[int, torch.Tensor]:
    """Every true box, each coordinate off by a normal error, as a detector would find them."""
    generator = torch.Generator().manual_seed(seed)
    boxes = {i: torch.cat([t.base, t.novel]) for i, t in truth.items()}
    return {i: (b + sigma * torch.randn(b.shape, generator=generator)).float() for i, b in boxes.items()}


def with_clutter(found, rows=7):
    """Some more boxes an image, so that their number says nothing."""
    clutter = torch.rand(rows, 4, generator=torch.Generator().manual_seed(1)) * 20 + torch.tensor([0, 0, 30, 30])
    return {i: torch.cat([b, clutter + i % 3]) for i, b in found.items()}


def pasted(truth, count):
    """Noisy boxes, with the true ones of ``count`` novel objects beside them."""
    found, left = with_clutter(noisy(truth, 1.5)), count
    for i, t in truth.items():
        inside = t.novel[((t.novel >= 1) & (t.novel <= 127)).all(1)][:left]
        found[i] = torch.cat([found[i], inside.float()])
        left -= len(inside)
    assert left == 0
    return found


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_detectors_boxes_are_not_flagged(benchmark, sigma, seed):
    found = with_clutter(noisy(benchmark.truth, sigma, seed))
    verdict, evidence = judge_boxes(measure_boxes(found.items(), benchmark.truth))
    assert verdict == "clean", evidence
    assert evidence.startswith("0 of ")


def test_pasted_ground_truth_is_flagged(benchmark):
    for count in (1, 10):
        verdict, evidence = judge_boxes(measure_boxes(pasted(benchmark.truth, count).items(), benchmark.truth))
        assert verdict == "LEAK" and evidence.startswith(f"{count} of "), evidence


def test_base_ground_truth_among_the_proposals_is_no_leak(benchmark):
    noise = with_clutter(noisy(benchmark.truth, 1.5))
    found = {i: torch.cat([b, benchmark.truth[i].base.float()]) for i, b in noise.items()}
    verdict, evidence = judge_boxes(measure_boxes(found.items(), benchmark.truth))
    assert verdict == "clean" and "(base: 0 of" not in evidence


def test_rounded_boxes_meet_by_chance_and_are_judged_by_it():
    """Whole-pixel ground truth and proposals: hits come by noise alone; pasting still shows."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(5, 60, (400, 1, 2), generator=generator).double()
    boxes = torch.cat([corner, corner + torch.randint(20, 60, (400, 1, 2), generator=generator)], 2)
    truth = {i: ImageTruth(torch.zeros(0, 4).double(), b, 128, 128) for i, b in enumerate(boxes)}
    more = torch.tensor([[1.0, 1.0, 9.0, 9.0]]).repeat(3, 1)
    found = {i: torch.cat([(t.novel + 1.5 * torch.randn(1, 4, generator=generator)).round().float(), more])
             for i, t in truth.items()}  # fmt: skip
    measured = measure_boxes(found.items(), truth)
    verdict, evidence = judge_boxes(measured)
    assert measured.grid == 1 and verdict == "clean", evidence
    assert (measured.novel.distance == 0).any()  # the test can fail: some are met to the pixel
    assert judge_boxes(measure_boxes([(i, b[:1].float()) for i, b in enumerate(boxes)], truth))[0] == "LEAK"


def test_edges_and_counts(benchmark):
    """A box at the image's edges is met by clipping; as many boxes as objects everywhere is no accident."""
    whole = torch.tensor([[0.0, 0.0, 128.0, 128.0]])
    truth = {i: ImageTruth(torch.zeros(0, 4).double(), whole.double(), 128, 128) for i in range(9)}
    verdict, evidence = judge_boxes(measure_boxes([(i, whole.repeat(3, 1)) for i in truth], truth))
    assert verdict == "cannot tell" and evidence.startswith("0 of 0 novel boxes")
    shaken = {i: noisy(benchmark.truth, 1.5)[i][len(t.base) :] for i, t in benchmark.truth.items()}
    verdict, evidence = judge_boxes(measure_boxes(shaken.items(), benchmark.truth))
    assert verdict == "LEAK" and evidence.startswith("0 of ")
    one = {i: ImageTruth(t.base[:0], t.novel[:1], 128, 128) for i, t in benchmark.truth.items() if len(t.novel)}
    best = [(i, shaken[i][:1]) for i in one]  # a file of the best box of each image, which shows one object each
    assert judge_boxes(measure_boxes(best, one))[0] == "clean"
    assert judge_boxes(measure_boxes([(10**6, whole)], benchmark.truth))[0] == "cannot tell"
    assert judge_boxes(measure_boxes([(i, torch.zeros(0, 4)) for i in benchmark.truth], benchmark.truth))[0] == "clean"


@pytest.mark.parametrize(("hits", "expected"), [(1, 1e-6), (3, 0.5), (20, 4.0), (1000, 999.0), (5, 9.0)])
def test_the_bound_holds(hits, expected):
    rare = torch.distributions.Poisson(torch.tensor(expected, dtype=torch.float64))
    tail = 1 - rare.log_prob(torch.arange(hits).double()).exp().sum()
    assert float(tail) <= chance_of(hits, expected) <= 1
