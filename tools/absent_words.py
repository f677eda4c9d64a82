#!/usr/bin/env python3
"""Ask every image of a data set for words that are not in it, random and hard ones, beside words that are: false boxes
an image for an absent word, recall, and precision and recall of the decision whether a word is in the image.

    tools/absent_words.py --weights output/quickstart/detector --dataset glyphs_val --output absent.json
"""

from vild.utils.command_line import add_model_flags, add_shared, make_parser
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", required=True)
    add_shared(parser, "--threshold", "--seed")
    add_shared(parser, "--output", required=True)
    add_model_flags(parser)
    args = parser.parse_args()

    from vild.checkpoint.pretrained import config_from_flags
    from vild.engine.sources import check_classes
    from vild.inference.absent import absent_words
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.report.absent import absent_table
    from vild.utils.files import write_json

    detector = OpenVocabularyDetector(config_from_flags(args))
    check_classes(detector.trained, args.dataset, marks=False)
    found = absent_words(detector, args.dataset, args.threshold, args.seed)
    write_json(args.output, found)
    print(absent_table({"": found}).markdown)


if __name__ == "__main__":
    main()
