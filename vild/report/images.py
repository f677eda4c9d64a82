"""The images of reports: ground truth next to detections, coloured by base and novel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import PIL.Image
import torch
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import BoxMode, Instances, pairwise_iou
from pycocotools import mask as mask_api
from torchvision.ops import box_convert

from vild.data import datasets
from vild.evaluation.evaluator import truth_of
from vild.evaluation.reliability import Objects, objects_by_image
from vild.evaluation.results import iterate_records
from vild.inference.drawing import draw, side_by_side
from vild.inference.predictor import OpenVocabularyDetector
from vild.report.page import Block, Image, Paragraph
from vild.utils.errors import BadImage, count_of
from vild.utils.files import write_image
from vild.utils.images import read_image

MIN_SIDE = 400  # pixels, of a drawn image


def to_instances(annotations: Iterable[dict], size: tuple[int, int]) -> Instances:
    """Annotations in Detectron2's form, with the field names of predictions, to be drawn on an image of ``size``
    (height, width). Has masks if all annotations have one."""
    annotations = [dict(a) for a in annotations]
    masks = all(a.get("segmentation") for a in annotations)
    for a in annotations:
        if not masks:
            a.pop("segmentation", None)
        elif isinstance(a["segmentation"], dict) and isinstance(a["segmentation"]["counts"], list):
            a["segmentation"] = mask_api.frPyObjects(a["segmentation"], *size)  # Detectron2 reads compressed RLE only
    truth = annotations_to_instances(annotations, size, "bitmask")
    result = Instances(size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
    if truth.has("gt_masks"):
        result.pred_masks = truth.gt_masks.tensor
    return result


def comparison(
    detectors: Mapping[str, OpenVocabularyDetector], name: str, count: int, threshold: float
) -> PIL.Image.Image:
    """Ground truth and the detections of each detector above a threshold, side by side, a row per image.

    Takes the first ``count`` images of the data set with two or more novel objects (no selection by result). Detections
    are marked as right or wrong.
    """
    classes, objects, rows, captions = datasets.get_classes(name), objects_by_image(truth_of(name)), [], []
    for record in datasets.load_dicts(name):
        if sum(classes.splits[a["category_id"]] == "novel" for a in record["annotations"]) < 2:
            continue
        image = read_image(record["file_name"], "RGB")
        truth, there = to_instances(record["annotations"], image.shape[:2]), objects[record["image_id"]]
        rows.append([draw(image, truth, classes.names, classes.splits, MIN_SIDE)])
        captions.append([count_of(len(truth), "object")])
        for detector in detectors.values():
            found = detector(record["file_name"], threshold=threshold)
            right = is_right(there, found)
            rows[-1].append(draw(image, found, classes.names, classes.splits, MIN_SIDE, right))
            captions[-1].append(f"{right.count(True)} of {len(truth)} found, {right.count(False)} wrong")
        if len(rows) == count:
            break
    return side_by_side(rows, ["ground truth", *detectors], captions)


def is_right(there: Objects, found: Instances) -> list[bool | None]:
    """Whether each detection finds one of the image's objects; None where the ground truth does not say."""
    boxes = box_convert(found.pred_boxes.tensor, "xyxy", "xywh").double().numpy()
    right, judged = there.match(boxes, found.pred_classes.numpy(), found.scores.numpy())
    return [good if known else None for good, known in zip(right.tolist(), judged.tolist(), strict=True)]


def class_images(name: str, results: Path, chosen: Sequence[dict], folder: Path, threshold: float) -> list[Block]:
    """For each class (a row of per_class.json), its ground truth in the first image of the data set that contains it,
    next to the detections above ``threshold`` that are of this class or overlap one of its objects."""
    classes, objects = datasets.get_classes(name), objects_by_image(truth_of(name))
    index = {i: k for k, i in enumerate(classes.ids)}
    records: dict[int, dict] = {}
    for record in datasets.load_dicts(name):
        for a in record["annotations"]:
            records.setdefault(a["category_id"], record)
    chosen = [c for c in chosen if index[c["id"]] in records]  # a class may have empty boxes only, which are not read
    found: dict[int, list[dict]] = {records[index[c["id"]]]["image_id"]: [] for c in chosen}
    for r in iterate_records(results):
        if r["image_id"] in found and r["score"] >= threshold:
            r |= {"category_id": index[r["category_id"]], "bbox_mode": BoxMode.XYWH_ABS}
            found[r["image_id"]].append(r)
    blocks: list[Block] = []
    for c in chosen:
        number = index[c["id"]]
        record = records[number]
        if not Path(record["file_name"]).is_file():
            blocks.append(Paragraph(f"{c['name']}: its image {record['file_name']} does not exist on this machine."))
            continue
        try:
            image = read_image(record["file_name"], "RGB")
        except BadImage as error:
            blocks.append(Paragraph(f"{c['name']}: {error}"))
            continue
        size = (record["height"], record["width"])
        truth = to_instances((a for a in record["annotations"] if a["category_id"] == number), size)
        detections = _of_class_or_near(found[record["image_id"]], number, truth)
        right = is_right(objects[record["image_id"]], detections)
        pair = [draw(image, i, classes.names, classes.splits, MIN_SIDE, r)
                for i, r in ((truth, None), (detections, right))]  # fmt: skip
        file = f"class_{c['id']}.jpg"
        write_image(folder / file, side_by_side([pair], [f"ground truth: {c['name']}", "detections"]).convert("RGB"))
        caption = f"{c['name']}: the first image of the data set that contains it"
        blocks.append(Image(file, caption, columns=2))
    return blocks


def _of_class_or_near(results: list[dict], number: int, truth: Instances) -> Instances:
    """The results of class ``number``, and those that overlap an object in ``truth`` (IoU at least 0.5)."""
    found = to_instances(results, truth.image_size)
    found.scores = torch.tensor([r["score"] for r in results])
    keep = found.pred_classes == number
    if len(truth) and len(found):
        keep |= pairwise_iou(found.pred_boxes, truth.pred_boxes).max(1).values >= 0.5
    return found[keep]
