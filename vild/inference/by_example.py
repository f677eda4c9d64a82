"""Does an example do what a word does? Score a data set with the novel names as words, by example, and as both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from vild.data import datasets
from vild.evaluation.evaluator import ground_truth_boxes, score, truth_of
from vild.evaluation.results import ResultArrays
from vild.inference.calibrate import fit_gap
from vild.inference.examples import read_examples
from vild.inference.image_features import ImageFeatures
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError
from vild.vocabulary.grow import with_examples
from vild.vocabulary.vocabulary import Vocabulary

COUNTS, DRAWS = (1, 5), 3
MADE_OF = {"words": "words", **{
    f"{kind}{count}": text.format(count, "s" if count > 1 else "")
    for kind, text in (("examples", "{} example{}"), ("both", "word and {} example{}"),
                       ("shuffled", "{} example{} of another name")) for count in COUNTS
}}  # fmt: skip
COLUMNS = ("AP50_novel", "precision_novel", "recall_novel", "AP50_base")


def draw_examples(name: str, novel: list[int], count: int, seed: int) -> dict[int, list[tuple[str, list[float]]]]:
    """``count`` regions of each of these classes (all, if there are fewer), drawn from a data set without crowds."""
    random, boxes = np.random.default_rng(seed), ground_truth_boxes(name)
    regions: dict[int, list] = {number: [] for number in novel}
    for record in datasets.load_dicts(name):
        for box, number in zip(*boxes[record["image_id"]], strict=True):
            if number in regions:
                regions[number].append((record["file_name"], box.tolist()))
    if none := [number for number, some in regions.items() if not some]:
        raise UserError(f"examples from {name}: it has no '{datasets.get_classes(name).names[none[0]]}'")
    return {n: [some[i] for i in random.permutation(len(some))[:count]] for n, some in regions.items()}


def text_matrices(detector: OpenVocabularyDetector, name: str, seed: int) -> dict[str, list[Tensor]]:
    """Of each key of MADE_OF, a text matrix [C, D] of the detector's classes for each draw of examples."""
    words, calibration = detector.trained, detector.model.roi_heads.calibration
    gap = (calibration and calibration.examples) or fit_gap(detector, name)
    novel = words.mask("novel").nonzero()[:, 0].tolist()
    matrices: dict[str, list[Tensor]] = {key: [] for key in MADE_OF}
    matrices["words"].append(words.embeddings)
    for count in COUNTS:
        for draw in range(DRAWS):
            drawn = draw_examples(name, novel, count, seed * DRAWS + draw)
            regions = read_examples({words.names[n]: some for n, some in drawn.items()})
            made = Vocabulary.from_regions(detector.teacher, *regions, gap)
            for kind, rows in (("examples", made.embeddings), ("shuffled", made.embeddings.roll(1, 0)),
                               ("both", with_examples(words.take(novel), made).embeddings)):  # fmt: skip
                matrix = words.embeddings.clone()
                matrix[novel] = rows
                matrices[f"{kind}{count}"].append(matrix)
    return matrices


@torch.inference_mode()
def by_example(
    detector: OpenVocabularyDetector, name: str, examples_from: str, seed: int = 0
) -> Mapping[str, Mapping[str, float]]:
    """The metrics of COLUMNS, in percent and the mean over draws (NaN without ground truth), for each key of MADE_OF.
    Base names are words in all of them. ``examples_from``: a data set with other images."""
    truth, classes = truth_of(name), detector.model.roi_heads.classifier.current_classes
    matrices = text_matrices(detector, examples_from, seed)
    found: dict[str, list[list]] = {key: [[] for _ in some] for key, some in matrices.items()}
    for record in tqdm(datasets.load_dicts(name), desc="by example", unit="image"):
        features = ImageFeatures(detector, record["file_name"])
        for key, some in matrices.items():
            for matrix, rows in zip(some, found[key], strict=True):
                instances = features.detect(replace(classes, text=matrix.to(classes.text.device)))
                boxes = box_convert(instances.pred_boxes.tensor, "xyxy", "xywh")
                scores, numbers = instances.scores.cpu(), instances.pred_classes.cpu()
                rows.append((record["image_id"], boxes.cpu(), scores, numbers))
    return {key: _mean([_score(truth, rows) for rows in some]) for key, some in found.items()}


def _score(truth, rows: list[tuple]) -> dict[str, float]:
    """The metrics of the detections of each image."""
    rows = sorted(rows, key=lambda row: row[0])
    boxes, scores, numbers = (torch.cat([row[k] for row in rows]).numpy() for k in (1, 2, 3))
    ids = np.repeat([row[0] for row in rows], [len(row[2]) for row in rows])
    found = ResultArrays(ids, np.array(truth.classes.ids)[numbers], boxes.astype(float), scores.astype(float))
    return score(truth, found, ("bbox",)).metrics["bbox"]


def _mean(draws: list[dict[str, float]]) -> dict[str, float]:
    return {column: float(np.mean([draw[column] for draw in draws])) for column in COLUMNS}
