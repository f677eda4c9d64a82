#!/usr/bin/env python3
"""Check a data set before a day is spent on it: its annotation file, and every image decoded and measured.

    tools/check_dataset.py --dataset lvis_v1_train_norare [--num-workers 16] [--output report.json]

Ends with status 1 if an image cannot be read or is of another size than the annotation file says. Training and
evaluation refuse such images by themselves, or leave them out and count them (INPUT.UNREADABLE skip).
"""

import argparse
import os
import sys
from pathlib import Path

from tabulate import tabulate
from tqdm import tqdm

from vild.data import datasets
from vild.data.unreadable import scan, scan_report
from vild.utils.errors import one_line_errors
from vild.utils.files import write_json

SHOWN = 30  # faults in the table; the report has them all


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a registered data set")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="threads that decode")
    parser.add_argument("--output", type=Path, help="also write what was found, as JSON")
    args = parser.parse_args()
    datasets.register_all()
    records = datasets.load_dicts(args.dataset)
    progress = tqdm(scan(records, args.num_workers), total=len(records), desc="images", unit="image")
    faults = [fault for fault in progress if fault]
    report = scan_report(args.dataset, records, faults)
    if args.output:
        write_json(args.output, report)
    if faults:
        rows = [[fault.image_id, fault.kind, fault.reason] for fault in faults[:SHOWN]]
        print(tabulate(rows, ["image_id", "is", "what"], "pipe"))
        if len(faults) > SHOWN:
            print(f"... and {len(faults) - SHOWN:,} more (--output FILE lists them)")
    print(
        f"{args.dataset}: {report['pictures']:,} images, {report['annotations']:,} annotations; "
        f"{report['unreadable']:,} unreadable, {report['another_size']:,} of another size"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
