#!/usr/bin/env python3
"""Convert a detector that the authors of ViLD released for TensorFlow 1 to Detectron2.

    tools/convert_tf_checkpoint.py resnet50_vild/model.ckpt-180000 --output output/lvis/released/vild_R50.safetensors \\
        [--teacher ViT-B-32-quickgelu --pretrained openai]

CKPT is the common prefix of the checkpoint's files (.index, .data-...), or the folder that holds one checkpoint or
SavedModel. TensorFlow is not needed. Variant and depth are found from the variables; the text matrix becomes the
vocabulary in the file, and --text-matrix compares it with a published one (clip_synonym_prompt.npy). Variables that are
no part of the detector are left out with a warning. The checkpoint does not name its teacher: --teacher records it,
which detecting other words and distilling from a store need.
"""

import sys
from dataclasses import replace
from pathlib import Path

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="prefix or folder of the checkpoint")
    add_shared(parser, "--output", required=True, note="NAME.safetensors or NAME.pth")
    add_shared(parser, "--teacher", "--pretrained")
    parser.add_argument("--text-matrix", type=Path, metavar="FILE", help="text embeddings to compare with, .npy")
    parser.add_argument("--strict", action="store_true", help="refuse unknown variables and another text matrix")
    args = parser.parse_args()
    if args.output.suffix not in (".safetensors", ".pth"):
        raise UserError(f"--output {args.output}: must end in .safetensors or .pth")

    from vild.checkpoint.released import compare_text, convert, with_teacher
    from vild.teacher.teacher import build_teacher

    found = convert(args.checkpoint, strict=args.strict)
    if args.text_matrix:
        same, line = compare_text(found.vocabulary, args.text_matrix)
        line = f"{args.checkpoint}: {line}"
        if args.strict and not same:
            raise UserError(line)
        print(line if same else f"warning: {line}", file=sys.stdout if same else sys.stderr)
    if args.teacher:
        vocabulary = with_teacher(found.vocabulary, build_teacher(args.teacher, args.pretrained, "cpu"))
        found = replace(found, vocabulary=vocabulary)
    found.write(args.output)
    names = len(found.vocabulary)
    print(f"{found.variant}, ResNet-{found.depth}, {names:,} names, for configs/{found.config}: {args.output}")


if __name__ == "__main__":
    main()
