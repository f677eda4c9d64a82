"""Broken and hostile files of every kind that vild reads: each ends in success or in one line for the user.

``make fuzz`` (VILD_FUZZ=nightly) runs 10,000 cases; the tests run a fixed few hundred.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import pickle
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.grid import read_grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_api

from tests.checkpoint.bundle_writer import write_bundle
from tests.conftest import REPOSITORY
from tests.fuzz.guard import forget_peak, peak, watched
from tests.fuzz.mutations import HOSTILE, broken
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.checkpoint.tensor_bundle import TensorBundle
from vild.config import load_config
from vild.data import datasets
from vild.data.classes import make_classes, read_split
from vild.data.proposals import load_proposals, read_labels, read_provenance, save_proposals, select_proposals
from vild.evaluation.evaluator import evaluate_results, ground_truth_boxes
from vild.evaluation.results import read_results
from vild.inference.words import parse_thresholds, read_words
from vild.store.maintenance import coverage, repair, summarise, verify
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError
from vild.utils.files import write_tensors
from vild.utils.images import read_image
from vild.vocabulary.prompts import LearnedPrompts, clean_name
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import parse_negatives

MOST_MEMORY = 2 << 30
WIDTH = 4
FINGERPRINT = {"name": "t", "pretrained": "", "weights": "0" * 16, "width": WIDTH, "preprocess": {"crop": "squash"}}
CATEGORIES = [{"id": 3, "name": "cat", "frequency": "f", "synonyms": ["kitty"]}, {"id": 4, "name": "dog"}]
DOCUMENT = {
    "images": [
        {"id": 7, "height": 60, "width": 80, "coco_url": "http://x/val2017/7.jpg", "neg_category_ids": [4]},
        {"id": 8, "height": 4, "width": 5, "file_name": "a/8.jpg", "not_exhaustive_category_ids": [3]},
    ],
    "categories": CATEGORIES,
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 30.5, 20], "segmentation": [[1, 2, 9, 2, 9, 8]]},
        {"id": 2, "image_id": 8, "category_id": 4, "bbox": [0, 0, 5, 4], "area": 20, "iscrowd": 1,
         "segmentation": {"size": [4, 5], "counts": [3, 17]}},
        {"id": 3, "image_id": 8, "category_id": 3, "bbox": [0, 0, 2, 2],
         "segmentation": {"size": [4, 5], "counts": "3a0"}},
    ],
}  # fmt: skip
ENTRY = {"mine": {"json": "a.json", "images": "pictures", "split": "split.json", "keep": "all", "protocol": "coco"}}
SPLIT = {"base": ["cat"], "novel": {"frequency": ["r"]}, "offered": ["dog"], "ids": {"cat": 3}}
RESULTS = [{"image_id": 8, "category_id": 3, "score": 0.5, "bbox": [0, 0, 2, 2],
            "segmentation": {"size": [4, 5], "counts": "3a0"}}]  # fmt: skip
CONFIG = """_BASE_: base.yaml
MODEL:
  WEIGHTS: "a.pth"
  VILD: {VARIANT: "vild", OBJECTIVES: [{NAME: l1, WEIGHT: {FROM: 1, TO: 0, SHAPE: linear}}]}
DATASETS:
  TRAIN: ("glyphs_train",)
  TEST: ("glyphs_val",)
SOLVER:
  STEPS: (10, 20)
  BASE_LR: 0.01
"""
GRID = """seeds: [0, 1]
iterations: 100
rows:
  ViLD: {config: vild, data: train}
  squared: {config: vild, MODEL.VILD.OBJECTIVES: [{NAME: squared, WEIGHT: 2}]}
  rotated: {evaluate: ViLD, novel_texts: rotated}
  teacher: {clip_on_crops: ViLD}
"""


# ---- valid files, and what reads them: {file: (which of them are broken, maker of the folder, reader of the folder)}


def make_data_set(folder: Path) -> None:
    for name, document in (("a", DOCUMENT), ("vild_datasets", ENTRY), ("split", SPLIT), ("results", RESULTS)):
        (folder / f"{name}.json").write_text(json.dumps(document))
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RESULTS * 2))


def read_data_set(folder: Path) -> None:
    datasets.forget()
    os.environ["DETECTRON2_DATASETS"] = str(folder)
    for record in datasets.load_dicts("mine"):
        for annotation in record["annotations"]:
            if isinstance(mask := annotation.get("segmentation"), dict):
                mask = mask_api.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
                assert mask_api.decode(mask).shape == (record["height"], record["width"])
    datasets.images_hash("mine"), ground_truth_boxes("mine"), datasets.read_annotations("mine")
    evaluate_results("mine", folder / "results.json", ("bbox", "segm"))


def read_a_split(folder: Path) -> None:
    make_classes(CATEGORIES, read_split("split.json", folder))


def read_some_results(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        found = read_results(folder / name, {8: (4, 5)}, {3, 4}, masks=True)
        for counts in found.masks:
            assert mask_api.decode({"size": [4, 5], "counts": counts}).shape == (4, 5)

    return read


def make_store(folder: Path) -> None:
    writer = StoreWriter(folder / "store", {"fingerprint": FINGERPRINT, "scales": [1.0]}, [3, 5, 9], shard_images=2)
    for index, _ in writer.missing():
        writer.write_shard(
            index, lambda i: StoredRegions(torch.tensor([[0.0, 0, i, i]]), torch.eye(WIDTH)[:1], torch.ones(1))
        )
    writer.finish()


def read_store(folder: Path) -> None:
    folder = folder / "store"
    try:
        store = EmbeddingStore(folder)
        for i in store.image_ids.tolist():
            store[i], store.read(i)
        list(store.boxes())
        summarise(folder), coverage(folder, [3])
    finally:
        list(verify(folder))
        repair(folder)


def vocabulary() -> Vocabulary:
    prompts = LearnedPrompts("a photo", torch.zeros(2, 3), FINGERPRINT, {"data": "x"})
    marks, synonyms = ("base", "novel"), (("kitty",), ())
    return Vocabulary(("cat", "dog"), torch.eye(2, WIDTH), marks, synonyms, prompts, FINGERPRINT)


def make_vocabulary(folder: Path) -> None:
    vocabulary().save(folder / "v.safetensors")
    vocabulary().prompts.save(folder / "p.safetensors")
    np.save(folder / "m.npy", np.eye(2, WIDTH, dtype=np.float32))
    (folder / "w.txt").write_text("\ufeff# mine\ncat | kitty\n\nchess knight | horse, dog; cow\n")
    (folder / "w.json").write_text('["cat | kitty", "dog"]')
    (folder / "w.yaml").write_text("path: x\nnc: 2\nnames:\n  0: cat\n  1: dog\n")


def read_vocabulary(folder: Path) -> None:
    made = Vocabulary.load(folder / "v.safetensors")
    made.take([0]).marked_by(made), str(made.prompts)
    assert made.embeddings.shape == (len(made), made.width) and made.embeddings.isfinite().all()


@functools.cache
def onnx_tool() -> dict:
    return runpy.run_path(str(REPOSITORY / "tools" / "run_onnx.py"))


def read_for_onnx(folder: Path) -> None:
    """tools/run_onnx.py, which stands alone."""
    tool = onnx_tool()
    try:
        tool["load_vocabulary"](folder / "v.safetensors", {"teacher": FINGERPRINT, "width": WIDTH})
    except tool["Mistake"] as mistake:
        raise UserError(mistake) from mistake


def make_checkpoint(folder: Path) -> None:
    state = vocabulary().state()
    tensors = {"model.weight": torch.eye(2), "model.bias": torch.zeros(2), "embeddings": state.pop("embeddings")}
    record = {"data_sets": [], "stores": [], "starts": []}
    metadata = {"vild": json.dumps({**state, "variant": "vild"}), "trained_on": json.dumps(record)}
    write_tensors(folder / "c.safetensors", tensors, metadata)
    weights = {"weight": torch.eye(2), "bias": torch.zeros(2)}
    rest = {"vocabulary": vocabulary().state(), "trained_on": record, "iteration": 3}
    torch.save({"model": weights, **rest}, folder / "c.pth")
    arrays = {name: value.numpy() for name, value in weights.items()}
    (folder / "c.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}, 2))


def read_checkpoint(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        VildCheckpointer(torch.nn.Linear(2, 2)).load(str(folder / name))
        if not name.endswith(".pkl"):
            Vocabulary.load(folder / name)

    return read


def make_tensorflow_checkpoint(compress: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        variables = {"aa/w": np.eye(2, dtype=np.float32), "aa/w/Momentum": np.zeros(2), "step": np.int64(3)}
        write_bundle(folder / "t", variables, compress=compress)

    return make


def read_tensorflow_checkpoint(folder: Path) -> None:
    bundle, refused = TensorBundle(folder / "t"), None
    for name in bundle:  # one that is refused must not hide the others
        try:
            assert bundle[name].nbytes <= 64
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


def make_proposals(folder: Path) -> None:
    found = {i: (torch.tensor([[0.0, 0, i, i], [1, 1, 4, 4]]), torch.tensor([0.9, 0.2])) for i in (3, 5)}
    save_proposals(folder / "p.safetensors", found, {"data_set": "mine", "network": None})
    records = [{"image_id": 3, "category_id": 1, "bbox": [0, 0, 3, 4.5], "score": s} for s in (0.9, 0.1)]
    (folder / "p.json").write_text(json.dumps(records))


def read_some_proposals(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        select_proposals(load_proposals(folder / name), 10, min_size=1, nms=0.5)
        read_provenance(folder / name), read_labels(folder / name)

    return read


SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "WEBP": "webp",
    "PPM": "ppm",
    "TGA": "tga",
}


def make_images(folder: Path) -> None:
    ramp = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, suffix in SUFFIXES.items():
        Image.fromarray(ramp).save(folder / f"a.{suffix}", kind, **({"exif": exif} if kind in ("JPEG", "PNG") else {}))
    Image.fromarray(ramp[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(ramp[:, :, 0].astype(np.float32) / 255).save(folder / "float.tif")


def read_a_image(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        image = read_image(folder / name)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3

    return read


def make_configs(folder: Path) -> None:
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "base.yaml").write_text("VERSION: 2\nINPUT:\n  FORMAT: RGB\n  MIN_SIZE_TRAIN: (64, 96)\n")
    (folder / "g.yaml").write_text(GRID)


TARGETS = {
    "annotations": ("a.json", make_data_set, read_data_set),
    "registry": ("vild_datasets.json", make_data_set, read_data_set),
    "split": ("split.json", make_data_set, read_a_split),
    "results": ("results.json", make_data_set, read_some_results("results.json")),
    "results_lines": ("results.jsonl", make_data_set, read_some_results("results.jsonl")),
    "manifest": ("store/manifest.json", make_store, read_store),
    "shard": ("store/shard-00000.safetensors", make_store, read_store),
    "vocabulary": ("v.safetensors", make_vocabulary, read_vocabulary),
    "onnx_vocabulary": ("v.safetensors", make_vocabulary, read_for_onnx),
    "prompts": ("p.safetensors", make_vocabulary, lambda folder: str(LearnedPrompts.load(folder / "p.safetensors"))),
    "matrix": ("m.npy", make_vocabulary, lambda folder: Vocabulary.from_npy(folder / "m.npy", ["a", "b"])),
    "words": ("w.txt", make_vocabulary, lambda folder: read_words(str(folder / "w.txt"))),
    "words_json": ("w.json", make_vocabulary, lambda folder: read_words(folder / "w.json")),
    "words_yaml": ("w.yaml", make_vocabulary, lambda folder: parse_negatives(folder / "w.yaml", files=True)),
    "checkpoint": ("c.safetensors", make_checkpoint, read_checkpoint("c.safetensors")),
    "checkpoint_pth": ("c.pth", make_checkpoint, read_checkpoint("c.pth")),
    "checkpoint_pkl": ("c.pkl", make_checkpoint, read_checkpoint("c.pkl")),
    "tensorflow": ("t.index", make_tensorflow_checkpoint(False), read_tensorflow_checkpoint),
    "tensorflow_snappy": ("t.index", make_tensorflow_checkpoint(True), read_tensorflow_checkpoint),
    "tensorflow_data": ("t.data-00000-of-00001", make_tensorflow_checkpoint(False), read_tensorflow_checkpoint),
    "proposals": ("p.safetensors", make_proposals, read_some_proposals("p.safetensors")),
    "proposals_json": ("p.json", make_proposals, read_some_proposals("p.json")),
    **{f"image_{s}": (f"a.{s}", make_images, read_a_image(f"a.{s}")) for s in SUFFIXES.values()},
    "picture_deep": ("deep.png", make_images, read_a_image("deep.png")),
    "picture_float": ("float.tif", make_images, read_a_image("float.tif")),
    "config": ("c.yaml", make_configs, lambda folder: load_config(str(folder / "c.yaml"))),
    "base_config": ("base.yaml", make_configs, lambda folder: load_config(str(folder / "c.yaml"))),
    "grid": ("g.yaml", make_configs, lambda folder: read_grid(folder / "g.yaml")),
}
TEXTS = 3  # targets below that take texts, not files

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", derandomize=True, max_examples=12, **COMMON)
settings.register_profile("nightly", max_examples=math.ceil(10_000 / (len(TARGETS) + TEXTS)), print_blob=True, **COMMON)
settings.load_profile(os.environ.get("VILD_FUZZ", "ci"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The root of the data sets is a case's folder, and only for the case; nobody logs thousands of warnings."""
    monkeypatch.setenv("DETECTRON2_DATASETS", "nowhere")
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
    datasets.forget()


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """All cases together need less than 2 GB, what was loaded before (PyTorch) included."""
    try:
        forget_peak()
    except OSError:
        pytest.skip("this system does not tell a process's peak of memory")
    yield
    assert peak() < MOST_MEMORY


def ends_well(call: Callable[[], object], folder: Path) -> None:
    """Success, or a UserError of one line; see ``watched`` for the rest."""
    with watched(folder):
        try:
            call()
        except UserError as error:
            assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_file_ends_in_one_line(target, tmp_path):
    name, make, read = TARGETS[target]
    whole = tmp_path / "whole"
    whole.mkdir()
    make(whole)
    content = (whole / name).read_bytes()
    read(whole)  # a reader that refuses everything would pass
    work = tmp_path / "work"

    @given(broken(name, content))
    def case(changed: bytes) -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        (work / name).write_bytes(changed)
        ends_well(lambda: read(work), work)

    case()


@given(st.text(max_size=40), st.lists(st.text(max_size=20), max_size=3))
def test_texts_of_the_command_line(words, thresholds):
    def call():
        found = read_words(words)
        parse_thresholds([f"{t}=0.5" for t in found.names] + thresholds, found.names)

    ends_well(call, Path("/nowhere"))


SOME_WORDS = st.one_of(
    st.text(max_size=40),
    st.lists(st.one_of(st.text("aA_ |,;#[]{}\"'\n\ufeff", max_size=8), st.sampled_from(HOSTILE)), max_size=4),
    st.dictionaries(st.one_of(st.integers(-1, 3), st.text(max_size=3)), st.text(max_size=8), max_size=3),
    st.sampled_from(HOSTILE),
)


@given(SOME_WORDS, SOME_WORDS)
def test_words_of_the_api(words, negatives):
    def call():
        found = read_words(words)
        assert len(found.names) == len(found.synonyms) == len({clean_name(name) for name in found.names})
        parse_negatives(negatives, files=True)

    ends_well(call, Path("/nowhere"))


KEYS = ("MODEL.VILD.OBJECTIVES", "SOLVER.STEPS", "MODEL.DEVICE", "INPUT.UNREADABLE", "MODEL", "SEED", "_BASE_", "")


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.text(max_size=30)), max_size=3))
def test_overrides_of_the_command_line(tmp_path_factory, overrides):
    folder = tmp_path_factory.getbasetemp() / "overrides"
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text("VERSION: 2\n")
    ends_well(lambda: load_config(str(folder / "c.yaml"), [part for pair in overrides for part in pair]), folder)


def test_the_guard_sees_what_it_is_to_see(tmp_path, monkeypatch):
    """Each of these would fail a case."""
    import subprocess

    for call in (
        lambda: (tmp_path.parent / "elsewhere").write_text("x"),
        lambda: subprocess.run(["true"]),
        lambda: os.mkdir(tmp_path.parent / "other"),
    ):
        with pytest.raises(AssertionError, match="outside its folder"):
            ends_well(call, tmp_path)
    with pytest.raises(KeyError):
        ends_well(lambda: {}["a"], tmp_path)
    monkeypatch.setattr("tests.fuzz.guard.CPU_SECONDS", 0.2)
    with pytest.raises(BaseException, match="does not end"):
        ends_well(lambda: any(False for _ in iter(int, 1)), tmp_path)
    ends_well(lambda: (tmp_path / "a").write_text("x"), tmp_path)
