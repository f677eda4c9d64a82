"""New names for a trained detector of the built-in world, by plain fine-tuning, ``tools/finetune.py`` and
``tools/probe.py``: what is learned, and what is forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from experiments.glyphs import GlyphsRun
from experiments.runner import Stage, stage
from vild.checkpoint.checkpointer import write_checkpoint
from vild.config import load_config
from vild.data.classes import read_split
from vild.evaluation.metrics import group_mean
from vild.utils.weight_files import load_weights
from vild.vocabulary.vocabulary import Vocabulary

NEW = "glyphs_new_train"
ROWS = {"before": "before", "plain": "plain fine-tuning", "finetuned": "tools/finetune.py", "probe": "tools/probe.py"}
GROUPS = ("base", "old novel", "new")
ABSENT = ("false_boxes", "recall")


class ForgettingRun(GlyphsRun):
    """Of a detector that is named as its config, ``variant``, evaluated on ``dataset``."""

    def __init__(self, folder: Path, seed: int, variant: str, dataset: str):
        super().__init__(folder, seed)
        self.variant, self.dataset = variant, dataset

    def learn(self) -> None:
        """Train the detector and its four successors, evaluate them, and ask them for absent words."""
        old = self.detector(self.variant, self.variant)
        world = stage("world_new", self.folder / "datasets", "make_glyphs.py", "--seed", self.seed, "--sets",
                      "new_train", needs=[self.world()])  # fmt: skip
        detector = ("--config-file", self.config(self.variant), "--weights", old.output / "model_final.pth")
        own = ("MODEL.VILD.TEACHER.NAME", f"local-dir:{self.teacher().output}", "SEED", self.seed)
        needs, tuned, probe = (old, world), self._path("finetuned"), self._path("probe").with_suffix(".pth")
        finetune = stage(tuned.name, tuned, "finetune.py", "--resume", "--dataset", NEW, "--output-dir", tuned,
                         *detector, "--opts", *own, needs=needs)  # fmt: skip
        probed = stage(probe.stem, probe, "probe.py", "--dataset", NEW, "--output", probe, *detector, "--opts", *own,
                       needs=needs)  # fmt: skip
        plain = self._plain(finetune)
        self.run(probed, plain)
        # what plain fine-tuning has learned, asked for all names
        offered = load_weights(plain.output / "model_final.pth")
        offered["vocabulary"] |= Vocabulary.load(tuned / "vocabulary.safetensors").state()
        write_checkpoint(plain.output / "all_names.pth", offered)
        files = {"before": old.output / "model_final.pth", "plain": plain.output / "all_names.pth",
                 "finetuned": tuned / "model_final.pth", "probe": probe}  # fmt: skip
        made = {"before": old, "plain": plain, "finetuned": finetune, "probe": probed}
        self.run(*(each for name, file in files.items() for each in self._evaluate(name, file, made[name])))

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.variant}_{name}"

    def _plain(self, finetune: Stage) -> Stage:
        """The same schedule, with a vocabulary of the new names alone: everything is trained, nothing is kept."""
        output, file = self._path("plain"), self.folder / "vocabulary_new.safetensors"
        words = stage(file.stem, file, "build_vocabulary.py", "--vocabulary", NEW, "--teacher",
                      f"local-dir:{self.teacher().output}", "--output", file, needs=[finetune])  # fmt: skip
        weights = load_config(self.config(self.variant)).MODEL.VILD.LOSS_WEIGHTS
        settings = ("MODEL.VILD.OLD_STUDENT.WEIGHTS", "", "MODEL.VILD.OLD_STUDENT.HEAD_ONLY", False,
                    "MODEL.VILD.DISTILL_FROM", "teacher",
                    "MODEL.VILD.VOCABULARY", file, "MODEL.VILD.LOSS_WEIGHTS", weights,
                    "OUTPUT_DIR", output)  # fmt: skip
        return stage(output.name, output, "train_net.py", "--config-file", finetune.output / "config.yaml", "--resume",
                     "--num-gpus", 0, *settings, needs=[finetune, words])  # fmt: skip

    def _evaluate(self, name: str, weights: Path, made: Stage) -> list[Stage]:
        place = f"{self._path(name).name}_{self.dataset}"
        settings = ("MODEL.WEIGHTS", weights, "MODEL.VILD.VOCABULARY", weights, "MODEL.VILD.CALIBRATION", False,
                    "DATASETS.TEST", f"('{self.dataset}',)")  # fmt: skip
        absent = self.folder / f"{place}_absent.json"
        options = ("--config-file", self.config(self.variant), "--dataset", self.dataset, "--output", absent)
        return [
            self.train(place, self.variant, *settings, flags=("--eval-only",), needs=[made]),
            stage(absent.stem, absent, "absent_words.py", *options, "--weights", weights, "--opts",
                  "MODEL.VILD.CALIBRATION", False, needs=[made]),
        ]  # fmt: skip

    def read_row(self, name: str) -> dict[str, float]:
        """AP50 of each of GROUPS, and ABSENT of random absent words."""
        place = f"{self._path(name).name}_{self.dataset}"
        classes = json.loads((self.folder / place / "inference" / "per_class.json").read_text())["classes"]
        new = read_split("glyphs_new", self.folder).names("base")
        values = np.array([c["bbox/AP50"] for c in classes], float)
        groups = ["new" if c["name"] in new else {"novel": "old novel"}.get(c["split"], c["split"]) for c in classes]
        found = {group: group_mean(values, [g == group for g in groups]) for group in GROUPS}
        absent = json.loads((self.folder / f"{place}_absent.json").read_text())["random"]
        return found | {key: absent[key] for key in ABSENT}
