"""Images that cannot be read: refused (``INPUT.UNREADABLE: "refuse"``) or left out and counted ("skip")."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage

from vild.utils.errors import UserError
from vild.utils.files import write_json

logger = logging.getLogger(__name__)

REASON = "unreadable"  # of a mapped record: {file: why}, the images that were met before (or, in evaluation, instead)
FILE = "unreadable.json"  # in an output folder: the same of all that was met
CHOICES = ("refuse", "skip")


def skips(cfg) -> bool:
    """``INPUT.UNREADABLE``: are images that cannot be read left out?"""
    if cfg.INPUT.UNREADABLE not in CHOICES:
        raise UserError(f"INPUT.UNREADABLE: '{cfg.INPUT.UNREADABLE}' is not one of {', '.join(CHOICES)}")
    return cfg.INPUT.UNREADABLE == "skip"


class Counted:
    """A training loader whose batches tell of the images that were left out: each is logged once, the file
    ``unreadable.json`` in ``folder`` has them all (that of another rank is ``unreadable-RANK.json``), and the metric
    ``unreadable_images`` says how many they are.

    Different images are counted, not how often they came: a run that was killed and resumed counts what an
    undisturbed one would.
    """

    def __init__(self, loader, folder: str | Path, resumed: bool):
        self.loader = loader
        rank = comm.get_rank()
        self.path = Path(folder) / (FILE if rank == 0 else f"unreadable-{rank}.json")
        self.resumed, self.found = resumed, {}

    def __iter__(self) -> Iterator[list[dict]]:
        # not before: a trainer that resumes makes a loader from the beginning first, and never asks it
        if not self.resumed:
            self.path.unlink(missing_ok=True)
        elif self.path.is_file():
            self.found = json.loads(self.path.read_text())
        return self._told(iter(self.loader))  # its iterator is made now, as a plain loader's is: it draws a number

    def _told(self, batches: Iterator[list[dict]]) -> Iterator[list[dict]]:
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


def gathered(found: dict[str, str], name: str, output_dir: str | Path | None) -> int:
    """Evaluation's: the images that any rank could not read, logged, and written as ``unreadable.json`` by the main
    process; how many they are (0 on the others). Called by all ranks."""
    together = {file: why for some in comm.gather(found, dst=0) for file, why in some.items()}
    if not comm.is_main_process():
        return 0
    for why in together.values():
        logger.warning("without detections: %s", why)
    if together:
        logger.warning("%s: %d images CANNOT BE READ; they count as images without detections", name, len(together))
    if output_dir:
        if together:
            write_json(Path(output_dir) / FILE, together)
        else:
            (Path(output_dir) / FILE).unlink(missing_ok=True)
    return len(together)


def of_run(folder: Path) -> dict[str, str]:
    """What ``unreadable.json`` and its fellows in a folder say."""
    files = sorted(folder.glob("unreadable*.json"))
    return {file: why for path in files for file, why in json.loads(path.read_text()).items()}
