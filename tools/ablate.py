#!/usr/bin/env python3
"""Run a grid of settings and seeds on the built-in world, and write one table and plot: mean ± standard deviation.

    tools/ablate.py --grid configs/Glyphs/ablations/paper.yaml --output-dir output/glyphs
    tools/ablate.py --grid configs/Glyphs/ablations/objectives.yaml --output-dir output/objectives

Each seed has its own world, teacher, proposals, stores and detectors; a training runs on each GPU or, without GPUs, on
each core. Started again, it resumes; grids with the same output folder share what they have in common. The other rows
continue when one fails. A row whose setting has changed since it was started is refused; the message names the files
to remove. After every seed, GRID.{md,json,png} are written, and GRID_cost.png (AP50 by GFLOP) where costs differ. In
the JSON file, the metrics of each row are in the order of "seeds".
"""

from pathlib import Path

from vild.utils.command_line import add_shared, at_least, make_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument(
        "--grid", type=Path, required=True, metavar="FILE", help="YAML file; see tools/experiments/grid.py"
    )
    add_shared(parser, "--output-dir", required=True)
    parser.add_argument("--seeds", type=at_least(0), nargs="+", metavar="N", help="instead of the grid's")
    parser.add_argument("--iterations", type=at_least(1), metavar="N", help="of each detector, instead of the grid's")
    parser.add_argument(
        "--curves", action="store_true", help="also evaluate the checkpoints that trainings kept: GRID_curves.png"
    )
    parser.add_argument("--smoke", action="store_true", help="as small as possible; the numbers mean nothing")
    args = parser.parse_args()

    from experiments.ablation import plot, plot_cost, read_cost, read_row, read_shares, run_seed, table, write_figure
    from experiments.curves import plot_curves, run_curve
    from experiments.glyphs import GlyphsRun
    from experiments.grid import check_seeds, read_grid

    from vild.engine.run_record import code_version
    from vild.utils.files import write_json, write_text

    grid, folder, name = read_grid(args.grid), args.output_dir, args.grid.stem
    iterations = grid.iterations if args.iterations is None else args.iterations
    if iterations < 0:
        raise UserError(f"--iterations: {iterations} is below 0")
    if args.curves and (held := [row.name for row in grid.rows if row.data == "heldout"]):
        raise UserError(f"--curves: they would be of glyphs_val, and row '{held[0]}' has data: heldout")
    seeds = grid.seeds if args.seeds is None else check_seeds(args.seeds, "--seeds")
    results, diagnostics, shares, code = {row.name: [] for row in grid.rows}, {}, {}, code_version()
    curves = {row.name: [] for row in grid.rows if row.config and args.curves}
    for number, seed in enumerate(seeds):
        print(f"seed {seed}", flush=True)
        run = GlyphsRun(folder / f"seed{seed}", seed, iterations, args.smoke)
        run_seed(run, grid.rows)
        if grid.shares and number == 0:
            shares = read_shares(run, grid, args.grid)
        for row in grid.rows:
            results[row.name].append(read_row(run, row) | (read_cost(run, row) if number == 0 else {}))
            if row.name in curves:
                curves[row.name].append(run_curve(run, row))
        if any(row.clip_on_crops for row in grid.rows):
            for key, values in run.read_diagnostics()[0].items():
                diagnostics.setdefault(key, []).append(values)
        page = table(results, diagnostics, shares)
        write_text(folder / f"{name}.md", page)
        setup = {"seeds": seeds[: number + 1], "iterations": run.iterations, "smoke": run.smoke, "code": code}
        write_json(folder / f"{name}.json", {**setup, "rows": results, "gauges": diagnostics, "shares": shares})
        plot(results, folder / f"{name}.png")
        plot_cost(results, folder / f"{name}_cost.png")
        if curves:
            write_json(folder / f"{name}_curves.json", curves)
            write_figure(plot_curves(curves), folder / f"{name}_curves.png")
        print(page, flush=True)


if __name__ == "__main__":
    main()
