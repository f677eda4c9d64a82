#!/usr/bin/env python3
"""Make VOC2007/voc_2007_test.json, VOC 2007's test set in COCO's form, from the official folder VOC2007/ with
Annotations/, ImageSets/ and JPEGImages/. Difficult objects become crowds, which evaluation ignores.

    DETECTRON2_DATASETS=/data datasets/prepare_voc.py
"""

from vild.utils.command_line import make_parser
from vild.utils.errors import UserError, one_line_errors

PUBLISHED = (4_952, 12_032)  # images, objects that are not difficult; as others report them


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--unofficial", action="store_true", help="accept files that differ from VOC 2007's own")
    args = parser.parse_args()

    from vild.data import datasets, prepare
    from vild.data.annotations import check_annotations
    from vild.data.voc import NAMES, read_voc

    path = datasets.root() / datasets.BUILTIN["voc_2007_test"].json
    document = read_voc(path.parent, "test", NAMES)
    check_annotations(document, path.parent)
    found = len(document["images"]), sum(not a["iscrowd"] for a in document["annotations"])
    print(f"found {found[0]:,} images and {found[1]:,} objects, published {PUBLISHED[0]:,} and {PUBLISHED[1]:,}")
    if found != PUBLISHED and not args.unofficial:
        raise UserError(f"{path.parent}: not the published test set (--unofficial takes other files)")
    prepare.write_json(path, document)
    print(f"{path}: written")


if __name__ == "__main__":
    main()
