"""The comparison that the tests of exported detectors rest on can fail."""

import pytest

from tests.export.exported import check_same

BOXES = [[0.0, 0, 10, 10], [0.0, 0, 10, 5], [50.0, 50, 60, 70]]  # the first two overlap by 0.5


def detections(scores=(0.9, 0.5, 1e-6), names=(0, 0, 1)) -> list[dict]:
    return [{"name": n, "score": s, "box": b} for n, s, b in zip(names, scores, BOXES, strict=True)]


def test_the_same_in_another_order_and_a_tie_of_nms():
    check_same(detections(), detections()[::-1])
    check_same(detections(), [detections()[0], detections()[2]])
    check_same([detections()[0], detections()[2]], detections())
    check_same([], [])


@pytest.mark.parametrize(
    "other",
    [
        detections()[:2],  # the last one, of a tiny score, is missing
        [*detections(), detections()[0]],  # one twice
        detections((0.9, 0.5, 2e-6)),
        detections((0.9002, 0.5, 1e-6)),
        detections(names=(0, 0, 0)),
        [],
    ],
)
def test_what_differs(other):
    for one, two in ((detections(), other), (other, detections())):
        with pytest.raises(AssertionError, match="alone"):
            check_same(one, two)
