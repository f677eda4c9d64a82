"""Proposals dropped before they cost anything."""

import pytest
import torch
from torchvision.ops import box_iou

from vild.data.proposals import select_proposals, select_rows
from vild.utils.errors import UserError


def random_proposals(seed: int, count: int = 120) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 50], 1)
    return boxes, (torch.rand(count, generator=generator) * 20).round() / 20  # with ties


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("min_size", "nms"), [(None, None), (12.0, None), (None, 0.5), (12.0, 0.5)])
def test_what_stays_and_what_goes(seed, min_size, nms):
    boxes, scores = random_proposals(seed)
    rows, dropped = select_rows(boxes, scores, len(boxes), min_size, nms)
    assert rows.unique().numel() == len(rows) and (scores[rows].diff() <= 0).all()
    assert len(rows) + sum(dropped.values()) == len(boxes)
    assert dropped.keys() == {k for k, v in (("min_size", min_size), ("nms", nms)) if v is not None}
    sides = (boxes[:, 2:] - boxes[:, :2]).amin(1)
    large = torch.ones_like(scores, dtype=torch.bool) if min_size is None else sides >= min_size
    assert large[rows].all()
    gone = large.clone()
    gone[rows] = False
    if nms is None:
        assert not gone.any()
        return
    iou = box_iou(boxes, boxes)
    assert (iou[rows][:, rows].fill_diagonal_(0) <= nms + 1e-6).all()
    for row in gone.nonzero()[:, 0]:  # something at least as good, and much the same, stays
        assert ((iou[row, rows] > nms - 1e-6) & (scores[rows] >= scores[row])).any()


def test_the_limit_takes_the_best_of_what_is_left():
    boxes, scores = random_proposals(0)
    every, _ = select_rows(boxes, scores, len(boxes), 12, 0.5)
    few, dropped = select_rows(boxes, scores, 7, 12, 0.5)
    assert torch.equal(few, every[:7]) and sum(dropped.values()) == len(boxes) - len(every)


def test_selecting_again_drops_nothing():
    boxes, scores = random_proposals(1)
    rows, _ = select_rows(boxes, scores, 50, 12, 0.5)
    again, dropped = select_rows(boxes[rows], scores[rows], 50, 12, 0.5)
    assert torch.equal(again, torch.arange(len(rows))) and set(dropped.values()) == {0}


def test_images_are_selected_one_by_one():
    proposals = {i: random_proposals(i, 30 * i) for i in range(4)}  # image 0 has none
    selected, dropped = select_proposals(proposals, 20, 5, 0.6)
    assert selected.keys() == proposals.keys() and len(selected[0][0]) == 0
    each = [select_rows(*proposals[i], 20, 5, 0.6) for i in proposals]
    for i, (rows, _) in enumerate(each):
        assert torch.equal(selected[i][0], proposals[i][0][rows]) and torch.equal(selected[i][1], proposals[i][1][rows])
    assert dropped == {k: sum(numbers[k] for _, numbers in each) for k in ("min_size", "nms")}
    assert select_proposals(proposals, 20)[1] == {}


@pytest.mark.parametrize("wrong", [{"nms": 0}, {"nms": 1.0}, {"nms": float("nan")}, {"min_size": -1}])
def test_a_threshold_without_meaning_is_refused(wrong):
    with pytest.raises(UserError, match="--nms|--min-size"):
        select_proposals({}, 20, **wrong)
