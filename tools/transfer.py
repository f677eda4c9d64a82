#!/usr/bin/env python3
"""A trained detector on other data sets, by swapping the vocabulary (paper, table 5): several data sets in one table.

    tools/transfer.py --config-file configs/LVIS/ensemble.yaml [--num-gpus 8] MODEL.WEIGHTS model_final.pth \\
        DATASETS.TEST "('voc_2007_test', 'coco_2017_val', 'objects365_v1_val')" OUTPUT_DIR output/transfer

Each data set's names are encoded by the detector's teacher with the prompts it was trained with. Writes
OUTPUT_DIR/inference/vild_metrics.json (what tools/report.py reads) and OUTPUT_DIR/transfer.md.
"""

from pathlib import Path

from detectron2.engine import default_argument_parser
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm

from vild.config import load_config
from vild.data import datasets
from vild.engine.launch import launch
from vild.engine.trainer import Trainer, setup
from vild.evaluation.evaluator import write_metrics
from vild.inference.predictor import OpenVocabularyDetector, vocabulary_of
from vild.report.run_report import transfer_table
from vild.utils.errors import one_line_errors
from vild.utils.files import write_text


@one_line_errors
def main(args):
    cfg = load_config(args.config_file, args.opts)
    setup(cfg, args)
    for name in cfg.DATASETS.TEST:  # before anything takes long
        datasets.get_classes(name)
    detector = OpenVocabularyDetector(cfg)
    results = {}
    for name in cfg.DATASETS.TEST:
        detector.model.set_vocabulary(vocabulary_of(detector, name))
        evaluator = Trainer.build_evaluator(cfg, name)
        results[name] = inference_on_dataset(detector.model, Trainer.build_test_loader(cfg, name), evaluator)
    if comm.is_main_process():
        path = write_metrics(cfg.OUTPUT_DIR, results)
        page = transfer_table(results)
        write_text(Path(cfg.OUTPUT_DIR, "transfer.md"), page + "\n")
        print(f"{page}\nmetrics: {path}")


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args())
