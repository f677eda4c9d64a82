"""Results files in the COCO format: a JSON list of {"image_id", "category_id", "score", "bbox": [x, y, w, h]} and, with
masks, "segmentation": {"size": [H, W], "counts": str}.

Read record by record into arrays, so that millions of detections fit in memory; written as they arrive.
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

_CHUNK = 1 << 24  # characters per read
_RECORD = 1 << 26  # characters; a longer record means a broken file
_SEPARATORS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class ResultArrays:
    """N detections as columns, sorted by image id, in the file's order within an image.

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
    """The ``count`` highest-scoring detections of each category over the whole data set, as AP-fixed takes them
    (Dave et al., arXiv 2102.01066)."""
    order = np.lexsort((-detections.scores, detections.category_ids))
    categories = detections.category_ids[order]
    first = np.searchsorted(categories, categories, side="left")
    kept = order[np.arange(len(order)) - first < count]
    return detections.take(np.sort(kept))


def iterate_records(path: str | Path) -> Iterator[object]:
    """Yield the items of a JSON list one at a time, in bounded memory.

    Raises:
        UserError: the file is missing, is not a JSON list, or is truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"results: {path} does not exist")
    decoder, count = json.JSONDecoder(), 0
    with open(path, encoding="utf-8", errors="replace") as file:  # a replacement character never parses as JSON
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
                    raise UserError(f"results: {path}: {where}: not JSON, or truncated ({error.msg})") from error
                buffer, at = buffer[at:] + more, 0
                continue
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, deeply nested lists
                raise UserError(f"results: {path}: record {count}: {type(error).__name__}: {error}") from error
            yield record
            count += 1


def read_results(
    path: str | Path, sizes: Mapping[int, tuple[int, int]], categories: set[int], masks: bool
) -> ResultArrays:
    """Read a results file, checking every record against the ground truth.

    Args:
        sizes: image_id to (height, width) of every image of the ground truth.
        categories: the category ids that may occur.
        masks: whether to read masks, which every record must have then.

    Raises:
        UserError: an invalid record; the message names the file, the record and the field.
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
    columns = (*id_columns.T, number_columns[:, :4], number_columns[:, 4])
    return ResultArrays(*columns, counts if masks else None).take(np.argsort(id_columns[:, 0], kind="stable"))


def _counts(segmentation: dict, size: tuple[int, int]) -> bytes:
    if tuple(segmentation["size"]) != size:
        raise ValueError(f"segmentation's size {segmentation['size']} is not the image's {list(size)}")
    counts = segmentation["counts"]
    if isinstance(counts, str):
        check_end(counts)
    elif fits(counts, *size):
        counts = mask_api.frPyObjects(segmentation, *size)["counts"]
    else:
        raise ValueError("segmentation's counts do not decode to a mask of the image's size")
    return counts.encode() if isinstance(counts, str) else counts


def _box_of_mask(record: dict, size: tuple[int, int]) -> list[float]:
    if "segmentation" not in record:
        raise KeyError("bbox")
    return mask_api.toBbox({"size": list(size), "counts": _counts(record["segmentation"], size)}).tolist()


class ResultsWriter:
    """Collect detections of all ranks on disk, in constant memory.

    Args:
        folder: for the ranks' temporary files (default: the system's).
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
        """Gather the records of all ranks into one results file, atomically. All ranks must call it."""
        with cannot_write(self._where):
            self._lines.seek(0)  # flushes too
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
