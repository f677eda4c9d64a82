"""Diagnostics that explain a detector's AP: how accurate is the teacher, and how close is the student to it?"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from vild.data import datasets
from vild.data.classes import Classes
from vild.data.proposals import Proposals
from vild.evaluation.evaluator import RESULTS_FILE, evaluate_results, ground_truth_boxes
from vild.evaluation.recall import ProposalRecallEvaluator
from vild.evaluation.results import ResultsWriter
from vild.inference.image_features import ImageFeatures
from vild.inference.image_input import rgb_tensor
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling.fusion import best_detections
from vild.modeling.losses import cosine_logits
from vild.teacher.teacher import Teacher
from vild.vocabulary.vocabulary import Vocabulary


def by_group(values: list[tuple[int, float]], classes: Classes) -> dict[str, float | None]:
    """Means of (class, value) pairs over base and novel classes and, where frequencies are known, over rare, common
    and frequent ones; None for a group without a pair."""
    groups = dict.fromkeys(("base", "novel"), classes.splits)
    if any(classes.frequencies):
        groups |= dict.fromkeys("rcf", classes.frequencies)
    result = {}
    for group, marks in groups.items():
        chosen = [v for c, v in values if marks[c] == group]
        result[group] = float(np.mean(chosen)) if chosen else None
    return result


def embed_ground_truth(teacher: Teacher, name: str) -> dict[int, Tensor]:
    """image_id to the teacher's embeddings [G, D] of the data set's ground-truth boxes."""
    truth, records = ground_truth_boxes(name), datasets.load_dicts(name)
    return {
        r["image_id"]: teacher.encode_regions(rgb_tensor(r["file_name"]), truth[r["image_id"]][0]).cpu()
        for r in tqdm(records, desc="teacher on ground truth")
    }


@torch.inference_mode()
def student_ground_truth(detector: OpenVocabularyDetector, name: str) -> dict[int, Tensor]:
    """As :func:`embed_ground_truth`, by the student's head that learns from the teacher."""
    truth, found = ground_truth_boxes(name), {}
    for record in tqdm(datasets.load_dicts(name), desc="student on ground truth"):
        features = ImageFeatures(detector, record["file_name"])
        found[record["image_id"]] = features.embed(features.scaled(truth[record["image_id"]][0]))
    return found


def top1(embeddings: dict[int, Tensor], vocabulary: Vocabulary, name: str) -> dict[str, float | None]:
    """How often the nearest of all names is the right one on ground-truth boxes: {group: percent}."""
    values = []
    for image_id, (_, classes) in ground_truth_boxes(name).items():
        best = (embeddings[image_id] @ vocabulary.embeddings.T).argmax(1).tolist()
        values += [(c, 100.0 * (c == b)) for c, b in zip(classes, best, strict=True)]
    return by_group(values, datasets.get_classes(name))


def mean_cosine(student: dict[int, Tensor], teacher: dict[int, Tensor], name: str) -> dict[str, float | None]:
    """Mean cosine between two embeddings [G, D] of the same ground-truth boxes: {group: cosine}."""
    values = []
    for image_id, (_, classes) in ground_truth_boxes(name).items():
        values += zip(classes, F.cosine_similarity(student[image_id], teacher[image_id]).tolist(), strict=True)
    return by_group(values, datasets.get_classes(name))


def jitter(boxes: Tensor, height: int, width: int, generator: torch.Generator, share: float = 0.1) -> Tensor:
    """Boxes [G, 4], xyxy, with each side moved by up to ``share`` of the box's width or height, within the image."""
    moves = torch.rand(boxes.shape, generator=generator, dtype=boxes.dtype) * 2 - 1
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return (boxes + share * moves * sides).clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))


def teacher_agreement(teacher: Teacher, embeddings: dict[int, Tensor], name: str) -> tuple[dict, dict]:
    """What the cosine between student and teacher can be compared with, both {group: cosine}: the teacher's own
    between a ground-truth box and the same box jittered, and that between unrelated boxes (of the whole data set)."""
    truth, generator = ground_truth_boxes(name), torch.Generator().manual_seed(0)
    mean = torch.cat(list(embeddings.values())).mean(0)
    own, unrelated = [], []
    for record in tqdm(datasets.load_dicts(name), desc="teacher on jittered boxes"):
        boxes, classes = truth[record["image_id"]]
        if not classes:
            continue
        here = embeddings[record["image_id"]]
        moved = jitter(boxes, record["height"], record["width"], generator)
        again = teacher.encode_regions(rgb_tensor(record["file_name"]), moved)
        own += zip(classes, F.cosine_similarity(again.cpu(), here).tolist(), strict=True)
        unrelated += zip(classes, (here @ mean).tolist(), strict=True)
    marks = datasets.get_classes(name)
    return by_group(own, marks), by_group(unrelated, marks)


def distillation_progress(student: dict, jittered: dict, unrelated: dict) -> dict[str, float | None]:
    """How far distillation has come, by group: 0 where the student is no nearer to its teacher's embedding than an
    unrelated box is, 1 where it is as near as the teacher to itself under a jitter of the box."""
    return {
        group: None if value is None else (value - unrelated[group]) / max(jittered[group] - unrelated[group], 1e-6)
        for group, value in student.items()
    }


CONVERGED = 0.9  # of its teacher's top-1; ViLD and ViLD-contrast are above it on the built-in world


def verdict(student: dict[str, float | None], teacher: dict[str, float | None]) -> str:
    """Whether distillation has converged, and what to change, from the top-1 accuracy of student and teacher on
    ground-truth boxes that were not trained on (:func:`top1`). A cosine cannot tell: it grows with the weight of the
    distillation even where accuracy and boxes get worse."""
    group = "novel" if teacher.get("novel") is not None else "base"
    ours, theirs = student[group], teacher[group]
    said = f"of {group} objects in their true boxes the student names {ours:.1f} % right, its teacher {theirs:.1f} %"
    if ours < CONVERGED * theirs:
        return (
            f"Distillation has not converged: {said}. The schedule ends first: train for more iterations, distil from "
            'more images a step (MODEL.VILD.DISTILL_IMAGES), or add the objective "contrast".'
        )
    return (
        f"Distillation has converged: {said}. What else is missing in AP are the boxes (recall of the proposals, "
        "loss_box_reg beside ViLD-text's: MODEL.VILD.DISTILL_WEIGHT may be too large) or the teacher."
    )


def clip_on_crops(
    teacher: Teacher,
    vocabulary: Vocabulary,
    name: str,
    proposals: Proposals,
    temperature: float = 0.01,
    nms_threshold: float = 0.5,
    per_image: int = 100,
) -> tuple[dict, float]:
    """Evaluate CLIP on cropped proposals, the baseline of the paper (section 3.2).

    A detection's score is the geometric mean of its softmax score and its proposal's score.

    Returns:
        metrics as of an evaluator, and seconds per image.
    """
    classes, writer = datasets.get_classes(name), ResultsWriter()
    text = vocabulary.embeddings.to(teacher.device)
    records, start = datasets.load_dicts(name), time.perf_counter()
    for record in tqdm(records, desc="CLIP on crops"):
        boxes, objectness = proposals.get(record["image_id"], (torch.zeros(0, 4), torch.zeros(0)))
        embeddings = teacher.encode_regions(rgb_tensor(record["file_name"]), boxes)
        named = cosine_logits(embeddings, text, temperature).softmax(1).cpu()
        scores = (named * objectness[:, None]).sqrt()
        kept, score, found, _ = best_detections(boxes, scores, 0.0, nms_threshold, per_image)
        rows = zip(box_convert(kept, "xyxy", "xywh").tolist(), score.tolist(), found.tolist(), strict=True)
        writer.add(
            [{"image_id": record["image_id"], "category_id": classes.ids[c], "bbox": b, "score": s} for b, s, c in rows]
        )
    seconds = (time.perf_counter() - start) / max(1, len(records))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RESULTS_FILE
        writer.finish(path)
        return evaluate_results(name, path, ("bbox",)).metrics, seconds


def detector_seconds(detector: OpenVocabularyDetector, name: str, images: int = 50) -> float:
    """Seconds per image of the detector, reading included, over the first images of a data set."""
    records = datasets.load_dicts(name)[:images]
    detector(records[0]["file_name"], threshold=0)  # warm-up
    start = time.perf_counter()
    for record in records:
        detector(record["file_name"], threshold=0)
    return (time.perf_counter() - start) / len(records)


def proposal_recall(name: str, proposals: Proposals, per_image: int) -> dict[str, float]:
    """AR@100, 300, 1000 and recall at IoU 0.5 of proposals, for base and novel."""
    evaluator = ProposalRecallEvaluator(name, per_image)
    for record in datasets.load_dicts(name):
        evaluator.add(record["image_id"], proposals.get(record["image_id"], (torch.zeros(0, 4),))[0])
    return evaluator.evaluate()["proposals"]
