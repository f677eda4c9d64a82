#!/usr/bin/env python3
"""Measure speed and memory, as ratios to a named baseline in the same run, with accuracy beside them.

    tools/benchmark.py evaluation [--num-images 20000] [--json FILE]

``tools/benchmark.py VERB --help`` describes what is measured. Each row is printed, and written to the JSON file, as
soon as it is measured: "ratio" is "baseline_s" / "ours_s".
"""

import argparse
import ast
import importlib
from pathlib import Path

VERBS = ("crops", "evaluation", "inference", "objectives", "store", "teacher", "train-step", "vocabulary")


def make_parser() -> argparse.ArgumentParser:
    settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **settings)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        path = Path(__file__).parent / "benchmarks" / f"{verb.replace('-', '_')}.py"
        text = ast.get_docstring(ast.parse(path.read_text()))  # without importing what the module imports
        add_flags(verb, verbs.add_parser(verb, help=text.split("\n")[0], description=text, **settings).add_argument)
    return parser


def add_flags(verb: str, add) -> None:
    """Add the flags of a verb; ``add``: ``add_argument`` of its parser."""

    def count(flag: str, default: int | None, text: str) -> None:
        add(flag, type=int, default=default, metavar="N", help=text if default is None else f"{text} ({default})")

    add("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")
    if verb not in ("evaluation", "store"):
        add("--device", help="(a GPU if there is one)")
        count("--repeats", 5 if verb == "inference" else 3, "timed repetitions; what is compared takes turns")
    if verb in ("inference", "objectives", "train-step", "vocabulary"):
        add("--config-file", default="LVIS/vild.yaml", metavar="FILE", help="the detector (LVIS/vild.yaml)")
        count("--size", 320, "side of the square images")
    if verb in ("objectives", "train-step"):
        count("--batch-size", 2, "images per step")
        count("--regions", 300, "distilled regions per image")
    if verb in ("inference", "vocabulary"):
        add("--names", type=int, nargs="+", default=[1203, 20_000], metavar="N", help="numbers of classes (1203 20000)")
    if verb in ("evaluation", "store"):
        add("--scratch", type=Path, metavar="FOLDER", help="a folder with several GB of space (the system's)")
    if verb in ("crops", "teacher"):
        add("--images", type=Path, metavar="FOLDER", help="photographs (default: synthetic images)")
    if verb in ("crops", "teacher", "vocabulary"):
        small = verb == "vocabulary"
        text = "the built-in world's text tower" if small else "ViT-B-32"
        add("--teacher", default=None if small else "ViT-B-32", help=f"open_clip model, or local-dir:FOLDER ({text})")
        add("--pretrained", default="random", help='open_clip tag or weights file ("random")')

    if verb == "crops":
        count("--boxes", 2000, "in all; each is cropped at 1x and at 1.5x")
        count("--at-once", None, "boxes per call (2048 on a GPU, 256 on a CPU)")
        count("--threads", None, "CPU threads (PyTorch's default)")
        count("--embedded", 100, "boxes whose embeddings are compared, evenly spaced")
    elif verb == "evaluation":
        count("--num-images", 20_000, "images that ours alone evaluates")
        count("--reference-images", 1000, "images that both sides evaluate")
        add("--masks", action="store_true", help="masks (rectangles) at --num-images, too")
    elif verb == "inference":
        add("--threshold", type=float, default=0.01, help="score threshold of both (0.01)")
    elif verb == "objectives":
        add("--objectives", nargs="+", metavar="NAME", help="(all)")
    elif verb == "store":
        count("--num-images", 1000, "images in the store")
        count("--regions", 300, "per image")
        count("--width", 512, "of the embeddings")
    elif verb == "teacher":
        count("--num-images", None, "images (512 on a GPU, 8 on a CPU)")
        count("--regions", None, "boxes per image (300; 50)")
        count("--batch-size", None, "crops per batch (2048; 128)")
        count("--num-workers", None, "processes that read images (8; 1)")
        add("--precision", choices=("fp32", "fp16", "bf16"), help="(bf16; fp32)")
        add("--compile", action="store_true", help="compile the image tower")
    elif verb == "train-step":
        add("--variants", nargs="+", default=["vild", "ensemble"], choices=["vild", "ensemble"], help="(both)")
    elif verb == "vocabulary":
        count("--encode", 50, "names to encode")


def main(args: argparse.Namespace) -> None:
    import torch
    from tabulate import tabulate

    from vild.utils.files import write_json

    args.device = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for row in importlib.import_module(f"benchmarks.{args.verb.replace('-', '_')}").run(args):
        rows.append(row)
        print("; ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
        if args.json:
            write_json(args.json, rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(tabulate([[cell(row.get(c)) for c in columns] for row in rows], columns, "pipe", disable_numparse=True))


def cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    arguments = make_parser().parse_args()
    from vild.utils.errors import one_line_errors

    one_line_errors(main)(arguments)
