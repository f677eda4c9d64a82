"""The stages of the method on the built-in world, from drawing its scenes to a trained and evaluated detector."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from experiments.runner import Runner, Stage

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "Glyphs"
EXTRA_WIDTH = 96  # of the extra teacher's embeddings; the first teacher's are 64 wide


class GlyphsRun(Runner):
    """The stages under one folder.

    Their argument ``data`` names training scenes: "train", or "nonovel", in which no novel object is drawn.
    With ``extra`` they are of the extra teacher, of another width, trained on other images.

    Args:
        folder: everything the stages write lies below it.
        seed: of the world, the teacher and every training.
        iterations: of every detector (0: as the configs say).
        smoke: everything as small as it can be, to see whether the stages work together.
    """

    def __init__(self, folder: Path, seed: int = 0, iterations: int = 0, smoke: bool = False):
        super().__init__(folder, DETECTRON2_DATASETS=str(folder / "datasets"))
        self.seed, self.iterations, self.smoke = seed, 10 if smoke else iterations, smoke

    def prepare(self, *beside: Stage) -> None:
        """Make all that a detector is trained with; ``beside`` are stages that need the world and the teacher only."""
        self.run(self.vocabulary(), *beside, self.proposals(), self.proposals("val"))
        self.run(self.store())

    def world(self, data: str = "train") -> Stage:
        sets, needs = (("train", "dev", "val"), ()) if data == "train" else ((f"{data}_train",), (self.world(),))
        options = ("--seed", self.seed, "--fraction", 0.05 if self.smoke else 1.0, "--sets", *sets)
        return Stage.of(_name("world", data), self.folder / "datasets", "make_glyphs.py", *options, needs=needs)

    def teacher(self, extra: bool = False) -> Stage:
        name, seed, width = ("teacher2", self.seed + 100, ("--width", EXTRA_WIDTH)) if extra else (
            "teacher", self.seed, ())  # fmt: skip
        output, steps = self.folder / name, 10 if self.smoke else 400
        options = ("--seed", seed, "--steps", steps, "--output", output, *width)
        return Stage.of(name, output, "train_glyph_teacher.py", *options, needs=(self.world(),))

    def vocabulary(self, dataset: str = "glyphs_train", extra: bool = False) -> Stage:
        name = "vocabulary2" if extra else "vocabulary" + dataset.removeprefix("glyphs_train")
        teacher, output = self.teacher(extra), self.folder / f"{name}.safetensors"
        options = ("--dataset", dataset, "--teacher", f"local-dir:{teacher.output}", "--output", output)
        return Stage.of(name, output, "build_vocabulary.py", *options, needs=(teacher,))

    def network(self, data: str = "train") -> Stage:
        """The class-agnostic proposal network."""
        name = "proposals" if data == "train" else f"network_{data}"
        iterations = ("SOLVER.MAX_ITER", self.iterations) if self.smoke else ()
        dataset = () if data == "train" else ("DATASETS.TRAIN", f"('{_dataset(data)}',)")
        return self._train(name, "proposals", *iterations, *dataset, needs=(self.world(data),))

    def proposals(self, data: str = "train") -> Stage:
        """``data`` may be "val", too."""
        network, name = self.network("train" if data == "val" else data), f"proposals_{data}"
        output = self.folder / f"{name}.safetensors"
        options = ("--config-file", self.config("proposals"), "--dataset", _dataset(data), "--output", output)
        weights = ("MODEL.WEIGHTS", network.output / "model_final.pth")
        return Stage.of(name, output, "make_proposals.py", *options, *weights, needs=(network,))

    def store(self, data: str = "train", extra: bool = False) -> Stage:
        name = "store2" if extra else _name("store", data)
        teacher, proposals, output = self.teacher(extra), self.proposals(data), self.folder / name
        options = ("--dataset", _dataset(data), "--teacher", f"local-dir:{teacher.output}",
                   "--proposals", proposals.output, "--output", output)  # fmt: skip
        return Stage.of(name, output, "build_teacher_store.py", *options, needs=(teacher, proposals))

    def detector(
        self, name: str, config: str, *overrides: object, data: str = "train", extra_teacher: str = ""
    ) -> Stage:
        """Train and evaluate a config, from the proposal network's weights unless ``overrides`` say otherwise.

        Args:
            data: "all", too: the scenes of "train" with the novel objects annotated.
            extra_teacher: "extra"; or "twice": the first teacher as a second one.
        """
        scenes = "train" if data == "all" else data
        network, store = self.network(scenes), self.store(scenes)
        vocabulary = self.vocabulary("glyphs_train_all" if data == "all" else "glyphs_train")
        needs, settings = [network, vocabulary, store], []
        if self.iterations:
            settings += ["SOLVER.MAX_ITER", self.iterations]
        if data != "train":
            settings += ["DATASETS.TRAIN", f"('{_dataset(data)}',)"]
        if extra_teacher:
            extra = extra_teacher == "extra"
            entry = {"STORE": self.store(extra=extra), "VOCABULARY": self.vocabulary(extra=extra)}
            needs += entry.values()
            settings += ["MODEL.VILD.TEACHERS", [{key: str(stage.output) for key, stage in entry.items()}]]
        return self._train(
            name, config, "MODEL.VILD.VOCABULARY", vocabulary.output, "MODEL.VILD.STORE", store.output,
            "MODEL.VILD.TEACHER.NAME", f"local-dir:{self.teacher().output}",
            "MODEL.WEIGHTS", network.output / "model_final.pth", *settings, *overrides, needs=tuple(needs),
        )  # fmt: skip

    def _train(self, name: str, config: str, *overrides: object, needs: tuple[Stage, ...]) -> Stage:
        """Resumes from its last checkpoint if it was killed."""
        output, gpus = self.folder / name, int(torch.cuda.is_available())
        options = ("--config-file", self.config(config), "--resume", "--num-gpus", gpus)
        settings = ("OUTPUT_DIR", output, "SEED", self.seed, *overrides)
        return Stage.of(name, output, "train_net.py", *options, *settings, needs=needs)

    def gauges(self, name: str, student: Stage, config: str, *overrides: object) -> Stage:
        """Diagnostics of a trained detector and of its teacher; ``config`` and ``overrides``: the student's."""
        proposals, output = self.proposals("val"), self.folder / "gauges.json"
        options = ("--config-file", self.config(config), "--dataset", "glyphs_val", "--proposals", proposals.output,
                   "--output", output, "--clip-on-crops")  # fmt: skip
        overrides += ("MODEL.WEIGHTS", student.output / "model_final.pth")
        overrides += ("MODEL.VILD.TEACHER.NAME", f"local-dir:{self.teacher().output}")
        return Stage.of(name, output, "gauges.py", *options, *overrides, needs=(student, proposals))

    def config(self, name: str) -> Path:
        return CONFIGS / f"{name}.yaml"

    def read_metrics(self, name: str) -> dict[str, float | None]:
        """The metrics of a trained or evaluated detector, keyed "<kind>/<metric>" (it has one data set)."""
        flat = json.loads((self.folder / name / "inference" / "vild_metrics.json").read_text())
        return {key.split("/", 1)[1]: value for key, value in flat.items()}

    def read_gauges(self) -> tuple[dict[str, dict], dict]:
        """The diagnostics as {name: {"base", "novel"}}, with the proposals' recall; and the metrics of CLIP on
        crops."""
        gauges = json.loads((self.folder / "gauges.json").read_text())
        crops, recall = gauges.pop("clip_on_crops"), gauges.pop("proposals")
        gauges["proposal_recall50"] = {
            mark: next(v for k, v in recall.items() if "recall50" in k and k.endswith(mark))
            for mark in ("base", "novel")
        }
        return gauges, crops


def _name(name: str, data: str) -> str:
    return name if data == "train" else f"{name}_{data}"


def _dataset(data: str) -> str:
    return {"nonovel": "glyphs_nonovel_train", "all": "glyphs_train_all"}.get(data, f"glyphs_{data}")
