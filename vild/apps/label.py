"""Label a folder of images, resumably, as one COCO file.

The detections of each image are appended to ``NAME.partial`` as a line; when all images are done, the lines become the
file. The first line is the plan: everything the labels depend on. The file has no timestamp, so that a resumed run
ends in the same bytes as an undisturbed one.
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
    """COCO annotations of one image, by descending score, without ``id`` and ``image_id``.

    ``category_id`` is the index in the vocabulary plus 1, ``bbox`` is xywh in pixels, ``area`` that of the mask in
    pixels, or of the box without one; detectors with masks add ``segmentation``, a compressed RLE.
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
    """Raise UserError for a file name that readers of COCO files would refuse, as vild does."""
    if not stays_below(file_name):
        raise UserError(f"image {printable(file_name)}: its name is not allowed in a COCO file; rename it")


class PartialLabels:
    """The labels of a run in progress: a file to which a plan and a record per image are appended. A context manager.

    A record is {"file_name", "height", "width", "annotations"} or {"file_name", "broken": reason}.

    Args:
        path: of the finished labels; the partial file is next to it.
        plan: plain values that the labels depend on.

    Attributes:
        done: names of the images that have a record.

    Raises:
        UserError: the partial file belongs to another plan, or the labels already exist.
    """

    def __init__(self, path: Path, plan: dict):
        self.path, self.aside = path, path.with_name(path.name + ".partial")
        self._at: dict[str, int] = {}  # offset of each record
        self._broken: dict[str, str] = {}
        if path.exists() and not self.aside.exists():
            raise UserError(f"--output {path}: already exists; remove it, or give another name")
        with cannot_write(self.aside):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.aside, "a+b")  # noqa: SIM115
        self._resume(plan)

    def _resume(self, plan: dict) -> None:
        """Read the records of an earlier run, and truncate an unfinished last line."""
        self._file.seek(0)
        end, header = 0, None
        while (line := self._file.readline()).endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:  # a power failure: not everything that was written reached the disk
                break
            if header is None:
                header = record
                self._check(header, plan)
            else:
                self._remember(record, end)
            end = self._file.tell()
        self._file.truncate(end)
        if header is None:
            self._append(plan)

    def _check(self, header: dict, plan: dict) -> None:
        for key in plan:
            if header.get(key) != plan[key]:
                raise UserError(
                    f"{self.aside}: started with another {key} ({_short(header.get(key))}, now "
                    f"{_short(plan[key])}); use the same, or remove the file"
                )

    def _remember(self, record: dict, at: int) -> None:
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
        with suppress(OSError):  # a full disk was reported when the record was written
            self._file.close()

    @property
    def done(self) -> set[str]:
        return set(self._at)

    def add(self, file_name: str, found: Detections) -> None:
        """Add the detections of an image."""
        height, width = found.image_size
        record = {"file_name": file_name, "height": height, "width": width, "annotations": to_annotations(found)}
        self._remember(record, self._append(record))

    def add_broken(self, file_name: str, reason: str) -> None:
        """Add an unreadable image."""
        record = {"file_name": file_name, "broken": reason}
        self._remember(record, self._append(record))

    def _read(self, file_name: str) -> dict:
        self._file.seek(self._at[file_name])
        return json.loads(self._file.readline())

    def finish(self, file_names: Sequence[str], names: Sequence[str], info: dict) -> list[str]:
        """Write the labels of these images, in this order, and remove the partial file. Holds one image in memory.

        Args:
            names: of the categories.
            info: the file's "info", to which the unreadable images are added.

        Returns:
            an error message for each unreadable image.
        """
        if not self.aside.exists():
            raise UserError(f"{self.aside} disappeared while it was being written")
        broken = {n: self._broken[n] for n in file_names if n in self._broken}
        whole = [n for n in file_names if n not in broken]
        categories = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
        info = {**info, "broken": [{"file_name": printable(n), "why": reason} for n, reason in broken.items()]}
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
    """Everything the labels depend on: checkpoint, config without paths, words, folder and, in ``asked``, further
    flags."""
    cfg, vocabulary = detector.cfg.clone(), detector.vocabulary
    cfg.defrost()
    cfg.MODEL.WEIGHTS = cfg.MODEL.DEVICE = cfg.OUTPUT_DIR = ""
    cfg.MODEL.VILD.VOCABULARY = cfg.MODEL.VILD.STORE = cfg.MODEL.VILD.TEACHER.NAME = ""
    return {
        "folder": str(folder.resolve()),
        "checkpoint": hash_file(detector.cfg.MODEL.WEIGHTS),
        "config": hashlib.sha256(cfg.dump().encode()).hexdigest()[:16],
        "vocabulary": [*vocabulary.names],
        "synonyms": [[*spellings] for spellings in vocabulary.synonyms],
        **asked,
    }


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
