"""Ask images for words that are not in them. A detector with good AP may still find whatever it is asked for: AP ranks
the detections of a word, but does not ask whether the best of them is there at all.

Each image is asked for ABSENT names that are not in it, and up to PRESENT that are, all at once. Once the absent names
are drawn at random, and once they are the hardest: those nearest, in the teacher's space, to a name that is in the
image. In LVIS a name is absent only if the image says so (``neg_category_ids``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from vild.data import datasets
from vild.evaluation.evaluator import truth_of
from vild.evaluation.reliability import Objects, objects_by_image
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.command_line import THRESHOLD
from vild.utils.errors import UserError
from vild.utils.images import read_image

ABSENT, PRESENT = 5, 2
KINDS = ("random", "hard")


@dataclass(frozen=True)
class Question:
    """Class indices that one image is asked for."""

    absent: tuple[int, ...]
    present: tuple[int, ...]


def ask(
    objects: Objects, similarity: np.ndarray, negatives: Sequence[int], kind: str, seed: int | list[int]
) -> Question:
    """The question for one image.

    Args:
        objects: of the image.
        similarity: [C, C], cosines between the names' text embeddings.
        negatives: classes that are known not to be in the image.
        kind: one of KINDS.
    """
    random, there = np.random.default_rng(seed), np.unique(objects.classes[~objects.crowd])
    absent = np.setdiff1d(negatives, objects.classes)
    present = random.permutation(there)[:PRESENT]
    if kind == "hard" and len(there):
        absent = absent[np.argsort(-similarity[np.ix_(there, absent)].max(0), kind="stable")]
    else:
        absent = random.permutation(absent)
    return Question(tuple(absent[:ABSENT].tolist()), tuple(present.tolist()))


@dataclass
class Answers:
    """Counts over the questions to all images; ``splits``: of the detector's classes."""

    splits: Sequence[str]
    false_boxes: dict[str, list[int]] = field(default_factory=lambda: {"base": [], "novel": [], "": []})
    found: int = 0
    things: int = 0
    words: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("said", "right", "there"), 0))

    def add(self, question: Question, objects: Objects, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray):
        """Add an image's detections at or above the threshold: boxes [N, 4] as xywh."""
        for number in question.absent:
            self.false_boxes[self.splits[number]].append(int((classes == number).sum()))
        asked = np.isin(objects.classes, question.present) & ~objects.crowd
        right, _ = objects.match(boxes, classes, scores)
        self.found += int((right & np.isin(classes, question.present)).sum())
        self.things += int(asked.sum())
        self.words["there"] += len(question.present)
        self.words["right"] += sum(number in classes for number in question.present)
        self.words["said"] += sum(number in classes for number in (*question.present, *question.absent))

    def summary(self) -> dict[str, float | None]:
        """``false_boxes_base``, ``false_boxes_novel`` and ``false_boxes`` (all): boxes an image for an absent word;
        ``recall`` of the asked things that are there; precision and recall of the decision whether a word is in the
        image. None where nothing was asked. All but the boxes in percent."""
        counts = {f"false_boxes_{split}": self.false_boxes[split] for split in ("base", "novel")}
        counts["false_boxes"] = [n for values in self.false_boxes.values() for n in values]
        result = {key: float(np.mean(n)) if n else None for key, n in counts.items()}
        said, right, there = (self.words[key] for key in ("said", "right", "there"))
        result["recall"] = 100 * self.found / self.things if self.things else None
        result["image_precision"] = 100 * right / said if said else None
        result["image_recall"] = 100 * right / there if there else None
        return result


def absent_words(
    detector: OpenVocabularyDetector, name: str, threshold: float = THRESHOLD, seed: int = 0
) -> Mapping[str, dict[str, float | None]]:
    """Ask every image of a data set with the detector's classes: {kind: summary}.

    Raises:
        UserError: there is no absent word to ask for.
    """
    names, by_image = detector.trained, objects_by_image(truth_of(name))
    similarity = (names.embeddings @ names.embeddings.T).numpy()
    answers = {kind: Answers(names.splits) for kind in KINDS}
    known = {i: range(len(names)) if o.known is None else sorted(o.known) for i, o in by_image.items()}
    if not any({*known[i]} - {*o.classes.tolist()} for i, o in by_image.items()):
        raise UserError(f"data set '{name}': no image says of a class that it is not there (neg_category_ids): there "
                        "is no absent word to ask for")  # fmt: skip
    for record in tqdm(datasets.load_dicts(name), desc="absent words", unit="image"):
        objects, negatives = by_image[record["image_id"]], known[record["image_id"]]
        image = read_image(record["file_name"], detector.cfg.INPUT.FORMAT)
        for kind in KINDS:
            question = ask(objects, similarity, negatives, kind, [seed, record["image_id"] & (2**63 - 1)])
            if not (asked := [*question.absent, *question.present]):
                continue
            found = detector.with_vocabulary(names.take(asked), context=True)(
                image, threshold=threshold, channels=detector.cfg.INPUT.FORMAT
            )
            classes = np.array(asked)[found.pred_classes.numpy()]
            answers[kind].add(question, objects, _xywh(found.pred_boxes.tensor), classes, found.scores.numpy())
    return {kind: each.summary() for kind, each in answers.items()}


def _xywh(boxes: Tensor) -> np.ndarray:
    return box_convert(boxes, "xyxy", "xywh").double().numpy()
