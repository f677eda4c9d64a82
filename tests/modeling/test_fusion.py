"""Detections from blocks of scores: the same as all at once, and bounded in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import nms

from vild.modeling import build_model, classifier, fusion
from vild.vocabulary.vocabulary import Vocabulary


def case(rows, classes, seed=0):
    """Small boxes in one corner of a large image; scores without ties."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(rows, 2, generator=generator) * 12
    boxes = torch.cat([corner, corner + 2 + torch.rand(rows, 2, generator=generator) * 9], 1)
    boxes[-1] = torch.tensor([1000.0, 1000.0, 1300.0, 1300.0])
    return boxes, (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 4).softmax(1)


def sort_all(boxes, scores, score_threshold, per_image, pre_nms):
    """All pairs sorted, NMS class by class."""
    rows, classes = (scores > score_threshold).nonzero(as_tuple=True)
    order = scores[rows, classes].argsort(descending=True)[:pre_nms]
    rows, classes = rows[order], classes[order]
    score, keep = scores[rows, classes], []
    for c in classes.unique():
        mine = (classes == c).nonzero()[:, 0]
        keep.append(mine[nms(boxes[rows[mine]].double(), score[mine], 0.5)])
    keep = torch.cat(keep).sort().values[:per_image]  # by position, which is by descending score
    return boxes[rows[keep]], score[keep], classes[keep], rows[keep]


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize(
    ("rows", "classes", "score_threshold", "per_image", "pre_nms"),
    [
        (60, 3, 0.0, 20, 100),
        (60, 3, 0.9, 20, 100),
        (300, 40, 0.0, 30, 2000),
        (300, 40, 0.0, 300, 500),
        (50, 5000, 0.0, 40, 900),
        (30, 20_000, 0.001, 50, 20_000),
    ],
)
def test_blocks_give_the_result_of_sorting_everything(rows, classes, score_threshold, per_image, pre_nms, block):
    boxes, scores = case(rows, classes)
    found = fusion.best_detections(boxes, scores.split(block), score_threshold, 0.5, per_image, pre_nms)
    for mine, expected in zip(found, sort_all(boxes, scores, score_threshold, per_image, pre_nms), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_among_equal_scores_the_better_proposal_is_kept(block):
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(50, 1) + torch.rand(50, 4)
    scores = torch.zeros(50, 20).index_fill(1, torch.tensor([3, 7]), 1.0)
    _, score, classes, proposals = fusion.best_detections(boxes, scores.split(block), 0.0, 0.5, 10, 200)
    assert score.tolist() == [1, 1] and sorted(classes.tolist()) == [3, 7] and proposals.tolist() == [0, 0]


def test_a_region_without_finite_scores_hides_no_other():
    boxes, scores = case(40, 64)
    whole = fusion.best_detections(boxes[1:], scores[1:], 0.0, 0.5, 30, 100)
    scores[0] = float("nan")
    for block in (1, 40):
        found = fusion.best_detections(boxes, scores.split(block), 0.0, 0.5, 30, 100)
        assert torch.equal(found[1], whole[1]) and torch.equal(found[3], whole[3] + 1)


def test_nms_is_as_exact_for_the_last_of_20_000_names_as_for_the_first():
    """Class offsets in float32 would round its boxes to two pixels."""
    boxes, _ = case(40, 1)
    scores = torch.zeros(2, 40, 20_000)
    scores[0, :, 0] = scores[1, :, -1] = torch.linspace(0.9, 0.1, 40)
    first, last = (fusion.best_detections(boxes, s, 0.0, 0.5, 40)[3] for s in scores)
    assert torch.equal(first, last) and 1 < len(first) < 40


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest new storage among the results of all operations."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("variant", ["vild", "image", "ensemble"])
def test_memory_is_bounded_with_20_000_names(make_cfg, variant, monkeypatch):
    """1,000 regions: no tensor holds more than a block of logits, and other blocks give the same scores."""
    torch.manual_seed(0)
    model = build_model(make_cfg(variant)).eval()
    names = tuple(f"name {n}" for n in range(20_000))
    embeddings = torch.nn.functional.normalize(torch.randn(20_000, 64), dim=1)
    model.set_vocabulary(Vocabulary(names, embeddings, ("base", "novel") * 10_000))
    heads, boxes = model.roi_heads, case(1000, 1)[0]
    regions = list(torch.nn.functional.normalize(torch.randn(1 + (variant == "ensemble"), 1000, 64), dim=2))
    with torch.inference_mode(), LargestTensor() as largest:
        blocks = heads._score_blocks(regions, heads.classifier.current_classes)
        found = fusion.best_detections(boxes, blocks, 0.0, 0.5, 300)
    assert largest.elements <= classifier.LOGITS_AT_ONCE < 1000 * 20_000
    monkeypatch.setattr(classifier, "LOGITS_AT_ONCE", 10 * classifier.LOGITS_AT_ONCE)  # all at once
    with torch.inference_mode():
        (scores,) = heads._score_blocks(regions, heads.classifier.current_classes)
    torch.testing.assert_close(found[1], scores[found[3], found[2]])
    torch.testing.assert_close(found[1], fusion.best_detections(boxes, scores, 0.0, 0.5, 300)[1])
