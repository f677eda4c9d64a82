"""A tiny world, made once: a few scenes, an untrained teacher of the built-in kind, its vocabulary, proposals
near the ground truth, and the store of them. No test needs a GPU, the network or files from outside."""

from __future__ import annotations

import fcntl
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vild.audit.leakage import Benchmark
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.data import datasets
from vild.data.proposals import load_proposals, save_proposals
from vild.evaluation.evaluator import ground_truth_boxes
from vild.export.detector import ExportedDetector
from vild.export.write import write_model
from vild.glyphs.teacher import MODEL_CFG, build_model
from vild.glyphs.world import write_world
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import build_model as build_detector
from vild.store.store import StoredRegions, StoreWriter
from vild.teacher.clip import save_local
from vild.teacher.teacher import Teacher, build_teacher
from vild.utils.files import hash_file
from vild.utils.images import read_image
from vild.vocabulary.vocabulary import Vocabulary

REPOSITORY = Path(__file__).parent.parent

# Two pytest processes on two cores: a thread each, here and in the tools that tests start
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)


# Files that start processes, train, or build networks of full size: left out of `make check`, and begun first, so that
# the processes of `make test` end together
SLOW = (
    *(
        "engine/",
        "test_tools.py",
        "test_commands.py",
        "apps/",
        "export/",
        "checkpoint/test_released",
        "kills/",
        "experiments/",
        "benchmarks/",
    ),
    *(
        "test_faults",
        "test_packaging.py",
        "fuzz/",
        "test_evaluate_tool.py",
        "modeling/test_timm",
        "modeling/test_lvis",
    ),
    *("store/test_store_kill", "utils/test_signals", "modeling/test_roi_heads", "modeling/test_extra_teachers"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        name = item.path.relative_to(REPOSITORY / "tests").as_posix()
        return next((n for n, start in enumerate(SLOW) if name.startswith(start)), len(SLOW))

    items.sort(key=rank)
    for item in items:
        if rank(item) < len(SLOW):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def text_cache(tmp_path_factory) -> None:
    """Nobody's own cache is read or written."""
    os.environ["VILD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def built_once(tmp_path_factory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder of this process's own whose content one of pytest's processes has built for all of them."""
    mine = tmp_path_factory.mktemp(name) / name
    workers = os.environ.get("PYTEST_XDIST_WORKER")
    if workers is None:
        build(mine)
        return mine
    shared = tmp_path_factory.getbasetemp().parent / "shared" / name
    shared.parent.mkdir(exist_ok=True)
    with open(shared.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            build(mine)
            shutil.copytree(mine, shared)
            return mine
    shutil.copytree(shared, mine)
    return mine


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The root of the data sets, with a small built-in world in it."""
    root = built_once(tmp_path_factory, "datasets", lambda root: write_world(root / "glyphs", seed=0, fraction=0.02))
    os.environ["DETECTRON2_DATASETS"] = str(root)
    datasets.register_all()
    return root


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    save_local(build_model(), MODEL_CFG, folder)
    return folder


@pytest.fixture(scope="session")
def teacher(teacher_folder) -> Teacher:
    return build_teacher(f"local-dir:{teacher_folder}")


@pytest.fixture(scope="session")
def vocabulary(world, teacher) -> Vocabulary:
    """The built-in names with random unit embeddings (an untrained text tower maps all names to one place)."""
    classes = datasets.get_classes("glyphs_train")
    embeddings = torch.randn(len(classes.names), teacher.width, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    return Vocabulary(classes.names, embeddings, classes.splits, classes.synonyms, "photo", teacher.fingerprint)


@pytest.fixture(scope="session")
def vocabulary_file(vocabulary, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.safetensors"
    vocabulary.save(path)
    return path


@pytest.fixture(scope="session")
def proposals_file(world, tmp_path_factory) -> Path:
    """Ten boxes an image: ground truth (base and novel alike), shaken, and random ones."""
    path = tmp_path_factory.mktemp("proposals") / "proposals.safetensors"
    rng, proposals = np.random.default_rng(0), {}
    for image_id, (boxes, _) in ground_truth_boxes("glyphs_train_all").items():
        corner = rng.uniform(0, 90, (10, 2))
        noise = np.concatenate([corner, corner + rng.uniform(16, 38, (10, 2))], 1)
        rows = np.concatenate([boxes.numpy() + rng.uniform(-2, 2, boxes.shape), noise])[:10].clip(0, 128)
        proposals[image_id] = torch.from_numpy(rows).float(), torch.linspace(1, 0.1, 10)
    save_proposals(path, proposals)
    return path


def store_plan(teacher: Teacher, proposals_file: Path) -> dict:
    return {"fingerprint": teacher.fingerprint, "proposals": hash_file(proposals_file)}


@pytest.fixture(scope="session")
def store_folder(world, teacher, proposals_file, tmp_path_factory) -> Path:
    proposals = load_proposals(proposals_file)
    files = {r["image_id"]: r["file_name"] for r in datasets.load_dicts("glyphs_train")}

    def regions(image_id: int) -> StoredRegions:
        image = torch.from_numpy(read_image(files[image_id], "RGB").copy()).permute(2, 0, 1)
        boxes, scores = proposals[image_id]
        return StoredRegions(boxes, teacher.encode_regions(image, boxes), scores)

    def build(folder: Path) -> None:
        writer = StoreWriter(folder, store_plan(teacher, proposals_file), sorted(files), shard_images=16)
        for index, _ in writer.missing():
            writer.write_shard(index, regions)
        writer.finish()

    return built_once(tmp_path_factory, "store", build)


@pytest.fixture
def make_cfg(vocabulary_file, store_folder, teacher_folder, tmp_path):
    """A config of the built-in world over the tiny files, with overrides."""

    def make(name: str = "vild", *overrides: object):
        return load_config(
            str(REPOSITORY / "configs" / "Glyphs" / f"{name}.yaml"),
            [
                "MODEL.VILD.VOCABULARY", str(vocabulary_file),
                "MODEL.VILD.STORE", str(store_folder),
                "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}",
                "OUTPUT_DIR", str(tmp_path / "output"),
                "DATALOADER.NUM_WORKERS", 0,
                "SOLVER.IMS_PER_BATCH", 2,
                *overrides,
            ],
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def checkpoint_file(world, vocabulary_file, teacher_folder, tmp_path_factory) -> Path:
    """An untrained detector of the built-in world's size."""
    folder = tmp_path_factory.mktemp("checkpoint")
    overrides = ["MODEL.VILD.VOCABULARY", str(vocabulary_file), "MODEL.VILD.VARIANT", "vild"]
    torch.manual_seed(0)
    model = build_detector(load_config(str(REPOSITORY / "configs" / "Glyphs" / "vild.yaml"), overrides))
    VildCheckpointer(model, str(folder)).save("model")
    return folder / "model.pth"


@pytest.fixture(scope="session")
def onnx_file(checkpoint_file, tmp_path_factory) -> Path:
    """That detector as model.onnx, and model.pt2 beside it, from one trace: half a minute of one core."""
    config = load_config(str(REPOSITORY / "configs/Glyphs/vild.yaml"), ["MODEL.WEIGHTS", str(checkpoint_file)])

    def build(folder: Path) -> None:
        detector = OpenVocabularyDetector(config)
        program = ExportedDetector(detector.model).program()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ExportedDetector, "program", lambda _: program)
            for name in ("model.onnx", "model.pt2"):
                write_model(detector, folder / name)

    return built_once(tmp_path_factory, "exported", build) / "model.onnx"


@pytest.fixture
def detector(make_cfg, checkpoint_file) -> OpenVocabularyDetector:
    return OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(checkpoint_file)))


@pytest.fixture(scope="session")
def benchmark(world) -> Benchmark:
    return Benchmark.read("glyphs_train", "", "glyphs_train_all")


@pytest.fixture
def tool(monkeypatch):
    """Run a tool in this process (starting one takes seconds); its exit status."""

    def run(name, *arguments):
        path = str(REPOSITORY / "tools" / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    return run
