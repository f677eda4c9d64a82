#!/usr/bin/env python3
"""Make COCO's open-vocabulary files (48 base, 17 novel names) from coco/annotations/instances_{train,val}2017.json:
coco/zero-shot/instances_{train,val}2017_{seen,unseen,all}_2[_oriorder].json, as many as the data sets need. A file
that is already there is checked.

    DETECTRON2_DATASETS=/data datasets/prepare_coco.py
"""

from vild.utils.command_line import make_parser
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--unofficial", action="store_true", help="accept files that differ from COCO 2017's own")
    official = not parser.parse_args().unofficial

    from vild.data import datasets, prepare

    prepare.prepare(prepare.COCO, datasets.root(), "coco_48_17", official)


if __name__ == "__main__":
    main()
