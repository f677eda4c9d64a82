import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.reference import lvis_precision, pycocotools_precision, random_world
from vild.data.classes import Split, make_classes
from vild.evaluation.metrics import summarize
from vild.evaluation.protocol import GroundTruth, evaluate
from vild.evaluation.results import ResultsWriter, best_per_class, iterate_records, read_results
from vild.utils.errors import UserError

BY_FREQUENCY = {"base": frozenset("fc"), "novel": frozenset("r")}


def classes_of(document, rules):
    return make_classes(document["categories"], Split(Path("test"), rules))


def read(truth, results, folder):
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return read_results(path, truth.sizes, {c["id"] for c in truth.document["categories"]}, masks=True)


def truth_of(document, protocol):
    return GroundTruth(document, classes_of(document, BY_FREQUENCY), protocol)


@pytest.mark.parametrize("protocol", ["coco", "lvis"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_reference(seed, protocol, tmp_path):
    document, results = random_world(seed, protocol == "lvis")
    per_image = np.unique([r["image_id"] for r in results], return_counts=True)[1]
    assert per_image.max() > 300
    truth = truth_of(document, protocol)
    mine = evaluate(truth, read(truth, results, tmp_path), ("bbox", "segm")).metrics
    for iou_type in ("bbox", "segm"):
        if protocol == "lvis":
            precision = lvis_precision(document, results, iou_type, tmp_path)
        else:
            precision = pycocotools_precision(document, results, iou_type)
        expected = summarize(precision, truth.classes.splits, truth.classes.frequencies)
        assert mine[iou_type].keys() == expected.keys() and 1 < mine[iou_type]["AP"] < 99
        for name, value in expected.items():
            assert mine[iou_type][name] == pytest.approx(value, abs=1e-6, nan_ok=True), (iou_type, name)


def test_means_are_those_of_the_reference(tmp_path):
    """The groups' means against lvis-api's own, not through our summary."""
    document, results = random_world(5, lvis=True)
    truth = truth_of(document, "lvis")
    mine = evaluate(truth, read(truth, results, tmp_path), ("bbox",)).metrics["bbox"]
    precision = lvis_precision(document, results, "bbox", tmp_path)
    for letter, rest in (("r", 0), ("c", 1), ("f", 2)):
        chosen = precision[:, :, [c % 3 == rest for c in range(1, 13)], 0]
        assert mine[f"AP{letter}"] == pytest.approx(100 * chosen[chosen > -1].mean(), abs=1e-6)
    assert mine["AP_novel"] == mine["APr"]


def test_ap_fixed_equals_the_reference_without_a_limit_per_image(tmp_path, monkeypatch):
    document, results = random_world(1, lvis=True)
    truth = truth_of(document, "lvis")
    monkeypatch.setattr("vild.evaluation.protocol.FIXED_PER_CLASS", 150)
    mine = evaluate(truth, read(truth, results, tmp_path), ("bbox",), fixed=True).metrics["bbox"]
    kept = []
    for category in range(1, 13):
        own = [r for r in results if r["category_id"] == category]
        kept += sorted(own, key=lambda r: (-r["score"], r["image_id"]))[:150]
    assert len(kept) < len(results)
    precision = lvis_precision(document, kept, "bbox", tmp_path, per_image=-1)
    for name, value in summarize(precision, truth.classes.splits, truth.classes.frequencies, fixed=True).items():
        assert mine[name] == pytest.approx(value, abs=1e-6)
    assert mine["AP_fixed"] != mine["AP"]


def test_best_per_class_takes_the_highest_scores(tmp_path):
    document, results = random_world(2, lvis=False)
    found = read(truth_of(document, "coco"), results, tmp_path)
    best = best_per_class(found, 20)
    for category in range(1, 13):
        everyone = np.sort(found.scores[found.category_ids == category])[::-1]
        np.testing.assert_array_equal(np.sort(best.scores[best.category_ids == category])[::-1], everyone[:20])
    assert len(best.masks) == len(best) and (np.diff(best.image_ids) >= 0).all()


def test_classes_that_are_offered_only_are_not_scored(tmp_path):
    """80-way scores the same 65 classes: a class marked neither base nor novel changes no mean."""
    document, results = random_world(3, lvis=False)
    for category in document["categories"]:
        category["frequency"] = ""
    marked = {"base": ("class 1", "class 2"), "novel": ("class 3",)}
    few = GroundTruth(document, classes_of(document, marked), "coco")
    classes = classes_of(document, {"base": "all", "novel": ()})
    splits = tuple({1: "base", 2: "base", 3: "novel"}.get(i, "") for i in classes.ids)
    many = GroundTruth(document, replace(classes, splits=splits), "coco")
    one, other = (evaluate(t, read(t, results, tmp_path), ("bbox", "segm")) for t in (few, many))
    assert one.metrics == other.metrics and (one.counts["offered"], other.counts["offered"]) == (3, 12)


def test_images_without_a_marked_annotation_can_be_left_out(tmp_path):
    """What the circulating 48/17 files do; detections there do not count then."""
    document, results = random_world(4, lvis=False)
    for category in document["categories"]:
        del category["frequency"]
    split = {"base": ("class 1",), "novel": ("class 2",)}
    whole = GroundTruth(document, classes_of(document, split), "coco")
    some = whole.only_annotated_images()
    assert 0 < len(some.document["images"]) < len(document["images"])
    cut = {**document, "images": some.document["images"],
           "annotations": [a for a in document["annotations"] if a["category_id"] <= 2],
           "categories": document["categories"][:2]}  # fmt: skip
    released = GroundTruth(cut, classes_of(cut, split), "coco")
    found = read(whole, results, tmp_path)
    mine, theirs = (evaluate(t, found, ("bbox", "segm")) for t in (some, released))
    assert mine.metrics == theirs.metrics != evaluate(whole, found, ("bbox", "segm")).metrics


def test_records_come_one_by_one_whatever_the_chunks(tmp_path, monkeypatch):
    records = [{"a": n, "text": "],[ {" * (n % 7)} for n in range(200)]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(records, indent=1))
    for chunk in (7, 64, 1 << 20):
        monkeypatch.setattr("vild.evaluation.results._CHUNK", chunk)
        assert list(iterate_records(path)) == records
    path.write_text(" [ ] ")
    assert list(iterate_records(path)) == []


MALFORMED = {
    "not a list": ('{"image_id": 1}', "is not a JSON list"),
    "cut off": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2', "record 0: not JSON, or truncated"),
    "cut off between": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1},', "after record 0"),
    "a number": ("[7]", "record 0"),
    "no score": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4]}]', "record 0: 'score' is missing"),
    "no box": ('[{"image_id": 3, "category_id": 1, "score": 1}]', "record 0: 'bbox' is missing"),
    "three numbers": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3], "score": 1}]', "record 0: bbox [1, 2, 3]"),
    "text": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, "4"], "score": 1}]', "record 0: must be real"),
    "unknown image": ('[{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "image_id 9 is"),
    "a list as id": ('[{"image_id": [], "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "record 0"),
    "unknown class": ('[{"image_id": 3, "category_id": 77, "bbox": [1, 2, 3, 4], "score": 1}]', "category_id 77 is"),
    "NaN": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, NaN], "score": 1}]', "not finite"),
    "negative": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, -3, 4], "score": 1}]', "bbox [1.0, 2.0, -3"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_results_file_is_reported_in_one_line(name, tmp_path):
    text, message = MALFORMED[name]
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_results(path, {3: (10, 10)}, {1}, masks=False)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_masks_must_fit_their_image(tmp_path):
    path = tmp_path / "r.json"
    record = {"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}
    path.write_text(json.dumps([record | {"segmentation": {"size": [9, 10], "counts": "0"}}]))
    with pytest.raises(UserError, match="record 0: segmentation's size"):
        read_results(path, {3: (10, 10)}, {1}, masks=True)
    path.write_text(json.dumps([record]))
    with pytest.raises(UserError, match="record 0: 'segmentation' is missing"):
        read_results(path, {3: (10, 10)}, {1}, masks=True)


def test_the_writer_gives_back_what_went_in(tmp_path):
    writer = ResultsWriter(str(tmp_path))
    records = [{"image_id": n, "score": n / 3} for n in range(50)]
    writer.add(records[:20])
    writer.add([])
    writer.add(records[20:])
    writer.finish(tmp_path / "r.json")
    assert list(iterate_records(tmp_path / "r.json")) == records == json.loads((tmp_path / "r.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    empty = ResultsWriter()
    empty.finish(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text()) == []
