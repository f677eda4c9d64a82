#!/usr/bin/env python3
"""Evaluate a trained detector on other data sets by swapping the vocabulary (paper, table 5), in one table.

    tools/transfer.py --config-file configs/LVIS/ensemble.yaml [--num-gpus 8] MODEL.WEIGHTS model_final.pth \\
        DATASETS.TEST "('voc_2007_test', 'coco_2017_val', 'objects365_v1_val')" OUTPUT_DIR output/transfer

Without --config-file, MODEL.WEIGHTS is the name or folder of a detector (vild-r50-ensemble, hf-hub:OWNER/NAME, ...).

The names of each data set are encoded by the detector's teacher with the prompts it was trained with. Writes
OUTPUT_DIR/inference/vild_metrics.json (read by tools/report.py) and OUTPUT_DIR/transfer.md.
"""

from pathlib import Path

from vild.utils.command_line import training_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main(args):
    from detectron2.evaluation import inference_on_dataset
    from detectron2.utils import comm

    from vild.checkpoint.pretrained import config_of_launch
    from vild.config import check_weights
    from vild.data import datasets
    from vild.engine.setup import setup
    from vild.engine.trainer import Trainer
    from vild.evaluation.evaluator import write_metrics
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.report.run_report import transfer_table
    from vild.utils.files import write_text

    cfg = config_of_launch(args, evaluates=True)
    for name in cfg.DATASETS.TEST:  # before anything that takes long
        datasets.get_classes(name)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("MODEL.WEIGHTS is empty: give trained weights to evaluate")
    check_weights(cfg)
    setup(cfg, args)
    detector = OpenVocabularyDetector(cfg)
    results = {}
    for name in cfg.DATASETS.TEST:
        detector.model.set_vocabulary(detector.with_vocabulary(name).vocabulary)
        evaluator = Trainer.build_evaluator(cfg, name)
        results[name] = inference_on_dataset(detector.model, Trainer.build_test_loader(cfg, name), evaluator)
    if comm.is_main_process():
        path = write_metrics(cfg.OUTPUT_DIR, results)
        page = transfer_table(results)
        write_text(Path(cfg.OUTPUT_DIR, "transfer.md"), page + "\n")
        print(f"{page}\nmetrics: {path}")


@one_line_errors
def start():
    args = training_parser(__doc__).parse_args()
    from vild.checkpoint.pretrained import config_of_launch
    from vild.engine.launch import launch

    launch(main, args, config_of_launch(args, evaluates=True).MODEL.DEVICE)


if __name__ == "__main__":
    start()
