#!/usr/bin/env python3
"""Teach a trained detector new names from a few dozen annotated images, at little cost to the others.

    tools/finetune.py --config-file configs/Glyphs/vild_contrast.yaml \\
        --weights output/quickstart/vild_contrast/model_final.pth \\
        --dataset glyphs_new_train --output-dir output/new_names

The new names are the base classes of the data set (tools/add_dataset.py); a name that the detector knows already stays
the same class. Objects of other names need no annotation in these images. A handful of boxes of one name, and seconds:
tools/probe.py.

Writes vocabulary.safetensors (old and new names), config.yaml and model_final.pth, which every tool takes as
--config-file and --weights. Schedule: 20 passes over the images, at least 60 steps (vild/engine/finetune.py); --opts
changes it.
"""

from argparse import Namespace
from pathlib import Path

from vild.utils.command_line import add_model_flags, add_shared, make_parser
from vild.utils.errors import UserError, count_of, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", required=True, note="with the new names")
    add_shared(parser, "--output-dir", required=True)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output-dir")
    add_model_flags(parser)
    args = parser.parse_args()

    from vild.checkpoint.pretrained import config_from_flags
    from vild.config import check_weights
    from vild.data import datasets
    from vild.engine.finetune import finetuning_config
    from vild.engine.setup import setup
    from vild.engine.trainer import Trainer
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.utils.lock import only_writer
    from vild.vocabulary.grow import find_classes, grow, kept_from
    from vild.vocabulary.words import Words

    old, file = config_from_flags(args), args.output_dir / "vocabulary.safetensors"
    classes = datasets.get_classes(args.dataset)
    cfg = finetuning_config(old, file, args.dataset, args.output_dir, args.opts)
    check_weights(cfg)
    started = Path(args.output_dir, "last_checkpoint").exists()
    if started and not args.resume:
        raise UserError(f"--output-dir {args.output_dir}: holds a training already; continue it with --resume")
    detector = OpenVocabularyDetector(old)
    base = [k for k, mark in enumerate(classes.splits) if mark == "base"]
    words = Words(tuple(classes.names[k] for k in base), tuple(classes.synonyms[k] for k in base))
    new, trained = detector.with_vocabulary(words).vocabulary, detector.trained
    at, grown = find_classes(trained, new.names), grow(trained, new)
    if started and file.exists():  # its checkpoints are of that vocabulary
        grown = kept_from(file, grown, f"--dataset {args.dataset} and --weights")
    known = [trained.splits[i] if i is not None else None for i in at]
    print(f"{count_of(len(new), 'name')} of {args.dataset}: {known.count(None)} that the detector's vocabulary lacks, "
          f"{known.count('base')} that it was trained on, {len(known) - known.count(None) - known.count('base')} that "
          f"it knows by their words; {cfg.SOLVER.MAX_ITER} steps", flush=True)  # fmt: skip
    if detector.model.roi_heads.calibration is not None:
        print("the detector's calibration does not hold for the new one: run tools/calibrate.py again", flush=True)
    del detector
    with only_writer(args.output_dir, folder=True):
        grown.save(file)
        setup(cfg, Namespace(eval_only=False, resume=args.resume))
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
    print(f"{args.output_dir / 'model_final.pth'}")


if __name__ == "__main__":
    main()
