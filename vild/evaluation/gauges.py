"""Gauges that explain a number: how good is the teacher, and how close has the student come to it?"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from detectron2.structures import Boxes
from torch import Tensor
from tqdm import tqdm

from vild.data import datasets
from vild.data.mapper import read_picture
from vild.evaluation.evaluator import evaluate_results, ground_truth_boxes
from vild.modeling.fusion import best_detections
from vild.modeling.losses import cosine_logits
from vild.predictor import OpenVocabularyDetector
from vild.teacher.clip import Teacher
from vild.teacher.proposals import Proposals
from vild.vocabulary import Vocabulary


def _rgb(record: dict) -> Tensor:
    return torch.from_numpy(read_picture(record["file_name"], "RGB").copy()).permute(2, 0, 1)


def _by_split(values: list[tuple[int, float]], splits: tuple[str, ...]) -> dict[str, float | None]:
    """Means of (class, value) pairs over base and over novel classes."""
    result = {}
    for mark in ("base", "novel"):
        chosen = [v for c, v in values if splits[c] == mark]
        result[mark] = float(np.mean(chosen)) if chosen else None
    return result


def embed_ground_truth(teacher: Teacher, name: str) -> dict[int, Tensor]:
    """image_id to the teacher's embeddings [G, D] of the data set's ground-truth boxes."""
    truth, records = ground_truth_boxes(name), datasets.load_dicts(name)
    return {
        r["image_id"]: teacher.encode_regions(_rgb(r), truth[r["image_id"]][0]).cpu()
        for r in tqdm(records, desc="teacher on ground truth")
    }


def teacher_accuracy(embeddings: dict[int, Tensor], vocabulary: Vocabulary, name: str) -> dict:
    """Percent of ground-truth crops that the teacher names right, all names offered: {"base", "novel"}."""
    values = []
    for image_id, (_, classes) in ground_truth_boxes(name).items():
        best = (embeddings[image_id] @ vocabulary.embeddings.T).argmax(1).tolist()
        values += [(c, 100.0 * (c == b)) for c, b in zip(classes, best, strict=True)]
    return _by_split(values, datasets.get_classes(name).splits)


@torch.inference_mode()
def student_cosine(detector: OpenVocabularyDetector, embeddings: dict[int, Tensor], name: str) -> dict:
    """Mean cosine between student and teacher on ground-truth boxes: {"base", "novel"}."""
    truth, values = ground_truth_boxes(name), []
    model = detector.model
    for record in tqdm(datasets.load_dicts(name), desc="student on ground truth"):
        boxes, classes = truth[record["image_id"]]
        if not classes:
            continue
        picture = read_picture(record["file_name"], detector.cfg.INPUT.FORMAT)
        inputs = T.AugInput(picture)
        moved = detector.resize(inputs).apply_box(boxes.numpy())
        image = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        student = model.roi_heads.region_embeddings(features, [Boxes(torch.from_numpy(moved).float().to(model.device))])
        cosine = F.cosine_similarity(student.cpu(), embeddings[record["image_id"]])
        values += zip(classes, cosine.tolist(), strict=True)
    return _by_split(values, datasets.get_classes(name).splits)


def clip_on_crops(
    teacher: Teacher,
    vocabulary: Vocabulary,
    name: str,
    proposals: Proposals,
    temperature: float = 0.01,
    nms_threshold: float = 0.5,
    per_image: int = 100,
) -> dict:
    """The baseline that runs the teacher on every proposal (paper, section 3.2): metrics as of an evaluator.

    A detection's score is the geometric mean of its softmax score and its proposal's score.
    """
    classes, results = datasets.get_classes(name), []
    text = vocabulary.embeddings.to(teacher.device)
    for record in tqdm(datasets.load_dicts(name), desc="CLIP on crops"):
        boxes, objectness = proposals.get(record["image_id"], (torch.zeros(0, 4), torch.zeros(0)))
        embeddings = teacher.encode_regions(_rgb(record), boxes)
        named = cosine_logits(embeddings, text, temperature).softmax(1).cpu()
        scores = (named * objectness[:, None]).sqrt()
        kept, score, found, _ = best_detections(boxes, scores, 0.0, nms_threshold, per_image)
        for (x0, y0, x1, y1), s, c in zip(kept.tolist(), score.tolist(), found.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            results.append({"image_id": record["image_id"], "category_id": classes.ids[c], "bbox": box, "score": s})
    return evaluate_results(name, results, ("bbox",))
