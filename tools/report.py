#!/usr/bin/env python3
"""Report on an evaluated run: its metrics beside the published ones, its cost, diagnostics, per-class AP, images.

    tools/report.py --run output/lvis/ensemble --diagnostics output/lvis/ensemble/diagnostics.json

Reads RUN/inference as tools/train_net.py writes it, and the output of tools/diagnostics.py. Writes report.md,
report.html and images to the output folder.
"""

from pathlib import Path

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="OUTPUT_DIR of the run")
    parser.add_argument("--diagnostics", type=Path, metavar="FILE", help="output of tools/diagnostics.py for this run")
    add_shared(parser, "--threshold")
    add_shared(parser, "--output-dir", note="default: RUN/report")
    args = parser.parse_args()

    from vild.report.page import write_page
    from vild.report.run_report import (
        cost_blocks,
        origin_blocks,
        read_diagnostics,
        read_run,
        run_blocks,
        unreadable_blocks,
    )

    metrics, folder = read_run(args.run), args.output_dir or args.run / "report"
    # whatever can fail comes before the images, the first files that are written
    explained = read_diagnostics(args.diagnostics) if args.diagnostics else []
    rest = [
        *unreadable_blocks(args.run, "Left out of the training"),
        *cost_blocks(args.run),
        *explained,
        *origin_blocks(args.run),
    ]
    blocks = []
    for name, values in metrics.items():
        blocks += run_blocks(args.run, name, values, len(metrics) == 1, folder, args.threshold)
    print(f"report: {write_page(folder, f'Report of {args.run}', blocks + rest)}, and report.html beside it")


if __name__ == "__main__":
    main()
