"""Detections of one image: Detectron2's ``Instances`` with class names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from pycocotools import mask as mask_api

from vild.utils.errors import UserError

UNMARKED = "not in training"  # how the split "" is shown
LEAST_ALTERNATIVE = 0.1


def describe_alternatives(others: Sequence[tuple[str, float]]) -> str:
    """ "cup 0.22, bowl 0.15"; unlikely ones are left out."""
    return ", ".join(f"{name} {score:.2f}" for name, score in others if score >= LEAST_ALTERNATIVE)


def warn_of(found: Detections) -> str:
    """A sentence if the image is unlike those the detector knows, else ""."""
    if found.distance is None or found.distance <= 1:
        return ""
    return "This image is unlike those the detector was calibrated on: do not rely on its scores."


class Detections(Instances):
    """Detections on the CPU, sorted by descending score: ``pred_boxes`` (xyxy, pixels of the image), ``scores``,
    ``pred_classes`` (indices into ``names``) and, if the detector has masks, ``pred_masks`` bool [N, H, W]."""

    def __init__(
        self,
        image_size: tuple[int, int],
        names: Sequence[str],
        splits: Sequence[str],
        distance: float | None = None,
        **fields,
    ):
        super().__init__(image_size, **fields)
        self._names, self._splits, self._distance = tuple(names), tuple(splits), distance

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the vocabulary, by class."""
        return self._names

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits of the vocabulary, by class: "base" (annotated in training), "novel" (held out in training) or
        "" (not in training)."""
        return self._splits

    @property
    def distance(self) -> float | None:
        """How unlike the images of its calibration the image is to the detector: above 1, scores mean little. None if
        the detector is not calibrated."""
        return self._distance

    def __getitem__(self, item) -> Detections:
        return Detections(
            self.image_size, self.names, self.splits, self.distance, **super().__getitem__(item).get_fields()
        )

    def to(self, *args, **kwargs) -> Detections:
        """See :meth:`Instances.to`."""
        return Detections(
            self.image_size, self.names, self.splits, self.distance, **super().to(*args, **kwargs).get_fields()
        )

    def labels(self) -> list[str]:
        """The name of each detection."""
        return [self.names[c] for c in self.pred_classes.tolist()]

    def alternatives(self) -> list[list[tuple[str, float]]]:
        """What else each box may be: the next names with their scores, best first."""
        if not self.has("other_classes"):
            return [[] for _ in range(len(self))]
        return [
            [(self.names[c], s) for c, s in zip(classes, scores, strict=True)]
            for classes, scores in zip(self.other_classes.tolist(), self.other_scores.tolist(), strict=True)
        ]

    def to_dict(self) -> dict:
        """Plain values for JSON: boxes are xyxy in pixels, masks compressed COCO RLE."""
        records, others = [], self.alternatives()
        for i, (box, score, name) in enumerate(
            zip(self.pred_boxes.tensor.tolist(), self.scores.tolist(), self.labels(), strict=True)
        ):
            record = {"name": name, "split": self.splits[int(self.pred_classes[i])], "score": score, "box": box}
            record["alternatives"] = [{"name": other, "score": s} for other, s in others[i]]
            if self.has("pred_masks"):
                code = mask_api.encode(np.asfortranarray(self.pred_masks[i].numpy(), dtype=np.uint8))
                record["mask"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
            records.append(record)
        height, width = self.image_size
        return {"height": height, "width": width, "detections": records}

    def to_supervision(self):
        """Convert to ``supervision.Detections``; names are in ``data["class_name"]``. UserError without the package."""
        try:
            import supervision
        except ImportError as error:
            raise UserError("the package supervision is not installed: pip install supervision") from error

        return supervision.Detections(
            xyxy=self.pred_boxes.tensor.numpy().reshape(-1, 4),
            mask=self.pred_masks.numpy() if self.has("pred_masks") and len(self) else None,
            confidence=self.scores.numpy(),
            class_id=self.pred_classes.numpy(),
            data={"class_name": np.array(self.labels(), dtype=str)},
        )
