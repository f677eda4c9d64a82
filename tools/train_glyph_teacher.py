#!/usr/bin/env python3
"""Train the built-in world's teacher, a small open_clip model; a minute or two on two cores.

Use it as teacher `local-dir:OUTPUT`.
"""

import argparse
import logging
from pathlib import Path

from vild.glyphs.teacher import MODEL_CFG, train
from vild.utils.errors import one_line_errors


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=MODEL_CFG["embed_dim"], help="of its embeddings")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("root").setLevel(logging.ERROR)
    train(args.output, args.steps, args.seed, width=args.width)


if __name__ == "__main__":
    main()
