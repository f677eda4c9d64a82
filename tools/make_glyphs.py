#!/usr/bin/env python3
"""Make the built-in world under $DETECTRON2_DATASETS/glyphs: scenes, annotations, a contact sheet."""

import argparse

from vild.data import datasets
from vild.glyphs.world import SETS, contact_sheet, write_world
from vild.utils.errors import one_line_errors
from vild.utils.files import write_image


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["train", "dev", "val"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=1.0, help="make only the first scenes of each set")
    args = parser.parse_args()
    root = datasets.root() / "glyphs"
    write_world(root, args.seed, tuple(args.sets), args.workers, args.fraction)
    write_image(root / "contact_sheet.png", contact_sheet(args.seed))
    print(f"the built-in world is in {root}; look at {root / 'contact_sheet.png'}")


if __name__ == "__main__":
    main()
