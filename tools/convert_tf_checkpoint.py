#!/usr/bin/env python3
"""Convert a detector that the authors of ViLD released for TensorFlow 1 to Detectron2.

    tools/convert_tf_checkpoint.py resnet50_vild/model.ckpt-180000 --output output/lvis/released/vild_R50.safetensors \\
        [--teacher ViT-B-32-quickgelu --pretrained openai]

CKPT is the common prefix of the checkpoint's files (.index, .data-...), or the folder that holds one checkpoint.
Reading it needs TensorFlow (pip install -e '.[tensorflow]'), which nothing else does. Variant and depth are found
from the variables; the text matrix becomes the vocabulary in the file. The checkpoint does not name its teacher:
--teacher records it, which detecting other words and distilling from a store need.
"""

import os
from pathlib import Path

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import UserError, one_line_errors


def read_checkpoint(path: Path) -> dict:
    """All variables by name."""
    prefix = path
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            raise UserError(f"{path}: the folder holds {len(found)} checkpoints (*.index), not one; name it")
        prefix = found[0].with_suffix("")
    if not prefix.with_name(prefix.name + ".index").is_file():
        raise UserError(f"{prefix}: no such checkpoint ({prefix.name}.index is not there)")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its log messages
    try:
        import tensorflow
    except ImportError as error:
        raise UserError("the checkpoint is read with TensorFlow: pip install -e '.[tensorflow]'") from error
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    except (tensorflow.errors.OpError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{prefix}: not a checkpoint that TensorFlow can read ({reason})") from error


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="prefix or folder of the checkpoint")
    add_shared(parser, "--output", required=True, note="NAME.safetensors or NAME.pth")
    add_shared(parser, "--teacher", "--pretrained")
    args = parser.parse_args()
    if args.output.suffix not in (".safetensors", ".pth"):
        raise UserError(f"--output {args.output}: must end in .safetensors or .pth")

    from vild.checkpoint.checkpointer import write_weights
    from vild.checkpoint.tensorflow import convert, with_teacher
    from vild.teacher.teacher import build_teacher

    state, vocabulary, variant, depth = convert(read_checkpoint(args.checkpoint), str(args.checkpoint))
    if args.teacher:
        vocabulary = with_teacher(vocabulary, build_teacher(args.teacher, args.pretrained, "cpu"))
    write_weights(args.output, state, vocabulary, variant)
    config = f"configs/LVIS/released/{variant}_R{depth}.yaml"
    print(f"{variant}, ResNet-{depth}, {len(vocabulary):,} names, for {config}: {args.output}")


if __name__ == "__main__":
    main()
