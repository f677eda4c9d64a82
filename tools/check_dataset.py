#!/usr/bin/env python3
"""Check a data set before training on it: its annotation file, and that every image decodes and has the stated size.

    tools/check_dataset.py --dataset lvis_v1_train_norare --output report.json

Exit status 1 if an image cannot be read or differs in size from its annotations. Training and evaluation refuse such
images too, or leave them out and count them (INPUT.UNREADABLE skip).
"""

import sys

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import count_of, one_line_errors

SHOWN = 30  # faults in the table; --output lists all


@one_line_errors
def main() -> int:
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", required=True)
    add_shared(parser, "--num-workers")
    add_shared(parser, "--output", note="the report as JSON")
    args = parser.parse_args()

    from tqdm import tqdm

    from vild.data import datasets
    from vild.data.unreadable import scan, scan_report
    from vild.report.page import markdown_table
    from vild.utils.files import write_json

    datasets.register_all()
    records = datasets.load_dicts(args.dataset)
    progress = tqdm(scan(records, args.num_workers), total=len(records), desc="images", unit="image")
    faults = [fault for fault in progress if fault]
    report = scan_report(args.dataset, records, faults)
    if args.output:
        write_json(args.output, report)
    if faults:
        rows = [[str(fault.image_id), fault.kind, fault.reason] for fault in faults[:SHOWN]]
        print(markdown_table(["image_id", "fault", "details"], rows))
        if len(faults) > SHOWN:
            print(f"... and {len(faults) - SHOWN:,} more (--output FILE lists them)")
    print(
        f"{args.dataset}: {count_of(report['pictures'], 'image')}, {count_of(report['annotations'], 'annotation')}; "
        f"{report['unreadable']:,} unreadable, {report['another_size']:,} of another size"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
