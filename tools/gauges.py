#!/usr/bin/env python3
"""Gauges behind a detector's number, as JSON: the teacher's accuracy on ground-truth crops, the student's cosine
to the teacher there, and, with --proposals, AP of the teacher run on every proposal (CLIP on crops).

    tools/gauges.py --config-file configs/Glyphs/vild.yaml --dataset glyphs_val --output gauges.json \\
        --proposals output/quickstart/proposals_val.safetensors MODEL.WEIGHTS output/quickstart/vild/model_final.pth
"""

import argparse
import json
from pathlib import Path

from vild.engine import check_classes, load_config
from vild.errors import one_line_errors
from vild.evaluation import gauges
from vild.predictor import OpenVocabularyDetector
from vild.teacher.proposals import load_proposals


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--proposals", help="proposals of the same data set: also CLIP on crops")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE ...")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.opts)
    proposals = load_proposals(args.proposals) if args.proposals else None
    detector = OpenVocabularyDetector(cfg)
    check_classes(detector.trained, args.dataset, marks=False)
    embeddings = gauges.embed_ground_truth(detector.teacher, args.dataset)
    result = {
        "teacher_top1": gauges.teacher_accuracy(embeddings, detector.trained, args.dataset),
        "student_teacher_cosine": gauges.student_cosine(detector, embeddings, args.dataset),
    }
    if proposals is not None:
        result["clip_on_crops"] = gauges.clip_on_crops(
            detector.teacher,
            detector.trained,
            args.dataset,
            proposals,
            cfg.MODEL.VILD.TEMPERATURE,
            cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            cfg.TEST.DETECTIONS_PER_IMAGE,
        )["bbox"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
