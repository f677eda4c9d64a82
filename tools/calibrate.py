#!/usr/bin/env python3
"""Calibrate a trained detector: fit its scores to the probability that a detection is right, on the base classes of a
data set that it was not trained on. No novel label is read. Writes its weights with the calibration; evaluation, demo,
page, label and export then use it (MODEL.VILD.CALIBRATION False turns it off).

    tools/calibrate.py --config-file configs/Glyphs/vild.yaml --weights output/quickstart/vild/model_final.pth \\
        --dataset glyphs_dev --output output/quickstart/vild/model_calibrated.pth
"""

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
    from vild.engine.sources import check_classes
    from vild.inference.calibrate import calibrate
    from vild.inference.predictor import OpenVocabularyDetector

    cfg = config_from_flags(args)
    detector = OpenVocabularyDetector(cfg)
    check_classes(detector.trained, args.dataset, marks=False)
    found = calibrate(detector, args.dataset)
    model, record = detector.model, read_network_record(cfg.MODEL.WEIGHTS)["trained_on"]
    write_weights(args.output, model.state_dict(), detector.trained, model.roi_heads.variant, record, found)
    print(f"fitted on {found.detections:,} detections of base classes, {found.right:,} right: a score is now the "
          f"probability that a detection is right\n{args.output}")  # fmt: skip


if __name__ == "__main__":
    main()
