"""Precision, recall and calibration error, against pycocotools' matching and numbers computed by hand."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.evaluation.reference import lvis_matches, random_world
from tests.evaluation.test_protocol import read, truth_of
from vild.evaluation.reliability import (
    Judged,
    calibration_error,
    diagram,
    judge,
    precision,
    recall,
    summarize_reliability,
)

TWO = Judged(
    scores=np.array([0.95, 0.85, 0.81, 0.3, 0.02]),
    right=np.array([True, True, False, False, True]),
    classes=np.array([0, 1, 1, 0, 0]),
    objects=np.array([3, 1]),
    images=2,
)


def test_by_hand():
    assert precision(TWO, 0.5) == pytest.approx(200 / 3) and recall(TWO, 0.5) == 50
    assert diagram(TWO)[9] == (1, 0.95, 1.0) and diagram(TWO)[8] == (2, pytest.approx(0.83), 0.5)
    assert diagram(TWO)[0][0] == 0  # 0.02 is left out
    assert calibration_error(TWO) == pytest.approx(100 * (0.05 + 2 * 0.33 + 0.3) / 4)
    found = summarize_reliability(TWO, ["base", "novel"], 0.5)
    assert found["precision_base"] == 100 and found["recall_base"] == pytest.approx(100 / 3)
    assert found["precision_novel"] == 50 and found["recall_novel"] == 100
    assert found["boxes_per_image"] == 1.5 and found["objects_per_image"] == 2
    assert found["boxes_per_image_novel"] == 1 and found["objects_per_image_base"] == 1.5


def test_without_detections_or_objects():
    none = Judged(np.zeros(0), np.zeros(0, bool), np.zeros(0, np.int64), np.zeros(2, np.int64), 1)
    assert np.isnan([precision(none, 0.5), recall(none, 0.5), calibration_error(none)]).all()


@pytest.mark.parametrize("seed", range(3))
def test_matches_are_those_of_pycocotools(seed, tmp_path):
    document, results = random_world(seed, lvis=False)
    truth = truth_of(document, "coco")
    found = read(truth, results, tmp_path)
    mine = judge(truth, found)
    (tmp_path / "gt.json").write_text(json.dumps(document))
    gt = COCO(str(tmp_path / "gt.json"))
    theirs = COCOeval(gt, gt.loadRes([{k: v for k, v in r.items() if k != "segmentation"} for r in results]), "bbox")
    theirs.params.maxDets = [10**6]
    theirs.params.iouThrs = np.array([0.5])
    theirs.params.areaRng = theirs.params.areaRng[:1]
    theirs.evaluate()
    rows = sorted(
        (e["category_id"], score, bool(match))
        for e in theirs.evalImgs if e
        for score, match, ignored in zip(e["dtScores"], e["dtMatches"][0], e["dtIgnore"][0], strict=True) if not ignored
    )  # fmt: skip
    ids = np.array(truth.classes.ids)
    assert sorted(zip(ids[mine.classes].tolist(), mine.scores.tolist(), mine.right.tolist(), strict=True)) == rows
    things = [a for a in document["annotations"] if not a.get("iscrowd")]
    assert mine.objects.sum() == len(things) and mine.right.sum() > 10


@pytest.mark.parametrize("seed", range(3))
def test_in_lvis_what_is_judged_and_right_is_as_lvis_api_says(seed, tmp_path):
    """Left out: classes of which an image says nothing, and detections without an object of a class that it has not
    exhaustively annotated."""
    document, results = random_world(seed, lvis=True)
    truth = truth_of(document, "lvis")
    mine = judge(truth, read(truth, results, tmp_path))
    rows = lvis_matches(document, results, tmp_path)
    ids = np.array(truth.classes.ids)
    assert sorted(zip(ids[mine.classes].tolist(), mine.scores.tolist(), mine.right.tolist(), strict=True)) == rows
    assert mine.right.sum() > 10
