"""From logits to detections at test time. Pure functions.

Shapes: R proposals of one image, C classes of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms


def ensemble_scores(text: Tensor, image: Tensor, novel: Tensor, weight: float = 2 / 3) -> Tensor:
    """Geometric mean of the two heads' scores, both [R, C] (eq. 5).

    text^weight * image^(1 - weight) on base classes, the exponents swapped where ``novel``, bool [C].
    """
    # new_full, unlike new_tensor, does not wait for the GPU
    exponent = torch.where(novel, text.new_full((), 1 - weight), text.new_full((), weight))
    return text**exponent * image ** (1 - exponent)


def variant_scores(
    variant: str, logits: list[Tensor], novel: Tensor, weight: float, extra: Sequence[Tensor] = ()
) -> Tensor:
    """Scores [R, C] from logits [R, C + 1] (background last) of the only head or (ensemble) of text and image head: the
    text head's by a softmax that includes the background, the image head's by one over the vocabulary alone.

    ``extra``: logits [R, C] in the spaces of extra teachers. They are further image heads; the scores of all image
    heads are averaged geometrically.
    """
    images = [x[:, :-1] for x in (logits if variant == "image" else logits[1:])] + list(extra)
    if len(images) > 1:
        image = torch.stack([x.log_softmax(1) for x in images]).mean(0).exp()
    elif images:
        image = images[0].softmax(1)
    if variant == "image":
        return image
    text = logits[0].softmax(1)[:, :-1]
    return ensemble_scores(text, image, novel, weight) if images else text


def best_pairs(blocks: Iterable[Tensor], score_threshold: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``limit`` (proposal, class) pairs above the threshold, without holding all of [R, C] in memory.

    Args:
        blocks: scores of successive proposals, [r, C] each, at least one.

    Returns:
        descending scores [K], proposals int64 [K], classes int64 [K].
    """
    best, first, least = [], 0, None
    for block in blocks:
        if least is None:  # the smallest score that is still accepted
            least = torch.nextafter(block.new_full((), score_threshold), block.new_full((), float("inf")))
        least = torch.fmax(least, _kth_at_least(block, limit))  # fmax ignores NaN
        rows, classes = (block >= least).nonzero(as_tuple=True)
        best.append((block[rows, classes], rows + first, classes))
        first += len(block)
        pairs = tuple(torch.cat(x) for x in zip(*best, strict=True))
        # many scores are exactly 1: ties are broken by the order of the proposals, not by topk's
        order = pairs[0].topk(min(limit, len(pairs[0])), sorted=False).indices.sort().values
        score, by_score = pairs[0][order].sort(descending=True, stable=True)
        order = order[by_score]
        best = [(score, pairs[1][order], pairs[2][order])]
        if len(score) == limit:
            least = torch.maximum(least, score[-1])
    return best[0]


def _kth_at_least(scores: Tensor, k: int, share: int = 16) -> Tensor:
    """A lower bound of the k-th best of [R, C]: the k-th best maximum over groups of ``share`` classes, because k
    groups contain one score each that is at least as high. -inf if there are fewer than k groups."""
    groups = scores.shape[1] // share
    if len(scores) * groups < k:
        return scores.new_full((), float("-inf"))
    maxima = scores[:, : groups * share].unflatten(1, (share, groups)).amax(1)
    return maxima.flatten().topk(k, sorted=False).values.min()


def best_detections(
    boxes: Tensor,
    scores: Tensor | Iterable[Tensor],
    score_threshold: float,
    nms_threshold: float,
    per_image: int,
    pre_nms: int = 20000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-class NMS over class-agnostic boxes, then the best ``per_image``.

    Only the best ``pre_nms`` (box, class) pairs enter NMS, which changes nothing as long as ``per_image`` of them
    survive it.

    Args:
        boxes: [R, 4] xyxy.
        scores: [R, C], or blocks of its rows (see :func:`best_pairs`).

    Returns:
        boxes [K, 4], scores [K], classes int64 [K], proposal indices int64 [K], by descending score.
    """
    blocks = (scores,) if isinstance(scores, Tensor) else scores
    score, rows, classes = best_pairs(blocks, score_threshold, pre_nms)
    # only better pairs suppress a pair: once the best ``count`` leave enough survivors, the rest changes nothing
    count = 3 * per_image
    while True:
        # torchvision offsets boxes by class times image side: beyond 2^24 pixels (20,000 names) float32 loses precision
        apart = boxes[rows[:count]].double()
        keep = batched_nms(apart, score[:count].double(), classes[:count], nms_threshold)[:per_image]
        if len(keep) == per_image or count >= len(score):
            return boxes[rows[keep]], score[keep], classes[keep], rows[keep]
        count *= 4
