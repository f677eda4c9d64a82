#!/usr/bin/env python3
"""Write the teacher's embeddings of a data set's proposals: the store that training distils from.

    tools/build_teacher_store.py --dataset glyphs_train --proposals output/quickstart/proposals_train.safetensors \\
        --teacher local-dir:output/quickstart/teacher --output-dir out/store

A killed run continues after its last complete shard. --num-gpus 8 shares the shards among eight processes (on
the CPU with --device cpu); torchrun and SLURM's srun start the same command without it. The records are the same.
"""

from contextlib import nullcontext

from vild.utils.command_line import add_launch_flags, add_shared, at_least, between_0_and_1, make_parser
from vild.utils.errors import one_line_errors


def parse():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", required=True)
    parser.add_argument("--proposals", required=True, metavar="FILE", help=".safetensors, or COCO results JSON")
    add_shared(parser, "--teacher", required=True)
    add_shared(parser, "--pretrained")
    parser.add_argument(
        "--crop", choices=["squash", "center", "pad"], default="squash",
        help="squash: change the aspect ratio (assumed of the paper, whose released code has no crops); center: CLIP's "
        "own, which cuts long boxes off; "
        "pad: keep the aspect ratio, with bars of the mean colour",
    )  # fmt: skip
    parser.add_argument("--max-per-image", type=at_least(1), default=300, metavar="N", help="proposals per image")
    text = "apply NMS at this IoU first (default: no NMS)"
    parser.add_argument("--nms", type=between_0_and_1, metavar="IOU", help=text)
    parser.add_argument("--min-size", type=float, metavar="PIXELS", help="drop smaller boxes (default: none)")
    parser.add_argument("--dtype", choices=["float16", "int8"], default="float16", help="int8 takes half the space")
    parser.add_argument("--shard-images", type=at_least(1), default=200, metavar="N", help="images per shard")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"],
        help="arithmetic of the teacher's image tower (default: that of a store that is continued; else bf16 on a GPU "
        "that has it, fp32 elsewhere)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the teacher (for millions of crops on a GPU)")
    add_shared(parser, "--batch-size", note="crops, halved when memory runs out (default: 2048 on a GPU, else 128)")
    add_shared(parser, "--num-workers", "--device")
    parser.add_argument(
        "--unreadable", choices=["refuse", "skip"], default="refuse",
        help="an image that cannot be read: stop, or store no regions for it (the manifest lists them)",
    )  # fmt: skip
    add_shared(parser, "--output-dir", required=True)
    add_launch_flags(parser)
    return parser.parse_args()


@one_line_errors
def main(args):
    from detectron2.utils import comm

    from vild.config import pick_device, pick_precision
    from vild.engine.build_store import begun_precision, build_store
    from vild.utils.lock import only_writer

    args.device = pick_device(args.device)
    args.precision = args.precision or begun_precision(args.output_dir) or pick_precision(args.device)
    args.batch_size = args.batch_size or (2048 if args.device.startswith("cuda") else 128)
    with only_writer(args.output_dir, folder=True) if comm.is_main_process() else nullcontext():
        build_store(args)


@one_line_errors
def start():
    args = parse()
    from vild.engine.launch import launch

    launch(main, args, args.device)


if __name__ == "__main__":
    start()
