"""The Detectron2 evaluator for open-vocabulary AP (LVIS or COCO protocol), and the files it writes."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from tabulate import tabulate

from vild.data import datasets
from vild.data.unreadable import REASON, gather_unreadable
from vild.evaluation.encode_masks import encode_masks
from vild.evaluation.metrics import decimal, rules
from vild.evaluation.protocol import Evaluation, GroundTruth, evaluate, scored_iou_types
from vild.evaluation.reliability import judge, summarize_reliability
from vild.evaluation.results import ResultArrays, ResultsWriter, read_results
from vild.utils.command_line import THRESHOLD
from vild.utils.errors import count_of
from vild.utils.files import write_json

logger = logging.getLogger(__name__)

METRICS_FILE = "vild_metrics.json"
RESULTS_FILE = "coco_instances_results.json"
CLASSES_FILE = "per_class.json"
IMAGES = "pictures"  # key beside "bbox" and "segm", with the number of unreadable images if there were any


class OpenVocabularyEvaluator(DatasetEvaluator):
    """AP over base, novel and all classes of a data set, by its protocol.

    Detections are streamed to disk and scored from the results file, as tools/evaluate.py does.

    Args:
        name: a registered data set (``vild.data.datasets``).
        output_dir: for ``coco_instances_results.json`` and ``per_class.json`` (None: do not keep them).
        masks: also evaluate masks.
    """

    def __init__(self, name: str, output_dir: str | None, masks: bool):
        self.name, self.output_dir = name, output_dir
        self.classes = datasets.get_classes(name)
        truth, wanted = truth_of(name), ("bbox", "segm") if masks else ("bbox",)
        # raises before anything is detected
        self.iou_types, self.notes = scored_iou_types(truth, wanted, f"data set '{name}'")
        self.reset()

    def reset(self):
        self.writer = ResultsWriter(self.output_dir)
        self.unreadable: dict[str, str] = {}

    def process(self, inputs, outputs):
        for given, output in zip(inputs, outputs, strict=True):
            if REASON in given:
                self.unreadable |= given[REASON]
                continue
            results = coco_records(output["instances"], given["image_id"])
            for result in results:
                result["category_id"] = self.classes.ids[result["category_id"]]
            self.writer.add(results)

    def evaluate(self):
        comm.synchronize()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(self.output_dir or scratch) / RESULTS_FILE
            self.writer.finish(path)
            unreadable = gather_unreadable(self.unreadable, self.name, self.output_dir)
            evaluation = self._score(path)
        if evaluation is None:
            return {}
        publish(self.name, evaluation, self.output_dir)
        metrics = evaluation.metrics
        return {**metrics, IMAGES: {REASON: float(unreadable)}} if unreadable else metrics

    def _score(self, path: Path) -> Evaluation | None:
        """The score of the results file, in the first process: where another runs beside it, that one scores masks."""
        path, beside = comm.all_gather((path, comm.get_local_size()))[0]
        shares = [(t,) for t in self.iou_types] if beside > 1 else [self.iou_types]
        rank, mine = comm.get_rank(), None
        if rank < len(shares):
            mine = score_file(truth_of(self.name), path, shares[rank])
        first, *others = comm.gather(mine) or [None]
        if first is None:
            return None
        for other in filter(None, others):
            first.metrics |= other.metrics
            first.classes = [a | b for a, b in zip(first.classes, other.classes, strict=True)]
        first.notes += self.notes
        return first


def coco_records(found: Instances, image_id: int) -> list[dict]:
    """An image's detections, on any device, as Detectron2's ``instances_to_coco_json`` writes them."""
    fields = dict(found.get_fields())
    masks = fields.pop("pred_masks", None)
    records = instances_to_coco_json(Instances(found.image_size, **fields).to("cpu"), image_id)
    if masks is not None:
        for record, mask in zip(records, encode_masks(masks), strict=True):
            record["segmentation"] = mask
    return records


def truth_of(name: str) -> GroundTruth:
    """The ground truth of a data set."""
    return GroundTruth(datasets.read_annotations(name), datasets.get_classes(name), datasets.get_entry(name).protocol)


def check_test_masks(names: Sequence[str]) -> None:
    """UserError if a test set has masks for some of its annotations only."""
    for name in names:
        scored_iou_types(truth_of(name), ("bbox", "segm"), f"DATASETS.TEST '{name}'")


def evaluate_results(
    name: str, path: str | Path, iou_types: tuple[str, ...], output_dir: str | Path | None = None
) -> Evaluation:
    """Score a results file against a data set, and :func:`publish`. Without masks in the annotations, only boxes are
    scored."""
    truth = truth_of(name)
    iou_types, notes = scored_iou_types(truth, iou_types, f"data set '{name}'")
    evaluation = score_file(truth, path, iou_types)
    evaluation.notes += notes
    publish(name, evaluation, output_dir)
    return evaluation


def score_file(truth: GroundTruth, path: str | Path, iou_types: tuple[str, ...]) -> Evaluation:
    """:func:`score` of a results file."""
    categories = {c["id"] for c in truth.document["categories"]}
    return score(truth, read_results(path, truth.sizes, categories, "segm" in iou_types), iou_types)


def publish(name: str, evaluation: Evaluation, output_dir: str | Path | None) -> None:
    """Log the metrics, and write ``per_class.json`` to ``output_dir``."""
    logger.info("%s", as_page(name, truth_of(name), evaluation))
    if output_dir:
        write_json(Path(output_dir) / CLASSES_FILE, {"counts": evaluation.counts, "classes": evaluation.classes})


def score(truth: GroundTruth, found: ResultArrays, iou_types: tuple[str, ...]) -> Evaluation:
    """All metrics of some detections: AP by the data set's protocol, AP-fixed for LVIS, and for boxes how far their
    scores can be believed (``reliability.py``), if they are between 0 and 1."""
    evaluation = evaluate(truth, found, iou_types, fixed=truth.protocol == "lvis")
    low, high = (found.scores.min(), found.scores.max()) if len(found.scores) else (0, 0)
    if low < 0 or high > 1:
        evaluation.notes.append(f"no precision, recall and calibration error: scores from {low:.4g} to {high:.4g} are "
                                "no probabilities")  # fmt: skip
    elif "bbox" in iou_types:
        judged = judge(truth, found)
        evaluation.metrics["bbox"] |= summarize_reliability(judged, truth.classes.splits, THRESHOLD)
        if len(judged.right) and judged.objects.any() and not judged.right.any():
            evaluation.notes.append("no detection is on an object of its class: are these the results of other images, "
                                    "or of other category ids?")  # fmt: skip
    return evaluation


def heading(name: str, truth: GroundTruth, evaluation: Evaluation) -> str:
    """One line above a table of metrics: protocol, classes offered and scored, images and detections."""
    counts = evaluation.counts
    groups = ", ".join(
        f"{counts[f'classes_{mark}']} {mark} ({counts[f'classes_{mark}_with_ground_truth']} with ground truth)"
        for mark in ("base", "novel")
    )
    return (
        f"{name}: {truth.protocol} protocol, {counts['offered']}-way; {groups}; "
        f"{count_of(counts['pictures'], 'image')}, {count_of(counts['detections'], 'detection')}, "
        f"at most {counts['most_detections_of_a_picture']} an image"
    )


def as_page(name: str, truth: GroundTruth, evaluation: Evaluation) -> str:
    """Heading, notes and table of an evaluation (Markdown)."""
    lines = [heading(name, truth, evaluation), *evaluation.notes]
    return "\n".join([*lines, "", as_table(evaluation.metrics, truth.protocol)])


def as_table(metrics: dict[str, dict[str, float]], protocol: str = "") -> str:
    """A Markdown table with a row per metric (percent unless its name says otherwise, "-" without ground truth) and a
    column per IoU type; for a ``protocol`` each row says by whose rules it is."""
    rows = [
        [key, *([rules(key, protocol)] if protocol else []), *(decimal(m.get(key), 2) for m in metrics.values())]
        for key in next(iter(metrics.values()))
    ]
    headers = ["", *(["rules"] if protocol else []), *metrics]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def write_metrics(output_dir: str | Path, results: dict[str, dict]) -> Path:
    """Write ``inference/vild_metrics.json`` from {data set: {IoU type: {metric key: percent}}}; return its path."""
    path = Path(output_dir) / "inference" / METRICS_FILE
    write_flat(path, results)
    return path


def write_flat(path: Path, results: dict[str, dict]) -> None:
    """Write {"<data set>/<IoU type>/<metric>": percent, or null without ground truth} as JSON."""
    flat = {
        f"{name}/{iou_type}/{key}": value
        for name, by_type in results.items()
        for iou_type, values in by_type.items()
        for key, value in values.items()
    }
    write_json(path, flat)


def ground_truth_boxes(name: str) -> dict[int, tuple[torch.Tensor, list[int]]]:
    """image_id to boxes, float32 [G, 4] xyxy, and contiguous class ids, without crowds."""
    truth = {}
    for record in datasets.load_dicts(name):
        things = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in things], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        truth[record["image_id"]] = boxes, [a["category_id"] for a in things]
    return truth
