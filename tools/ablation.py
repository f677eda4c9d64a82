#!/usr/bin/env python3
"""All four variants, the oracle, CLIP on crops and two controls on the built-in world, over several seeds.

Everything of a seed is its own: world, teacher, proposals, stores, detectors. Every detector trains for the same
number of iterations. Prints a Markdown table, mean ± standard deviation over the seeds, and writes it with all
single numbers to OUTPUT/ablation.{md,json}. Run again, it goes on from what is there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tabulate import tabulate

from vild.errors import one_line_errors
from vild.pipeline import GlyphsRun, stage
from vild.vocabulary import Vocabulary

METRICS = ["bbox/AP50_novel", "bbox/AP50_base", "bbox/AP50_all", "bbox/APr", "bbox/APc", "bbox/APf",
           "segm/AP50_novel", "segm/AP50_base"]  # fmt: skip


def rotate_novel(vocabulary: Vocabulary) -> Vocabulary:
    """Every novel name gets the next novel name's embedding: a control that must destroy novel AP."""
    novel = vocabulary.mask("novel").nonzero()[:, 0]
    embeddings = vocabulary.embeddings.clone()
    embeddings[novel] = vocabulary.embeddings[novel.roll(1)]
    return Vocabulary(
        vocabulary.names,
        embeddings,
        vocabulary.splits,
        vocabulary.synonyms,
        "rotated",
        vocabulary.fingerprint,
    )


def other_rows(run: GlyphsRun) -> dict[str, dict]:
    """The other variants, the oracle and the two controls. {row: metrics}."""
    folder = run.folder
    rotated_file = folder / "vocabulary_rotated.safetensors"
    rotate_novel(Vocabulary.load(run.vocabulary)).save(rotated_file)
    rotated = stage(
        "rotated", "train_net.py", "--config-file", run.config("vild"), "--eval-only", "--num-gpus", 0,
        "OUTPUT_DIR", folder / "rotated", "MODEL.WEIGHTS", folder / "vild" / "model_final.pth",
        "MODEL.VILD.VOCABULARY", run.vocabulary, "MODEL.VILD.TEST_VOCABULARY", rotated_file,
    )  # fmt: skip
    # the control never meets a novel object: its proposal network neither
    network = run.train("network_nonovel", "proposals", "DATASETS.TRAIN", "('glyphs_nonovel_train',)")
    run.run(run.world("world_nonovel", "nonovel_train"), rotated)
    run.run(network)
    run.run(run.make_proposals("proposals_nonovel", "glyphs_nonovel_train", "network_nonovel"))
    run.run(run.store("store_nonovel", "glyphs_nonovel_train", "proposals_nonovel"))
    oracle = run.train(
        "oracle", "text", "DATASETS.TRAIN", "('glyphs_train_all',)",
        "MODEL.VILD.VOCABULARY", folder / "vocabulary_oracle.safetensors", start="proposals",
    )  # fmt: skip
    nonovel = run.train(
        "nonovel", "vild", "DATASETS.TRAIN", "('glyphs_nonovel_train',)",
        "MODEL.VILD.STORE", folder / "store_nonovel", start="network_nonovel",
    )  # fmt: skip
    run.run(run.train("image", "image", start="proposals"), run.train("ensemble", "ensemble", start="proposals"))
    run.run(oracle, nonovel)
    return {
        "ViLD-image": run.metrics("image"),
        "ViLD-ensemble": run.metrics("ensemble"),
        "oracle (novel names annotated, ViLD-text)": run.metrics("oracle"),
        "control: ViLD, novel texts rotated": run.metrics("rotated"),
        "control: ViLD, no novel object in training scenes": run.metrics("nonovel"),
    }


def mean_and_std(values: list[float | None], digits: int = 1) -> str:
    if any(v is None for v in values):
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=0, help="of each detector (default: the config's)")
    args = parser.parse_args()
    runs = [GlyphsRun(args.output / f"seed{s}", 20, seed=s, iterations=args.iterations) for s in args.seeds]
    rows: dict[str, list[dict]] = {}
    gauge_rows: dict[str, list[dict]] = {}

    def add(found: dict[str, dict], to: dict[str, list[dict]]) -> None:
        for name, values in found.items():
            to.setdefault(name, []).append(values)
        write(args.output, rows, gauge_rows)

    for run in runs:  # the claim over all seeds first, the rest after it
        print(f"seed {run.seed}: ViLD and ViLD-text", flush=True)
        run.train_both(run.make_vocabulary("vocabulary_oracle", "glyphs_train_all"))
        add({"ViLD-text": run.metrics("text"), "ViLD": run.metrics("vild")}, rows)
        found, crops = run.read_gauges()
        crops = {f"bbox/{key}": value for key, value in crops.items()}
        add({"teacher on the proposals (CLIP on crops)": crops}, rows)
        add(found, gauge_rows)
    for run in runs:
        print(f"seed {run.seed}: the other rows", flush=True)
        add(other_rows(run), rows)


def write(folder: Path, rows: dict[str, list[dict]], gauge_rows: dict[str, list[dict]]) -> None:
    """The tables so far, on the terminal and in the folder."""
    options = {"tablefmt": "pipe", "disable_numparse": True}
    headers = ["", "seeds", *(m.replace("bbox/", "box ").replace("segm/", "mask ") for m in METRICS)]
    body = [
        [name, str(len(values)), *(mean_and_std([v.get(m) for v in values]) for m in METRICS)]
        for name, values in rows.items()
    ]
    gauge_body = [
        [name, *(mean_and_std([v[m] for v in values], 3 if "cosine" in name else 1) for m in ("base", "novel"))]
        for name, values in gauge_rows.items()
    ]
    page = tabulate(body, headers, **options) + "\n\n" + tabulate(gauge_body, ["gauge", "base", "novel"], **options)
    (folder / "ablation.md").write_text(page + "\n")
    (folder / "ablation.json").write_text(json.dumps({"rows": rows, "gauges": gauge_rows}, indent=1))
    print(page, flush=True)


if __name__ == "__main__":
    main()
