#!/usr/bin/env python3
"""Train or evaluate a detector (or the class-agnostic proposal network), with Detectron2's flags.

    tools/train_net.py --config-file configs/Glyphs/vild.yaml [--num-gpus 8] [--resume] [KEY VALUE ...]
    tools/train_net.py --config-file configs/Glyphs/vild.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
    tools/train_net.py --eval-only MODEL.WEIGHTS vild-r50-ensemble

MODEL.WEIGHTS is a file, a URL, or the name or folder of a detector (vild-r50-ensemble, hf-hub:OWNER/NAME, ...). A
training takes its weights, an evaluation without --config-file also its config.
"""

from contextlib import nullcontext

from vild.utils.command_line import training_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main(args):
    from detectron2.utils import comm

    from vild.checkpoint.checkpointer import VildCheckpointer
    from vild.checkpoint.pretrained import config_of_launch
    from vild.data import datasets
    from vild.engine.run_record import last_checkpoint
    from vild.engine.setup import setup
    from vild.engine.trainer import Trainer
    from vild.utils.lock import only_writer

    cfg = config_of_launch(args, args.eval_only)
    for name in (*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):  # before anything is written
        datasets.get_entry(name)
    if args.eval_only:
        resumes = args.resume and last_checkpoint(cfg.OUTPUT_DIR)
        if not resumes and not cfg.MODEL.WEIGHTS:
            nothing = f", and OUTPUT_DIR {cfg.OUTPUT_DIR} has no checkpoint" if args.resume else ""
            raise UserError(f"--eval-only: MODEL.WEIGHTS is empty{nothing}: give trained weights to evaluate")
        setup(cfg, args)
        model = Trainer.build_model(cfg)
        calibrated = cfg.MODEL.VILD.CALIBRATION
        checkpointer = VildCheckpointer(model, cfg.OUTPUT_DIR, calibrated=calibrated, trained=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    with only_writer(cfg.OUTPUT_DIR, folder=True) if comm.is_main_process() else nullcontext():
        setup(cfg, args)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


@one_line_errors
def start():
    args = training_parser(__doc__).parse_args()
    from vild.checkpoint.pretrained import config_of_launch
    from vild.engine.launch import launch

    launch(main, args, config_of_launch(args, args.eval_only).MODEL.DEVICE)


if __name__ == "__main__":
    start()
