#!/usr/bin/env python3
"""Make a data set of your own known by name: an entry in $DETECTRON2_DATASETS/vild_datasets.json, no code.

    tools/add_dataset.py --name pets_train --json pets/train.json --images pets/images --split pets/split.json \\
        --keep base
"""

import argparse

from vild.data import datasets
from vild.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--json", required=True, help="annotation file, LVIS or COCO form, below the root")
    parser.add_argument("--images", required=True, help="picture folder, below the root")
    parser.add_argument(
        "--split", required=True, help='"lvis", "coco_48_17", or a file {"base": [...], "novel": [...]}'
    )
    parser.add_argument("--keep", choices=["base", "all"], default="all", help='"base" for training')
    parser.add_argument("--protocol", choices=["coco", "lvis"], default="coco", help="how it is evaluated")
    args = parser.parse_args()
    if args.name in datasets.BUILTIN:
        raise UserError(f"--name: '{args.name}' is one of vild's own data sets")
    entry = datasets.Entry(args.json, args.images, args.split, args.keep, args.protocol)
    classes = datasets.check_entry(args.name, entry)
    path = datasets.add_entry(args.name, entry)
    print(
        f"'{args.name}' is now known ({path}): {classes.splits.count('base')} base and "
        f"{classes.splits.count('novel')} novel names"
    )


if __name__ == "__main__":
    main()
