#!/usr/bin/env python3
"""Kill store building, training and evaluation (SIGKILL) at random moments on a tiny built-in world, and run the same
command again after each kill. In the end, the bytes of the store, weights and losses of the training, and the metrics
must equal those of a run without kills.

    PYTHONPATH=tools python -m tests.kills --output-dir output/kill-test

prints `50 kills, 0 lost`; otherwise what was lost, with exit status 1
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
            "--output-dir", "store"),
        job("training", "training", "train_net.py", *detector, *start, "SOLVER.MAX_ITER", STEPS),
        # logged losses are medians over the steps since the last resume; of one more step, they are that step's own
        job("one more step", "training", "train_net.py", *detector, *start, "SOLVER.MAX_ITER", STEPS + 1,
            "DATASETS.TEST", "()", kill=False, losses=True),
        job("evaluation", "evaluation", "train_net.py", "--eval-only", *detector, "OUTPUT_DIR", "evaluation",
            "MODEL.WEIGHTS", "training/model_final.pth"),
    ]  # fmt: skip


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("output/kill-test"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4, help="how often everything starts from nothing")
    parser.add_argument("--cold", action="store_true", help="start a new interpreter each time (much slower)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    folder, start = args.output_dir.resolve(), time.monotonic()

    def log(line: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {line}", flush=True)

    with only_writer(folder, folder=True):
        world = GlyphsRun(folder / "world", smoke=True)
        world.run(world.vocabulary(), world.proposals())
        environment = os.environ | {
            "DETECTRON2_DATASETS": str(folder / "world" / "datasets"),
            "OMP_NUM_THREADS": "1",  # the last bits depend on it
        }
        harness = Harness(folder, make_jobs(world.config("vild")), environment, link=["world"], warm=not args.cold)
        torch.set_num_threads(1)  # a process with several threads cannot be forked
        harness.run_references(log)
        harness.kill_and_compare(args.kills, args.rounds, args.seed, log)
        seconds = round(time.monotonic() - start)
        write_json(folder / "kills.json", {"killed": harness.killed, "lost": harness.lost, "seconds": seconds})
    for name, kinds in harness.killed.items():
        if sum(kinds.values()):
            log(f"{name}: " + ", ".join(f"{count} at {kind}" for kind, count in kinds.items()))
    print(harness.summary())
    sys.exit(1 if harness.lost else 0)


if __name__ == "__main__":
    main()
