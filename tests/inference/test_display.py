"""What a person is shown: the rules one by one, and that they are the authors' for the authors' detectors only."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from detectron2.structures import Boxes, Instances

from vild.inference.display import NOTEBOOK, DisplayRules
from vild.utils.errors import NotAvailable


def test_the_rules_on_boxes_by_hand():
    boxes = [[0, 0, 20, 20], [0, 0, 20, 13], [0, 9, 20, 20], [50, 0, 61, 20], [50, 50, 61, 69], [80, 0, 120, 40]]
    found = Instances((100, 200), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
                      scores=torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]))  # fmt: skip

    def kept(**rules):
        return (DisplayRules(**rules).select(found).scores * 10).round().int().tolist()

    # the second covers 0.65 of the first, the third 0.55; areas are 400, 260, 220, 220, 209 and 1600
    assert kept() == [9, 8, 7, 6, 5, 4] and kept(across_names=0.6) == [9, 7, 6, 5, 4]
    assert kept(across_names=0.6, area=220) == [9, 7, 6, 4]
    assert kept(across_names=0.6, area=220, most=2) == [9, 7]
    assert len(NOTEBOOK.select(found[:0])) == 0
    assert (NOTEBOOK.objectness, NOTEBOOK.across_names, NOTEBOOK.area, NOTEBOOK.most) == (0.9, 0.6, 220, 25)


@pytest.mark.parametrize("least", [0.5, 0.9])
def test_proposals_that_are_no_object_are_not_classified(detector, image, monkeypatch, least):
    heads, rpn, given = detector.model.roi_heads, detector.model.proposal_generator, []
    detect, propose = heads.detect, rpn.forward

    def proposed(*inputs):
        found, losses = propose(*inputs)
        found[0].objectness_logits = torch.linspace(2, -2, len(found[0]))  # sigmoid(2) is 0.88
        return found, losses

    monkeypatch.setattr(rpn, "forward", proposed)
    monkeypatch.setattr(heads, "detect", lambda f, p, c: (given.append(len(p[0])), detect(f, p, c))[1])
    everything = detector(image, threshold=0)
    detector.rules = DisplayRules(objectness=least)
    found = detector(image, threshold=0)
    assert len(everything) > 0 and given == [given[0], given[0] // 2 if least == 0.5 else 0]
    assert 0 < len(found) < len(everything) if least == 0.5 else len(found) == 0


def test_a_word_beside_the_words(detector, image, monkeypatch, caplog):
    other = copy.copy(detector)
    other.rules = DisplayRules(beside=("kite flyer",))
    with_word = other.with_vocabulary(["umbrella", "sun"])
    expected = detector.with_vocabulary(["umbrella", "sun"], negatives=["kite flyer"])
    assert torch.equal(with_word._offered.text, expected._offered.text) and with_word.names == ("umbrella", "sun")
    for asked in (["Kite_flyer"], ["umbrella | kite flyer"]):  # then it is a word like any other
        assert torch.equal(other.with_vocabulary(asked)._offered.text, detector.with_vocabulary(asked)._offered.text)
    assert len(other.with_vocabulary(detector.trained)._offered.text) == len(detector.trained) + 1

    def missing(*_):
        raise NotAvailable("no encoder")

    monkeypatch.setattr(type(detector._text), "teacher", property(missing))
    other.rules = replace(other.rules, beside=("nobody asked for this",))
    with caplog.at_level(logging.WARNING):
        without = other.with_vocabulary(["umbrella", "sun"])
    assert "'nobody asked for this' must be encoded: no encoder. Detecting without it" in caplog.text
    assert torch.equal(without._offered.text, detector.with_vocabulary(["umbrella", "sun"])._offered.text)


def test_other_detectors_are_shown_as_they_detect(detector, image):
    shown = detector.for_display()
    assert shown.rules == DisplayRules() and shown.names == detector.names
    assert torch.equal(shown(image, threshold=0).scores, detector(image, threshold=0).scores)
