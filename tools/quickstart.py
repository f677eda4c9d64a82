#!/usr/bin/env python3
"""Run the whole method on the built-in world, on a CPU or GPUs, and write a report: world, teacher, proposals, store,
training, evaluation, images, and our recipe's detector as a folder for ``from_pretrained``. Started again, it resumes.

    tools/quickstart.py --output-dir output/quickstart
"""

import os
from pathlib import Path

from vild.utils.command_line import add_shared, at_least, make_parser
from vild.utils.errors import one_line_errors

OURS = "ViLD-contrast (ours)"
TEXT = """ViLD-text, the paper's baseline, and ViLD-contrast, our recipe of the paper's ViLD for short schedules: beside
ViLD's L1 to the teacher it tells a region's embedding from those of other regions, and its boxes weigh more. They are
trained for equally many iterations on the same scenes: {base} base classes are annotated, {novel} novel classes are
drawn in the scenes but never annotated. Evaluated on {images} scenes, with all {all} classes in the vocabulary.
ViLD-contrast has met the novel objects only as unnamed proposals whose teacher embedding it imitates. The paper's own
ViLD is not trained here; docs/calibration.md compares it."""


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--output-dir", default=Path("output/quickstart"))
    add_shared(parser, "--seed", note="of the world, the teacher and all trainings")
    parser.add_argument(
        "--iterations", type=at_least(0), default=0, metavar="N", help="of each detector; 0: as its config says"
    )
    parser.add_argument("--smoke", action="store_true", help="as small as possible; the numbers mean nothing")
    args = parser.parse_args()

    from experiments.glyphs import GlyphsRun

    from vild.config import load_config
    from vild.data import datasets
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.report.images import comparison
    from vild.report.quickstart import quickstart_table, trust_table, write_quickstart_report
    from vild.utils.command_line import THRESHOLD

    run = GlyphsRun(args.output_dir, args.seed, args.iterations, args.smoke)
    trained = {"ViLD-text": run.detector("text", "text"), OURS: run.detector("vild_contrast", "vild_contrast")}
    run.run(*trained.values())
    run.run(run.diagnostics("diagnostics", trained[OURS], "vild_contrast"))
    shown, weights, absent = {t: each.name for t, each in trained.items()}, "model_final.pth", {}
    if not args.smoke:  # whose detectors find too little to be calibrated
        run.trust(*trained.values())
        shown |= {f"{title}, calibrated": f"{each.name}_calibrated" for title, each in trained.items()}
        weights = "model_calibrated.pth"
        absent = {title: run.read_absent(each.name) for title, each in trained.items()}

    os.environ["DETECTRON2_DATASETS"] = str(args.output_dir / "datasets")
    diagnostics, crops = run.read_diagnostics()
    diagnostics["clip_on_crops_AP50"] = {group: crops[f"AP50_{group}"] for group in ("base", "novel")}
    metrics = {title: run.read_metrics(shown[title]) for title in sorted(shown)}
    teacher = ["MODEL.VILD.TEACHER.NAME", f"local-dir:{run.teacher().output}"]
    detectors = {
        title: OpenVocabularyDetector(
            load_config(str(run.config(stage.name)), ["MODEL.WEIGHTS", str(stage.output / weights), *teacher])
        )
        for title, stage in trained.items()
    }
    detectors[OURS].save(args.output_dir / "detector")
    splits, images = detectors[OURS].trained.splits, len(datasets.load_dicts("glyphs_val"))
    counts = {"base": splits.count("base"), "novel": splits.count("novel"), "all": len(splits)}
    page = write_quickstart_report(
        args.output_dir,
        {**metrics, "absent": absent, "gauges": diagnostics, "seconds": run.seconds},
        TEXT.format(images=images, **counts),
        comparison(detectors, "glyphs_val", count=3, threshold=THRESHOLD),
    )
    print(quickstart_table(metrics).markdown, trust_table(metrics).markdown, sep="\n\n")
    print(f"report: {page}, with the image {args.output_dir / 'report.png'}; detector: {args.output_dir / 'detector'}")


if __name__ == "__main__":
    main()
