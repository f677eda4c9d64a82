#!/usr/bin/env python3
"""Export a detector so that its vocabulary can change without exporting again.

    tools/export.py --weights output/quickstart/detector --output out/model.onnx

NAME.onnx (or NAME.pt2, of torch.export) takes an image and a text matrix [names, width]. Beside it are written
NAME.json, the settings a program needs to run it, and context.safetensors, the base names of training.
tools/run_onnx.py runs it without PyTorch. --output-dir writes a folder with config, weights, vocabulary and teacher
instead, which other tools take as --weights and OpenVocabularyDetector.from_pretrained loads.
"""

import sys

from vild.utils.command_line import add_model_flags, add_shared, make_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    add_shared(target, "--output", "--output-dir")
    add_model_flags(parser)
    args = parser.parse_args()
    if args.output and args.output.suffix not in (".onnx", ".pt2"):
        raise UserError(f"--output {args.output}: give a name that ends in .onnx or .pt2, or --output-dir")
    if args.output:
        args.device = "cpu"  # graphs are traced there

    from vild.checkpoint.pretrained import config_from_flags
    from vild.export.write import write_model
    from vild.inference.predictor import OpenVocabularyDetector

    detector = OpenVocabularyDetector(config_from_flags(args))
    if args.output:
        print(f"tracing {args.output}, which takes about a minute", file=sys.stderr)
        write_model(detector, args.output)
    else:
        detector.save(args.output_dir)
    print(args.output or args.output_dir)


if __name__ == "__main__":
    main()
