"""Run the tools one after another as a user would, each stage once: what is there is not made again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from vild.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
_PROGRESS = re.compile(rb"(\d+%)\|[^|]*\|\s*\S+ \[[^<\]]*<([\d:]+)|eta: ([\d:]+)")


class Pipeline:
    """Stages under one folder. ``<folder>/stages/<name>.json`` marks a finished one, ``<name>.log`` is its output.

    Args:
        folder: everything the stages write lies below it.
        total: how many stages there will be (for the display).
    """

    def __init__(self, folder: Path, total: int):
        self.folder, self.total, self.count = folder, total, 0
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}

    def run(self, name: str, *command: object) -> None:
        """Run ``tools/<command[0]>`` unless the stage is done; its last progress is shown.

        Raises:
            UserError: the stage failed, or was done before by another command.
        """
        self.count += 1
        arguments = [str(c) for c in command]
        marker, log = self.folder / "stages" / f"{name}.json", self.folder / "stages" / f"{name}.log"
        head = f"[{self.count}/{self.total}] {name}"
        if marker.exists():
            done = json.loads(marker.read_text())
            if done["command"] != arguments:
                raise UserError(f"{marker}: stage '{name}' was made by another command; remove {self.folder}")
            self.seconds[name] = done["seconds"]
            print(f"{head}: there already", flush=True)
            return
        started = time.time()
        environment = {**os.environ, "DETECTRON2_DATASETS": str(self.folder / "datasets")}
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(REPOSITORY / "tools" / arguments[0]), *arguments[1:]],
                stdout=file, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip
            try:
                self._wait(process, head, log, started)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        seconds = round(time.time() - started, 1)
        if process.returncode != 0:
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise UserError(f"stage '{name}' failed: {lines[-1].removeprefix('error: ')} (see {log})")
        marker.write_text(json.dumps({"command": arguments, "seconds": seconds}))
        self.seconds[name] = seconds
        print(f"{head}: done in {seconds:.0f} s{' ' * 30}", flush=True)

    @staticmethod
    def _wait(process: subprocess.Popen, head: str, log: Path, started: float) -> None:
        """Wait for the stage, telling every few seconds (on a terminal) or every half minute how far it is."""
        terminal = sys.stdout.isatty()
        told = 0.0
        while process.poll() is None:
            time.sleep(0.5)
            if time.time() - told < (3 if terminal else 30):
                continue
            told = time.time()
            with open(log, "rb") as file:
                file.seek(max(0, log.stat().st_size - 4096))
                found = _PROGRESS.findall(file.read())
            percent, left, eta = (part.decode() for part in found[-1]) if found else ("", "", "")
            rest = f", {percent + ', ' if percent else ''}{left or eta} left in this step" if found else ""
            line = f"{head}: {time.time() - started:.0f} s{rest}"
            print(f"\r{line:<78}" if terminal else line, end="" if terminal else "\n", flush=True)
        if terminal:
            print("\r", end="")


class GlyphsRun(Pipeline):
    """The stages of the method on the built-in world. Paths below ``folder``, one method a stage.

    Args:
        seed: of the world, the teacher and every training.
        iterations: of every detector (0: as the configs say).
        smoke: everything as small as it can be: shows that the stages fit together, nothing else.
    """

    def __init__(self, folder: Path, total: int, seed: int = 0, iterations: int = 0, smoke: bool = False):
        super().__init__(folder, total)
        self.seed, self.iterations, self.smoke = seed, 10 if smoke else iterations, smoke
        self.teacher = f"local-dir:{folder / 'teacher'}"
        self.vocabulary = folder / "vocabulary.safetensors"

    def config(self, name: str) -> Path:
        return REPOSITORY / "configs" / "Glyphs" / f"{name}.yaml"

    def metrics(self, name: str) -> dict[str, float | None]:
        """The metrics a training stage wrote, keyed "<kind>/<metric>" (one data set)."""
        flat = json.loads((self.folder / name / "inference" / "vild_metrics.json").read_text())
        return {key.split("/", 1)[1]: value for key, value in flat.items()}

    def world(self, *sets: str) -> None:
        """The world, its teacher and its vocabulary."""
        fraction, steps = (0.05, 10) if self.smoke else (1.0, 400)
        self.run("world", "make_glyphs.py", "--seed", self.seed, "--fraction", fraction, "--sets", *sets)
        self.run(
            "teacher", "train_glyph_teacher.py", "--seed", self.seed, "--steps", steps,
            "--output", self.folder / "teacher",
        )  # fmt: skip
        self.make_vocabulary("vocabulary", "glyphs_train")

    def make_vocabulary(self, name: str, dataset: str) -> None:
        output = self.folder / f"{name}.safetensors"
        self.run(name, "build_vocabulary.py", "--dataset", dataset, "--teacher", self.teacher, "--output", output)

    def make_proposals(self, name: str, dataset: str) -> None:
        weights = self.folder / "proposals" / "model_final.pth"
        self.run(
            name, "make_proposals.py", "--config-file", self.config("proposals"), "--dataset", dataset,
            "--output", self.folder / f"{name}.safetensors", "MODEL.WEIGHTS", weights,
        )  # fmt: skip

    def store(self, name: str, dataset: str, proposals: str) -> None:
        self.run(
            name, "build_teacher_store.py", "--dataset", dataset, "--teacher", self.teacher,
            "--proposals", self.folder / f"{proposals}.safetensors", "--output", self.folder / name,
        )  # fmt: skip

    def train(self, name: str, config: str, *overrides: object) -> None:
        """Train and evaluate a config; goes on from its last checkpoint if it was killed."""
        if self.iterations and (config != "proposals" or self.smoke):
            overrides = ("SOLVER.MAX_ITER", self.iterations, *overrides)
        self.run(
            name, "train_net.py", "--config-file", self.config(config), "--resume",
            "--num-gpus", int(_has_gpu()), "OUTPUT_DIR", self.folder / name, "SEED", self.seed,
            "MODEL.VILD.VOCABULARY", self.vocabulary, "MODEL.VILD.STORE", self.folder / "store",
            "MODEL.VILD.TEACHER.NAME", self.teacher, *overrides,
        )  # fmt: skip

    def gauges(self, name: str, student: str, proposals: str) -> None:
        self.run(
            name, "gauges.py", "--config-file", self.config(student), "--dataset", "glyphs_val",
            "--proposals", self.folder / f"{proposals}.safetensors", "--output", self.folder / f"{name}.json",
            "MODEL.WEIGHTS", self.folder / student / "model_final.pth",
            "MODEL.VILD.TEACHER.NAME", self.teacher,
        )  # fmt: skip


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
