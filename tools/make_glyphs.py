#!/usr/bin/env python3
"""Make the built-in world under $DETECTRON2_DATASETS/glyphs: scenes, annotations, a contact sheet.

DETECTRON2_DATASETS=output/quickstart/datasets tools/make_glyphs.py --seed 0
"""

from vild.utils.command_line import add_shared, between_0_and_1, make_parser
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--seed", "--num-workers")
    parser.add_argument(
        "--sets", nargs="+", choices=["train", "nonovel_train", "new_train", "dev", "val"],
        default=["train", "dev", "val"], help="scene sets to make",
    )  # fmt: skip
    text = "make only this fraction of each set's scenes"
    parser.add_argument("--fraction", type=between_0_and_1, default=1.0, help=text)
    args = parser.parse_args()

    from vild.data import datasets
    from vild.glyphs.world import contact_sheet, write_world
    from vild.utils.files import write_image

    root = datasets.root() / "glyphs"
    write_world(root, args.seed, args.sets, args.num_workers, args.fraction)
    write_image(root / "contact_sheet.png", contact_sheet(args.seed))
    print(f"the built-in world is in {root}; look at {root / 'contact_sheet.png'}")


if __name__ == "__main__":
    main()
