#!/usr/bin/env python3
"""The whole method on the built-in world, on a CPU, with a report: world, teacher, proposals, store, training,
evaluation, images. Run again, it goes on from what is there."""

import argparse
import os
from pathlib import Path

from experiments.pipeline import GlyphsRun

from vild.config import load_config
from vild.data import datasets
from vild.inference.predictor import OpenVocabularyDetector
from vild.report.images import comparison
from vild.report.quickstart import quickstart_table, write_quickstart_report
from vild.utils.errors import one_line_errors

TEXT = """ViLD and ViLD-text, trained for equally many iterations on the same scenes: {base} base names annotated,
{novel} novel names drawn in them but never annotated. Evaluated on {images} scenes with all {all} names offered.
ViLD has met the novel objects only as unnamed proposals whose teacher embedding it imitates."""


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=0, help="of each detector (default: the config's)")
    parser.add_argument("--smoke", action="store_true", help="as small as can be; its numbers mean nothing")
    args = parser.parse_args()
    run = GlyphsRun(args.output, seed=args.seed, iterations=args.iterations, smoke=args.smoke)
    run.train_both()

    os.environ["DETECTRON2_DATASETS"] = str(args.output / "datasets")
    gauges, crops = run.read_gauges()
    gauges["clip_on_crops_AP50"] = {mark: crops[f"AP50_{mark}"] for mark in ("base", "novel")}
    document = {
        "ViLD": run.metrics("vild"),
        "ViLD-text": run.metrics("text"),
        "gauges": gauges,
        "seconds": run.seconds,
    }
    detectors = {
        title: OpenVocabularyDetector(
            load_config(
                str(run.config(name)),
                ["MODEL.WEIGHTS", str(args.output / name / "model_final.pth")],
            )
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
    page = write_quickstart_report(args.output, document, text, image)
    print(quickstart_table({k: document[k] for k in ("ViLD", "ViLD-text")}).markdown)
    print(f"the report: {page}, its image: {args.output / 'report.png'}")


if __name__ == "__main__":
    main()
