#!/usr/bin/env python3
"""Has a training file, a proposal file, a store, a vocabulary or a network seen novel annotations, and by what
evidence?

    tools/audit_leakage.py --dataset lvis_v1_train_norare --full lvis_v1_train --proposals p.safetensors \\
        --store store --weights output/model_final.pth --vocabulary v.safetensors \\
        --teacher ViT-B-32-quickgelu --pretrained openai --output audit.json

Evidence is "measured" against the full annotations or the teacher, or "recorded" by the tools that made a file. Exit
status: 0 all clean; 1 a LEAK; 3 no leak found, but something cannot be decided (which is not clean); 2 a wrong
command.
"""

import sys

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", required=True, metavar="NAME", help="the training data set, or an annotation file")
    parser.add_argument("--full", metavar="NAME", help="data set or file with ALL annotations of the same images")
    parser.add_argument("--split", default="", help="which names are novel (default: as in --dataset)")
    parser.add_argument("--proposals", metavar="FILE", help="a proposal file")
    parser.add_argument("--store", metavar="STORE", help="an embedding store")
    parser.add_argument("--weights", metavar="NAME", help="a checkpoint file, or the name or folder of a detector")
    parser.add_argument("--vocabulary", metavar="FILE", help="a vocabulary, or what --weights takes")
    add_shared(parser, "--teacher", note="to recompute the vocabulary")
    add_shared(parser, "--pretrained")
    add_shared(parser, "--output", note="the findings as JSON")
    args = parser.parse_args()

    from tabulate import tabulate

    from vild.audit.findings import findings
    from vild.data.provenance import CLEAN, LEAK, UNKNOWN, worst
    from vild.utils.files import write_json

    rows = list(findings(args))
    overall = worst([row[2] for row in rows])
    if args.output:
        keys = ("artefact", "how", "verdict", "evidence")
        write_json(args.output, {"verdict": overall, "findings": [dict(zip(keys, r, strict=True)) for r in rows]})
    print(tabulate([(a, f"{v} ({h})", e) for a, h, v, e in rows], ["artefact", "verdict", "evidence"],
                   tablefmt="grid", maxcolwidths=[30, 14, 70]))  # fmt: skip
    print(f"verdict: {overall}")
    sys.exit({CLEAN: 0, LEAK: 1, UNKNOWN: 3}[overall])


if __name__ == "__main__":
    main()
