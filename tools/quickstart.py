#!/usr/bin/env python3
"""Run the whole method on the built-in world, on a CPU, and report: world, teacher, proposals, store, training,
evaluation, images. Started again, it continues with what is there.

    tools/quickstart.py --output-dir output/quickstart
"""

import argparse
import os
from pathlib import Path

COLUMNS = ["bbox/AP50_novel", "bbox/AP50_base", "bbox/AP50_all", "bbox/AP", "segm/AP50_novel", "segm/AP50_base"]
TEXT = """ViLD and ViLD-text, trained for equally many iterations on the same scenes: {base} base names annotated,
{novel} novel names drawn in them but never annotated. Evaluated on {images} scenes with all {all} names offered.
ViLD has met the novel objects only as unnamed proposals whose teacher embedding it imitates."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output-dir", type=Path, default=Path("output/quickstart"), help="(output/quickstart)")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the teacher and the trainings (0)")
    parser.add_argument("--iterations", type=int, default=0, help="of each detector (0: as its config says)")
    parser.add_argument("--smoke", action="store_true", help="as small as possible; the numbers mean nothing")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    from experiments.glyphs import GlyphsRun

    from vild.config import load_config
    from vild.data import datasets
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.report.quickstart import comparison, table, write_report

    run = GlyphsRun(args.output_dir, args.seed, args.iterations, args.smoke)
    run.prepare()
    student = run.detector("vild", "vild")
    run.run(run.detector("text", "text"), student)
    run.run(run.gauges("gauges", student, "vild"))

    os.environ["DETECTRON2_DATASETS"] = str(args.output_dir / "datasets")
    gauges, crops = run.read_gauges()
    gauges["clip_on_crops_AP50"] = {mark: crops[f"AP50_{mark}"] for mark in ("base", "novel")}
    metrics = {"ViLD": run.read_metrics("vild"), "ViLD-text": run.read_metrics("text")}
    detectors = {
        title: OpenVocabularyDetector(
            load_config(str(run.config(name)), ["MODEL.WEIGHTS", str(args.output_dir / name / "model_final.pth")])
        )
        for title, name in (("ViLD-text", "text"), ("ViLD", "vild"))
    }
    splits = detectors["ViLD"].trained.splits
    text = TEXT.format(
        base=splits.count("base"),
        novel=splits.count("novel"),
        all=len(splits),
        images=len(datasets.load_dicts("glyphs_val")),
    )
    image = comparison(detectors, "glyphs_val", count=4, threshold=0.5)
    document = {**metrics, "gauges": gauges, "seconds": run.seconds}
    page = write_report(args.output_dir, document, COLUMNS, text, image)
    print(table(metrics, COLUMNS))
    print(f"the report: {page}, its image: {args.output_dir / 'report.png'}")


if __name__ == "__main__":
    arguments = parse_arguments()
    from vild.utils.errors import one_line_errors

    one_line_errors(main)(arguments)
