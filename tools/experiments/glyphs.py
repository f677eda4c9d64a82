"""The stages of the method on the built-in world, from drawing its scenes to a trained and evaluated detector."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from experiments.runner import Runner, Stage, stage
from vild.utils.files import hash_file

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "Glyphs"
EXTRA_WIDTH = 96  # of the extra teacher's embeddings; the first teacher's are 64 wide


class GlyphsRun(Runner):
    """The stages under one folder; each method is a stage, and needs the stages whose outputs it reads.

    Their argument ``data`` names the training scenes: "train", "nonovel" (no novel object is drawn) or, of the scenes
    of "train", "all" (the novel objects are annotated, too) or "heldout" (every fourth base name is held out in place
    of the novel ones, and detectors are evaluated so on the dev scenes: for choosing settings). With ``extra`` they are
    of the extra teacher, which has another width and is trained on other images.

    Args:
        folder: everything the stages write lies below it.
        seed: of the world, the teacher and every training.
        iterations: of every detector (0: as the configs say).
        smoke: everything as small as possible, to see whether the stages work together.
    """

    def __init__(self, folder: Path, seed: int = 0, iterations: int = 0, smoke: bool = False):
        super().__init__(folder, DETECTRON2_DATASETS=str(folder / "datasets"))
        self.seed, self.iterations, self.smoke = seed, 10 if smoke else iterations, smoke

    def world(self, data: str = "train") -> Stage:
        name, sets, needs = "world", ("train", "dev", "val"), []
        if data == "nonovel":
            name, sets, needs = "world_nonovel", ("nonovel_train",), [self.world()]
        options = ("--seed", self.seed, "--fraction", 0.05 if self.smoke else 1.0, "--sets", *sets)
        return stage(name, self.folder / "datasets", "make_glyphs.py", *options, needs=needs)

    def teacher(self, extra: bool = False) -> Stage:
        output = self.folder / ("teacher2" if extra else "teacher")
        options = ("--seed", self.seed + 100 * extra, "--steps", 10 if self.smoke else 400, "--output-dir", output)
        width = ("--width", EXTRA_WIDTH) if extra else ()
        return stage(output.name, output, "train_glyph_teacher.py", *options, *width, needs=[self.world()])

    def vocabulary(self, data: str = "train", extra: bool = False) -> Stage:
        name = "vocabulary2" if extra else _name("vocabulary", data)
        teacher, output = self.teacher(extra), self.folder / f"{name}.safetensors"
        options = ("--vocabulary", _dataset(data), "--teacher", f"local-dir:{teacher.output}", "--output", output)
        return stage(name, output, "build_vocabulary.py", *options, needs=[teacher])

    def network(self, data: str = "train") -> Stage:
        """The class-agnostic proposal network."""
        name = "proposals" if data == "train" else _name("network", data)
        settings = ["SOLVER.MAX_ITER", self.iterations] if self.smoke else []
        settings += [] if data == "train" else ["DATASETS.TRAIN", f"('{_dataset(data)}',)"]
        return self.train(name, "proposals", *settings, needs=[self.world(data)])

    def proposals(self, data: str = "train") -> Stage:
        """``data`` may also be "val"."""
        name, network = f"proposals_{data}", self.network("train" if data == "val" else data)
        output = self.folder / f"{name}.safetensors"
        options = ("--config-file", self.config("proposals"), "--dataset", _dataset(data), "--output", output)
        weights = ("--weights", network.output / "model_final.pth")
        return stage(name, output, "make_proposals.py", *options, *weights, needs=[network])

    def store(self, data: str = "train", extra: bool = False) -> Stage:
        name = "store2" if extra else _name("store", data)
        teacher, proposals, output = self.teacher(extra), self.proposals(data), self.folder / name
        options = ("--dataset", _dataset(data), "--teacher", f"local-dir:{teacher.output}",
                   "--proposals", proposals.output, "--output-dir", output)  # fmt: skip
        return stage(name, output, "build_teacher_store.py", *options, needs=[teacher, proposals])

    def detector(
        self, name: str, config: str, *overrides: object, data: str = "train", teachers: int | str = 1
    ) -> Stage:
        """Train and evaluate a detector, from the proposal network's weights unless ``overrides`` say otherwise.

        ``teachers``: 1; 2, with the extra teacher; or "twice", with the first teacher as its own extra teacher.
        """
        same = data in ("all", "heldout")  # scenes as of "train", other names
        scenes = "train" if same else data
        network, store = self.network(scenes), self.store(scenes)
        vocabulary = self.vocabulary(data if same else "train")
        needs, settings = [network, store, vocabulary], []
        if self.iterations:
            settings += ["SOLVER.MAX_ITER", self.iterations]
        if data != "train":
            settings += ["DATASETS.TRAIN", f"('{_dataset(data)}',)"]
        if data == "heldout":
            settings += ["DATASETS.TEST", "('glyphs_heldout_dev',)"]
        more, of = self.extra_teacher(teachers)
        settings, needs = settings + more, needs + of
        return self.train(
            name, config, "MODEL.VILD.VOCABULARY", vocabulary.output, "MODEL.VILD.STORE", store.output,
            "MODEL.VILD.TEACHER.NAME", f"local-dir:{self.teacher().output}",
            "MODEL.WEIGHTS", network.output / "model_final.pth", *settings, *overrides, needs=needs,
        )  # fmt: skip

    def extra_teacher(self, teachers: int | str) -> tuple[list[object], list[Stage]]:
        """The config's keys for a detector's ``teachers``, and the stages that they need."""
        if teachers == 1:
            return [], []
        entry = {"STORE": self.store(extra=teachers == 2), "VOCABULARY": self.vocabulary(extra=teachers == 2)}
        return ["MODEL.VILD.TEACHERS", [{key: str(each.output) for key, each in entry.items()}]], [*entry.values()]

    def train(self, name: str, config: str, *overrides: object, flags: tuple = (), needs: list[Stage]) -> Stage:
        """``train_net.py``; without ``flags`` it trains, and resumes from its last checkpoint."""
        gpus, output = 0 if flags else int(torch.cuda.is_available()), self.folder / name
        options = ("--config-file", self.config(config), *(flags or ("--resume",)), "--num-gpus", gpus)
        settings = ("OUTPUT_DIR", output, "SEED", self.seed, *overrides)
        return stage(name, output, "train_net.py", *options, *settings, needs=needs)

    def shares(self, student: Stage, grid: Path) -> Stage:
        """The gradients of a grid's objectives, beside L1's, on what a trained detector embeds. A grid that has changed
        is another stage."""
        output, kept = self.folder / f"{grid.stem}_shares_{hash_file(grid)[:8]}.json", student.output
        options = ("--config-file", kept / "config.yaml", "--weights", kept / "model_final.pth")
        return stage(output.stem, output, "gradient_shares.py", *options, "--grid", grid, "--output", output,
                     needs=[student])  # fmt: skip

    def diagnostics(self, name: str, student: Stage, config: str, *overrides: object) -> Stage:
        """Diagnostics of a trained detector, whose config and overrides are given, and of its teacher."""
        proposals, output = self.proposals("val"), self.folder / "diagnostics.json"
        options = ("--config-file", self.config(config), "--dataset", "glyphs_val", "--proposals", proposals.output,
                   "--output", output, "--clip-on-crops")  # fmt: skip
        overrides += ("MODEL.WEIGHTS", student.output / "model_final.pth")
        overrides += ("MODEL.VILD.TEACHER.NAME", f"local-dir:{self.teacher().output}")
        return stage(name, output, "diagnostics.py", *options, "--opts", *overrides, needs=[student, proposals])

    def trust(self, *students: Stage, by_example: str = "") -> None:
        """Calibrate trained detectors, named as their configs, on the base classes of "dev"; then evaluate them, as
        NAME_calibrated, and ask them for absent words, and the one named ``by_example`` for examples in place of words.
        """
        stages, own = [], ("--opts", "MODEL.VILD.TEACHER.NAME", f"local-dir:{self.teacher().output}")
        for each in students:
            output, config = each.output / "model_calibrated.pth", ("--config-file", self.config(each.name))
            options = ("--dataset", "glyphs_dev", "--output", output, "--weights", each.output / "model_final.pth")
            fit = stage(f"{each.name}_calibration", output, "calibrate.py", *config, *options, *own, needs=[each])
            settings = ("MODEL.WEIGHTS", output, "MODEL.VILD.VOCABULARY", output)
            calibrated = f"{each.name}_calibrated"
            stages.append(self.train(calibrated, each.name, *settings, flags=("--eval-only",), needs=[fit]))
            answers = self._absent(each.name)
            options = ("--dataset", "glyphs_val", "--output", answers, "--weights", output)
            stages.append(stage(answers.stem, answers, "absent_words.py", *config, *options, needs=[fit]))
            if each.name == by_example:
                options = (*config, "--weights", output, "--dataset", "glyphs_val", "--examples-from", "glyphs_dev")
                options += ("--seed", self.seed, "--output", self._by_example, *own)
                stages.append(stage(self._by_example.stem, self._by_example, "by_example.py", *options, needs=[fit]))
        self.run(*stages)

    def _absent(self, name: str) -> Path:
        return self.folder / f"{name}_absent.json"

    def read_absent(self, name: str) -> dict[str, dict]:
        """What :meth:`trust` found of a detector and absent words, by their kind."""
        return json.loads(self._absent(name).read_text())

    @property
    def _by_example(self) -> Path:
        return self.folder / "by_example.json"

    def read_by_example(self) -> dict[str, dict]:
        """What tools/by_example.py found, by what the novel names were made of."""
        found = json.loads(self._by_example.read_text())
        found.pop("of", None)  # on which data sets; absent from files of earlier versions
        return found

    def config(self, name: str) -> Path:
        return CONFIGS / f"{name}.yaml"

    def read_metrics(self, name: str) -> dict[str, float | None]:
        """The metrics of a trained or evaluated detector as {"<IoU type>/<metric>": percent}."""
        flat = json.loads((self.folder / name / "inference" / "vild_metrics.json").read_text())
        return {key.split("/", 1)[1]: value for key, value in flat.items()}  # without the name of the data set

    def read_diagnostics(self) -> tuple[dict[str, dict], dict]:
        """The diagnostics as {name: {"base", "novel"}}, with the proposals' recall; the metrics of CLIP on crops."""
        found = json.loads((self.folder / "diagnostics.json").read_text())
        crops, recall = found.pop("clip_on_crops"), found.pop("proposals")
        found.pop("verdict", None)  # in words
        found["proposal_recall50"] = {
            group: next(v for k, v in recall.items() if "recall50" in k and k.endswith(group))
            for group in ("base", "novel")
        }
        return found, crops


def _name(name: str, data: str) -> str:
    return name if data == "train" else f"{name}_{data}"


def _dataset(data: str) -> str:
    others = {"nonovel": "glyphs_nonovel_train", "all": "glyphs_train_all", "heldout": "glyphs_heldout_train"}
    return others.get(data, f"glyphs_{data}")
