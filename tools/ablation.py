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


def one_seed(folder: Path, seed: int, iterations: int) -> tuple[dict, dict]:
    """Everything for one seed: {row: metrics}, gauges."""
    run = GlyphsRun(folder, total=19, seed=seed, iterations=iterations)
    run.run(run.world("train", "nonovel_train", "dev", "val"))
    run.run(run.train_teacher(), run.train("proposals", "proposals"))
    run.run(
        run.make_vocabulary("vocabulary", "glyphs_train"),
        run.make_vocabulary("vocabulary_oracle", "glyphs_train_all"),
        run.make_proposals("proposals_train", "glyphs_train"),
        run.make_proposals("proposals_val", "glyphs_val"),
    )
    # the control never meets a novel object: its proposal network neither
    run.run(
        run.store("store", "glyphs_train", "proposals_train"),
        run.train("network_nonovel", "proposals", "DATASETS.TRAIN", "('glyphs_nonovel_train',)"),
    )
    run.run(run.make_proposals("proposals_nonovel", "glyphs_nonovel_train", "network_nonovel"))
    run.run(run.train("text", "text", start="proposals"), run.train("vild", "vild", start="proposals"))
    run.run(run.train("image", "image", start="proposals"), run.train("ensemble", "ensemble", start="proposals"))
    oracle = run.train(
        "oracle", "text", "DATASETS.TRAIN", "('glyphs_train_all',)",
        "MODEL.VILD.VOCABULARY", folder / "vocabulary_oracle.safetensors", start="proposals",
    )  # fmt: skip
    run.run(oracle, run.store("store_nonovel", "glyphs_nonovel_train", "proposals_nonovel"))
    nonovel = run.train(
        "nonovel", "vild", "DATASETS.TRAIN", "('glyphs_nonovel_train',)",
        "MODEL.VILD.STORE", folder / "store_nonovel", start="network_nonovel",
    )  # fmt: skip
    rotated_file = folder / "vocabulary_rotated.safetensors"
    rotate_novel(Vocabulary.load(run.vocabulary)).save(rotated_file)
    rotated = stage(
        "rotated", "train_net.py", "--config-file", run.config("vild"), "--eval-only", "--num-gpus", 0,
        "OUTPUT_DIR", folder / "rotated", "MODEL.WEIGHTS", folder / "vild" / "model_final.pth",
        "MODEL.VILD.VOCABULARY", run.vocabulary, "MODEL.VILD.TEST_VOCABULARY", rotated_file,
    )  # fmt: skip
    run.run(nonovel, rotated)
    run.run(run.gauges("gauges", "vild", "proposals_val"))

    gauges = json.loads((folder / "gauges.json").read_text())
    crops = {f"bbox/{key}": value for key, value in gauges.pop("clip_on_crops").items()}
    recall = run.metrics("proposals")
    gauges["proposal_recall50"] = {
        mark: next(v for k, v in recall.items() if k.endswith(mark)) for mark in ("base", "novel")
    }
    rows = {
        "ViLD-text": run.metrics("text"),
        "ViLD-image": run.metrics("image"),
        "ViLD": run.metrics("vild"),
        "ViLD-ensemble": run.metrics("ensemble"),
        "oracle (novel names annotated, ViLD-text)": run.metrics("oracle"),
        "teacher on the proposals (CLIP on crops)": crops,
        "control: ViLD, novel texts rotated": run.metrics("rotated"),
        "control: ViLD, no novel object in training scenes": run.metrics("nonovel"),
    }
    return rows, gauges


def mean_and_std(values: list[float | None], digits: int = 1) -> str:
    if any(v is None for v in values):
        return "-"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=len(values) > 1):.{digits}f}"


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=0, help="of each detector (default: the config's)")
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        print(f"seed {seed}", flush=True)
        results.append(one_seed(args.output / f"seed{seed}", seed, args.iterations))
        write(args.output, results, args.seeds)


def write(folder: Path, results: list[tuple[dict, dict]], seeds: list[int]) -> None:
    """The table so far, on the terminal and in the folder."""
    names = list(results[0][0])
    body = [[name, *(mean_and_std([rows[name].get(m) for rows, _ in results]) for m in METRICS)] for name in names]
    headers = ["", *(m.replace("bbox/", "box ").replace("segm/", "mask ") for m in METRICS)]
    gauges = [
        [name, *(mean_and_std([g[name][mark] for _, g in results], 3 if "cosine" in name else 1)
                 for mark in ("base", "novel"))]
        for name in results[0][1]
    ]  # fmt: skip
    done = f"{len(results)} of {len(seeds)} seeds ({', '.join(map(str, seeds[: len(results)]))})"
    options = {"tablefmt": "pipe", "disable_numparse": True}
    page = "\n\n".join(
        [done, tabulate(body, headers, **options), tabulate(gauges, ["gauge", "base", "novel"], **options)]
    )
    (folder / "ablation.md").write_text(page + "\n")
    singles = [{"seed": s, "rows": rows, "gauges": g} for s, (rows, g) in zip(seeds, results, strict=False)]
    (folder / "ablation.json").write_text(json.dumps(singles, indent=1))
    print(page, flush=True)


if __name__ == "__main__":
    main()
