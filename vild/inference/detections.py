"""Detections of one image: Detectron2's ``Instances`` with class names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as mask_api

from vild.inference.drawing import MIN_SIDE, draw
from vild.inference.image_input import ImageInput, as_array, stamp_of
from vild.utils.errors import UserError, first_line
from vild.utils.files import write_image, write_json

UNMARKED = "not in training"  # how the split "" is shown
LEAST_ALTERNATIVE = 0.1
LINES, LONGEST = 10, 40  # of what is printed: detections, and characters of a name
COLUMNS = ("name", "split", "score", "x1", "y1", "x2", "y2")


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
    ``pred_classes`` (indices into ``names``) and, if the detector has masks, ``pred_masks`` bool [N, H, W]. Printed,
    they are a line each."""

    def __init__(
        self,
        image_size: tuple[int, int],
        names: Sequence[str],
        splits: Sequence[str],
        distance: float | None = None,
        source: tuple[ImageInput, str | None] | None = None,
        stamp: tuple[int, int] | None = None,
        **fields,
    ):
        """``source``: the image that :meth:`draw` draws on, and its ``channels`` if it is an array; ``stamp``:
        ``stamp_of`` the image when it was read."""
        super().__init__(image_size, **fields)
        self._names, self._splits, self._distance = tuple(names), tuple(splits), distance
        self._source, self._stamp = source, stamp

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
        return self._with(super().__getitem__(item))

    def to(self, *args, **kwargs) -> Detections:
        """See :meth:`Instances.to`."""
        return self._with(super().to(*args, **kwargs))

    def _with(self, some: Instances) -> Detections:
        own = (self.names, self.splits, self.distance, self._source, self._stamp)
        return Detections(self.image_size, *own, **some.get_fields())

    def __repr__(self) -> str:
        height, width = self.image_size
        lines = [f"{len(self)} detection{'s' * (len(self) != 1)} in {width} x {height} pixels"]
        names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in self.labels[:LINES]]
        boxes = self.pred_boxes.tensor.round().int().tolist()
        longest = max(map(len, names), default=0)
        rows = zip(names, self.scores.tolist(), boxes, strict=False)
        lines += [f"  {name:{longest}}  {score:.2f}  {box}" for name, score, box in rows]
        if len(self) > LINES:
            lines.append(f"  … {len(self) - LINES} more")
        return "\n".join([*lines, *filter(None, [warn_of(self)])])

    __str__ = __repr__

    @property
    def labels(self) -> list[str]:
        """The name of each detection."""
        return [self.names[c] for c in self.pred_classes.tolist()]

    @property
    def alternatives(self) -> list[list[tuple[str, float]]]:
        """What else each box may be: the next names with their scores, best first."""
        if not self.has("other_classes"):
            return [[] for _ in range(len(self))]
        return [
            [(self.names[c], s) for c, s in zip(classes, scores, strict=True)]
            for classes, scores in zip(self.other_classes.tolist(), self.other_scores.tolist(), strict=True)
        ]

    def draw(self, min_side: int = MIN_SIDE) -> Image.Image:
        """The image with boxes, masks, names and scores; a smaller one is enlarged to ``min_side`` pixels.

        Raises:
            UserError: the image is gone, or its file was written again since.
        """
        if self._source is None:
            raise UserError("draw: these detections were made without an image; vild.inference.drawing.draw takes one")
        image, channels = self._source
        array = as_array(image, "RGB", channels)
        if array.shape[:2] != tuple(self.image_size):
            raise UserError(f"image {image}: is now of {array.shape[1]} x {array.shape[0]} pixels, and was of "
                            f"{self.image_size[1]} x {self.image_size[0]}")  # fmt: skip
        if self._stamp is not None and stamp_of(image) != self._stamp:
            raise UserError(f"image {image}: the file was changed after the detection; detect in it again")
        return draw(array, self, self.names, min_side=min_side)

    def save(self, path: str | Path) -> None:
        """Write :meth:`draw` as an image; with the suffix .json, :meth:`to_dict`. UserError for another suffix, or if
        it cannot be written."""
        suffix = Path(path).suffix.lower()
        if suffix != ".json" and Image.registered_extensions().get(suffix) not in Image.SAVE:
            raise UserError(f"{path}: the suffix is neither .json nor that of an image that can be written "
                            "(.jpg, .png, ...)")  # fmt: skip
        drawn = None if suffix == ".json" else self.draw()
        try:
            if drawn is None:
                write_json(path, self.to_dict())
            else:
                write_image(path, drawn, quality=92)
        except UserError:
            raise
        except (OSError, ValueError) as error:  # a name that the system refuses, a format without colours
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{path}: cannot be written ({reason})") from error

    def to_pandas(self):
        """Convert to a ``pandas.DataFrame``, a row for each detection: name, split, score, box in pixels. UserError
        without the package."""
        pandas = _package("pandas")
        splits, scores = [self.splits[c] for c in self.pred_classes.tolist()], self.scores.tolist()
        rows = zip(self.labels, splits, scores, self.pred_boxes.tensor.tolist(), strict=True)
        return pandas.DataFrame([(*row, *box) for *row, box in rows], columns=COLUMNS)

    def to_dict(self) -> dict:
        """Plain values for JSON: boxes are xyxy in pixels, masks compressed COCO RLE; :attr:`distance` if it is
        known."""
        records, others = [], self.alternatives
        for i, (box, score, name) in enumerate(
            zip(self.pred_boxes.tensor.tolist(), self.scores.tolist(), self.labels, strict=True)
        ):
            record = {"name": name, "split": self.splits[int(self.pred_classes[i])], "score": score, "box": box}
            record["alternatives"] = [{"name": other, "score": s} for other, s in others[i]]
            if self.has("pred_masks"):
                code = mask_api.encode(np.asfortranarray(self.pred_masks[i].numpy(), dtype=np.uint8))
                record["mask"] = {"size": list(code["size"]), "counts": code["counts"].decode()}
            records.append(record)
        height, width = self.image_size
        distance = {} if self.distance is None else {"distance": self.distance}
        return {"height": height, "width": width, **distance, "detections": records}

    def to_supervision(self):
        """Convert to ``supervision.Detections``; names are in ``data["class_name"]``. UserError without the package."""
        supervision = _package("supervision")
        return supervision.Detections(
            xyxy=self.pred_boxes.tensor.numpy().reshape(-1, 4),
            mask=self.pred_masks.numpy() if self.has("pred_masks") and len(self) else None,
            confidence=self.scores.numpy(),
            class_id=self.pred_classes.numpy(),
            data={"class_name": np.array(self.labels, dtype=str)},
        )

    def to_fiftyone(self):
        """Convert to ``fiftyone.Detections``, the value of a sample's field: boxes are relative x, y, width and height,
        masks those within the box, rounded to whole pixels; corners outside the image are clipped. UserError without
        the package."""
        fiftyone = _package("fiftyone")
        height, width = self.image_size
        found = []
        boxes = self.pred_boxes.clone()
        boxes.clip(self.image_size)
        rows = zip(self.labels, boxes.tensor.tolist(), self.scores.tolist(), strict=True)
        for i, (name, (x0, y0, x1, y1), score) in enumerate(rows):
            box = [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height]
            mask = None
            if self.has("pred_masks"):
                left, top = min(round(x0), width - 1), min(round(y0), height - 1)
                bottom, right = max(round(y1), top + 1), max(round(x1), left + 1)
                mask = self.pred_masks[i, top:bottom, left:right].numpy()
            found.append(fiftyone.Detection(label=name, bounding_box=box, confidence=score, mask=mask))
        return fiftyone.Detections(detections=found)


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"the package {name} is not installed: pip install {name}") from error
