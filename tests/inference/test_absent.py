"""Absent words: the questions, and the counts of the answers by hand."""

import numpy as np
import pytest

from vild.evaluation.protocol import GroundTruth
from vild.evaluation.reliability import Objects
from vild.inference import absent as module
from vild.inference.absent import ABSENT, KINDS, Answers, Question, absent_words, ask
from vild.utils.errors import UserError

THINGS = Objects(
    boxes=np.array([[0.0, 0, 10, 10], [20, 0, 10, 10], [40, 0, 10, 10]]),
    classes=np.array([1, 1, 3]),
    crowd=np.zeros(3, bool),
)
CLOSE = np.eye(12)
CLOSE[3, 7] = CLOSE[1, 9] = 0.9
CLOSE[3, 2] = 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_not_there_is_absent(kind):
    for seed in range(20):
        question = ask(THINGS, CLOSE, range(12), kind, seed)
        assert len(question.absent) == ABSENT and not {1, 3} & {*question.absent}
        assert {*question.present} == {1, 3}
    assert ask(THINGS, CLOSE, range(12), kind, 3) == ask(THINGS, CLOSE, range(12), kind, 3)


def test_hard_words_are_the_nearest_to_what_is_there():
    assert {*ask(THINGS, CLOSE, range(12), "hard", 0).absent[:2]} == {7, 9}
    assert ask(THINGS, CLOSE, range(12), "hard", 0).absent[2] == 2


def test_in_lvis_only_what_the_image_says_is_absent():
    assert {*ask(THINGS, CLOSE, [1, 4, 5], "random", 0).absent} == {4, 5}


def test_counts_by_hand():
    answers = Answers(splits=["base"] * 6 + ["novel"] * 4 + [""] * 2)
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 9], [60, 60, 5, 5], [70, 70, 5, 5]])
    answers.add(Question((4, 7, 8), (1, 3)), THINGS, boxes, np.array([1, 1, 7, 7]), np.array([0.9, 0.8, 0.7, 0.6]))
    found = answers.summary()
    assert found["false_boxes_base"] == 0 and found["false_boxes_novel"] == 1  # two of the word 7, none of 8
    assert found["false_boxes"] == pytest.approx(np.mean([*answers.false_boxes["base"], *answers.false_boxes["novel"]]))
    assert found["recall"] == pytest.approx(100 / 3)  # the second box on an object finds no other
    assert found["image_precision"] == 50 and found["image_recall"] == 50
    assert Answers(["base"] * 2).summary()["recall"] is None
    # a class that the split leaves unmarked is in neither column
    answers.add(Question((10,), ()), THINGS, boxes[:1], np.array([10]), np.array([0.9]))
    more = answers.summary()
    assert more["false_boxes_novel"] == found["false_boxes_novel"] and more["false_boxes"] == 0.75  # 3 of 4 words


def test_every_image_is_asked(detector, world):
    found = absent_words(detector, "glyphs_val", threshold=0.0)
    again = absent_words(detector, "glyphs_val", threshold=0.0)
    assert found == again and found.keys() == {*KINDS}
    assert all(value >= 0 for summary in found.values() for value in summary.values())
    none = absent_words(detector, "glyphs_val", threshold=1.0)
    assert none["random"]["false_boxes_novel"] == none["random"]["recall"] == 0
    assert none["random"]["image_precision"] is None


def test_a_data_set_whose_images_say_of_nothing_that_it_is_absent_is_refused(detector, monkeypatch):
    """Its image precision was 100: nothing was asked that could be wrong."""
    truth = module.truth_of("glyphs_lvis_val")
    images = [{k: v for k, v in i.items() if k != "neg_category_ids"} for i in truth.document["images"]]
    none = GroundTruth({**truth.document, "images": images}, truth.classes, truth.protocol)
    monkeypatch.setattr(module, "truth_of", lambda _: none)
    with pytest.raises(UserError, match=r"data set 'glyphs_lvis_val': no image says .* \(neg_category_ids\)"):
        absent_words(detector, "glyphs_lvis_val")
