#!/usr/bin/env python3
"""Compare objectives fairly: the norm of each one's gradient on the region embeddings of real batches, its share of
that of L1 at the config's weight, and the weight that would give it a stated share.

    tools/gradient_shares.py --config-file configs/Glyphs/vild_contrast.yaml \\
        --weights output/quickstart/vild_contrast/model_final.pth \\
        --grid configs/Glyphs/ablations/objectives.yaml

A weight is DISTILL_WEIGHT times the objective's WEIGHT, and its loss's of LOSS_WEIGHTS; schedules are taken in the
middle of the training. Gradients change while the student learns: take weights from the middle of a training. "-": the
objective looks at feature maps (tokens, attention) and has no gradient there.
"""

from pathlib import Path

from vild.utils.command_line import add_model_flags, add_shared, at_least, make_parser
from vild.utils.errors import UserError, one_line_errors


def positive(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise ValueError
    return float(text)


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--grid", type=Path, metavar="FILE",
                        help="the objectives of its rows (default: those of the config)")  # fmt: skip
    parser.add_argument("--batches", type=at_least(1), default=4, metavar="N", help="training batches to average over")
    parser.add_argument("--share", type=positive, default=1.0, metavar="S",
                        help="of L1's gradient, that the proposed weights give")  # fmt: skip
    add_shared(parser, "--output", note="the table as JSON")
    add_model_flags(parser)
    args = parser.parse_args()

    from itertools import islice

    from experiments.grid import CONFIGS, read_grid

    from vild.checkpoint.checkpointer import VildCheckpointer
    from vild.checkpoint.pretrained import config_from_flags
    from vild.config import load_config
    from vild.data.loader import build_train_loader
    from vild.engine.sources import open_store, parse_distillation
    from vild.evaluation.metrics import decimal
    from vild.modeling import build_model
    from vild.modeling.classifier import softmax_settings
    from vild.modeling.objectives import parse_objectives
    from vild.report.gradient_shares import L1, PROGRESS, mean_norms, scale_of, shares
    from vild.report.page import markdown_table
    from vild.utils.files import write_json

    cfg, configs = config_from_flags(args), {}
    if args.grid:
        rows = [row for row in read_grid(args.grid).rows if row.config and row.teachers == 1]
        for row in rows:
            configs[row.name] = load_config(str(CONFIGS / f"{row.config}.yaml"), [str(x) for x in row.arguments])
    else:
        configs["the config"] = cfg
    if parse_distillation(cfg).source != "store":
        raise UserError("--config-file: batches are of a training that distils from a store (DISTILL_FROM 'store')")
    model = build_model(cfg).eval()
    VildCheckpointer(model, trained=True).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    width = model.vocabulary.width
    weighted = [
        (name, objective, scale_of(row, objective.name, width))
        for name, row in configs.items() if parse_distillation(row).source != "nothing"
        for objective in parse_objectives(row.MODEL.VILD.OBJECTIVES)
    ]  # fmt: skip
    given = [configs[name].MODEL.VILD.TEMPERATURE for name, *_ in weighted]
    temperatures = {each: softmax_settings(each, model.vocabulary)[0] for each in given}
    batches = list(islice(build_train_loader(cfg, open_store(cfg)), args.batches))
    objectives = [L1, *(objective for _, objective, _ in weighted)]
    l1, *norms = mean_norms(objectives, [1.0, *map(temperatures.get, given)], model, batches)  # L1 has no softmax
    own = next((each for each in parse_objectives(cfg.MODEL.VILD.OBJECTIVES) if each.name == "l1"), L1)
    l1 *= scale_of(cfg, "l1", width) * own.weight(PROGRESS)
    if not l1:
        raise UserError("--config-file: its L1, of which shares are, has weight 0 in the middle of the training")
    table = shares(weighted, norms, l1, args.share)
    keys = ("row", "objective", "weight", "gradient", "share", "proposed")
    if args.output:
        write_json(args.output, {"l1": l1, "rows": [dict(zip(keys, row, strict=True)) for row in table]})
    head = ["", "objective", "weight", "gradient norm", "share of L1's", f"weight for a share of {args.share:g}"]
    print(markdown_table(head, [[*row[:2], *(decimal(x, 4) for x in row[2:])] for row in table]))
    print(f"\nL1's gradient at the config's weight: {l1:.4f}")


if __name__ == "__main__":
    main()
