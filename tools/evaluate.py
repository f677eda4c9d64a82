#!/usr/bin/env python3
"""Score a results JSON of any detector, without a model: base, novel and all, by the rules of the papers.

    tools/evaluate.py --protocol lvis        --gt lvis_v1_val.json         --results R.json --output-dir out
    tools/evaluate.py --protocol coco-48-17  --gt instances_val2017.json   --results R.json --output-dir out
    tools/evaluate.py --protocol split --split mine.json --gt mine_val.json --results R.json --output-dir out

lvis: LVIS's federated rules, novel = rare; AP-fixed in its own rows. coco: no split. coco-48-17: the 48 base and 17
novel names, on the images that contain one of them. split: base and novel by --split; LVIS's rules if the ground truth
is in LVIS form, else COCO's, and every row says whose. Without masks in the ground truth there is no mask AP. Writes
vild_metrics.json, per_class.json and table.md to the output folder.
"""

from pathlib import Path

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import UserError, count_of, first_of, one_line_errors

SPLITS = {"lvis": "lvis", "coco": "everything", "coco-48-17": "coco_48_17"}


def read_truth(path: str, protocol: str, split: str):
    """The ``GroundTruth`` of an annotation file under one of the protocols above, and what does not match ``split``."""
    from vild.data import datasets
    from vild.data.annotations import is_lvis_form, load_annotations
    from vild.data.classes import make_classes, read_split
    from vild.evaluation.protocol import GroundTruth

    document = load_annotations(path)
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
    truth = GroundTruth(document, classes, "lvis" if lvis and protocol in ("lvis", "split") else "coco")
    return truth, _unmatched_names(rules, document["categories"], path) if split else []


def _unmatched_names(rules, categories: list[dict], path: str) -> list[str]:
    """A line each for names of the split that are not in the file, and the other way round."""
    absent, left = rules.absent(categories), [c["name"] for c in categories if rules.mark(c) is None]
    lines = [f"{path} lacks {count_of(len(absent), 'name')} of the split ({first_of(absent)})"] if absent else []
    if left:
        lines.append(f"left out, as not in the split: {count_of(len(left), 'name')} of {path} ({first_of(left)})")
    return lines


@one_line_errors
def main():
    parser = make_parser(__doc__)
    protocols = ["lvis", "coco", "coco-48-17", "split"]
    parser.add_argument("--protocol", choices=protocols, required=True, help="whose rules and split; see above")
    parser.add_argument("--gt", required=True, metavar="FILE", help="annotations in LVIS or COCO form")
    parser.add_argument(
        "--results", required=True, metavar="FILE", help="detections in COCO's results form, or a line each"
    )
    parser.add_argument("--split", default="", help="which names are base and novel, instead of the protocol's split")
    parser.add_argument("--iou-type", nargs="+", choices=["bbox", "segm"], default=["bbox"], help="boxes, masks")
    add_shared(parser, "--output-dir", required=True)
    args = parser.parse_args()

    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    from vild.evaluation import evaluator
    from vild.evaluation.protocol import scored_iou_types
    from vild.evaluation.results import read_results
    from vild.utils.files import write_json, write_text

    truth, doubts = read_truth(args.gt, args.protocol, args.split)
    categories = {c["id"] for c in truth.document["categories"]}
    if args.protocol == "coco-48-17":
        categories |= {c["id"] for c in COCO_CATEGORIES}  # results for all 80 names against a file of 65
    sizes = truth.sizes
    if args.protocol == "coco-48-17":
        truth = truth.only_annotated_images()
    iou_types, notes = scored_iou_types(truth, args.iou_type, args.gt)
    found = read_results(args.results, sizes, categories, "segm" in iou_types)
    result = evaluator.score(truth, found, iou_types)
    result.notes += doubts + notes
    name = Path(args.gt).stem
    page = f"{evaluator.as_page(name, truth, result)}\n"
    print(page, end="")
    evaluator.write_flat(args.output_dir / evaluator.METRICS_FILE, {name: result.metrics})
    write_json(args.output_dir / evaluator.CLASSES_FILE, {"counts": result.counts, "classes": result.classes})
    write_text(args.output_dir / "table.md", page)


if __name__ == "__main__":
    main()
