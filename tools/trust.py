#!/usr/bin/env python3
"""Can detections be believed? Train variants and our recipe on the built-in world, calibrate each on base names of its
dev scenes, and report AP, precision, recall and calibration error at the default threshold, absent words, and the
recipe asked by example regions in place of words: mean and standard deviation over seeds. Started again, it resumes; a
detector that is added is all it trains.

    tools/trust.py --output-dir output/glyphs --seeds 0 1 2
"""

from pathlib import Path

from vild.utils.command_line import add_shared, at_least, make_parser
from vild.utils.errors import one_line_errors

NAMES = {  # by config
    "text": "ViLD-text",
    "image": "ViLD-image",
    "vild": "ViLD",
    "ensemble": "ViLD-ensemble",
    "vild_contrast": "ViLD-contrast (ours)",
}
RECIPE = "vild_contrast"
AP = ("bbox/AP50_novel", "bbox/AP50_base")


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--output-dir", default=Path("output/glyphs"))
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], metavar="N", help="one world each")
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=[*NAMES], help="of configs/Glyphs")
    args = parser.parse_args()

    from experiments.ablation import mean_and_std
    from experiments.glyphs import GlyphsRun

    from vild.evaluation.metrics import title
    from vild.inference.by_example import COLUMNS as EXAMPLE_COLUMNS
    from vild.inference.by_example import MADE_OF
    from vild.report.absent import COLUMNS as ABSENT
    from vild.report.page import Heading, Table, write_page

    plain, calibrated = ({NAMES[variant]: [] for variant in args.variants} for _ in range(2))  # a seed's metrics each
    examples = {text: [] for text in MADE_OF.values()}
    for seed in args.seeds:
        run = GlyphsRun(args.output_dir / f"seed{seed}", seed)
        trained = [run.detector(variant, variant) for variant in args.variants]
        run.run(*trained)
        run.trust(*trained, by_example=RECIPE)
        if RECIPE in args.variants:
            for key, found in run.read_by_example().items():
                examples[MADE_OF[key]].append({f"bbox/{column}": value for column, value in found.items()})
        for variant in args.variants:
            plain[NAMES[variant]].append(run.read_metrics(variant))
            found = run.read_metrics(f"{variant}_calibrated")
            for kind, summary in run.read_absent(variant).items():
                found |= {f"{kind}/{key}": value for key, value in summary.items()}
            calibrated[NAMES[variant]].append(found)

    def table(columns: dict[str, tuple[str, int]], rows: dict[str, list[dict]]) -> Table:
        """``columns``: titles and decimals by metric, or by several in one column ("bbox/recall_novel bbox/recall")."""

        def cell(values: list[dict], column: str, digits: int) -> str:
            parts = ([v[key] for v in values if v[key] is not None] for key in column.split())
            return " / ".join(mean_and_std(part, digits) for part in parts)

        cells = [[name, *(cell(values, c, d) for c, (_, d) in columns.items())] for name, values in rows.items()]
        return Table(["", *(each for each, _ in columns.values())], cells)

    brief = {column: (title(column), 1) for column in (*AP, "bbox/precision", "bbox/recall")}
    scores = {column: (title(column), 1) for column in AP}
    for key in ("precision", "recall", "calibration_error"):
        scores[f"bbox/{key}_novel bbox/{key}"] = (f"{key.replace('_', ' ')}, novel / all", 1)
    scores |= {f"bbox/{thing}_per_image": (f"{thing} an image", 1) for thing in ("boxes", "objects")}
    both = [(name + end, rows[name]) for name in plain for end, rows in (("", plain), (", calibrated", calibrated))]
    blocks = [Heading("In brief"), table(brief, calibrated), Heading("Scores at the default threshold"),
              table(scores, dict(both)), Heading("Absent words")]  # fmt: skip
    for kind in ("random", "hard"):
        columns = {f"{kind}/{key}": (f"{kind}: {name}", digits) for key, (name, digits) in ABSENT.items()}
        blocks.append(table(columns, calibrated))
    if RECIPE in args.variants:
        columns = {f"bbox/{column}": (title(f"bbox/{column}"), 1) for column in EXAMPLE_COLUMNS}
        blocks += [Heading("By example"), table(columns, examples)]
    page = write_page(args.output_dir, "Detections one can trust", blocks)
    print(page.read_text())


if __name__ == "__main__":
    main()
