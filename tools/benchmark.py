#!/usr/bin/env python3
"""Speed and memory, as ratios to a named baseline measured in the same run, with what accuracy costs beside them.

    tools/benchmark.py evaluation [--num-images 20000] [--json FILE]

One verb a module of vild/benchmarks; ``tools/benchmark.py VERB --help`` says what it measures.
"""

import argparse
import importlib
import pkgutil
from pathlib import Path

import benchmarks
from tabulate import tabulate

from vild.utils.errors import one_line_errors
from vild.utils.files import write_json


def as_table(rows: list[dict]) -> str:
    """Markdown; "-" for what a row does not have."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return tabulate([[cell(row.get(c)) for c in columns] for row in rows], columns, "pipe", disable_numparse=True)


def cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for found in pkgutil.iter_modules(benchmarks.__path__):
        module = importlib.import_module(f"{benchmarks.__name__}.{found.name}")
        verb = verbs.add_parser(found.name.replace("_", "-"), help=module.__doc__.split("\n")[0],
                                description=module.__doc__)  # fmt: skip
        module.add_arguments(verb)
        verb.add_argument("--json", type=Path, help="the same numbers as a JSON list")
        verb.set_defaults(run=module.run)
    args = parser.parse_args()
    rows = list(args.run(args))
    print(as_table(rows))
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
