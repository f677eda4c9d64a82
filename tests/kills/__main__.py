#!/usr/bin/env python3
"""SIGKILL at random moments over store building, training and evaluation on a tiny built-in world; after each, the
same command again; in the end the bytes of the store, weights and losses of the training and the metrics must be those
of a run that was left alone.

    PYTHONPATH=tools python -m tests.kills --output output/kill-test

prints `50 kills, 0 lost`; exit status 1 and what was lost otherwise
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from experiments.glyphs import GlyphsRun
from experiments.runner import TOOLS

from tests.kills.harness import Harness, KillableCommand
from vild.utils.errors import one_line_errors
from vild.utils.files import write_json
from vild.utils.lock import only_writer

STEPS = 8


def make_jobs(config: Path) -> list[KillableCommand]:
    """The commands, in a folder in which ``world`` is what stages of :class:`GlyphsRun` have written."""

    def job(name: str, output: str, tool: str, *arguments: object, **kwargs) -> KillableCommand:
        return KillableCommand(name, (sys.executable, str(TOOLS / tool), *map(str, arguments)), output, **kwargs)

    teacher = "local-dir:world/teacher"
    detector = [
        "--config-file", config, "--num-gpus", 0, "--resume", "MODEL.DEVICE", "cpu",
        "MODEL.VILD.VOCABULARY", "world/vocabulary.safetensors", "MODEL.VILD.STORE", "store",
        "MODEL.VILD.TEACHER.NAME", teacher, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 1,
    ]  # fmt: skip
    start = ("OUTPUT_DIR", "training", "MODEL.WEIGHTS", "world/proposals/model_final.pth")
    return [
        job("store", "store", "build_teacher_store.py", "--dataset", "glyphs_train", "--proposals",
            "world/proposals_train.safetensors", "--teacher", teacher, "--shard-images", 5, "--device", "cpu",
            "--output", "store"),
        job("training", "training", "train_net.py", *detector, *start, "SOLVER.MAX_ITER", STEPS),
        # what is logged is a median over the steps since the last resume; of one further step, it is that step's
        job("a further step", "training", "train_net.py", *detector, *start, "SOLVER.MAX_ITER", STEPS + 1,
            "DATASETS.TEST", "()", kill=False, losses=True),
        job("evaluation", "evaluation", "train_net.py", "--eval-only", *detector, "OUTPUT_DIR", "evaluation",
            "MODEL.WEIGHTS", "training/model_final.pth"),
    ]  # fmt: skip


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/kill-test"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4, help="how often all of it is begun from nothing")
    parser.add_argument("--cold", action="store_true", help="a new interpreter for every start, which takes far longer")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    folder, start = args.output.resolve(), time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {line}", flush=True)

    with only_writer(folder, folder=True):
        world = GlyphsRun(folder / "world", smoke=True)
        world.run(world.vocabulary(), world.proposals())
        environment = os.environ | {
            "DETECTRON2_DATASETS": str(folder / "world" / "datasets"),
            "OMP_NUM_THREADS": "1",  # as many in every run, for the same last bits
        }
        harness = Harness(folder, make_jobs(world.config("vild")), environment, link=["world"], warm=not args.cold)
        torch.set_num_threads(1)  # a process of several threads cannot be copied
        harness.measure(tell)
        harness.torment(args.kills, args.rounds, args.seed, tell)
        seconds = round(time.monotonic() - start)
        write_json(folder / "kills.json", {"killed": harness.killed, "lost": harness.lost, "seconds": seconds})
    for name, kinds in harness.killed.items():
        if sum(kinds.values()):
            tell(f"{name}: " + ", ".join(f"{count} at {kind}" for kind, count in kinds.items()))
    print(harness.verdict())
    sys.exit(1 if harness.lost else 0)


if __name__ == "__main__":
    main()
