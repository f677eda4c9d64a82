#!/usr/bin/env python3
"""Write the proposals of a trained class-agnostic network (or of any detector) for a data set.

    tools/make_proposals.py --config-file configs/Glyphs/proposals.yaml --dataset glyphs_train \\
        --weights output/quickstart/proposals/model_final.pth --output output/quickstart/proposals.safetensors
"""

from vild.utils.command_line import add_model_flags, add_shared, make_parser
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", "--output", required=True)
    add_model_flags(parser)
    args = parser.parse_args()

    from vild.config import config_from_flags
    from vild.inference.make_proposals import make_proposals
    from vild.utils.lock import only_writer

    with only_writer(args.output):
        make_proposals(config_from_flags(args), args.dataset, args.output)


if __name__ == "__main__":
    main()
