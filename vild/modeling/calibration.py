"""Calibrated scores: the probability that a detection is right.

After NMS each detection gets another score, from three things: the log-odds of its class, its margin over the
background, and how much a better detection covers it (:func:`crowding`):

    s = sigmoid(a_1 log-odds + b_1 margin + c_1)                      of a box alone
    score = sigmoid(a log-odds + b margin + d crowding(s) + c)

Boxes stay; only their scores and so their order change. ``vild/inference/calibrate.py`` fits the numbers on base
classes. An ensemble has numbers of its own for novel classes: its text head was trained with the names of the base
classes, so what is fitted on them holds for novel ones only where the text head is left out. There the log-odds are the
image head's, which has seen no label of any class.

Shapes: R regions, K detections of one image, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from vild.modeling.familiarity import Familiarity
from vild.vocabulary.regions import Gap

ROUNDS = 3
LARGEST = 30.0  # log-odds beyond this are not told apart


def log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of the softmax of [R, K]. It still ranks where p is 1 to the last bit."""
    log_p = logits.log_softmax(1)
    best, index = logits.max(1, keepdim=True)
    others = (logits - best).exp().scatter(1, index, 0).sum(1, keepdim=True)
    return _to_odds(log_p).scatter(1, index, -others.log().clamp(-LARGEST, LARGEST))


def _to_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    return (log_p - (-torch.expm1(log_p)).log()).clamp(-LARGEST, LARGEST)


def evidence(
    variant: str, logits: Sequence[Tensor], novel: Tensor | None, weight: float, extra: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Log-odds of the variant's score and margin over the background, both [R, C]. Arguments: see
    :func:`vild.modeling.fusion.variant_scores`.

    Novel classes of an ensemble have the image head's log-odds. Where only an image head speaks the margin is 0."""
    images = [x[:, :-1] for x in (logits if variant == "image" else logits[1:])] + list(extra)
    # in ONNX logsigmoid is the logarithm of a sigmoid, which in single precision is 0 or 1 for most classes
    image = torch.stack([F.logsigmoid(log_odds(x).double()) for x in images]).mean(0) if images else None
    if variant == "image":
        odds = _to_odds(image).float()
        return odds, torch.zeros_like(odds)
    text = log_odds(logits[0])[:, :-1]
    margin = (logits[0][:, :-1] - logits[0][:, -1:]).clamp(-LARGEST, LARGEST)
    if image is None:
        return text, margin
    fused = _to_odds(weight * F.logsigmoid(text.double()) + (1 - weight) * image)
    return torch.where(novel, _to_odds(image), fused).float(), margin.masked_fill(novel, 0)


def crowding(boxes: Tensor, scores: Tensor) -> Tensor:
    """For each of K detections the largest IoU * score of a better one, of any class: [K], 0 without one.

    Args:
        boxes: [K, 4] xyxy.
        scores: [K].
    """
    better = scores[None] > scores[:, None]
    return F.pad(box_iou(boxes, boxes) * scores * better, (0, 1)).amax(1)


@dataclass(frozen=True)
class Calibration:
    """The fitted numbers.

    Attributes:
        alone: weights of log-odds and margin, and the constant, of a box alone.
        final: weights of log-odds, margin and crowding, and the constant.
        temperature: of the softmax that they were fitted for.
        data_set: on whose base classes they were fitted.
        detections, right: how many there were, and how many of them were right.
        images: what is known of its images.
        novel: ``alone`` and ``final`` of an ensemble's novel classes.
        examples: makes classes by example comparable with words; None if the teacher was not at hand.
    """

    alone: tuple[float, float, float]
    final: tuple[float, float, float, float]
    temperature: float
    data_set: str
    detections: int
    right: int
    images: Familiarity | None = None
    novel: tuple[tuple[float, float, float], tuple[float, float, float, float]] | None = None
    examples: Gap | None = None

    def scores(self, boxes: Tensor, log_odds: Tensor, margin: Tensor, novel: Tensor | None) -> Tensor:
        """Calibrated scores [K] of the boxes [K, 4] of one image, from :func:`evidence` [K] of their classes and which
        of these are novel, bool [K] (needed for an ensemble)."""
        covered = crowding(boxes, self.alone_scores(log_odds, margin, novel))
        a, b, d, c = self.final if self.novel is None else _choose(novel, self.novel[1], self.final)
        return (a * log_odds + b * margin + d * covered + c).sigmoid()

    def alone_scores(self, log_odds: Tensor, margin: Tensor, novel: Tensor | None) -> Tensor:
        """The score that a box would have if it overlapped no other; of any shape."""
        a, b, c = self.alone if self.novel is None else _choose(novel, self.novel[0], self.alone)
        return (a * log_odds + b * margin + c).sigmoid()

    def state(self) -> dict:
        """Plain values, for a checkpoint."""
        state = {**asdict(self), "alone": list(self.alone), "final": list(self.final)}
        state["novel"] = None if self.novel is None else [list(numbers) for numbers in self.novel]
        state["examples"] = None if self.examples is None else self.examples.state()
        if self.images is not None:
            state["images"] |= {key: list(state["images"][key]) for key in ("mean", "spread")}
        return state

    @classmethod
    def from_state(cls, state: object, statistics: int | None = None, width: int | None = None) -> Calibration:
        """Inverse of :meth:`state`. ValueError, TypeError or KeyError for something else, or another number of image
        statistics than ``statistics``, or width of embeddings than ``width``."""
        images, novel, examples = (state.get(key) for key in ("images", "novel", "examples"))  # older files lack them
        return cls(
            _numbers(state["alone"], 3),
            _numbers(state["final"], 4),
            float(state["temperature"]),
            str(state["data_set"]),
            int(state["detections"]),
            int(state["right"]),
            None if images is None else Familiarity.from_state(images, statistics),
            None if novel is None else (_numbers(novel[0], 3), _numbers(novel[1], 4)),
            None if examples is None else Gap.from_state(examples, width),
        )


def _choose(novel: Tensor, if_novel: Sequence[float], if_base: Sequence[float]) -> list[Tensor]:
    return [torch.where(novel, n, b) for n, b in zip(if_novel, if_base, strict=True)]


def _numbers(given: object, count: int) -> tuple[float, ...]:
    numbers = tuple(map(float, given))
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{numbers} are not {count} finite numbers")
    return numbers


def fit(boxes: Sequence[Tensor], odds: Sequence[Tensor], margins: Sequence[Tensor], judge, **about) -> Calibration:
    """Fit by logistic regression, box alone first, then with crowding. What is right depends on the order of the
    scores (the second box on an object is wrong), so each is fitted ROUNDS times.

    Args:
        boxes, odds, margins: of each image, [K_i, 4], [K_i] and [K_i].
        judge: scores [K_i] of each image to, joined, (right [N], judged [N]), bool: which detections are right, and
            which take part in the fit.
        about: the other attributes of the calibration.
    """
    counts = [len(b) for b in boxes]
    alone = torch.stack([torch.cat(list(odds)), torch.cat(list(margins))], 1).double()
    scores = alone[:, 0].sigmoid()
    for _ in range(ROUNDS):
        right, judged = judge(scores.split(counts))
        first = _logistic(alone[judged], right[judged])
        scores = _predict(first, alone)
    covered = torch.cat([crowding(b, s) for b, s in zip(boxes, scores.split(counts), strict=True)])
    features = torch.cat([alone, covered[:, None]], 1)
    for _ in range(ROUNDS):
        right, judged = judge(scores.split(counts))
        final = _logistic(features[judged], right[judged])
        scores = _predict(final, features)
    return Calibration(
        tuple(first), tuple(final), detections=int(judged.sum()), right=int(right[judged].sum()), **about
    )


def _predict(weights: list[float], features: Tensor) -> Tensor:
    *factors, constant = weights
    return (features @ features.new_tensor(factors) + constant).sigmoid()


def _logistic(features: Tensor, right: Tensor) -> list[float]:
    """Weights of float64 [N, F] and the constant that predict ``right``, bool [N] (Platt 1999: his targets keep the
    weights finite where the classes can be separated)."""
    mean, spread = features.mean(0), features.std(0).clamp(min=1e-6)
    scaled = (features - mean) / spread
    positive = right.sum()
    high, low = (positive + 1) / (positive + 2), 1 / (len(right) - positive + 2)
    targets = torch.where(right, high.double(), low.double())
    weights = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(scaled @ weights[:-1] + weights[-1], targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    factors = weights.detach()[:-1] / spread
    return [*factors.tolist(), float(weights.detach()[-1] - (factors * mean).sum())]
