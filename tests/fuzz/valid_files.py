"""Valid files of every kind that vild reads: each function writes some into a folder."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.checkpoint.bundle_writer import write_bundle
from vild.data.proposals import save_proposals
from vild.store.store import StoredRegions, StoreWriter
from vild.utils.files import write_tensors
from vild.vocabulary.prompts import LearnedPrompts
from vild.vocabulary.vocabulary import Vocabulary

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


def make_data_set(folder: Path) -> None:
    for name, document in (("a", DOCUMENT), ("vild_datasets", ENTRY), ("split", SPLIT), ("results", RESULTS)):
        (folder / f"{name}.json").write_text(json.dumps(document))
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RESULTS * 2))


def make_store(folder: Path) -> None:
    writer = StoreWriter(folder / "store", {"fingerprint": FINGERPRINT, "scales": [1.0]}, [3, 5, 9], shard_images=2)
    for index, _ in writer.missing():
        writer.write_shard(
            index, lambda i: StoredRegions(torch.tensor([[0.0, 0, i, i]]), torch.eye(WIDTH)[:1], torch.ones(1))
        )
    writer.finish()


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


def make_tensorflow_checkpoint(compress: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        variables = {"aa/w": np.eye(2, dtype=np.float32), "aa/w/Momentum": np.zeros(2), "step": np.int64(3)}
        write_bundle(folder / "t", variables, compress=compress)

    return make


def make_proposals(folder: Path) -> None:
    found = {i: (torch.tensor([[0.0, 0, i, i], [1, 1, 4, 4]]), torch.tensor([0.9, 0.2])) for i in (3, 5)}
    save_proposals(folder / "p.safetensors", found, {"data_set": "mine", "network": None})
    records = [{"image_id": 3, "category_id": 1, "bbox": [0, 0, 3, 4.5], "score": s} for s in (0.9, 0.1)]
    (folder / "p.json").write_text(json.dumps(records))


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


def make_configs(folder: Path) -> None:
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "base.yaml").write_text("VERSION: 2\nINPUT:\n  FORMAT: RGB\n  MIN_SIZE_TRAIN: (64, 96)\n")
    (folder / "g.yaml").write_text(GRID)
