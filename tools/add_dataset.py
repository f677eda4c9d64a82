#!/usr/bin/env python3
"""Make a data set of your own known by name: an entry in $DETECTRON2_DATASETS/vild_datasets.json, no code.

    tools/add_dataset.py --name pets_train --json pets/train.json --images pets/images --split pets/split.json \\
        --keep base
"""

import argparse
from dataclasses import replace

from vild.data import datasets
from vild.data.annotations import is_lvis_form
from vild.data.classes import read_split
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--json", required=True, help="annotation file, LVIS or COCO form, below the root")
    parser.add_argument("--images", required=True, help="image folder, below the root")
    parser.add_argument(
        "--split", required=True, help='"lvis", "coco_48_17", ..., or a file {"base": [...], "novel": [...]}'
    )
    parser.add_argument("--keep", choices=["base", "all"], default="all", help='"base" for training')
    parser.add_argument(
        "--protocol", choices=["coco", "lvis"], help="how it is evaluated (default: told from the file's form)"
    )
    args = parser.parse_args()
    if args.name in datasets.BUILTIN:
        raise UserError(f"--name: '{args.name}' is one of vild's own data sets")
    entry = datasets.Entry(args.json, args.images, args.split, args.keep, args.protocol or "coco")
    document = datasets.read_entry(args.name, entry)
    if args.protocol is None:
        lvis = is_lvis_form(document)
        entry = replace(entry, protocol="lvis" if lvis else "coco")
        why = "has neg_category_ids and frequencies" if lvis else "lacks neg_category_ids or frequencies"
        print(f"{args.json} {why}: evaluated by the {entry.protocol} protocol (--protocol says otherwise)")
    classes = datasets.check_entry(args.name, entry)
    if missing := read_split(args.split, datasets.root()).absent(document["categories"]):
        print(f"warning: {len(missing)} names of split {args.split} are not in {args.json} ('{missing[0]}' ...)")
    path = datasets.add_entry(args.name, entry)
    print(
        f"'{args.name}' is now known ({path}): {classes.splits.count('base')} base and "
        f"{classes.splits.count('novel')} novel names"
    )


if __name__ == "__main__":
    main()
