#!/usr/bin/env python3
"""Show on a GPU what is only expected without one: exact crops, the teacher pass, training steps, evaluation.

    tools/gpu_report.py [--rows crops pass ...] [--output-dir output/gpu]

Each row says what was expected and whether it holds. Rows are written to gpu.md and gpu.json as they are measured: a
killed run keeps them, and the same command continues, with rows that failed measured again. No row begins after
--minutes.
"""

import time
from pathlib import Path

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import UserError, count_of, first_line, one_line_errors


def parse():
    parser = make_parser(__doc__)
    add_shared(parser, "--output-dir", default=Path("output/gpu"))
    add_shared(parser, "--device")
    add_shared(parser, "--teacher", default="ViT-B-32", note="with random weights")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only (default: all)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photographs (default: synthetic images)")
    parser.add_argument(
        "--tiny", action="store_true", help="sizes for a CPU, to see that it works; speeds mean nothing"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no further row after so many")
    return parser.parse_args()


@one_line_errors
def main():
    started, args = time.monotonic(), parse()
    import torch
    from benchmarks.gpu import CHECKS

    from vild.config import pick_device
    from vild.utils.lock import only_writer

    device = pick_device(args.device)
    if device == "cpu" and not args.tiny:
        raise UserError("--device cpu: there is no GPU to report on (--tiny tries the rows out)")
    checks = {check.name: check for check in CHECKS}
    if unknown := set(args.rows or ()) - checks.keys():
        raise UserError(f"--rows {min(unknown)}: none of {', '.join(checks)}")
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)  # which timers synchronise and memory is counted of
    card = torch.cuda.get_device_name() if device != "cpu" else device
    with only_writer(args.output_dir, folder=True):
        report(args, checks, device, {"card": card, "torch": torch.__version__, "tiny": args.tiny, "rows": []}, started)


def report(args, checks: dict, device: str, state: dict, started: float) -> None:
    """Measure the rows that are not in the report yet."""
    import json
    import tempfile
    import traceback

    import torch
    from benchmarks.gpu import Settings

    from vild.utils.files import write_json, write_text
    from vild.utils.untrusted import refused_as

    path = args.output_dir / "gpu.json"
    if path.exists():
        with refused_as(f"{path}: is not a report's"):
            found = json.loads(path.read_text())
            other = any(found[key] != state[key] for key in ("card", "torch", "tiny"))
            state["rows"] = [row for row in found["rows"] if "failed" not in row]
        if other:
            raise UserError(f"--output-dir {args.output_dir}: has the rows of another card, version or size")
    done = {row["row"] for row in state["rows"]}
    todo = [name for name in dict.fromkeys(args.rows or checks) if name not in done]
    configs = "Glyphs" if args.tiny else "LVIS"
    for number, name in enumerate(todo):
        if time.monotonic() - started > 60 * args.minutes:
            print(f"{count_of(len(todo) - number, 'row')} to go; the same command continues")
            break
        check, begun = checks[name], time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(device, args.tiny, Path(folder), args.teacher, configs, args.images)
            try:
                holds, measured = check.run(settings)
            except Exception as error:  # one row says so; the others are measured
                traceback.print_exc()
                holds, measured = False, {"failed": f"{type(error).__name__}: {first_line(error)}"}
        seconds = round(time.monotonic() - begun, 1)
        row = {"row": name, "expected": check.expected, "holds": holds, **measured, "seconds": seconds}
        state["rows"] = sorted([*state["rows"], row], key=lambda row: [*checks].index(row["row"]))
        write_json(path, state)
        write_text(args.output_dir / "gpu.md", page(state))
        print("; ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
        if device != "cpu":
            torch.cuda.empty_cache()
    print(f"report: {args.output_dir / 'gpu.md'}")


def page(state: dict) -> str:
    from tabulate import tabulate

    own = ("row", "expected", "holds", "seconds")
    rows = [
        [row["row"], row["expected"], "yes" if row["holds"] else "NO",
         "; ".join(f"{key} {cell(value)}" for key, value in row.items() if key not in own), cell(row["seconds"])]
        for row in state["rows"]
    ]  # fmt: skip
    head = ("row", "expected", "holds", "measured", "seconds")
    note = " Tiny sizes: speeds mean nothing." if state["tiny"] else ""
    table = tabulate(rows, head, "pipe", disable_numparse=True)
    return f"# On {state['card']}, PyTorch {state['torch']}\n\n`make gpu` wrote this page.{note}\n\n{table}\n"


def cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
