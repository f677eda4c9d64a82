#!/usr/bin/env python3
"""Settings by seeds on the built-in world, as one table and one plot: mean ± standard deviation.

    tools/ablate.py --grid configs/Glyphs/ablations/paper.yaml --output output/ablation
    tools/ablate.py --grid configs/Glyphs/ablations/objectives.yaml --output output/objectives

Everything of a seed is its own: world, teacher, proposals, stores, detectors; as many trainings run side by side as
there are cores. Run again, it goes on from what is there; another grid with the same OUTPUT takes what the two share.
A row that fails ends no other; a row whose setting changed since it began is refused, with the files to remove.
Writes OUTPUT/GRID.{md,json,png} after every seed, and GRID_cost.png (AP50 over GFLOP) where the rows cost different
amounts. In the JSON each row has its metrics in the order of "seeds"; beside them stand the iterations of each detector
(0: as its config says) and the version of the code.
"""

import argparse
from pathlib import Path

from experiments.ablation import plot, plot_cost, read_cost, read_row, run_seed, table
from experiments.grid import check_seeds, read_grid
from experiments.pipeline import GlyphsRun

from vild.engine.run_record import code_version
from vild.utils.errors import UserError, one_line_errors
from vild.utils.files import write_json, write_text


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--grid", type=Path, required=True, help="YAML file (tools/experiments/grid.py says what it holds)"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the grid's")
    parser.add_argument("--iterations", type=int, help="of each detector, instead of the grid's (0: its config's)")
    parser.add_argument("--smoke", action="store_true", help="as small as can be; its numbers mean nothing")
    args = parser.parse_args()
    grid = read_grid(args.grid)
    iterations = grid.iterations if args.iterations is None else args.iterations
    if iterations < 0:
        raise UserError(f"--iterations: {iterations} is below 0")
    seeds = grid.seeds if args.seeds is None else check_seeds(args.seeds, "--seeds")
    results = {row.name: [] for row in grid.rows}
    gauges: dict[str, list[dict]] = {}
    code = code_version()
    for number, seed in enumerate(seeds):
        print(f"seed {seed}", flush=True)
        run = GlyphsRun(args.output / f"seed{seed}", seed=seed, iterations=iterations, smoke=args.smoke)
        run_seed(run, grid.rows)
        for row in grid.rows:
            results[row.name].append(read_row(run, row) | (read_cost(run, row) if number == 0 else {}))
        if any(row.clip_on_crops for row in grid.rows):
            for name, values in run.read_gauges()[0].items():
                gauges.setdefault(name, []).append(values)
        page = table(results, gauges)
        name = args.grid.stem
        write_text(args.output / f"{name}.md", page)
        made = {"seeds": seeds[: number + 1], "iterations": run.iterations, "smoke": run.smoke, "code": code}
        write_json(args.output / f"{name}.json", {**made, "rows": results, "gauges": gauges})
        plot(results, args.output / f"{name}.png")
        plot_cost(results, args.output / f"{name}_cost.png")
        print(page, flush=True)


if __name__ == "__main__":
    main()
