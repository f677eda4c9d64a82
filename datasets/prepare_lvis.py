#!/usr/bin/env python3
"""Make LVIS's open-vocabulary files from lvis/lvis_v1_{train,val}.json: lvis_v1_train_norare.json (no rare
annotation) and lvis_v1_minival.json (the images in COCO's val2017). A file that is already there is
checked; of train and val one may be missing.

    DETECTRON2_DATASETS=/data datasets/prepare_lvis.py
"""

from vild.utils.command_line import make_parser
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--unofficial", action="store_true", help="accept files that differ from LVIS v1's own")
    official = not parser.parse_args().unofficial

    from vild.data import datasets, prepare

    prepare.prepare(prepare.LVIS, datasets.root(), "lvis_v1" if official else "lvis", official)


if __name__ == "__main__":
    main()
