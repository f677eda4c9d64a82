"""Every command of README, docs and ``--help`` is run, in order, on a tiny world that looks as ``make quickstart``
leaves it: in this process (starting one takes seconds), the long ones at small size. A command that can be neither run
as it stands nor made small by SMALL stands in NOT_RUN with its reason; its flags and configs must exist."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.apps.test_video import make_video
from tests.conftest import REPOSITORY
from tests.copied import PAGES, SCRIPTS, Command, blocks_of, commands_of
from tests.data.official import coco_document, lvis_document
from vild.config import load_config
from vild.data import datasets
from vild.glyphs.world import write_world
from vild.modeling.calibration import Calibration

NOT_RUN = {  # what matches is not run, because
    r"^make ": "the gate runs lint, tests and the quickstart's smoke; the others take hours or a GPU",
    r"^pip install|^hf ": "network",
    r"^(python )?datasets/prepare_": "needs the official files; tests/data/test_prepare.py",
    r"^python -m vild.install_detectron2": "tests/test_tools.py",
    r"^(torchrun|srun) ": "several processes; tests/engine/test_launch.py",
    r"vild-r\d+|resnet50_vild|LVIS/released": "the authors' files; tests/checkpoint",
    r"--webcam": "a camera; tests/apps/test_demo.py",
    r"tools/(quickstart|trust|ablate|forgetting).py": "hours; the gate's smoke, tests/experiments",
    r"tools/train_glyph_teacher.py": "minutes of drawing; the gate's smoke",
    r"tools/(benchmark|gpu_report).py": "minutes; tests/benchmarks",
    r"students/resnet18|mobilenetv3_20ep": "timm's weights; tests/modeling/test_timm_backbone.py",
    r" \.\.\.( |$)": "a fragment",
    r"KEY VALUE": "a form",
    r"tools/make_glyphs.py": "draws over the world that is here; the fixture `world` does the same",
    r"^tools/label_studio.py": "serves; tests/apps",
    r"^tools/figures.py": "make lint checks; tests/test_figures.py",
    r"--merge": "two halves of a store; tests/store/test_maintenance.py",
}
TEACHER = "--teacher local-dir:output/quickstart/teacher"
SMALL = {  # replacements, in this order
    r"--teacher ViT-B-32-quickgelu --pretrained openai": TEACHER,
    r"--examples-from glyphs_dev": "--examples-from glyphs_train_all",  # the tiny world's dev lacks most names
    r"lvis_v1_train_norare": "glyphs_train",
    r"lvis_v1_train\b": "glyphs_train_all",
    r"voc_2007_test|coco_2017_val|objects365_v1_val": "glyphs_val",
    r"(transfer.py --config-file configs/LVIS)/ensemble": r"\1/vild",
    r"--num-gpus 8": "--num-gpus 0",
    r"/data/": "output/quickstart/datasets/",
    r"^(tools/learn_prompts.py .*)": r"\1 --steps 1",
    r"^(tools/finetune.py .*)": r"\1 --opts SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0",
    r"^(tools/gradient_shares.py .*)": r"\1 --batches 1",
    r" --runtime openvino": "",  # not installed
    r"output/lvis/ensemble/diagnostics.json": "out/diagnostics.json",
    r"--run output/lvis/ensemble": "--run out/eval",
}
TRAINING = ("SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0",
            "SOLVER.WARMUP_ITERS", "0")  # fmt: skip
Q = "output/quickstart"
WEIGHTS = ("model_final.pth", "model_calibrated.pth")
LONGEST = 90  # characters of a command in a failure


def fitting(words: list[str]) -> list[str]:
    """A config of LVIS or COCO becomes the built-in world's of the same variant, with its own paths; trainings are
    short."""
    place = next((i for i, word in enumerate(words) if re.match(r"configs/(LVIS|COCO)/", word)), None)
    keys = []
    if place is not None:
        cfg = load_config(words[place])
        network = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"
        words[place] = f"configs/Glyphs/{'proposals' if network else cfg.MODEL.VILD.VARIANT}.yaml"
        keys = ["OUTPUT_DIR", cfg.OUTPUT_DIR, "MODEL.VILD.VOCABULARY", cfg.MODEL.VILD.VOCABULARY,
                "MODEL.VILD.STORE", cfg.MODEL.VILD.STORE]  # fmt: skip
    if words[0] in ("tools/train_net.py", "tools/transfer.py"):
        first = next((i for i, word in enumerate(words) if re.fullmatch(r"[A-Z_.]{4,}", word)), len(words))
        words = [*words[:first], *keys, *words[first:], *(() if "--eval-only" in words else TRAINING)]
    return words


@cache
def flags_of(tool: str) -> set[str]:
    answer = io.StringIO()
    with contextlib.redirect_stdout(answer):
        run([tool, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", answer.getvalue()))


def run(words: list[str]) -> object:
    """The exit status of a tool, or of ``python -c``."""
    argv, sys.argv = sys.argv, words
    try:
        if words[0] == "-c":
            exec(words[1], {})
        else:
            runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
    return 0


@pytest.fixture(scope="module")
def home(world, teacher_folder, vocabulary_file, proposals_file, store_folder, onnx_file, tmp_path_factory):
    """A folder like the repository's root after ``make quickstart``, with what the examples call by name."""
    home = tmp_path_factory.mktemp("home")
    data = shutil.copytree(world, home / Q / "datasets")
    write_world(data / "glyphs", sets=("new_train",), workers=1, fraction=0.1)
    for number in (60, 381):
        shutil.copy(data / "glyphs/val/000001.jpg", data / f"glyphs/val/{number:06}.jpg")
    shutil.copytree(teacher_folder, home / Q / "teacher")
    for name in (f"{Q}/store", "store", "output/store"):
        shutil.copytree(store_folder, home / name)
    shutil.copy(vocabulary_file, home / Q / "vocabulary.safetensors")
    for name in ("train", "val"):
        shutil.copy(proposals_file, home / Q / f"proposals_{name}.safetensors")
    for name in ("tools", "configs"):
        (home / name).symlink_to(REPOSITORY / name)
    for name in ("mine", "pets"):
        for part in ("train", "val"):
            shutil.copytree(data / "glyphs" / part, data / name / part)
            shutil.copy(data / f"glyphs/annotations/coco_{part}.json", data / name / f"{part}.json")
        shutil.copytree(data / "glyphs/train", data / name / "images")
        shutil.copytree(data / "glyphs/val", data / name / "images", dirs_exist_ok=True)
        shutil.copy(data / name / "val.json", data / name / "labels.json")
        shutil.copy(REPOSITORY / "vild/data/splits/everything.json", data / name / "split.json")
    make_files(home, data)
    shutil.copy(proposals_file, home / "p.safetensors")
    shutil.copy(vocabulary_file, home / "v.safetensors")
    before = os.getcwd(), os.environ["DETECTRON2_DATASETS"]
    os.chdir(home)
    os.environ["DETECTRON2_DATASETS"] = str(data)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(REPOSITORY / "tools"))
    patch.setattr("vild.inference.calibrate.calibrate", calibration)  # an untrained detector finds too little
    patch.setattr("vild.apps.web_page.serve", lambda *_: None)
    patch.setattr("vild.export.detector.ExportedDetector.program", lambda _: None)  # tests/export traces
    patch.setattr("vild.export.write.to_onnx", lambda *_: onnx_file.read_bytes())
    for command in (f"proposals.yaml OUTPUT_DIR {Q}/proposals", f"vild_contrast.yaml OUTPUT_DIR {Q}/vild_contrast"):
        assert run(fitting(shlex.split(f"tools/train_net.py --num-gpus 0 --config-file configs/Glyphs/{command}"))) == 0
    config, trained, calibrated = (f"{Q}/vild_contrast/{name}" for name in ("config.yaml", *WEIGHTS))
    calibrate = f"--weights {trained} --dataset glyphs_train --output {calibrated}"
    assert run(shlex.split(f"tools/calibrate.py --config-file {config} {calibrate}")) == 0
    evaluate = f"--config-file {config} --eval-only MODEL.WEIGHTS {calibrated} OUTPUT_DIR {Q}/vild_contrast_calibrated"
    assert run(fitting(shlex.split(f"tools/train_net.py --num-gpus 0 {evaluate}"))) == 0
    export = f"--weights {calibrated} --output-dir {Q}/detector"
    assert run(shlex.split(f"tools/export.py --config-file {config} {export}")) == 0
    for name in ("model_final.pth", "output/model_final.pth", "output/ensemble/model_final.pth"):
        (home / name).parent.mkdir(exist_ok=True)
        shutil.copy(home / trained, home / name)
    shutil.copytree(home / Q / "detector", home / "out/detector")
    yield home
    patch.undo()
    os.chdir(before[0])
    os.environ["DETECTRON2_DATASETS"] = before[1]
    datasets.register_all()


def calibration(detector, name: str) -> Calibration:
    temperature = detector.model.roi_heads.classifier.test_temperature
    return Calibration((1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), temperature, name, 60, 30)


def make_files(home: Path, data: Path) -> None:
    """What the examples call a.jpg, mine.json, R.json ..."""
    (home / "photos").mkdir()
    for name in ("a.jpg", "b.jpg", "scene.jpg", "photos/c.jpg"):
        shutil.copy(data / "glyphs/val/000001.jpg", home / name)
    make_video(home / "in.mp4", 3)
    names = [c["name"] for c in json.loads((data / "pets/train.json").read_text())["categories"]]
    layout = {part: f"yolo/images/{part}" for part in ("train", "val")}
    (data / "pets/data.yaml").write_text(json.dumps({**layout, "names": names}))
    for part in layout.values():
        shutil.copytree(home / "photos", data / "pets" / part)
        labels = data / "pets" / part.replace("images", "labels")
        labels.mkdir(parents=True)
        (labels / "c.txt").write_text("0 0.5 0.5 0.25 0.25\n")
    np.save(home / "clip_text.npy", np.random.default_rng(0).normal(size=(64, 60)).astype(np.float32))
    (home / "lvis_v1_val.json").write_text(json.dumps(lvis_document({1: [1, 2]})))
    (home / "instances_val2017.json").write_text(json.dumps(coco_document({1: [1, 17]}, "val")))
    shutil.copy(data / "glyphs/annotations/coco_val.json", home / "mine_val.json")
    (home / "mine.json").write_text((REPOSITORY / "vild/data/splits/lvis.json").read_text())
    (home / "R.json").write_text(json.dumps([{"image_id": 1, "category_id": 1, "bbox": [4, 6, 20, 10], "score": 0.5}]))


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands(page, home, ran, tmp_path, capsys):
    failed = []
    for command in commands_of(page, tmp_path / "shell"):
        text = shlex.join(command.words)
        if any(re.search(pattern, text) for pattern in NOT_RUN):
            failed += [f"{text[:LONGEST]}: no {word}" for word in missing_in(command.words)]
            continue
        words = made_small(command)
        if words in ran:
            continue
        ran.append(words)
        capsys.readouterr()
        status, error = run(words), capsys.readouterr().err
        if status and not (words[0] == "tools/audit_leakage.py" and status in (1, 3)):  # a verdict, not a mistake
            failed.append(f"{text[:LONGEST]}: {status} {error[-300:]}")
    assert not failed


@pytest.fixture(scope="module")
def ran() -> list[list[str]]:
    """What was run: the same command stands on several pages."""
    return []


def missing_in(words: tuple[str, ...]) -> list[str]:
    """Flags that the tool of a command does not have, and configs that do not exist."""
    tools = [i for i, word in enumerate(words) if re.fullmatch(r"(tools|datasets)/\w+\.py", word)]
    flags = [word for word in words[tools[0] :] if word.startswith("--")] if tools else []
    configs = [word for word in words if word.startswith("configs/") and not (REPOSITORY / word).is_file()]
    return [flag for flag in flags if flag not in flags_of(words[tools[0]])] + configs


def made_small(command: Command) -> list[str]:
    text = shlex.join(command.words)
    for pattern, replacement in SMALL.items():
        text = re.sub(pattern, replacement, text)
    words = shlex.split(text)
    return fitting(words[1:] if words[0] == "python" else words)


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/detecting.md", "docs/deployment.md", "docs/released.md", "docs/tutorials/search-by-example.md"],
)
def test_python(page, home):
    names: dict = {}
    for block in blocks_of(REPOSITORY / page, "python"):
        if not any(re.search(pattern, block) for pattern in NOT_RUN):
            exec(block, names)


def test_notebook(home, monkeypatch, capsys):
    """From words to boxes to a report, cell by cell; the two tools that it starts run in this process."""
    start = subprocess.run

    def here(command, **kwargs):
        if command[0] != sys.executable:
            return start(command, **kwargs)
        assert run(fitting(command[1:])) == 0

    monkeypatch.setattr("subprocess.run", here)
    names: dict = {}
    for cell in json.loads((REPOSITORY / "docs/tutorials/first-detection.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert (home / "out/first-detection/report/report.html").is_file() and min(names["found"].draw().size) >= 480
    assert re.search(r"novel [\d.]+ box AP50", capsys.readouterr().out)


def test_no_command_has_written_over_a_file_of_the_repository(home):
    links = {home / "tools", home / "configs"}
    made = [p.relative_to(home) for p in home.rglob("*") if p.is_file() and not links & {p, *p.parents}]
    assert len(made) > 100
    assert not [p for p in made if p.parts[0] not in ("out", "output") and (REPOSITORY / p).exists()]
