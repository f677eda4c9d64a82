"""Images that cannot be read or are not of the size in the annotation file: an error (``INPUT.UNREADABLE: "refuse"``),
or left out and counted ("skip"). tools/check_dataset.py scans a data set for them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage

from vild.utils.errors import BadImage, UserError, count_of
from vild.utils.files import write_json
from vild.utils.images import read_image

logger = logging.getLogger(__name__)

REASON = "unreadable"  # key of a mapped record: {file: message} of the images replaced by this one
FILE = "unreadable.json"  # in an output folder: the same for the whole run
CHOICES = ("refuse", "skip")
UNREADABLE, OTHER_SIZE = "unreadable", "another size"  # kinds of faults


def check_size(image: np.ndarray, record: dict) -> None:
    """BadImage if an image [H, W, 3] has another size than the annotation file says."""
    if image.shape[:2] != (record["height"], record["width"]):
        sizes = f"{image.shape[1]}x{image.shape[0]}, the annotation file says {record['width']}x{record['height']}"
        raise BadImage(f"image {record['file_name']} is {sizes}")


def skips(cfg) -> bool:
    """``INPUT.UNREADABLE``: are unreadable images left out?"""
    if cfg.INPUT.UNREADABLE not in CHOICES:
        raise UserError(f"INPUT.UNREADABLE: '{cfg.INPUT.UNREADABLE}' is not one of {', '.join(CHOICES)}")
    return cfg.INPUT.UNREADABLE == "skip"


class UnreadableCounter:
    """Wrap a training loader: log each unreadable image once, write all to ``unreadable.json`` in ``folder`` (rank N:
    ``unreadable-N.json``) and their number to the metric ``unreadable_pictures``. (Distinct images are counted, so that
    a resumed run has the same count as an uninterrupted one.)
    """

    def __init__(self, loader, folder: str | Path, resumed: bool):
        self.loader = loader
        rank = comm.get_rank()
        self.path = Path(folder) / (FILE if rank == 0 else f"unreadable-{rank}.json")
        self.resumed, self.found = resumed, {}

    def __iter__(self) -> Iterator[list[dict]]:
        # not in __init__: a trainer that resumes builds a loader from the start first, and does not iterate it
        if not self.resumed:
            self.path.unlink(missing_ok=True)
        elif self.path.is_file():
            self.found = json.loads(self.path.read_text())
        return self._count(iter(self.loader))  # create its iterator now: it draws a random number, as without us

    def _count(self, batches: Iterator[list[dict]]) -> Iterator[list[dict]]:
        for batch in batches:
            new = {file: why for record in batch for file, why in record.pop(REASON, {}).items()}
            if new := {file: why for file, why in new.items() if file not in self.found}:
                self.found |= new
                write_json(self.path, self.found)
                for why in new.values():
                    logger.warning("left out of the training: %s (%d so far)", why, len(self.found))
            if self.found and has_event_storage():
                get_event_storage().put_scalar("unreadable_pictures", len(self.found), smoothing_hint=False)
            yield batch


def gather_unreadable(found: dict[str, str], name: str, output_dir: str | Path | None) -> int:
    """Log the images that evaluation could not read on any rank and write them to ``unreadable.json``. All ranks call
    it; returns their number on the main process, 0 on the others."""
    together = {file: why for some in comm.gather(found, dst=0) for file, why in some.items()}
    if not comm.is_main_process():
        return 0
    for why in together.values():
        logger.warning("without detections: %s", why)
    if together:
        count = count_of(len(together), "image")
        logger.warning("%s: %s that CANNOT BE READ, counted as without detections", name, count)
        if output_dir:
            write_json(Path(output_dir) / FILE, together)
    elif output_dir:
        (Path(output_dir) / FILE).unlink(missing_ok=True)
    return len(together)


def read_unreadable(folder: Path) -> dict[str, str]:
    """The contents of all ``unreadable*.json`` in a folder."""
    files = sorted(folder.glob("unreadable*.json"))
    return {file: why for path in files for file, why in json.loads(path.read_text()).items()}


@dataclass(frozen=True)
class Fault:
    """A bad image: UNREADABLE or OTHER_SIZE, and a one-line reason."""

    image_id: int
    file_name: str
    kind: str
    reason: str


def check_image(record: dict) -> Fault | None:
    """Read an image as training does; None if there is no fault."""
    kind = UNREADABLE
    try:
        image, kind = read_image(record["file_name"]), OTHER_SIZE
        check_size(image, record)
    except BadImage as error:
        return Fault(record["image_id"], record["file_name"], kind, str(error))
    return None


def scan(records: Sequence[dict], workers: int) -> Iterator[Fault | None]:
    """:func:`check_image` for each record, in order, in ``workers`` threads (decoders release the GIL)."""
    if workers < 1:
        raise UserError(f"--num-workers {workers}: must be at least 1")
    with ThreadPool(workers) as pool:
        yield from pool.imap(check_image, records)


def scan_report(name: str, records: Sequence[dict], faults: Sequence[Fault]) -> dict:
    """The result of a scan as plain values."""
    counts = Counter(fault.kind for fault in faults)
    return {
        "data_set": name,
        "pictures": len(records),
        "annotations": sum(len(record["annotations"]) for record in records),
        "unreadable": counts[UNREADABLE],
        "another_size": counts[OTHER_SIZE],
        "faults": [asdict(fault) for fault in faults],
    }
