"""Results files: detections of any detector in COCO's results form, a JSON list of {"image_id", "category_id",
"score", "bbox": [x, y, w, h]} and, for masks, "segmentation": {"size": [H, W], "counts": str}.

Read one record at a time into columns, so that millions of detections fit; written as they come.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.utils import comm
from pycocotools import mask as mask_api

from vild.data.rle import check_end, fits
from vild.utils.errors import UserError
from vild.utils.files import cannot_write, written_whole

_CHUNK = 1 << 24  # characters read at once
_RECORD = 1 << 26  # a longer record is a broken file
_SEPARATORS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class ResultArrays:
    """N detections as columns, images by rising id, the file's order within an image.

    Attributes:
        image_ids, category_ids: int64 [N].
        boxes: float64 [N, 4], xywh in pixels of the original image.
        scores: float64 [N].
        masks: N compressed RLEs (their ``counts``), or None.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    masks: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, keep: np.ndarray) -> ResultArrays:
        """The detections ``keep`` (bool [N] or indices), in that order."""
        masks = self.masks
        if masks is not None:
            masks = [masks[i] for i in (np.flatnonzero(keep) if keep.dtype == bool else keep)]
        return ResultArrays(self.image_ids[keep], self.category_ids[keep], self.boxes[keep], self.scores[keep], masks)


def best_per_class(detections: ResultArrays, count: int) -> ResultArrays:
    """At most ``count`` detections of each category over the whole set, those of the highest scores (Dave et al.,
    arXiv 2102.01066: what AP-fixed is computed of)."""
    order = np.lexsort((-detections.scores, detections.category_ids))
    categories = detections.category_ids[order]
    first = np.searchsorted(categories, categories, side="left")
    kept = order[np.arange(len(order)) - first < count]
    return detections.take(np.sort(kept))


def iterate_records(path: str | Path) -> Iterator[object]:
    """The items of a JSON list, one at a time, in bounded memory.

    Raises:
        UserError: the file is missing, is no list, or ends in the middle.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"results: {path} does not exist")
    decoder, count = json.JSONDecoder(), 0
    with open(path, encoding="utf-8", errors="replace") as file:  # no JSON is made of what is replaced
        buffer = file.read(_CHUNK).lstrip()
        if not buffer.startswith("["):
            raise UserError(f"results: {path} is not a JSON list of detections")
        at = 1
        while True:
            at = _SEPARATORS.match(buffer, at).end()
            if buffer.startswith("]", at):
                return
            try:
                record, at = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                more = file.read(_CHUNK) if len(buffer) - at < _RECORD else ""
                if not more:
                    where = f"record {count}" if at < len(buffer) else f"its end, after record {count - 1}"
                    raise UserError(f"results: {path}: {where}: not JSON, or cut off ({error.msg})") from error
                buffer, at = buffer[at:] + more, 0
                continue
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand lists in one another
                raise UserError(f"results: {path}: record {count}: {type(error).__name__}: {error}") from error
            yield record
            count += 1


def read_results(
    path: str | Path, sizes: Mapping[int, tuple[int, int]], categories: set[int], masks: bool
) -> ResultArrays:
    """Read a results file and check every record against the ground truth.

    Args:
        sizes: image_id to (height, width) of every image of the ground truth.
        categories: every category id that may occur.
        masks: whether masks are wanted.

    Raises:
        UserError: names the file, the record and the field.
    """
    ids, numbers, counts = array("q"), array("d"), []
    for n, record in enumerate(iterate_records(path)):
        try:
            image_id, category_id = record["image_id"], record["category_id"]
            if image_id not in sizes:
                raise ValueError(f"image_id {image_id!r} is not in the ground truth")
            if category_id not in categories:
                raise ValueError(f"category_id {category_id!r} is not in the ground truth")
            if masks:
                counts.append(_counts(record["segmentation"], sizes[image_id]))
            box = record["bbox"] if "bbox" in record else _box_of_mask(record, sizes[image_id])
            if len(box) != 4:
                raise ValueError(f"bbox {box} is not [x, y, width, height]")
            ids.extend((image_id, category_id))
            numbers.extend((*box, record["score"]))
        except KeyError as error:
            raise UserError(f"results: {path}: record {n}: {error} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"results: {path}: record {n}: {error}") from error
    id_columns = np.frombuffer(ids, np.int64).reshape(-1, 2)
    number_columns = np.frombuffer(numbers, np.float64).reshape(-1, 5)
    bad = ~np.isfinite(number_columns).all(1) | (number_columns[:, 2:4] < 0).any(1)
    if bad.any():
        n = int(np.flatnonzero(bad)[0])
        *box, score = number_columns[n].tolist()
        raise UserError(f"results: {path}: record {n}: bbox {box} or score {score} is negative or not finite")
    found = ResultArrays(id_columns[:, 0], id_columns[:, 1], number_columns[:, :4], number_columns[:, 4],
                       counts if masks else None)  # fmt: skip
    return found.take(np.argsort(found.image_ids, kind="stable"))


def _counts(segmentation: dict, size: tuple[int, int]) -> bytes:
    if tuple(segmentation["size"]) != size:
        raise ValueError(f"segmentation's size {segmentation['size']} is not the image's {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, str):
        check_end(counts)
    elif fits(counts, *size):
        counts = mask_api.frPyObjects(segmentation, *size)["counts"]
    else:
        raise ValueError("segmentation's counts are not a mask of the image's size")
    return counts.encode() if isinstance(counts, str) else counts


def _box_of_mask(record: dict, size: tuple[int, int]) -> list[float]:
    if "segmentation" not in record:
        raise KeyError("bbox")
    return mask_api.toBbox({"size": list(size), "counts": _counts(record["segmentation"], size)}).tolist()


class ResultsWriter:
    """Collect detections on disk as they come, on any number of ranks; memory does not grow with them.

    Args:
        folder: where the ranks' scratch files lie (None: the system's).
    """

    def __init__(self, folder: str | None = None):
        self._where = folder or tempfile.gettempdir()
        with cannot_write(self._where):
            os.makedirs(self._where, exist_ok=True)
            self._lines = tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8")  # noqa: SIM115

    def add(self, records: list[dict]) -> None:
        with cannot_write(self._where):
            self._lines.writelines(json.dumps(record) + "\n" for record in records)

    def finish(self, path: str | Path) -> None:
        """Bring every rank's records together in one results file, whole or not at all. All ranks must call it."""
        with cannot_write(self._where):
            self._lines.seek(0)  # and what is still in memory goes to the disk
        main = comm.is_main_process()
        with written_whole(path) if main else nullcontext(os.devnull) as aside, open(aside, "w") as file:
            file.write("[")
            separator = "\n"
            while True:
                lines = self._lines.readlines(_CHUNK)
                if not any(comm.all_gather(bool(lines))):
                    break
                for line in (line for part in comm.gather(lines) for line in part):
                    file.write(separator + line.rstrip("\n"))
                    separator = ",\n"
            file.write("\n]\n")
        self._lines.close()
