"""Labels of a folder of images as one COCO file, written so that a killed run goes on where it was.

What is found in an image is a line of ``NAME.partial`` at once; when all are there they become the file. The first
line is the plan: whatever the labels depend on. The file holds no time, so that a run that was killed ends in the same
bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools import mask as mask_api

from vild.data.annotations import stays_below
from vild.inference.detections import Detections
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError, printable
from vild.utils.files import cannot_write, hash_file, written_whole


def to_annotations(found: Detections) -> list[dict]:
    """COCO's annotations of one image, by falling score; ``id`` and ``image_id`` are still to come.

    ``category_id`` counts from 1 in the vocabulary's order, ``bbox`` is xywh in pixels, ``area`` in pixels, of the mask
    where there is one; a detector with masks gives ``segmentation``, a compressed RLE.
    """
    annotations = []
    for record in instances_to_coco_json(found, 0):
        *_, width, height = record["bbox"]
        mask = record.get("segmentation")
        annotation = {
            "category_id": record["category_id"] + 1,
            "bbox": record["bbox"],
            "area": width * height if mask is None else int(mask_api.area(mask)),
            "iscrowd": 0,
            "score": record["score"],
        }
        annotations.append(annotation if mask is None else {**annotation, "segmentation": mask})
    return annotations


def check_name(file_name: str) -> None:
    """UserError for an image's name that readers of the labels, vild among them, would refuse."""
    if not stays_below(file_name):
        raise UserError(f"image {printable(file_name)}: labels cannot hold such a name; rename it")


class PartialLabels:
    """The side file: a plan and a record an image, appended; a context manager.

    A record is {"file_name", "height", "width", "annotations"} or {"file_name", "broken": why}.

    Args:
        path: of the labels; the side file lies beside it.
        plan: plain values that the labels depend on.

    Attributes:
        done: the images that are in it.

    Raises:
        UserError: the side file was begun with another plan, or the labels are already there.
    """

    def __init__(self, path: Path, plan: dict):
        self.path, self.aside = path, path.with_name(path.name + ".partial")
        self._at: dict[str, int] = {}  # where each record begins
        self._broken: dict[str, str] = {}
        if path.exists() and not self.aside.exists():
            raise UserError(f"--output {path}: is there already; remove it, or name another file")
        with cannot_write(self.aside):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.aside, "a+b")  # noqa: SIM115
        self._go_on(plan)

    def _go_on(self, plan: dict) -> None:
        """Read what is there; a line that a killed run left unfinished is cut off."""
        self._file.seek(0)
        end, header = 0, None
        while (line := self._file.readline()).endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:  # a power cut: the disk has not everything that was written
                break
            if header is None:
                header = record
                self._check(header, plan)
            else:
                self._know(record, end)
            end = self._file.tell()
        self._file.truncate(end)
        if header is None:
            self._append(plan)

    def _check(self, header: dict, plan: dict) -> None:
        for key in plan:
            if header.get(key) != plan[key]:
                raise UserError(
                    f"{self.aside}: it was begun with another {key} ({_short(header.get(key))}, now "
                    f"{_short(plan[key])}); give the same, or remove it"
                )

    def _know(self, record: dict, at: int) -> None:
        self._at[record["file_name"]] = at
        if "broken" in record:
            self._broken[record["file_name"]] = record["broken"]

    def _append(self, record: dict) -> int:
        with cannot_write(self.aside):
            at = self._file.seek(0, 2)
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            return at

    def __enter__(self) -> PartialLabels:
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):  # what a full disk has not taken is tried once more, and was told before
            self._file.close()

    @property
    def done(self) -> set[str]:
        return set(self._at)

    def add(self, file_name: str, found: Detections) -> None:
        """What was found in an image."""
        height, width = found.image_size
        record = {"file_name": file_name, "height": height, "width": width, "annotations": to_annotations(found)}
        self._know(record, self._append(record))

    def add_broken(self, file_name: str, why: str) -> None:
        """An image that cannot be read."""
        record = {"file_name": file_name, "broken": why}
        self._know(record, self._append(record))

    def _read(self, file_name: str) -> dict:
        self._file.seek(self._at[file_name])
        return json.loads(self._file.readline())

    def finish(self, file_names: Sequence[str], names: Sequence[str], info: dict) -> list[str]:
        """Write the labels of these images, in this order, and remove the side file. One image is in memory at a
        time.

        Args:
            names: of the categories.
            info: what the file shall say about itself.

        Returns:
            what is wrong with the broken ones, a line each; ``info`` lists them too.
        """
        if not self.aside.exists():
            raise UserError(f"{self.aside} has gone while it was being written")
        broken = {n: self._broken[n] for n in file_names if n in self._broken}
        whole = [n for n in file_names if n not in broken]
        categories = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
        info = {**info, "broken": [{"file_name": printable(n), "why": why} for n, why in broken.items()]}
        with written_whole(self.path) as aside, open(aside, "w", encoding="utf-8") as file:
            file.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)},\n"images": [')
            separator = "\n"
            for image_id, name in enumerate(whole, 1):
                record = self._read(name)
                del record["annotations"]
                file.write(separator + json.dumps({"id": image_id, **record}))
                separator = ",\n"
            file.write('\n],\n"annotations": [')
            separator, annotation_id = "\n", 0
            for image_id, name in enumerate(whole, 1):
                for annotation in self._read(name)["annotations"]:
                    annotation_id += 1
                    file.write(separator + json.dumps({"id": annotation_id, "image_id": image_id, **annotation}))
                    separator = ",\n"
            file.write("\n]}\n")
        self._file.close()
        self.aside.unlink()
        return list(broken.values())


def plan_of(detector: OpenVocabularyDetector, folder: Path, asked: dict) -> dict:
    """What labels depend on: the checkpoint, the config but for its paths, the words, the folder and what the command
    line says besides."""
    cfg, vocabulary = detector.cfg.clone(), detector.vocabulary
    cfg.defrost()
    cfg.MODEL.WEIGHTS = cfg.MODEL.DEVICE = cfg.OUTPUT_DIR = ""
    cfg.MODEL.VILD.VOCABULARY = cfg.MODEL.VILD.STORE = cfg.MODEL.VILD.TEACHER.NAME = ""
    return {
        "folder": str(folder.resolve()),
        "checkpoint": hash_file(detector.cfg.MODEL.WEIGHTS),
        "config": hashlib.sha256(cfg.dump().encode()).hexdigest()[:16],
        "vocabulary": [*vocabulary.names],
        "synonyms": [[*others] for others in vocabulary.synonyms],
        **asked,
    }


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
