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

from vild.utils.command_line import add_shared, at_least, between_0_and_1, make_parser
from vild.utils.errors import one_line_errors

VERBS = ("crops", "evaluation", "inference", "objectives", "store", "teacher", "train-step", "vocabulary")


def make_benchmark_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        path = Path(__file__).parent / "benchmarks" / f"{verb.replace('-', '_')}.py"
        text = ast.get_docstring(ast.parse(path.read_text()))  # without importing what the module imports
        settings = {"formatter_class": parser.formatter_class, "allow_abbrev": False}
        add_flags(verb, verbs.add_parser(verb, help=text.split("\n")[0], description=text, **settings))
    return parser


def add_flags(verb: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    def count(flag: str, default: int | None, text: str) -> None:
        add(flag, type=at_least(1), default=default, metavar="N", help=text)

    add("--json", type=Path, metavar="FILE", help="write the rows as a JSON list")
    if verb not in ("evaluation", "store"):
        add_shared(parser, "--device")
        count("--repeats", 5 if verb == "inference" else 3, "timed repetitions; what is compared takes turns")
    if verb in ("inference", "objectives", "train-step", "vocabulary"):
        add_shared(parser, "--config-file", default="LVIS/vild.yaml")
        count("--size", 320, "side of the square images")
    if verb in ("objectives", "train-step"):
        count("--batch-size", 2, "images per step")
        count("--regions", 300, "distilled regions per image")
    if verb in ("inference", "vocabulary"):
        add("--names", type=at_least(1), nargs="+", default=[1203, 20_000], metavar="N", help="numbers of classes")
    if verb in ("evaluation", "store"):
        add("--scratch", type=Path, metavar="FOLDER", help="a folder with several GB of space (the system's)")
    if verb in ("crops", "teacher"):
        add("--images", type=Path, metavar="FOLDER", help="photographs (default: synthetic images)")
        add_shared(parser, "--teacher", default="ViT-B-32")
    if verb == "vocabulary":
        add_shared(parser, "--teacher", note="default: the built-in world's text tower")
        count("--encode", 50, "names to encode")
    if verb in ("crops", "teacher", "vocabulary"):
        add_shared(parser, "--pretrained", default="random")

    if verb == "crops":
        count("--boxes", None, "in all, each cropped at 1x and at 1.5x (2000 on a GPU, 400 on a CPU)")
        count("--at-once", None, "boxes per call (2048; 256)")
        count("--threads", None, "CPU threads (PyTorch's default)")
        count("--embedded", None, "boxes whose embeddings are compared, evenly spaced (100; 20)")
    elif verb == "evaluation":
        count("--num-images", 20_000, "images that ours alone evaluates")
        count("--reference-images", 1000, "images that both sides evaluate")
        add("--masks", action="store_true", help="masks (rectangles) at --num-images, too")
    elif verb == "inference":
        add("--threshold", type=between_0_and_1, default=0.01, help="score threshold of both")
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
        add("--channels-last", action="store_true", help="weights and features of both with their channels last")


@one_line_errors
def main():
    args = make_benchmark_parser().parse_args()
    import torch
    from tabulate import tabulate

    from vild.utils.files import write_json

    args.device = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(args.device).index or 0)  # which the timers synchronise
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
    main()
