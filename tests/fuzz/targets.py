"""What is broken, and what reads it: {target: (file, maker of its folder, reader of the folder)}."""

from __future__ import annotations

import functools
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from experiments.grid import read_grid
from pycocotools import mask as mask_api

from tests.conftest import REPOSITORY
from tests.fuzz.valid_files import (
    CATEGORIES,
    FINGERPRINT,
    SUFFIXES,
    WIDTH,
    make_checkpoint,
    make_configs,
    make_data_set,
    make_images,
    make_proposals,
    make_store,
    make_tensorflow_checkpoint,
    make_vocabulary,
)
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.checkpoint.tensor_bundle import TensorBundle
from vild.config import load_config
from vild.data import datasets
from vild.data.classes import make_classes, read_split
from vild.data.proposals import load_proposals, read_labels, read_provenance, select_proposals
from vild.evaluation.evaluator import evaluate_results, ground_truth_boxes
from vild.evaluation.results import read_results
from vild.inference.words import read_words
from vild.store.maintenance import coverage, repair, summarise, verify
from vild.store.store import EmbeddingStore
from vild.utils.errors import UserError
from vild.utils.images import read_image
from vild.vocabulary.prompts import LearnedPrompts
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import parse_negatives


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


def read_checkpoint(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        VildCheckpointer(torch.nn.Linear(2, 2)).load(str(folder / name))
        if not name.endswith(".pkl"):
            Vocabulary.load(folder / name)

    return read


def read_tensorflow_checkpoint(folder: Path) -> None:
    bundle, refused = TensorBundle(folder / "t"), None
    for name in bundle:  # one that is refused must not hide the others
        try:
            assert bundle[name].nbytes <= 64
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


def read_some_proposals(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        select_proposals(load_proposals(folder / name), 10, min_size=1, nms=0.5)
        read_provenance(folder / name), read_labels(folder / name)

    return read


def read_a_image(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        image = read_image(folder / name)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3

    return read


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
