#!/usr/bin/env python3
"""Train the built-in world's teacher, a small open_clip model; a minute or two on two cores.

    tools/train_glyph_teacher.py --output-dir output/quickstart/teacher

Use it as --teacher local-dir:output/quickstart/teacher.
"""

import logging

from vild.utils.command_line import add_shared, at_least, make_parser
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--seed")
    parser.add_argument("--steps", type=at_least(1), default=400, metavar="N", help="training steps")
    parser.add_argument("--width", type=at_least(1), default=64, metavar="D", help="width of its embeddings")
    add_shared(parser, "--output-dir", required=True)
    args = parser.parse_args()

    from vild.glyphs.teacher import train

    logging.getLogger("vild").setLevel(logging.INFO)
    train(args.output_dir, args.steps, args.seed, width=args.width)


if __name__ == "__main__":
    main()
