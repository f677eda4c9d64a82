#!/usr/bin/env python3
"""Make LVIS's open-vocabulary files from lvis/lvis_v1_{train,val}.json: lvis_v1_train_norare.json (no rare
annotation) and lvis_v1_minival.json (the images in COCO's val2017). A file that is already there is checked.

    DETECTRON2_DATASETS=/data datasets/prepare_lvis.py
"""

import argparse

from vild.data import datasets, prepare
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unofficial", action="store_true", help="the files are others than LVIS v1's own")
    official = not parser.parse_args().unofficial
    prepare.prepare(prepare.LVIS, datasets.root(), "lvis_v1" if official else "lvis", official)


if __name__ == "__main__":
    main()
