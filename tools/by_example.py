#!/usr/bin/env python3
"""Does an example do what a word does? Evaluate a detector with the novel names as words, by 1 and by 5 example
regions, as word and examples, and, as the control, by examples of another novel name. Base names are words throughout.
The examples are drawn three times from the annotations of a second data set, and results averaged: here, and only here,
novel annotations are used. They reach neither training nor calibration. The output is JSON: the metrics by what novel
names were made of, and, under "of", data sets, weights and seed.

    tools/by_example.py --weights output/quickstart/detector --dataset glyphs_val --examples-from glyphs_dev \\
        --output by_example.json
"""

from vild.utils.command_line import add_model_flags, add_shared, make_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", required=True)
    parser.add_argument("--examples-from", required=True, metavar="NAME", help="another data set of the same classes")
    add_shared(parser, "--seed")
    add_shared(parser, "--output", required=True)
    add_model_flags(parser)
    args = parser.parse_args()
    if args.examples_from == args.dataset:
        raise UserError(f"--examples-from {args.examples_from}: its objects would be found by their own examples")

    from vild.checkpoint.checkpointer import detector_hash
    from vild.checkpoint.pretrained import config_from_flags
    from vild.data import datasets
    from vild.engine.sources import check_classes
    from vild.evaluation.metrics import decimal, title
    from vild.inference.by_example import COLUMNS, MADE_OF, by_example
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.report.page import Table
    from vild.utils.files import write_json

    scored, shown = ({record["file_name"] for record in datasets.load_dicts(name)}
                     for name in (args.dataset, args.examples_from))  # fmt: skip
    if both := scored & shown:
        raise UserError(f"--examples-from {args.examples_from}: {len(both)} of its images are in {args.dataset}, too, "
                        f"such as {min(both)}: their objects would be found by their own examples")  # fmt: skip
    detector = OpenVocabularyDetector(cfg := config_from_flags(args))
    for name in (args.dataset, args.examples_from):
        check_classes(detector.trained, name, marks=False)
    found = by_example(detector, args.dataset, args.examples_from, args.seed)
    of = {"dataset": args.dataset, "examples_from": args.examples_from, "seed": args.seed,
          "weights": cfg.MODEL.WEIGHTS, "detector": detector_hash(detector.model)}  # fmt: skip
    write_json(args.output, {**found, "of": of})
    rows = [[text, *(decimal(found[key][column], 1) for column in COLUMNS)] for key, text in MADE_OF.items()]
    print(Table(["novel names as", *(title(f"bbox/{column}") for column in COLUMNS)], rows).markdown)


if __name__ == "__main__":
    main()
