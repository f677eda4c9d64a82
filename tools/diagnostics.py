#!/usr/bin/env python3
"""Explain a detector's AP, as JSON: how often the teacher and the student name a ground-truth box right, and their
cosine there (base and novel, rare, common and frequent); with --proposals their recall; with --clip-on-crops the AP of
the teacher run on every proposal, and its cost beside the detector's.

"verdict" says whether distillation has converged, and what to change. distillation_progress is where the student lies
between an unrelated box (0) and the teacher's own agreement with itself when the box is jittered (1).

    tools/diagnostics.py --weights output/quickstart/detector \\
        --dataset glyphs_val --proposals output/quickstart/proposals_val.safetensors --clip-on-crops \\
        --output diagnostics.json
"""

from vild.utils.command_line import add_model_flags, add_shared, make_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", required=True)
    parser.add_argument("--proposals", metavar="FILE", help="proposals of the same data set, to measure their recall")
    parser.add_argument("--clip-on-crops", action="store_true", help="also run the teacher on every proposal")
    add_shared(parser, "--output", required=True)
    add_model_flags(parser)
    args = parser.parse_args()
    if args.clip_on_crops and not args.proposals:
        raise UserError("--clip-on-crops needs --proposals")

    from vild.checkpoint.pretrained import config_from_flags
    from vild.data.proposals import load_proposals
    from vild.engine.sources import check_classes
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.report import diagnostics
    from vild.utils.files import write_json

    cfg = config_from_flags(args)
    proposals = load_proposals(args.proposals) if args.proposals else None
    detector = OpenVocabularyDetector(cfg)
    check_classes(detector.trained, args.dataset, marks=False)
    embeddings = diagnostics.embed_ground_truth(detector.teacher, args.dataset)
    student = diagnostics.student_ground_truth(detector, args.dataset)
    cosine = diagnostics.mean_cosine(student, embeddings, args.dataset)
    jittered, unrelated = diagnostics.teacher_agreement(detector.teacher, embeddings, args.dataset)
    result = {
        "teacher_top1": diagnostics.top1(embeddings, detector.trained, args.dataset),
        "student_top1": diagnostics.top1(student, detector.trained, args.dataset),
        "student_teacher_cosine": cosine,
        "teacher_cosine_jittered": jittered,
        "teacher_cosine_unrelated": unrelated,
        "distillation_progress": diagnostics.distillation_progress(cosine, jittered, unrelated),
    }
    if any(value is not None for value in result["teacher_top1"].values()):
        result["verdict"] = diagnostics.verdict(result["student_top1"], result["teacher_top1"])
    if proposals is not None:
        result["proposals"] = diagnostics.proposal_recall(args.dataset, proposals, cfg.TEST.PROPOSALS_PER_IMAGE)
    if args.clip_on_crops:
        metrics, seconds = diagnostics.clip_on_crops(
            detector.teacher,
            detector.trained,
            args.dataset,
            proposals,
            detector.model.roi_heads.classifier.test_temperature,
            cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        times = {"seconds_a_picture": seconds,
                 "detector_seconds_a_picture": diagnostics.detector_seconds(detector, args.dataset)}  # fmt: skip
        result["clip_on_crops"] = metrics["bbox"] | times
    write_json(args.output, result)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
