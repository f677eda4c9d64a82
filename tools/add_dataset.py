#!/usr/bin/env python3
"""Register a data set of your own under a name: an entry in $DETECTRON2_DATASETS/vild_datasets.json, no code.

    tools/add_dataset.py --name pets_train --json pets/train.json --images pets/images --split pets/split.json \\
        --keep base
    tools/add_dataset.py --name pets_train --json pets/data.yaml --subset train --split pets/split.json --keep base

YOLO's or VOC's annotations are copied to a COCO file, vild_datasets/NAME.json: add the data set again when they change.
"""

from dataclasses import replace

from vild.utils.command_line import make_parser
from vild.utils.errors import UserError, count_of, first_of, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--name", required=True, help="how tools and configs will call it")
    parser.add_argument("--json", required=True, metavar="FILE",
                        help="LVIS or COCO annotations, YOLO's data.yaml or a VOC folder, below the root")  # fmt: skip
    parser.add_argument("--images", metavar="FOLDER", help="image folder, below the root (YOLO's and VOC's are known)")
    parser.add_argument("--subset", metavar="NAME", help="train, val, ... of a data.yaml or of VOC's ImageSets/Main")
    parser.add_argument(
        "--split", required=True, help='"lvis", "coco_48_17", ..., or a file {"base": [...], "novel": [...]}'
    )
    parser.add_argument("--keep", choices=["base", "all"], default="all", help='"base" for training')
    parser.add_argument("--protocol", choices=["coco", "lvis"], help="evaluation rules (default: by the file's form)")
    args = parser.parse_args()

    from vild.data import datasets
    from vild.data.annotations import is_lvis_form, stays_below
    from vild.data.classes import read_split
    from vild.data.convert import convert
    from vild.data.prepare import write_json
    from vild.vocabulary.words import check_names

    if args.name in datasets.BUILTIN:
        raise UserError(f"--name: '{args.name}' is a built-in data set")
    if not stays_below(args.name):
        raise UserError(f"--name: '{args.name}' cannot be the name of a file")
    converted = convert(datasets.root(), args.json, args.images, args.subset)
    file, images = (f"vild_datasets/{args.name}.json", converted[0]) if converted else (args.json, args.images)
    entry = datasets.Entry(file, images, args.split, args.keep, args.protocol or "coco")
    document = converted[1] if converted else datasets.read_annotations(args.name, entry)
    if not (folder := datasets.root() / images).is_dir():
        raise UserError(f"--images: {folder} is not a folder")
    if args.protocol is None:
        lvis = is_lvis_form(document)
        entry = replace(entry, protocol="lvis" if lvis else "coco")
        print(f"evaluated by {entry.protocol.upper()}'s rules, after the file's form (change it with --protocol)")
    classes = datasets.get_classes(args.name, entry, document)
    check_names(classes.names, args.json)
    split = read_split(args.split, datasets.root())
    if left := [c["name"] for c in document["categories"] if split.mark(c) is None]:
        print(f"warning: left out, as not in split {args.split}: {count_of(len(left), 'name')} ({first_of(left)})")
    if missing := split.absent(document["categories"]):
        count = count_of(len(missing), "name")
        print(f"warning: {args.json} lacks {count} of split {args.split} ({first_of(missing)})")
    named = [image for image in document["images"] if "file_name" in image and images != "coco"]  # there URLs say where
    files = [folder / image["file_name"] for image in named]
    if lost := [str(file) for file in files if not file.is_file()]:
        print(f"warning: missing: {len(lost)} of {count_of(len(files), 'image')} ({first_of(lost)})")
    if converted:
        write_json(datasets.root() / file, document)
    replaced = datasets.entries().get(args.name)
    path = datasets.add_entry(args.name, entry)
    if replaced not in (None, entry):
        print(f"warning: replaced the earlier '{args.name}': {replaced}")
    base, novel = (classes.splits.count(mark) for mark in ("base", "novel"))
    print(f"'{args.name}' registered in {path}: {base} base and {novel} novel names")


if __name__ == "__main__":
    main()
