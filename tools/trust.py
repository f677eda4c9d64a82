#!/usr/bin/env python3
"""Can detections be believed? Train variants on the built-in world, calibrate each on base names of its dev
scenes, and report AP, precision, recall and calibration error at the default threshold, and absent words: mean and
standard deviation over seeds. Started again, it resumes.

    tools/trust.py --output-dir output/trust --seeds 0 1 2
"""

from pathlib import Path

from vild.utils.command_line import add_shared, at_least, make_parser
from vild.utils.errors import one_line_errors

VARIANTS = ("text", "image", "vild", "ensemble")
AP = ("bbox/AP50_novel", "bbox/AP50_base")


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--output-dir", default=Path("output/trust"))
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], metavar="N", help="one world each")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of MODEL.VILD.VARIANT")
    args = parser.parse_args()

    from experiments.ablation import mean_and_std
    from experiments.glyphs import GlyphsRun

    from vild.evaluation.metrics import TABLES, title
    from vild.report.absent import COLUMNS as ABSENT
    from vild.report.page import Heading, Table, write_page

    rows: dict[str, list[dict]] = {}
    for seed in args.seeds:
        run = GlyphsRun(args.output_dir / f"seed{seed}", seed)
        trained = [run.detector(variant, variant) for variant in args.variants]
        run.run(*trained)
        run.trust(*trained)
        for variant in args.variants:
            rows.setdefault(variant, []).append(run.read_metrics(variant))
            found = run.read_metrics(f"{variant}_calibrated")
            for kind, summary in run.read_absent(variant).items():
                found |= {f"{kind}/{key}": value for key, value in summary.items()}
            rows.setdefault(f"{variant}, calibrated", []).append(found)

    def table(columns: dict[str, str], digits: int = 1, which: str = "") -> Table:
        some = {name: values for name, values in rows.items() if next(iter(columns)) in values[0] and which in name}
        cells = [
            [name, *(mean_and_std([v[c] for v in values if v[c] is not None], digits) for c in columns)]
            for name, values in some.items()
        ]
        return Table(["", *columns.values()], cells)

    brief = {column: title(column) for column in (*AP, "bbox/precision", "bbox/recall")}
    scores = {column: title(column) for column in (*AP, *TABLES["trust"])}
    blocks = [Heading("In brief"), table(brief, which="calibrated"), Heading("Scores at the default threshold"),
              table(scores), Heading("Absent words")]  # fmt: skip
    for kind in ("random", "hard"):
        columns = {f"{kind}/{key}": f"{kind}: {name}" for key, (name, _) in ABSENT.items()}
        blocks.append(table(columns, 3))
    page = write_page(args.output_dir, "Detections one can trust", blocks)
    print(page.read_text())


if __name__ == "__main__":
    main()
