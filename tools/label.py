#!/usr/bin/env python3
"""Label a folder of images with words: one COCO file (boxes, masks, scores) that other trainers read.

    tools/label.py --config-file configs/Glyphs/vild.yaml --input photos/ --vocabulary "umbrella, chess knight" \\
        --output labels.json --threshold 0.3 --opts MODEL.WEIGHTS output/quickstart/vild/model_final.pth

Images are named relative to the folder; width and height are those of the image turned upright by its EXIF tag.
A run that was killed goes on from labels.json.partial when the same command is run again. Images that cannot be read
are left out, and listed in the file's "info". tools/add_dataset.py takes the result as a data set.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from vild.apps.command_line import add_detector_arguments, add_overrides, make_detector
from vild.apps.demo import writing
from vild.apps.inputs import find_images
from vild.apps.label import PartialLabels, check_name, plan_of
from vild.inference.words import parse_thresholds
from vild.utils.errors import UserError, one_line_errors
from vild.utils.files import hash_file
from vild.utils.lock import only_writer


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_detector_arguments(parser)
    parser.add_argument("--input", type=Path, required=True, metavar="FOLDER", help="all images below it")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the COCO file")
    parser.add_argument("--threshold", type=float, default=0.3, metavar="SCORE")
    add_overrides(parser)
    return parser.parse_args(argv)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.input.is_dir():
        raise UserError(f"--input {args.input}: is not a folder")
    images = find_images([args.input])
    with writing(args.output, args.output.parent), only_writer(args.output):
        detector = make_detector(args, args.threshold)
        is_file = args.vocabulary is not None and Path(args.vocabulary).is_file()
        asked = {
            "vocabulary file": hash_file(args.vocabulary) if is_file else None,
            "negatives": args.negatives,
            "threshold": args.threshold,
            "threshold-of": parse_thresholds(args.threshold_of, detector.names),
        }
        plan = plan_of(detector, args.input, asked)
        with PartialLabels(args.output, plan) as labels:
            to_do = [p for p in images if p.name not in labels.done]
            already = len(images) - len(to_do)
            for image in tqdm(to_do, desc="images", unit="image", total=len(images), initial=already):
                try:
                    check_name(image.name)
                    found = detector(image.path)
                except UserError as error:
                    labels.add_broken(image.name, str(error))
                else:
                    labels.add(image.name, found)
            info = {"description": "labels by vild", "checkpoint": plan["checkpoint"], "threshold": args.threshold}
            broken = labels.finish([p.name for p in images], detector.names, info)
    if broken:
        print(f"{len(broken)} of {len(images)} images cannot be read:", *broken, sep="\n  ", file=sys.stderr)
    print(f"{args.output}: {len(images) - len(broken)} images labelled with {len(detector.names)} words")


if __name__ == "__main__":
    main()
