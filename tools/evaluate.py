#!/usr/bin/env python3
"""Score a results JSON of any detector, without a model: base, novel and all, by the papers' rules.

    tools/evaluate.py --protocol lvis        --gt lvis_v1_val.json         --results R.json --output out
    tools/evaluate.py --protocol coco-48-17  --gt instances_val2017.json   --results R.json --output out
    tools/evaluate.py --protocol split --split mine.json --gt mine_val.json --results R.json --output out

lvis: LVIS's federated rules, novel = rare; AP-fixed in columns of its own. coco: all classes of the file alike.
coco-48-17: the 48 base and 17 novel names, on the images that hold one of them. split: base and novel by --split,
LVIS's rules where the ground truth is in LVIS's form. Writes OUTPUT/vild_metrics.json, per_class.json and table.md.
"""

import argparse
from pathlib import Path

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from vild.data import datasets
from vild.data.annotations import check_annotations, is_lvis_form, read_json
from vild.data.classes import make_classes, read_split
from vild.evaluation import evaluator
from vild.evaluation.protocol import GroundTruth, evaluate
from vild.evaluation.results import read_results
from vild.utils.errors import UserError, one_line_errors
from vild.utils.files import write_json, write_text

SPLITS = {"lvis": "lvis", "coco": "everything", "coco-48-17": "coco_48_17"}


def read_truth(path: str, protocol: str, split: str) -> GroundTruth:
    """The ground truth of a file under one of the protocols named above."""
    document = read_json(path)
    check_annotations(document, path)
    lvis = is_lvis_form(document)
    if protocol == "lvis" and not lvis:
        raise UserError(f"--protocol lvis: {path} is not in LVIS's form (frequency, neg_category_ids)")
    if not split and protocol == "split":
        raise UserError("--protocol split needs --split, a file or the name of one in vild/data/splits")
    rules = read_split(split or SPLITS[protocol], datasets.root())
    rules.check_official(document["categories"], (), path)
    classes = make_classes(document["categories"], rules)
    if not classes.names:
        raise UserError(f"{path}: split '{rules.path.stem}' matches none of its categories")
    return GroundTruth(document, classes, "lvis" if lvis and protocol in ("lvis", "split") else "coco")


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=["lvis", "coco", "coco-48-17", "split"], required=True)
    parser.add_argument("--gt", required=True, help="annotation file, LVIS or COCO form")
    parser.add_argument("--results", required=True, help="detections, COCO's results form")
    parser.add_argument("--split", default="", help="which names are base and novel, instead of the protocol's")
    parser.add_argument("--iou-type", nargs="+", choices=["bbox", "segm"], default=["bbox"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    truth = read_truth(args.gt, args.protocol, args.split)
    categories = {c["id"] for c in truth.document["categories"]}
    if args.protocol == "coco-48-17":
        categories |= {c["id"] for c in COCO_CATEGORIES}  # results of all 80 names against a file of 65
    found = read_results(args.results, truth.sizes, categories, "segm" in args.iou_type)
    if args.protocol == "coco-48-17":
        truth = truth.only_annotated_images()
    result = evaluate(truth, found, tuple(args.iou_type), fixed=truth.protocol == "lvis")
    name = Path(args.gt).stem
    page = f"{evaluator.heading(name, truth, result)}\n\n{evaluator.as_table(result.metrics)}\n"
    print(page, end="")
    evaluator.write_flat(args.output / evaluator.METRICS_FILE, {name: result.metrics})
    write_json(args.output / evaluator.CLASSES_FILE, {"counts": result.counts, "classes": result.classes})
    write_text(args.output / "table.md", page)


if __name__ == "__main__":
    main()
