"""A row of the vocabulary for one name, learned in seconds: a linear probe in the space of region embeddings (the idea
of LP-OVOD, Pham et al. 2024). No weight of the detector changes.

Shapes: N regions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from vild.checkpoint.checkpointer import read_network_record, write_weights
from vild.data import datasets
from vild.data.loader import check_keeps_base
from vild.data.provenance import training_record
from vild.evaluation.evaluator import ground_truth_boxes
from vild.inference.image_features import ImageFeatures
from vild.inference.predictor import OpenVocabularyDetector
from vild.store.store import EmbeddingStore
from vild.utils.errors import UserError
from vild.vocabulary.grow import find_classes, grow
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import GivenWords, Words

RIDGE = 10.0  # chosen by base and new names of glyphs_dev, seed 0, among 0.01 to 100
OVERLAP = 0.5  # IoU of a proposal with a box that makes it one of the name, as in training
NEAREST, IMAGES = 100, 2000  # of a store: regions taken for the name, and images looked at


class Learned(NamedTuple):
    """A name that was learned.

    Attributes:
        positive: how many of the ``regions`` are of it. If none is, its row stays its word.
        cosine: of the row to the word.
        vocabulary: of old and new names, with this row and those before it.
    """

    name: str
    positive: int
    regions: int
    cosine: float
    vocabulary: Vocabulary


def learn_names(
    detector: OpenVocabularyDetector,
    words: GivenWords | Words | Vocabulary,
    source: str,
    store: EmbeddingStore | None = None,
) -> Iterator[Learned]:
    """Learn each of these names that the detector was not trained with.

    Args:
        source: the data set with their boxes, whose base classes are learned; with a store, what to call the words.
        store: learn without boxes, from its regions.

    Raises:
        UserError: an ensemble, no name to learn, a data set that keeps novel annotations, or a store of another
            teacher.
    """
    heads, trained = detector.model.roi_heads, detector.trained
    if heads.fuses:
        raise UserError(f"weights {detector.cfg.MODEL.WEIGHTS}: an ensemble scores by two heads, for which one "
                        "row cannot be learned; take tools/finetune.py")  # fmt: skip
    new = words if isinstance(words, Vocabulary) else detector.with_vocabulary(words).vocabulary
    marks = datasets.get_classes(source).splits if store is None else ("base",) * len(new)
    at = {n: i for n, i in enumerate(find_classes(trained, new.names)) if marks[n] == "base"}
    if not (learn := [n for n, i in at.items() if i is None or trained.splits[i] != "base"]):
        raise UserError(f"{source}: the detector was trained on all of these names")
    new = new.take(learn)
    both = made = grow(trained, new)
    if store is None:
        check_keeps_base(source, "probe")
        regions, classes = regions_of(detector, source)
    else:
        store.check_teacher(trained.fingerprint, "the detector")
    for n, index in zip(learn, find_classes(both, new.names), strict=True):
        word = row = both.embeddings[index]
        if store is None:
            positive = classes == n
        else:
            regions, positive = regions_of_store(store, word)
        if count := int(positive.sum()):
            rivals = rivals_of(detector, both, index, regions)
            row = fit_row(regions, positive, rivals, word, heads.classifier.test_temperature)
            made = with_row(made, index, row, f"linear probe of {count} regions")
        yield Learned(made.names[index], count, len(positive), float(row @ word), made)


def save(
    path: Path, detector: OpenVocabularyDetector, vocabulary: Vocabulary, source: str, store: EmbeddingStore | None
) -> None:
    """Write the vocabulary as ``.safetensors`` or, as ``.pth``, the detector with it and a record of the two."""
    if path.suffix == ".safetensors":
        vocabulary.save(path)
        return
    heads, record = detector.model.roi_heads, training_record([source] if store is None else [], store)
    record["starts"] = [read_network_record(detector.cfg.MODEL.WEIGHTS)]
    write_weights(path, detector.model.state_dict(), vocabulary, heads.variant, record, heads.calibration)


def fit_row(
    regions: Tensor, positive: Tensor, rivals: Tensor, start: Tensor, temperature: float, ridge: float = RIDGE
) -> Tensor:
    """The unit row w [D], float32, that minimises the logistic loss of "is it of this name?" plus ridge |w - start|².

    A region x is of the name with the probability that the detector's softmax gives it beside the other names:
    sigmoid(w x / temperature - rival), where rival is the logsumexp of the others' logits. Mean over the positive
    regions plus mean over the negative ones: there may be many more of these.

    Args:
        regions: unit [N, D].
        positive: bool [N], with at least one of each.
        rivals: [N].
        start: unit [D], the name's word.
    """
    x, rival, origin = (t.double().cpu() for t in (regions, rivals, start))
    sign, counts = torch.where(positive.cpu(), 1.0, -1.0).double(), positive.sum().item()
    weight = torch.where(positive.cpu(), 1 / counts, 1 / (len(x) - counts)).double()
    free = origin.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        row = F.normalize(free, dim=0)
        wrong = F.softplus(-sign * (x @ row / temperature - rival))
        loss = (weight * wrong).sum() + ridge * (row - origin).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.normalize(free.detach(), dim=0).float()


@torch.inference_mode()
def regions_of(detector: OpenVocabularyDetector, name: str) -> tuple[Tensor, Tensor]:
    """What the detector sees in a data set's images: embeddings [N, D] of its proposals and of the annotated boxes, and
    the class that each is of (index in the data set), -1 for none.
    """
    truth, embeddings, classes = ground_truth_boxes(name), [], []
    for record in tqdm(datasets.load_dicts(name), desc="regions", unit="image"):
        features = ImageFeatures(detector, record["file_name"])
        boxes, numbers = truth[record["image_id"]]
        boxes = features.scaled(boxes)
        everything = torch.cat([boxes, features.proposals.proposal_boxes.tensor])
        overlap, which = F.pad(box_iou(everything, boxes), (0, 1)).max(1)
        classes.append(torch.where(overlap.cpu() >= OVERLAP, torch.tensor([*numbers, -1])[which.cpu()], -1))
        embeddings.append(features.embed(everything))
    return torch.cat(embeddings), torch.cat(classes)


def regions_of_store(store: EmbeddingStore, word: Tensor) -> tuple[Tensor, Tensor]:
    """Without labels: embeddings [N, D] of the regions of up to IMAGES images of a store, and whether each is one of
    the NEAREST to the word [D]."""
    ids = store.image_ids
    if len(ids) > IMAGES:
        ids = np.random.default_rng(0).choice(ids, IMAGES, replace=False)
    embeddings = torch.cat([store[int(i)].embeddings for i in ids])
    if len(embeddings) <= NEAREST:
        raise UserError(f"store {store.folder}: it has {len(embeddings)} regions, no more than the {NEAREST} nearest")
    positive = torch.zeros(len(embeddings), dtype=torch.bool)
    positive[(embeddings @ word).topk(NEAREST).indices] = True
    return embeddings, positive


def rivals_of(detector: OpenVocabularyDetector, vocabulary: Vocabulary, index: int, regions: Tensor) -> Tensor:
    """Logsumexp [N] of the logits of all classes but one, and of the background where the detector scores it."""
    heads = detector.model.roi_heads
    classifier = heads.classifier
    matrix = classifier.matrix(vocabulary.embeddings.to(detector.model.device)).detach()
    logits = classifier.logits(regions.to(matrix.device), matrix, classifier.test_temperature)
    logits[:, index] = float("-inf")
    return (logits[:, :-1] if heads.variant == "image" else logits).logsumexp(1).cpu() - classifier.bias


def with_row(vocabulary: Vocabulary, index: int, row: Tensor, made_of: str) -> Vocabulary:
    """The vocabulary with another row of a class, which counts as trained (base)."""
    rows = vocabulary.embeddings.clone()
    rows[index] = row
    splits = tuple("base" if i == index else mark for i, mark in enumerate(vocabulary.splits))
    made = [*(vocabulary.made_of or ("",) * len(vocabulary))]
    made[index] = made_of
    return replace(vocabulary, embeddings=rows, splits=splits, made_of=tuple(made))
