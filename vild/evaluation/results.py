"""Results files in the COCO format: a JSON list of {"image_id", "category_id", "score", "bbox": [x, y, w, h]} and, with
masks, "segmentation": {"size": [H, W], "counts": str}; or one such record a line (.jsonl).

Read record by record into arrays, so that millions of detections fit in memory; written as they arrive.
"""

from __future__ import annotations

import json
import logging
import math
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

from vild.data.annotations import NUMBERS, found, is_list_of, short, whole
from vild.data.box_form import doubt, spread
from vild.data.rle import fit_many, fits
from vild.utils.errors import UserError
from vild.utils.files import cannot_write, written_whole

logger = logging.getLogger(__name__)

_CHUNK = 1 << 24  # characters per read
_RECORD = 1 << 26  # characters; a longer record means a broken file
_MASKS = 256  # checked at once: few enough for the processor's cache
_SEPARATORS, _SPACE = re.compile(r"[\s,]*"), re.compile(r"\s*")


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


def best_of_each(groups: np.ndarray, detections: ResultArrays, count: int) -> ResultArrays:
    """The ``count`` highest-scoring detections of each group, in the order given; ``groups``, int64 [N], may be
    ``image_ids`` (as LVIS limits detections) or ``category_ids`` (as AP-fixed does). Of equal scores the first."""
    order = np.lexsort((-detections.scores, groups))
    ranked = groups[order]
    first = np.searchsorted(ranked, ranked, side="left")
    return detections.take(np.sort(order[np.arange(len(order)) - first < count]))


def iterate_records(path: str | Path) -> Iterator[object]:
    """Yield the items of a JSON list, or of a file with an object a line, one at a time, in bounded memory.

    Raises:
        UserError: the file is missing, is neither, is truncated, or goes on after the list.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"results: {path} does not exist")
    decoder, count = json.JSONDecoder(), 0
    # a replacement character never parses as JSON; line breaks stay, so that places can be counted
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        buffer, passed, lines = file.read(_CHUNK), 0, 1  # read; characters before it; the line on which it begins
        at = _SPACE.match(buffer).end()
        in_list = buffer.startswith("[", at)
        if not in_list and not buffer.startswith("{", at):
            raise UserError(f"results: {path} is not a JSON list of detections")
        at += in_list
        while True:
            at = (_SEPARATORS if in_list else _SPACE).match(buffer, at).end()
            if in_list and buffer.startswith("]", at):
                at += 1
                break
            try:
                record, at = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                more = file.read(_CHUNK) if len(buffer) - at < _RECORD else ""
                if not more and not in_list and at == len(buffer):
                    return
                if not more:
                    where = f"record {count}" if at < len(buffer) else f"its end, after record {count - 1}"
                    raise UserError(f"results: {path}: {where}: not JSON, or truncated ({error.msg})") from error
                passed, lines = passed + at, lines + buffer.count("\n", 0, at)
                buffer, at = buffer[at:] + more, 0
                continue
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, deeply nested lists
                raise UserError(f"results: {path}: record {count}: {type(error).__name__}: {error}") from error
            yield record
            count += 1
        while (at := _SPACE.match(buffer, at).end()) == len(buffer):
            passed, lines = passed + at, lines + buffer.count("\n")
            buffer, at = file.read(_CHUNK), 0
            if not buffer:
                return
        what = "a second list" if buffer.startswith("[", at) else f"something else ({short(buffer[at : at + 20])})"
        place = f"on line {lines + buffer.count(chr(10), 0, at)}, at character {passed + at + 1} of the file"
        raise UserError(
            f"results: {path}: {what} begins {place}, after a list of {count} records: make one list of it, or write a "
            "record a line"
        )


def read_results(
    path: str | Path, sizes: Mapping[int, tuple[int, int]], categories: set[int], masks: bool
) -> ResultArrays:
    """Read a results file, checking every record against the ground truth; warn of boxes that are hardly xywh in
    pixels.

    Args:
        sizes: image_id to (height, width) of every image of the ground truth.
        categories: the category ids that may occur.
        masks: whether to read masks, which every record must have then.

    Raises:
        UserError: an invalid record; the message names the file, the record, the key and the value.
    """
    ids, numbers, counts = array("q"), array("d"), []
    for n, record in enumerate(iterate_records(path)):
        try:
            if type(record) is not dict:
                raise ValueError(f"{short(record)} is not an object")
            image_id, category_id = whole(record, "image_id"), whole(record, "category_id")
            if image_id not in sizes:
                raise ValueError(f"image_id {image_id} is not in the ground truth")
            if category_id not in categories:
                raise ValueError(f"category_id {category_id} is not in the ground truth")
            score = record.get("score")
            if type(score) not in NUMBERS:
                raise ValueError(f"{found(record, 'score')}; it must be a number")
            if masks:
                counts.append(_counts(record, sizes[image_id]))
            box = _box(record, sizes[image_id])
            ids.extend((image_id, category_id))
            numbers.extend((*box, score))
        except OverflowError as error:
            why = f"{found(record, 'bbox')}, {found(record, 'score')}; a number is too large"
            raise UserError(f"results: {path}: record {n}: {why}") from error
        except ValueError as error:
            raise UserError(f"results: {path}: record {n}: {error}") from error
    id_columns = np.frombuffer(ids, np.int64).reshape(-1, 2)
    for start in range(0, len(counts), _MASKS):
        part = slice(start, start + _MASKS)
        pixels = np.array([math.prod(sizes[i]) for i in id_columns[part, 0].tolist()], np.int64)
        if not (good := fit_many(counts[part], pixels)).all():
            n = start + int(np.argmin(good))
            raise UserError(f"results: {path}: record {n}: {_misfit(counts[n].decode(errors='surrogatepass'))}")
    number_columns = np.frombuffer(numbers, np.float64).reshape(-1, 5)
    bad = ~np.isfinite(number_columns).all(1) | (number_columns[:, 2:4] < 0).any(1)
    if bad.any():
        n = int(np.flatnonzero(bad)[0])
        *box, score = number_columns[n].tolist()
        raise UserError(f"results: {path}: record {n}: bbox {box} or score {score} is negative or not finite")
    some = spread(len(ids) // 2)
    images = np.array([sizes[i] for i in id_columns[some, 0].tolist()]).reshape(-1, 2)
    if why := doubt(number_columns[some, :4], images):
        logger.warning("results: %s: %s", path, why)
    columns = (*id_columns.T, number_columns[:, :4], number_columns[:, 4])
    return ResultArrays(*columns, counts if masks else None).take(np.argsort(id_columns[:, 0], kind="stable"))


def _counts(record: dict, size: tuple[int, int]) -> bytes:
    """The mask of a record as compressed RLE."""
    mask = record.get("segmentation")
    if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
        raise ValueError(f'{found(record, "segmentation")}; it must be RLE, {{"size": [H, W], "counts": ...}}')
    if mask["size"] != list(size):
        raise ValueError(f"segmentation's size {short(mask['size'])} is not the image's {list(size)}")
    counts = mask["counts"]
    if isinstance(counts, str):
        return counts.encode(errors="surrogatepass")
    if not is_list_of(counts, int) or not fits(counts, *size):
        raise ValueError(_misfit(counts))
    return mask_api.frPyObjects(mask, *size)["counts"]


def _misfit(counts: object) -> str:
    return f"segmentation's counts {short(counts)} do not decode to a mask of the image's size"


def _box(record: dict, size: tuple[int, int]) -> list[float]:
    """The box of a record; without one, that of its mask."""
    if "bbox" not in record and "segmentation" in record:
        counts = _counts(record, size)
        if not fit_many([counts], np.array([size[0] * size[1]])):  # pycocotools reads beyond the end of a truncated one
            raise ValueError(_misfit(record["segmentation"]["counts"]))
        return mask_api.toBbox({"size": list(size), "counts": counts}).tolist()
    box = record.get("bbox")
    if type(box) is not list or len(box) != 4 or not {*map(type, box)} <= NUMBERS:
        raise ValueError(f"{found(record, 'bbox')}; it must be four numbers (x, y, width, height)")
    return box


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
