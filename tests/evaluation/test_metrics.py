import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vild.data import datasets
from vild.evaluation import metrics
from vild.evaluation.evaluator import (
    OpenVocabularyEvaluator,
    as_table,
    check_test_masks,
    evaluate_results,
    ground_truth_boxes,
    write_metrics,
)
from vild.evaluation.metrics import Metric
from vild.utils.errors import UserError


def score(name, results, folder, iou_types=("bbox",)):
    """Metrics of results, through a file as a user's."""
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return evaluate_results(name, path, iou_types).metrics


def perfect(name):
    """The ground truth as results."""
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9,
         "segmentation": a["segmentation"]}
        for a in datasets.read_annotations(name)["annotations"]
    ]  # fmt: skip


def noisy(name, seed=0):
    """Ground truth shaken, some with a wrong class, some missing, random scores."""
    rng, results = np.random.default_rng(seed), []
    for result in perfect(name):
        if rng.random() < 0.1:
            continue
        result["bbox"] = (np.array(result["bbox"]) + rng.normal(0, 3, 4)).clip(1).tolist()
        result["score"] = float(rng.random())
        if rng.random() < 0.3:
            result["category_id"] = int(rng.integers(1, 61))
        results.append(result)
    return results


@pytest.mark.parametrize("name", ["glyphs_val", "glyphs_lvis_val"])
def test_perfect_detections_score_100(world, name, tmp_path):
    for values in score(name, perfect(name), tmp_path, ("bbox", "segm")).values():
        assert all(np.isnan(v) or v == pytest.approx(100) for key, v in values.items() if key.startswith("AP"))
        if "precision" in values:
            assert values["precision"] == values["recall"] == values["recall_novel"] == 100
            assert values["boxes_per_image"] == values["objects_per_image"]
        assert values["AP50_novel"] == values["APr"] == pytest.approx(100)


def test_equals_pycocotools(world, tmp_path):
    results = noisy("glyphs_val")
    mine = score("glyphs_val", results, tmp_path)["bbox"]
    path = world / "glyphs/annotations/coco_val.json"
    truth = COCO(str(path))
    run = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    assert mine["AP"] == pytest.approx(100 * run.stats[0]) and mine["AP50_all"] == pytest.approx(100 * run.stats[1])
    for mark, letters in (("novel", "r"), ("base", "fc")):
        ids = [c["id"] for c in truth.dataset["categories"] if c["frequency"] in letters]
        run.params.catIds = ids
        run.evaluate()
        run.accumulate()
        run.summarize()
        assert mine[f"AP50_{mark}"] == pytest.approx(100 * run.stats[1])


def test_novel_and_base_do_not_mix(world, tmp_path):
    classes = datasets.get_classes("glyphs_val")
    novel = {i for i, s in zip(classes.ids, classes.splits, strict=True) if s == "novel"}
    only_novel = [r for r in perfect("glyphs_val") if r["category_id"] in novel]
    values = score("glyphs_val", only_novel, tmp_path)["bbox"]
    assert values["AP50_novel"] == pytest.approx(100) and values["AP50_base"] == 0
    assert values["APr"] == pytest.approx(100) and values["APf"] == values["APc"] == 0


def test_a_class_without_ground_truth_is_left_out_of_means():
    precision = np.ones((10, 101, 3, 4))
    precision[:, :, 1] = -1
    precision[:, :, 2] = 0.5
    values = metrics.summarize(precision, ("base", "novel", "base"), ("f", "r", "c"))
    assert values["AP"] == values["AP50_base"] == 75 and np.isnan(values["AP50_novel"]) and np.isnan(values["APr"])
    assert "| APr | - |" in re.sub(" +", " ", as_table({"bbox": values}))


def test_no_detections_score_zero(world, tmp_path):
    values = score("glyphs_val", [], tmp_path)["bbox"]
    assert values["AP"] == values["AP50_novel"] == 0


def test_the_evaluator_maps_classes_back(world, tmp_path):
    evaluator = OpenVocabularyEvaluator("glyphs_val", str(tmp_path), masks=False)
    for image_id, (boxes, classes) in ground_truth_boxes("glyphs_val").items():
        instances = Instances((128, 128), pred_boxes=Boxes(boxes), pred_classes=torch.tensor(classes),
                              scores=torch.full((len(classes),), 0.7))  # fmt: skip
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP50_all"] == pytest.approx(100)
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == len(perfect("glyphs_val"))


def test_a_set_without_masks_is_evaluated_by_its_boxes(world, tmp_path, monkeypatch, caplog):
    """A detector with masks, validated on box-only data; data with some masks is refused before anything is done."""
    document = datasets.read_annotations("glyphs_val")
    boxes_only = [{k: v for k, v in a.items() if k != "segmentation"} for a in document["annotations"]]
    count = len(boxes_only)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name, annotations in (("none", boxes_only), ("some", [*document["annotations"][:1], *boxes_only[1:]])):
        (tmp_path / f"{name}.json").write_text(json.dumps({**document, "annotations": annotations}))
        datasets.add_entry(name, datasets.Entry(f"{name}.json", "images", "lvis"))
    check_test_masks(["none"])
    for refuse in (
        lambda: check_test_masks(["none", "some"]),
        lambda: OpenVocabularyEvaluator("some", None, masks=True),
    ):
        with pytest.raises(UserError, match=f"'some': {count - 1} of {count} annotations have no mask .id 2, 3, "):
            refuse()
    evaluator = OpenVocabularyEvaluator("none", str(tmp_path / "out"), masks=True)
    for image_id, (boxes, classes) in ground_truth_boxes("none").items():
        masks, scores = torch.zeros(len(boxes), 128, 128), torch.full((len(boxes),), 0.7)
        instances = Instances((128, 128), pred_boxes=Boxes(boxes), pred_classes=torch.tensor(classes), scores=scores,
                              pred_masks=masks)  # fmt: skip
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    with caplog.at_level("INFO", "vild"):
        metrics = evaluator.evaluate()
    assert metrics.keys() == {"bbox"} and metrics["bbox"]["AP50_all"] == pytest.approx(100)
    assert f"no mask AP: {count} of {count} annotations have no mask" in caplog.text


def test_metrics_file_is_flat(tmp_path):
    path = write_metrics(str(tmp_path), {"d": {"bbox": {"AP": 1.5, "AP50_novel": float("nan")}}})
    assert json.loads(Path(path).read_text()) == {"d/bbox/AP": 1.5, "d/bbox/AP50_novel": None}


def test_a_metric_at_a_threshold_that_nobody_computes_is_refused():
    for iou in (40, 62, 100):
        with pytest.raises(ValueError, match=f"AP{iou}: the IoU thresholds are 50, 55 ... 95, not {iou}"):
            Metric(f"AP{iou}", iou=iou)
