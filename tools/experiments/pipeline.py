"""Run the tools one after another as a user would, each stage once: what is there is not made again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

import torch

from vild.utils.errors import UserError
from vild.utils.files import write_json

TOOLS = Path(__file__).resolve().parents[1]
CONFIGS = TOOLS.parent / "configs" / "Glyphs"
SECOND_WIDTH = 96  # of the second teacher's embeddings
_PROGRESS = re.compile(rb"(\d+%)\|[^|]*\|\s*\S+ \[[^<\]]*<([\d:]+)|eta: ([\d:]+)")


@dataclass(frozen=True)
class Stage:
    """A tool with its arguments, under a name."""

    name: str
    command: tuple[str, ...]

    @property
    def output(self) -> str:
        """The file or folder that its command names to be written; "" where it names none."""
        return next((b for a, b in pairwise(self.command) if a in ("--output", "OUTPUT_DIR")), "")


def stage(name: str, *command: object) -> Stage:
    return Stage(name, tuple(str(c) for c in command))


class Pipeline:
    """Stages under one folder. ``<folder>/stages/<name>.json`` has a stage's command as soon as it begins, and its
    seconds once it is done; ``<name>.log`` is its output.

    Args:
        folder: everything the stages write lies below it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}

    def run(self, *stages: Stage) -> None:
        """Run stages that do not need one another side by side, as many at once as there are cores, which they share
        (two small trainings on a core each finish sooner than one after the other on both). Those done are left out.

        Raises:
            UserError: a stage failed (told when the others have ended), or was begun before by another command.
        """
        todo = [each for each in stages if not self._is_done(each)]
        cores = torch.get_num_threads()
        threads = max(1, cores // max(len(stages), 1))  # also of those done: all of a call compute alike
        running: list[_Running] = []
        try:
            failed = self._work_through(todo, running, cores, threads)
        finally:
            for process in running:
                process.stop()
        if failed:
            raise UserError(f"{failed[0]}; {len(failed)} of {len(stages)} stages failed") from failed[0]

    def _is_done(self, each: Stage) -> bool:
        """UserError if what is there, whole or in part, is another command's."""
        marker = self.folder / "stages" / f"{each.name}.json"
        if not marker.exists():
            return False
        made = json.loads(marker.read_text())
        if made["command"] != list(each.command):
            remove = f"that file and {each.output}, with what later stages made of it" if each.output else self.folder
            raise UserError(
                f"{marker}: stage '{each.name}' was begun by another command, "
                f"{_first_difference(made['command'], each.command)}; remove {remove}, or name a grid's row differently"
            )
        if "seconds" not in made:
            return False
        self.seconds[each.name] = made["seconds"]
        print(f"{each.name}: there already", flush=True)
        return True

    def _work_through(self, todo: list[Stage], running: list[_Running], at_once: int, threads: int) -> list[UserError]:
        """Until all have ended, whichever fail: their errors. Tells every few seconds (on a terminal) or every half
        minute how far they are."""
        terminal, told, failed = sys.stdout.isatty(), -60.0, []
        while todo or running:
            while todo and len(running) < at_once:
                running.append(_Running(todo.pop(0), self.folder, threads))
            time.sleep(0.5)
            for process in [r for r in running if r.ended()]:
                running.remove(process)
                try:
                    self.seconds[process.stage.name] = process.finish()
                except UserError as error:
                    failed.append(error)
                    print(f"{error}{' ' * 40}", flush=True)
                    continue
                left = f"; {len(todo) + len(running)} left at this point" if todo or running else ""
                print(f"{process.stage.name}: done in {process.seconds:.0f} s{left}{' ' * 40}", flush=True)
            if running and time.monotonic() - told > (3 if terminal else 30):
                told = time.monotonic()
                line = "; ".join(r.progress() for r in running)
                print(f"\r{line:<78}" if terminal else line, end="" if terminal else "\n", flush=True)
        if terminal:
            print("\r", end="")
        return failed


def _first_difference(then: Sequence[str], now: Sequence[str]) -> str:
    """In words, with the argument before it, which may be the key."""
    pairs = enumerate(zip_longest(then, now))
    at = next(n for n, (a, b) in pairs if a != b)
    was, is_now = (" ".join(command[max(0, at - 1) : at + 1]) for command in (then, now))
    return f"'{was}' where it is now '{is_now}'"


class _Running:
    """A stage in its process. Its command is written down first: what it leaves half done is no other command's."""

    def __init__(self, each: Stage, folder: Path, threads: int):
        self.stage, self.started, self.seconds = each, time.monotonic(), 0.0
        self.marker, self.log = (folder / "stages" / f"{each.name}.{end}" for end in ("json", "log"))
        environment = {**os.environ, "DETECTRON2_DATASETS": str(folder / "datasets"), "OMP_NUM_THREADS": str(threads)}
        write_json(self.marker, {"command": each.command})
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(TOOLS / each.command[0]), *each.command[1:]],
                stdout=file, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        if not self.ended():
            self.process.terminate()
            self.process.wait()

    def finish(self) -> float:
        """Mark the stage as done; its seconds. UserError if it failed."""
        self.seconds = round(time.monotonic() - self.started, 1)
        if self.process.returncode != 0:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
            reason = lines[-1].removeprefix("error: ")
            raise UserError(f"stage '{self.stage.name}' failed: {reason} (see {self.log})")
        write_json(self.marker, {"command": self.stage.command, "seconds": self.seconds})
        return self.seconds

    def progress(self) -> str:
        """How long it has run and, from its last output, how long is left."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            found = _PROGRESS.findall(file.read())
        rest = ""
        if found:
            percent, left, eta = (part.decode() for part in found[-1])
            rest = f", {percent}{', ' if percent else ''}{left or eta} left in this step"
        return f"{self.stage.name}: {time.monotonic() - self.started:.0f} s{rest}"


class GlyphsRun(Pipeline):
    """The stages of the method on the built-in world. Paths below ``folder``, one method a stage.

    Args:
        seed: of the world, the teacher and every training.
        iterations: of every detector (0: as the configs say).
        smoke: everything as small as it can be: shows that the stages fit together, nothing else.
    """

    def __init__(self, folder: Path, seed: int = 0, iterations: int = 0, smoke: bool = False):
        super().__init__(folder)
        self.seed, self.iterations, self.smoke = seed, 10 if smoke else iterations, smoke
        self.teacher = f"local-dir:{folder / 'teacher'}"
        self.vocabulary = folder / "vocabulary.safetensors"

    def train_both(self) -> None:
        """From nothing to ViLD and ViLD-text, trained on the same scenes for as long, and the gauges."""
        self.prepare()
        self.run(self.train("text", "text", start="proposals"), self.train("vild", "vild", start="proposals"))
        self.run(self.gauges("gauges", "vild", "proposals_val"))

    def prepare(self, *beside: Stage) -> None:
        """From nothing to all that a detector is trained with.

        ``beside``: further stages that need the world and the teacher only.
        """
        self.run(self.world("world", "train", "dev", "val"))
        self.run(self.train_teacher(), self.train("proposals", "proposals"))
        self.run(
            self.make_vocabulary("vocabulary", "glyphs_train"),
            *beside,
            self.make_proposals("proposals_train", "glyphs_train"),
            self.make_proposals("proposals_val", "glyphs_val"),
        )
        self.run(self.store("store", "glyphs_train", "proposals_train"))

    def config(self, name: str) -> Path:
        return CONFIGS / f"{name}.yaml"

    def metrics(self, name: str) -> dict[str, float | None]:
        """The metrics a training stage wrote, keyed "<kind>/<metric>" (one data set)."""
        flat = json.loads((self.folder / name / "inference" / "vild_metrics.json").read_text())
        return {key.split("/", 1)[1]: value for key, value in flat.items()}

    def read_gauges(self) -> tuple[dict[str, dict], dict]:
        """What the gauges stage wrote: {gauge: {"base", "novel"}}, with the proposals' recall; and the metrics of
        CLIP on crops."""
        gauges = json.loads((self.folder / "gauges.json").read_text())
        crops, recall = gauges.pop("clip_on_crops"), gauges.pop("proposals")
        gauges["proposal_recall50"] = {
            mark: next(v for k, v in recall.items() if "recall50" in k and k.endswith(mark))
            for mark in ("base", "novel")
        }
        return gauges, crops

    def world(self, name: str, *sets: str) -> Stage:
        fraction = 0.05 if self.smoke else 1.0
        return stage(name, "make_glyphs.py", "--seed", self.seed, "--fraction", fraction, "--sets", *sets)

    def train_teacher(self) -> Stage:
        return self._train_teacher("teacher", self.seed)

    def second_teacher(self) -> dict[str, str]:
        """An entry of MODEL.VILD.TEACHERS, made after :meth:`prepare`: a teacher of another width that learned from
        other images, its words, and its store over the same proposals."""
        self.run(self._train_teacher("teacher2", self.seed + 100, "--width", SECOND_WIDTH))
        teacher = f"local-dir:{self.folder / 'teacher2'}"
        self.run(
            self.make_vocabulary("vocabulary2", "glyphs_train", teacher),
            self.store("store2", "glyphs_train", "proposals_train", teacher),
        )
        return {"STORE": str(self.folder / "store2"), "VOCABULARY": str(self.folder / "vocabulary2.safetensors")}

    def _train_teacher(self, name: str, seed: int, *more: object) -> Stage:
        steps = 10 if self.smoke else 400
        tool = "train_glyph_teacher.py"
        return stage(name, tool, "--seed", seed, "--steps", steps, "--output", self.folder / name, *more)

    def make_vocabulary(self, name: str, dataset: str, teacher: str = "") -> Stage:
        """``teacher``: "" for the first."""
        output, teacher = self.folder / f"{name}.safetensors", teacher or self.teacher
        return stage(name, "build_vocabulary.py", "--dataset", dataset, "--teacher", teacher, "--output", output)

    def make_proposals(self, name: str, dataset: str, network: str = "proposals") -> Stage:
        return stage(
            name, "make_proposals.py", "--config-file", self.config("proposals"), "--dataset", dataset,
            "--output", self.folder / f"{name}.safetensors",
            "MODEL.WEIGHTS", self.folder / network / "model_final.pth",
        )  # fmt: skip

    def store(self, name: str, dataset: str, proposals: str, teacher: str = "") -> Stage:
        """``teacher``: "" for the first."""
        return stage(
            name, "build_teacher_store.py", "--dataset", dataset, "--teacher", teacher or self.teacher,
            "--proposals", self.folder / f"{proposals}.safetensors", "--output", self.folder / name,
        )  # fmt: skip

    def train(self, name: str, config: str, *overrides: object, start: str = "") -> Stage:
        """Train and evaluate a config; goes on from its last checkpoint if it was killed.

        ``start``: another stage, whose backbone and RPN the training starts from ("": from scratch).
        """
        if self.iterations and (start or self.smoke):
            overrides = ("SOLVER.MAX_ITER", self.iterations, *overrides)
        if start:
            overrides = ("MODEL.WEIGHTS", self.folder / start / "model_final.pth", *overrides)
        return stage(
            name, "train_net.py", "--config-file", self.config(config), "--resume",
            "--num-gpus", int(torch.cuda.is_available()), "OUTPUT_DIR", self.folder / name, "SEED", self.seed,
            "MODEL.VILD.VOCABULARY", self.vocabulary, "MODEL.VILD.STORE", self.folder / "store",
            "MODEL.VILD.TEACHER.NAME", self.teacher, *overrides,
        )  # fmt: skip

    def gauges(self, name: str, student: str, proposals: str, config: str = "", *overrides: object) -> Stage:
        """``config`` and ``overrides``: of the student's stage ("": named like it)."""
        return stage(
            name, "gauges.py", "--config-file", self.config(config or student), "--dataset", "glyphs_val",
            "--proposals", self.folder / f"{proposals}.safetensors", "--output", self.folder / f"{name}.json",
            "--clip-on-crops", *overrides, "MODEL.WEIGHTS", self.folder / student / "model_final.pth",
            "MODEL.VILD.TEACHER.NAME", self.teacher,
        )  # fmt: skip
