"""Label a folder of images, resumably, as one COCO file, or in YOLO's or VOC's layout.

The detections of each image are appended to ``NAME.partial`` as a line; when all images are done, the lines become the
file or folder. The first line is the plan: everything the labels depend on. The file has no timestamp, so that a
resumed run ends in the same bytes as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools import mask as mask_api

from vild.data.annotations import stays_below
from vild.data.voc import write_voc
from vild.data.yolo import write_yolo
from vild.inference.detections import Detections, warn_of
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError, printable
from vild.utils.files import cannot_write, hash_file, written_whole, written_whole_folder

FORMATS = {"yolo": write_yolo, "voc": write_voc}  # that are folders
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff]")  # in XML, or a list of a name a line


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


def check_name(file_name: str, form: str = "coco") -> None:
    """Raise UserError for a file name that readers of COCO files would refuse, as vild does, or that VOC's XML cannot
    hold."""
    if not stays_below(file_name):
        raise UserError(f"image {printable(file_name)}: its name is not allowed in a COCO file; rename it")
    if form == "voc" and UNWRITABLE.search(file_name):
        raise UserError(f"image {file_name!a}: its name has a control character, not allowed in VOC's XML; rename it")


def check_stems(file_names: Iterable[str]) -> None:
    """UserError if two images differ by their suffix only: in YOLO's and VOC's layout they would share their labels."""
    stems: dict[str, str] = {}
    for name in file_names:
        if (other := stems.setdefault(name.rpartition(".")[0], name)) != name:
            raise UserError(f"images {printable(other)} and {printable(name)} would share one label file; rename one")


class PartialLabels:
    """The labels of a run in progress: a file to which a plan and a record per image are appended. A context manager.

    A record is {"file_name", "height", "width", "annotations"}, with "unlike": true for an image unlike those the
    detector knows (``warn_of``), or {"file_name", "broken": reason}.

    Args:
        path: of the finished labels, a file or folder; the partial file is next to it.
        plan: plain values that the labels depend on.

    Raises:
        UserError: the partial file belongs to another plan, or the labels already exist.
    """

    def __init__(self, path: Path, plan: dict):
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._offsets: dict[str, int] = {}  # of each image's record
        if path.exists() and not self.partial.exists():
            raise UserError(f"{path}: already exists; remove it, or give another name")
        with cannot_write(self.partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial, "a+b")  # noqa: SIM115
        self._resume(plan)

    def _resume(self, plan: dict) -> None:
        """Read the records of an earlier run, and truncate an unfinished last line."""
        self._file.seek(0)
        end = 0
        while (line := self._file.readline()).endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:  # a power failure: not everything that was written reached the disk
                break
            if end:
                self._offsets[record["file_name"]] = end
            else:
                self._check(record, plan)
            end = self._file.tell()
        self._file.truncate(end)
        if not end:
            self._append(plan)

    def _check(self, header: dict, plan: dict) -> None:
        for key in plan:
            if header.get(key) != plan[key]:
                raise UserError(
                    f"{self.partial}: started with another {key} ({_short(header.get(key))}, now "
                    f"{_short(plan[key])}); use the same, or remove the file"
                )

    def _append(self, record: dict) -> int:
        with cannot_write(self.partial):
            offset = self._file.seek(0, 2)
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            return offset

    def __enter__(self) -> PartialLabels:
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):  # a full disk was reported when the record was written
            self._file.close()

    @property
    def done(self) -> set[str]:
        """Names of the images that have a record."""
        return set(self._offsets)

    def add(self, file_name: str, found: Detections) -> None:
        """Add the detections of an image."""
        height, width = found.image_size
        record = {"file_name": file_name, "height": height, "width": width, "annotations": to_annotations(found)}
        self._offsets[file_name] = self._append(record | ({"unlike": True} if warn_of(found) else {}))

    def add_broken(self, file_name: str, reason: str) -> None:
        """Add an unreadable image."""
        self._offsets[file_name] = self._append({"file_name": file_name, "broken": reason})

    def _read(self, file_name: str) -> dict:
        self._file.seek(self._offsets[file_name])
        return json.loads(self._file.readline())

    def finish(
        self,
        file_names: Sequence[str],
        names: Sequence[str],
        info: dict,
        form: str = "coco",
        source: Path | None = None,
    ) -> tuple[list[str], list[str]]:
        """Write the labels of these images, in this order, and remove the partial file. Holds the annotations of one
        image in memory.

        Args:
            names: of the categories.
            info: the COCO file's "info", to which the unreadable images are added, and unlike ones if there are any.
            form: "coco", or one of FORMATS, which copy the images from the folder ``source``.

        Returns:
            an error message for each unreadable image, and the file names of the unlike ones.
        """
        if not self.partial.exists():
            raise UserError(f"{self.partial} disappeared while it was being written")
        broken, unlike, images = [], [], []
        for file_name in file_names:
            record = self._read(file_name)
            if "broken" in record:
                broken.append({"file_name": printable(file_name), "why": record["broken"]})
            else:
                del record["annotations"]
                if record.pop("unlike", False):
                    unlike.append(file_name)
                images.append({"id": len(images) + 1, **record})
        labelled = ((image, self._read(image["file_name"])["annotations"]) for image in images)
        if form in FORMATS:
            with written_whole_folder(self.path) as folder:
                FORMATS[form](folder, source, names, labelled)
        else:
            info = {**info, "broken": broken, **({"unlike": unlike} if unlike else {})}
            _write_coco(self.path, images, labelled, names, info)
        self._file.close()
        self.partial.unlink()
        return [record["why"] for record in broken], unlike


def _write_coco(
    path: Path, images: list[dict], labelled: Iterable[tuple[dict, list[dict]]], names: Sequence[str], info: dict
) -> None:
    categories, ids = [{"id": n, "name": name} for n, name in enumerate(names, 1)], itertools.count(1)
    annotations = ({"id": next(ids), "image_id": i["id"], **a} for i, found in labelled for a in found)
    with written_whole(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.write(f'{{"info": {json.dumps(info)},\n"categories": {json.dumps(categories)}')
        for key, records in (("images", images), ("annotations", annotations)):
            file.write(f',\n"{key}": [')
            for n, record in enumerate(records):
                file.write((",\n" if n else "\n") + json.dumps(record))
            file.write("\n]")
        file.write("}\n")


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
