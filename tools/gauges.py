#!/usr/bin/env python3
"""What explains a detector's number, as JSON: the teacher's accuracy on ground-truth crops, the student's cosine to
the teacher there (by base and novel, rare, common and frequent); with --proposals their recall; with --clip-on-crops
the AP of the teacher run on every proposal, and what that costs beside the detector on the same machine.

    tools/gauges.py --config-file configs/Glyphs/vild.yaml --dataset glyphs_val --output diagnostics.json \\
        --proposals output/quickstart/proposals_val.safetensors --clip-on-crops \\
        MODEL.WEIGHTS output/quickstart/vild/model_final.pth
"""

import argparse
from pathlib import Path

from vild.config import load_config
from vild.data.proposals import load_proposals
from vild.engine.sources import check_classes
from vild.inference.predictor import OpenVocabularyDetector
from vild.report import diagnostics
from vild.utils.errors import UserError, one_line_errors
from vild.utils.files import write_json


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--proposals", help="proposals of the same data set: their recall")
    parser.add_argument("--clip-on-crops", action="store_true", help="also the teacher on every proposal")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args()
    if args.clip_on_crops and not args.proposals:
        raise UserError("--clip-on-crops needs --proposals")
    cfg = load_config(args.config_file, args.opts)
    proposals = load_proposals(args.proposals) if args.proposals else None
    detector = OpenVocabularyDetector(cfg)
    check_classes(detector.trained, args.dataset, marks=False)
    embeddings = diagnostics.embed_ground_truth(detector.teacher, args.dataset)
    result = {
        "teacher_top1": diagnostics.teacher_accuracy(embeddings, detector.trained, args.dataset),
        "student_teacher_cosine": diagnostics.student_cosine(detector, embeddings, args.dataset),
    }
    if proposals is not None:
        recall = diagnostics.proposal_recall(args.dataset, proposals, cfg.TEST.PROPOSALS_PER_IMAGE)
        result["proposals"] = {k: None if v != v else v for k, v in recall.items()}
    if args.clip_on_crops:
        metrics, seconds = diagnostics.clip_on_crops(
            detector.teacher,
            detector.trained,
            args.dataset,
            proposals,
            cfg.MODEL.VILD.TEMPERATURE,
            cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        result["clip_on_crops"] = {k: None if v != v else v for k, v in metrics["bbox"].items()}
        result["clip_on_crops"]["seconds_a_picture"] = seconds
        result["clip_on_crops"]["detector_seconds_a_picture"] = diagnostics.detector_seconds(detector, args.dataset)
    write_json(args.output, result)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
