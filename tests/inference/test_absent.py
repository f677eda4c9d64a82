"""Absent words: the questions, and the counts of the answers by hand."""

import numpy as np
import pytest

from vild.evaluation.reliability import Objects
from vild.inference.absent import ABSENT, KINDS, Answers, Question, absent_words, ask

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
    answers = Answers(base=np.arange(12) < 6)
    boxes = np.array([[0.0, 0, 10, 10], [0, 0, 10, 9], [60, 60, 5, 5], [70, 70, 5, 5]])
    answers.add(Question((4, 7, 8), (1, 3)), THINGS, boxes, np.array([1, 1, 7, 7]), np.array([0.9, 0.8, 0.7, 0.6]))
    found = answers.summary()
    assert found["false_boxes_base"] == 0 and found["false_boxes_novel"] == 1  # two of the word 7, none of 8
    assert found["recall"] == pytest.approx(100 / 3)  # the second box on an object finds no other
    assert found["image_precision"] == 50 and found["image_recall"] == 50
    assert Answers(np.ones(2, bool)).summary()["recall"] is None


def test_every_image_is_asked(detector, world):
    found = absent_words(detector, "glyphs_val", threshold=0.0)
    again = absent_words(detector, "glyphs_val", threshold=0.0)
    assert found == again and found.keys() == {*KINDS}
    assert all(value >= 0 for summary in found.values() for value in summary.values())
    none = absent_words(detector, "glyphs_val", threshold=1.0)
    assert none["random"]["false_boxes_novel"] == none["random"]["recall"] == 0
    assert none["random"]["image_precision"] is None
