import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_api

from tests.evaluation.reference import lvis_precision, pycocotools_precision, random_world
from vild.data.annotations import check_annotations
from vild.data.classes import Split, make_classes
from vild.evaluation.evaluator import score
from vild.evaluation.metrics import summarize
from vild.evaluation.protocol import GroundTruth, evaluate, scored_iou_types
from vild.evaluation.results import best_of_each, read_results
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


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_ap_fixed_has_no_limit_of_detections_an_image(iou_type, tmp_path):
    """With thin boxes and empty masks of classes that are not exhaustively annotated, which no crowd overlaps."""
    document, results = random_world(2, lvis=True, image_count=10, most=800)
    open_classes = {i["id"]: i["not_exhaustive_category_ids"] for i in document["images"]}
    empty = {"bbox": [5, 5, 0, 9], "score": 0.999}
    for image_id, categories in open_classes.items():
        size = next([i["height"], i["width"]] for i in document["images"] if i["id"] == image_id)
        mask = {"size": size, "counts": mask_api.encode(np.zeros(size, np.uint8, order="F"))["counts"].decode()}
        results += [{"image_id": image_id, "category_id": c, "segmentation": mask, **empty} for c in categories]
    per_image = np.unique([r["image_id"] for r in results], return_counts=True)[1]
    assert (per_image > 300).sum() > 3 and any(open_classes.values())
    truth = truth_of(document, "lvis")
    mine = evaluate(truth, read(truth, results, tmp_path), (iou_type,), fixed=True).metrics[iou_type]
    for fixed in (False, True):
        precision = lvis_precision(document, results, iou_type, tmp_path, per_image=-1 if fixed else 300)
        for name, value in summarize(precision, truth.classes.splits, truth.classes.frequencies, fixed).items():
            assert mine[name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    assert mine["AP_fixed"] > mine["AP"] + 0.1


@pytest.mark.parametrize("protocol", ["coco", "lvis"])
@pytest.mark.parametrize("first", [1_700_000_000_000_000_000, -(2**63), 2**63 - 60, -7])
def test_any_64_bit_ids_give_what_small_ones_give(first, protocol, tmp_path):
    """Time stamps, hashes and negative ids, of images, classes and annotations, beyond what a float64 tells apart."""
    document, results = random_world(6, protocol == "lvis", image_count=8, most=60)
    small = truth_of(document, protocol)
    expected = score(small, read(small, results, tmp_path), ("bbox", "segm"))
    new = {i["id"]: first + n for n, i in enumerate(document["images"])}
    for image in document["images"]:
        image["id"] = new[image["id"]]
        for key in ("neg_category_ids", "not_exhaustive_category_ids") if protocol == "lvis" else ():
            image[key] = [first + c for c in image[key]]
    for category in document["categories"]:
        category["id"] += first
    for record in (*document["annotations"], *results):
        record["image_id"], record["category_id"] = new[record["image_id"]], first + record["category_id"]
    for n, record in enumerate(document["annotations"]):
        record["id"] = first + n
    check_annotations(document, "gt.json")
    wide = truth_of(document, protocol)
    found = score(wide, read(wide, results, tmp_path), ("bbox", "segm"))
    assert str(found.metrics) == str(expected.metrics) and expected.metrics["bbox"]["AP"] > 1
    assert found.counts == expected.counts


def test_best_of_each_takes_the_highest_scores(tmp_path):
    document, results = random_world(2, lvis=False)
    found = read(truth_of(document, "coco"), results, tmp_path)
    best = best_of_each(found.category_ids, found, 20)
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


NO_MASK = {"missing": ..., "null": None, "empty": [], "two points": [[1, 1, 9, 9]], "empty polygon": [[]],
           "odd": [[1, 1, 9, 9, 5]], "empty RLE": {"size": [90, 90], "counts": [8100]}}  # fmt: skip


@pytest.mark.parametrize("kind", NO_MASK)
def test_masks_are_scored_only_where_the_annotations_have_them(kind):
    """pycocotools takes some of these for boxes, and some match nothing."""
    document, _ = random_world(0, lvis=False, image_count=5)
    truth, count = truth_of(document, "coco"), len(document["annotations"])
    assert scored_iou_types(truth, ["bbox", "segm"], "gt.json") == (("bbox", "segm"), [])
    for annotation in document["annotations"][1:]:
        annotation["segmentation"] = NO_MASK[kind]
        if kind == "missing":
            del annotation["segmentation"]
    with pytest.raises(
        UserError, match=rf"gt.json: {count - 1} of {count} annotations have no mask \(id 2, 3, 4, 5, 6, \.\.\.\)"
    ):
        scored_iou_types(truth, ["bbox", "segm"], "gt.json")
    assert scored_iou_types(truth, ["bbox"], "gt.json") == (("bbox",), [])
    document["annotations"][0]["segmentation"] = None
    note = f"no mask AP: {count} of {count} annotations have no mask"
    assert scored_iou_types(truth, ["bbox", "segm"], "gt.json") == (("bbox",), [note])
    with pytest.raises(UserError, match="there is no mask AP"):
        scored_iou_types(truth, ["segm"], "gt.json")


def test_ap_fixed_says_when_a_limit_an_image_makes_it_a_lower_bound(tmp_path):
    document, results = random_world(1, lvis=True, image_count=8, most=120)
    truth = truth_of(document, "lvis")
    limited = []
    for image in document["images"]:
        own = sorted((r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"])
        limited += own[:30]
    at_limit = sum(len([r for r in limited if r["image_id"] == i["id"]]) == 30 for i in document["images"])
    assert at_limit > 1
    (note,) = score(truth, read(truth, limited, tmp_path), ("bbox",)).notes
    assert note.startswith("AP_fixed is a lower bound if the detector was limited to 30 detections an image")
    assert f"as {at_limit} images suggest" in note
    assert score(truth, read(truth, results, tmp_path), ("bbox",)).notes == []


def test_results_none_of_which_is_on_an_object_are_doubted(tmp_path):
    """Those of other images with the same ids score 0.00, as those of a detector that finds nothing do."""
    document, results = random_world(2, lvis=False)
    truth = truth_of(document, "coco")
    assert not score(truth, read(truth, results, tmp_path), ("bbox",)).notes
    elsewhere = [{**r, "bbox": [0, 0, 0.1, 0.1]} for r in results]
    (note,) = score(truth, read(truth, elsewhere, tmp_path), ("bbox",)).notes
    assert note.startswith("no detection is on an object of its class")
    assert not score(truth, read(truth, [], tmp_path), ("bbox",)).notes


@pytest.mark.parametrize(("factor", "shift", "range_"), [(100, 0, "100"), (1, -2, "-")])
def test_scores_that_are_no_probabilities_have_an_ap_only(factor, shift, range_, tmp_path):
    document, results = random_world(2, lvis=False)
    truth = truth_of(document, "coco")
    plain = score(truth, read(truth, results, tmp_path), ("bbox",))
    other = [{**r, "score": factor * r["score"] + shift} for r in results]
    found = score(truth, read(truth, other, tmp_path), ("bbox",))
    (note,) = found.notes
    assert note.startswith("no precision, recall and calibration error: scores from ") and range_ in note
    assert "precision" in plain.metrics["bbox"] and "precision" not in found.metrics["bbox"]
    assert found.metrics["bbox"]["AP"] == pytest.approx(plain.metrics["bbox"]["AP"], abs=1e-6)
