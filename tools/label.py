#!/usr/bin/env python3
"""Label a folder of images with words, for any trainer: one COCO file (boxes, masks, scores), or a folder in YOLO's or
VOC's layout (boxes and copies of the images).

    tools/label.py --weights output/quickstart/detector --input photos/ --output labels.json \\
        --vocabulary "umbrella, chess knight"
    tools/label.py ... --format yolo --output-dir labelled    # labelled/data.yaml

Image names are relative to the folder; width and height are those of the image turned upright by its EXIF tag. A killed
run continues from labels.json.partial when the same command is run again. Images that cannot be read are left out and
listed at the end and under "info" (exit status 1). Those unlike what the detector was calibrated on are listed, too: do
not rely on their labels. tools/add_dataset.py registers the result as a data set.
"""

import os
import sys
from pathlib import Path

from vild.utils.command_line import add_detector_flags, add_shared, make_parser
from vild.utils.errors import UserError, count_of, one_line_errors, printable


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="FOLDER", help="label all images below it")
    target = parser.add_mutually_exclusive_group(required=True)
    add_shared(target, "--output", note="for COCO")
    add_shared(target, "--output-dir", note="for YOLO and VOC")
    parser.add_argument("--format", choices=["coco", "yolo", "voc"], default="coco", help="of the labels")
    add_shared(parser, "--threshold")
    add_detector_flags(parser)
    args = parser.parse_args(argv)
    if (args.format == "coco") != (args.output_dir is None):
        raise UserError(f"--format {args.format}: give {'--output FILE' if args.output_dir else '--output-dir FOLDER'}")
    output = args.output or args.output_dir
    if not args.input.is_dir():
        raise UserError(f"--input {args.input}: is not a folder")
    if args.output_dir and args.output_dir.resolve().is_relative_to(args.input.resolve()):
        raise UserError(f"--output-dir {output}: is inside --input {args.input}: its copies would be labelled, too")

    from tqdm import tqdm

    from vild.apps.detector import make_detector
    from vild.apps.inputs import find_images
    from vild.apps.label import PartialLabels, check_name, check_stems, plan_of
    from vild.inference.examples import parse_examples
    from vild.inference.thresholds import parse_thresholds
    from vild.utils.files import hash_file
    from vild.utils.lock import only_writer

    images, examples = find_images([args.input]), parse_examples(args.example)
    if args.format != "coco":
        check_stems(image.name for image in images)
    with only_writer(output):
        detector = make_detector(args)
        hashed = lambda given: hash_file(given) if given and os.path.isfile(given) else None  # noqa: E731
        asked = {
            "vocabulary file": hashed(args.vocabulary),
            "negatives": hashed(args.negatives) or args.negatives,
            "example": [[hashed(i), *box, name] for name, some in examples.items() for i, box in some] or None,
            "threshold": args.threshold,
            "threshold-of": parse_thresholds(args.threshold_of, detector.names),
        }
        plan = plan_of(detector, args.input, asked)
        with PartialLabels(output, plan) as labels:
            to_do = [p for p in images if p.name not in labels.done]
            already = len(images) - len(to_do)
            for image in tqdm(to_do, desc="images", unit="image", total=len(images), initial=already):
                try:
                    check_name(image.name, args.format)
                    found = detector(image.path)
                except UserError as error:
                    labels.add_broken(image.name, str(error))
                else:
                    labels.add(image.name, found)
            info = {"description": "labels by vild", "checkpoint": plan["checkpoint"], "threshold": args.threshold}
            broken, unlike = labels.finish([p.name for p in images], detector.names, info, args.format, args.input)
    if broken:
        total = count_of(len(images), "image")
        print(f"{len(broken)} of {total} cannot be read:", *broken, sep="\n  ", file=sys.stderr)
    if unlike:
        names = printable(", ".join(unlike[:3]) + (", ..." if len(unlike) > 3 else ""))
        print(f"unlike the images that the detector was calibrated on: {len(unlike)} of {len(images)}; do not rely on "
              f"their scores ({names})", file=sys.stderr)  # fmt: skip
    labelled, words = count_of(len(images) - len(broken), "image"), count_of(len(detector.names), "word")
    print(f"{output}: {labelled} labelled with {words}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
