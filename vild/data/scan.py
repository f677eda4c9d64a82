"""Every image of a data set decoded once, before a day is spent on it (tools/check_dataset.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice

from vild.utils.errors import UserError
from vild.utils.images import read_image

UNREADABLE, OTHER_SIZE = "unreadable", "another size"
AHEAD = 4  # images a thread, decoded or waiting


@dataclass(frozen=True)
class Fault:
    """What is wrong with an image: UNREADABLE or OTHER_SIZE (than the annotation file says), and a line."""

    image_id: int
    file_name: str
    kind: str
    reason: str


def look_at(record: dict) -> Fault | None:
    """Read an image as training does; None if all is well."""
    about = record["image_id"], record["file_name"]
    try:
        height, width = read_image(record["file_name"]).shape[:2]
    except UserError as error:
        return Fault(*about, UNREADABLE, str(error))
    if (height, width) != (record["height"], record["width"]):
        reason = f"{width}x{height}, the annotation file says {record['width']}x{record['height']}"
        return Fault(*about, OTHER_SIZE, f"image {record['file_name']} is {reason}")
    return None


def scan(records: Sequence[dict], workers: int) -> Iterator[Fault | None]:
    """:func:`look_at` of each record, in order, by ``workers`` threads: the decoders let go of Python's lock."""
    if workers < 1:
        raise UserError(f"--num-workers {workers}: at least one is needed")
    left = iter(records)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(look_at, record) for record in islice(left, AHEAD * workers)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(look_at, record) for record in islice(left, 1)]


def as_report(name: str, records: Sequence[dict], faults: Sequence[Fault]) -> dict:
    """What a scan found, as plain values."""
    counts = Counter(fault.kind for fault in faults)
    return {
        "data_set": name,
        "pictures": len(records),
        "annotations": sum(len(record["annotations"]) for record in records),
        "unreadable": counts[UNREADABLE],
        "another_size": counts[OTHER_SIZE],
        "faults": [asdict(fault) for fault in faults],
    }
