"""Fit the calibration of a detector's scores on the base classes of a data set. No novel label is read."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import box_convert
from tqdm import tqdm

from vild.data import datasets
from vild.evaluation.evaluator import ground_truth_boxes, truth_of
from vild.evaluation.protocol import GroundTruth
from vild.evaluation.reliability import objects_by_image
from vild.inference.image_input import rgb_tensor
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling.calibration import Calibration, fit
from vild.modeling.classifier import ClassSet
from vild.modeling.familiarity import FEWEST_IMAGES, Familiarity
from vild.utils.errors import UserError, count_of
from vild.vocabulary.regions import Gap

LEAST = 0.01  # detections with lower scores would only teach that they are wrong
FEWEST = 50  # right and wrong detections that a fit needs
MOST_REGIONS = 5_000  # the teacher is asked about

logger = logging.getLogger(__name__)


def calibrate(detector: OpenVocabularyDetector, name: str) -> Calibration:
    """Fit on a data set with the detector's classes.

    Raises:
        UserError: no images, too few right or wrong detections of base classes, or scores that say nothing.
    """
    base = detector.trained.mask("base").numpy()
    if not base.any():
        raise UserError(f"calibration: the detector's vocabulary marks no class as base ({detector.cfg.MODEL.WEIGHTS})")
    truth = _only_base(truth_of(name), base)
    records, by_image = datasets.load_dicts(name), objects_by_image(truth)
    if not records:
        raise UserError(f"calibration on {name}: it has no images")
    if len(records) < FEWEST_IMAGES:
        logger.warning("calibration on %s: %s; to tell when an image is unlike those, take %d or more",
                       name, count_of(len(records), "image"), FEWEST_IMAGES)  # fmt: skip
    if truth.protocol == "lvis":
        logger.warning("calibration on %s: of most classes LVIS's images do not say whether they are there. Detections "
                       "of those are left out, so scores are too high where any word may be asked", name)  # fmt: skip
    objects = [by_image[record["image_id"]] for record in records]
    classes = detector.model.roi_heads.classifier.current_classes
    fitted = _fit(detector, name, records, objects, classes, base)
    fitted = replace(fitted, examples=fit_gap(detector, name))
    if detector.model.roi_heads.variant != "ensemble":
        return fitted
    # what novel classes are scored by has no label of base classes in it, either: they stand for novel ones
    as_novel = _fit(detector, name, records, objects, replace(classes, base=torch.zeros_like(classes.base)), base)
    return replace(fitted, novel=(as_novel.alone, as_novel.final))


def _fit(detector, name: str, records: list[dict], objects: list, classes: ClassSet, base: np.ndarray) -> Calibration:
    """The fit to the base classes among the detections of ``classes``."""
    found, statistics = zip(
        *(_detect(detector, r, classes) for r in tqdm(records, desc="calibration", unit="image")), strict=True
    )
    boxes = [f.pred_boxes.tensor for f in found]
    sides = [box_convert(box, "xyxy", "xywh").double().numpy() for box in boxes]
    numbers = [f.pred_classes.numpy() for f in found]
    odds, margins = [f.log_odds for f in found], [f.margin for f in found]
    candidate = torch.cat(odds).sigmoid() > LEAST

    def judge(scores) -> tuple[Tensor, Tensor]:
        right, judged = [], []
        for there, box, number, score in zip(objects, sides, numbers, scores, strict=True):
            hits, known = there.match(box, number, score.numpy())
            right.append(hits)
            judged.append(known & base[number])
        return torch.from_numpy(np.concatenate(right)), torch.from_numpy(np.concatenate(judged)) & candidate

    temperature = detector.model.roi_heads.classifier.test_temperature
    right, judged = judge([o.sigmoid() for o in odds])
    counts = int((right & judged).sum()), int((~right & judged).sum())
    if min(counts) < FEWEST:
        raise UserError(f"calibration on {name}: {counts[0]} right and {counts[1]} wrong detections of base classes, "
                        f"fewer than {FEWEST}; take more images")  # fmt: skip
    images = Familiarity.fit(torch.cat(statistics)) if len(records) >= FEWEST_IMAGES else None
    fitted = fit(boxes, odds, margins, judge, temperature=temperature, data_set=name, images=images)
    # a class's logit is in its log-odds and in its margin
    if not all(a > 0 and a + b > 0 for a, b, *_ in (fitted.alone, fitted.final)):
        raise UserError(f"calibration on {name}: right detections do not have higher scores than wrong ones")
    return fitted


def fit_gap(detector: OpenVocabularyDetector, name: str) -> Gap | None:
    """How regions of base classes lie beside their words, in the teacher's space; None without the teacher."""
    base = detector.trained.mask("base").numpy()
    try:
        teacher = detector.teacher
    except UserError as error:
        logger.warning("%s. Without the teacher examples cannot be made comparable with words", error)
        return None
    truth, regions, classes = ground_truth_boxes(name), [], []
    for record in datasets.load_dicts(name):
        boxes, numbers = truth[record["image_id"]]
        if (is_base := base[numbers]).any():
            regions.append(teacher.encode_regions(rgb_tensor(record["file_name"]), boxes[is_base]).cpu())
            classes += np.array(numbers)[is_base].tolist()
        if len(classes) >= MOST_REGIONS:
            break
    return Gap.fit(torch.cat(regions), detector.trained.embeddings[classes])


def _only_base(truth: GroundTruth, base: np.ndarray) -> GroundTruth:
    """The ground truth without the annotations of other classes, which are not to be read."""
    ids = {i for i, is_base in zip(truth.classes.ids, base, strict=True) if is_base}
    annotations = [a for a in truth.document["annotations"] if a["category_id"] in ids]
    return GroundTruth({**truth.document, "annotations": annotations}, truth.classes, truth.protocol)


@torch.inference_mode()
def _detect(detector: OpenVocabularyDetector, record: dict, classes: ClassSet) -> tuple[Instances, Tensor]:
    """The detections of an image, with what a calibrated score is made of, and the image's statistics [1, S]."""
    inputs = [detector.model_input(record["file_name"])]
    found, statistics = detector.model.detect_and_compare(inputs, classes, evidence=True)
    return found[0].to("cpu"), statistics.cpu()
