#!/usr/bin/env python3
"""Train or evaluate a detector (or the class-agnostic proposal network), with Detectron2's flags.

tools/train_net.py --config-file configs/Glyphs/vild.yaml [--num-gpus 8] [--resume] [KEY VALUE ...]
tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
"""

from detectron2.engine import default_argument_parser

from vild.checkpoint import VildCheckpointer
from vild.engine import Trainer, setup
from vild.errors import one_line_errors
from vild.launch import launch


@one_line_errors
def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        VildCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
