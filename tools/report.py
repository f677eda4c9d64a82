#!/usr/bin/env python3
"""Report of an evaluated run: its numbers beside the published ones, its cost, diagnostics, per-class AP,
images.

    tools/report.py --run output/lvis/ensemble [--gauges output/lvis/ensemble/gauges.json]

Reads RUN/inference as tools/train_net.py writes it, and what tools/gauges.py wrote; writes report.md, report.html and
images into OUTPUT (RUN/report).
"""

import argparse
from pathlib import Path

from vild.report.page import write_page
from vild.report.run_report import cost_blocks, origin_blocks, read_diagnostics, read_run, run_blocks, unreadable_blocks
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="OUTPUT_DIR of a training or evaluation")
    parser.add_argument("--gauges", type=Path, help="what tools/gauges.py wrote for it")
    parser.add_argument("--threshold", type=float, default=0.3, help="score of the detections that are drawn")
    parser.add_argument("--output", type=Path, help="default: RUN/report")
    args = parser.parse_args()
    metrics, folder = read_run(args.run), args.output or args.run / "report"
    # what can fail before the images, the first files that are written
    explained = read_diagnostics(args.gauges) if args.gauges else []
    rest = [
        *unreadable_blocks(args.run, "were left out of the training"),
        *cost_blocks(args.run),
        *explained,
        *origin_blocks(args.run),
    ]
    blocks = []
    for name, values in metrics.items():
        blocks += run_blocks(args.run, name, values, len(metrics) == 1, folder, args.threshold)
    print(f"the report: {write_page(folder, f'Report of {args.run}', blocks + rest)}, and report.html beside it")


if __name__ == "__main__":
    main()
