#!/usr/bin/env python3
"""Export a detector so that its vocabulary can change without exporting again.

    tools/export.py --config-file configs/Glyphs/vild.yaml --output out/model.onnx \\
        --opts MODEL.WEIGHTS output/quickstart/vild/model_final.pth

``NAME.onnx`` (or ``NAME.pt2``, of torch.export) takes an image and a text matrix [names, width]; beside it lie
``NAME.json``, what one must know to run it, and ``context.safetensors``, the base names of training. tools/run_onnx.py
runs it without PyTorch. Any other --output is a folder that OpenVocabularyDetector.from_folder loads: config, weights,
vocabulary and teacher.
"""

import argparse
from pathlib import Path

from vild.config import load_config
from vild.export.write import write_model
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", required=True, type=Path, help="NAME.onnx, NAME.pt2 or a folder")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides, KEY VALUE ...")
    args = parser.parse_args()

    as_graph = args.output.suffix in (".onnx", ".pt2")
    overrides = [*args.opts, "MODEL.DEVICE", "cpu"] if as_graph else args.opts
    detector = OpenVocabularyDetector(load_config(args.config_file, overrides))
    if as_graph:
        write_model(detector, args.output)
    else:
        detector.save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
