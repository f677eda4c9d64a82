"""``MODEL.VILD.OBJECTIVES``: schedules, several objectives, and mistakes in one line."""

import pytest

from tests.modeling.test_objectives import regions
from vild.modeling.objectives import OBJECTIVES, parse_objectives, word_lists
from vild.modeling.schedule import parse_schedule
from vild.utils.errors import UserError


@pytest.mark.parametrize(
    ("shape", "expected"), [("linear", [2, 2, 1, 0, 0]), ("cosine", [2, 2, 1, 0, 0]), ("step", [2, 2, 2, 0, 0])]
)
def test_schedules(shape, expected):
    schedule = parse_schedule({"FROM": 2, "TO": 0.0, "SHAPE": shape, "BETWEEN": [0.25, 0.75]}, "key")
    assert [schedule(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(expected)
    assert parse_schedule(3, "key")(0.7) == 3


def test_the_mixture_moves_from_soft_to_hard():
    soft, hard = parse_objectives([
        {"NAME": "soft_targets", "WEIGHT": {"FROM": 1, "TO": 0}, "TEMPERATURE": {"FROM": 4, "TO": 1}},
        {"NAME": "hard_targets", "WEIGHT": {"FROM": 0, "TO": 1}, "OVER": "words.safetensors"},
    ])  # fmt: skip
    x = regions()
    assert soft(x, 0.0).item() == pytest.approx(OBJECTIVES["soft_targets"](x, temperature=4.0).item())
    assert soft(x, 0.5).item() == pytest.approx(OBJECTIVES["soft_targets"](x, temperature=2.5).item() / 2)
    assert soft(x, 1.0).item() == 0 and word_lists([soft, hard]) == ["words.safetensors"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["l1"], "has no NAME"),
        ([{"NAME": "l3"}], "'l3' is not one of .*l1"),
        ([{"NAME": "l1"}, {"NAME": "l1", "WEIGHT": 2}], "duplicate objective 'l1'"),
        ([{"NAME": "l1", "TEMPERATURE": 2}], "'TEMPERATURE' is not one of WEIGHT"),
        ([{"NAME": "l1", "WEIGHT": "much"}], "WEIGHT: 'much' is not a number"),
        ([{"NAME": "contrast", "TEMPERATURE": "1e-1"}], "TEMPERATURE: '1e-1' is not a number"),
        ([{"NAME": "soft_targets", "OVER": 3}], "OVER: 3 is not text"),
        ([{"NAME": "contrast", "TEMPERATURE": 0}], "TEMPERATURE: 0 is not above 0"),
        ([{"NAME": "soft_targets", "TEMPERATURE": {"FROM": 4, "TO": 0}}], "TEMPERATURE: .* is not above 0"),
        ([{"NAME": "smooth_l1", "BETA": -0.1}], "BETA: -0.1 is below 0"),
        ([{"NAME": "hard_targets", "CONFIDENCE": {"FROM": 1.1, "TO": 0}}], "CONFIDENCE: .* is not within 0 and 1"),
        ([{"NAME": "l1", "WEIGHT": {"FROM": 1, "TO": -1}}], "WEIGHT: .* is below 0"),
        ([{"NAME": "l1", "WEIGHT": {"FROM": 1, "TO": 0, "SHAPE": ["step"]}}], "is not a number or"),
        ([{"NAME": "l1", "WEIGHT": {"FROM": 1, "TO": 0, "SHAPE": "step"}}], "jumps where BETWEEN ends"),
        ([{"NAME": "l1", "WEIGHT": {"FROM": 1, "TO": 0, "SHAPE": "step", "BETWEEN": [0, 1]}}], "must be below 1"),
        ([{"NAME": "l1", "WEIGHT": {"FROM": 1}}], "is not a number or"),
        ([{"NAME": "l1", "WEIGHT": {"FROM": 1, "TO": 0, "BETWEEN": [1, 0]}}], "is not a number or"),
        ([{"NAME": "l1", "WEIGHT": {"FROM": 1, "TO": 0, "BETWEEN": [200, 800]}}], "is not a number or"),  # iterations
        ([{"NAME": "l1", "WEIGHT": {"FROM": 1, "TO": 0, "SHAPE": "round"}}], "is not a number or"),
    ],
)
def test_mistakes_are_one_line(entries, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_objectives(entries)
    assert "\n" not in str(caught.value) and "MODEL.VILD.OBJECTIVES" in str(caught.value)
