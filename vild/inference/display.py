"""Which of the detections above the threshold (``thresholds.py``) a person is shown. Evaluation follows none of these
rules."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.structures import Instances
from torchvision.ops import nms


@dataclass(frozen=True)
class DisplayRules:
    """
    Attributes:
        across_names: of two boxes of any names whose IoU is higher, show the one with the higher score. 1: both.
        objectness: least probability, by the RPN, that the proposal behind a box is an object.
        area: least area of a box, in square pixels of the image.
        most: number of boxes, the best ones. None: all.
        beside: words that compete for each box and are not shown.
    """

    across_names: float = 0.7
    objectness: float = 0.0
    area: float = 0.0
    most: int | None = None
    beside: tuple[str, ...] = ()

    def select(self, found: Instances) -> Instances:
        """The detections that are shown, by descending score."""
        boxes = found.pred_boxes.tensor
        keep = nms(boxes, found.scores, self.across_names)
        return found[keep[found.pred_boxes.area()[keep] >= self.area][: self.most].sort().values]


# The demonstration notebook of the authors (tensorflow/tpu, projects/vild, ViLD_demo.ipynb)
NOTEBOOK = DisplayRules(across_names=0.6, objectness=0.9, area=220, most=25, beside=("background",))
