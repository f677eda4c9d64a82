#!/usr/bin/env python3
"""New names without forgetting? On the built-in world, ten novel names are taught to a trained detector by about fifty
scenes that annotate nothing else: by plain fine-tuning, by tools/finetune.py, and as a linear probe. The table has AP50
of base names, of the other novel names and of the new ones, and false boxes of words that are not there (at the default
threshold, uncalibrated): mean and standard deviation over seeds. Started again, it resumes; in the folder of
tools/trust.py it uses what is there. The report is forgetting/report.md; the folder's name ends with a --variant or
--dataset that is not the default.

    tools/forgetting.py --output-dir output/glyphs --seeds 0 1 2
"""

from pathlib import Path

from vild.utils.command_line import add_shared, at_least, make_parser
from vild.utils.errors import one_line_errors

VARIANTS = ("text", "vild", "vild_contrast")  # those that both can teach
COLUMNS = {"base": ("AP50 base", 1), "old novel": ("AP50 old novel", 1), "new": ("AP50 new", 1),
           "false_boxes": ("false boxes, absent word", 3), "recall": ("recall of what is there", 1)}  # fmt: skip


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--output-dir", default=Path("output/glyphs"))
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], metavar="N", help="one world each")
    parser.add_argument("--variant", choices=VARIANTS, default="vild_contrast", help="the detector, of configs/Glyphs")
    add_shared(parser, "--dataset", choices=["glyphs_dev", "glyphs_val"], default="glyphs_val",
               note="scored on: glyphs_val, or glyphs_dev for choosing settings")  # fmt: skip
    args = parser.parse_args()

    from experiments.ablation import mean_and_std
    from experiments.forgetting import NEW, ROWS, ForgettingRun

    from vild.report.page import Heading, Paragraph, Table, write_page

    rows = {name: [] for name in ROWS}
    for seed in args.seeds:
        run = ForgettingRun(args.output_dir / f"seed{seed}", seed, args.variant, args.dataset)
        run.learn()
        for name in ROWS:
            rows[name].append(run.read_row(name))
    cells = [[ROWS[name], *(mean_and_std([v[key] for v in values], digits) for key, (_, digits) in COLUMNS.items())]
             for name, values in rows.items()]  # fmt: skip
    table = Table(["", *(title for title, _ in COLUMNS.values())], cells)
    of = {"variant": args.variant, "dataset": args.dataset}
    folder = "_".join(["forgetting", *(value for key, value in of.items() if value != parser.get_default(key))])
    setting = (f"The detector is {args.variant} of configs/Glyphs, taught by {NEW} and scored on {args.dataset}; "
               f"seeds {', '.join(map(str, args.seeds))}.")  # fmt: skip
    page = write_page(args.output_dir / folder, f"New names ({args.variant}, {args.dataset})",
                      [Paragraph(setting), Heading("What is learned, and what is forgotten"), table])  # fmt: skip
    print(page.read_text())


if __name__ == "__main__":
    main()
