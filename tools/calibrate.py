#!/usr/bin/env python3
"""Calibrate a trained detector: fit its scores to the probability that a detection is right, on the base classes of a
data set that it was not trained on. No novel label is read. Writes its weights with the calibration; evaluation, demo,
page, label and export then use it (MODEL.VILD.CALIBRATION False turns it off).

    tools/calibrate.py --config-file configs/Glyphs/vild_contrast.yaml --dataset glyphs_dev \\
        --weights output/quickstart/vild_contrast/model_final.pth --output out/calibrated.pth
"""

import sys

from vild.utils.command_line import add_model_flags, add_shared, make_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", required=True)
    add_shared(parser, "--output", required=True, note="a .pth or .safetensors")
    add_model_flags(parser)
    args = parser.parse_args()
    if args.output.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--output {args.output}: weights are written as .pth or .safetensors")

    from vild.checkpoint.checkpointer import read_network_record, write_weights
    from vild.checkpoint.pretrained import config_from_flags
    from vild.data.provenance import was_trained_on
    from vild.engine.sources import check_classes
    from vild.inference.calibrate import calibrate
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.utils.lock import only_writer

    cfg = config_from_flags(args)
    with only_writer(args.output):  # a file that cannot be written is said before the data set is looked at
        detector = OpenVocabularyDetector(cfg)
        if args.output.exists() and args.output.samefile(cfg.MODEL.WEIGHTS):
            raise UserError(f"--output {args.output}: is the file of --weights, which may hold a training to resume")
        check_classes(detector.trained, args.dataset, marks=False)
        record = read_network_record(cfg.MODEL.WEIGHTS)["trained_on"]
        if record and was_trained_on(record, args.dataset):
            print(f"warning: {cfg.MODEL.WEIGHTS} was trained on {args.dataset}: on other images it is less often right "
                  "than its scores will say", file=sys.stderr)  # fmt: skip
        found = calibrate(detector, args.dataset)
        heads = detector.model.roi_heads
        write_weights(args.output, detector.model.state_dict(), detector.trained, heads.variant, record, found)
    print(f"fitted on {found.detections:,} detections of base classes, {found.right:,} right: a score is now the "
          f"probability that a detection is right\n{args.output}")  # fmt: skip


if __name__ == "__main__":
    main()
