#!/usr/bin/env python3
"""Write the proposals of a trained class-agnostic network (or of any detector) for a data set.

    tools/make_proposals.py --config-file configs/Glyphs/proposals.yaml --dataset glyphs_train \\
        --weights output/quickstart/proposals/model_final.pth --output output/quickstart/proposals.safetensors

--num-gpus 8 shares the images among eight processes (without a GPU: processes on the CPU); torchrun and SLURM's srun
start the same command without it. The file is the same. A GPU computes in half precision if the config's training does
(--opts SOLVER.AMP.ENABLED False: in float32).
"""

from contextlib import nullcontext

from vild.utils.command_line import add_launch_flags, add_model_flags, add_shared, make_parser
from vild.utils.errors import one_line_errors


def parse():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", "--output", required=True)
    add_launch_flags(parser)
    add_model_flags(parser)
    return parser.parse_args()


@one_line_errors
def main(args):
    from detectron2.utils import comm

    from vild.checkpoint.pretrained import config_from_flags
    from vild.engine.make_proposals import make_proposals
    from vild.utils.lock import only_writer

    with only_writer(args.output) if comm.is_main_process() else nullcontext():
        make_proposals(config_from_flags(args), args.dataset, args.output)


@one_line_errors
def start():
    args = parse()
    from vild.engine.launch import launch

    launch(main, args, args.device)


if __name__ == "__main__":
    start()
