"""Write the built-in world to disk: images, annotations in LVIS and COCO format, a contact sheet."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api
from tqdm import tqdm

from vild.glyphs import drawing
from vild.utils.errors import UserError
from vild.utils.files import cannot_write, write_text

CHUNK = 50  # scenes that a process is given at a time


class SceneSet(NamedTuple):
    """``offset`` keeps the sets' random streams apart; ``options``: of ``drawing.scene``."""

    count: int
    offset: int
    options: dict


# dev is for choosing settings, val for the final numbers; only val has drawing styles that training lacks
SETS = {
    "train": SceneSet(2000, 1, {}),
    "nonovel_train": SceneSet(2000, 1, {"novel": False}),
    "new_train": SceneSet(72, 4, {"uniform": True}),  # two thirds have one of ten names that a detector learns later
    "dev": SceneSet(200, 2, {"uniform": True}),
    "val": SceneSet(400, 3, {"uniform": True, "val_styles": True}),
}


def _make_scene(job: tuple[int, int, SceneSet, str]) -> tuple[dict, list[dict]]:
    """Draw and save a scene; returns its image record and annotations (in LVIS format, without ids)."""
    seed, index, kind, path = job
    image, placed = drawing.scene(seed * 1000 + kind.offset, index, **kind.options)
    with cannot_write(path):
        Image.fromarray(image).save(path, quality=95)
    image_id = index + 1
    annotations = []
    for thing in placed:
        rle = mask_api.encode(np.asfortranarray(thing.mask.astype(np.uint8)))
        annotations.append(
            {
                "image_id": image_id,
                "category_id": thing.index + 1,
                "bbox": mask_api.toBbox(rle).tolist(),
                "area": float(mask_api.area(rle)),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    present = {a["category_id"] for a in annotations}
    absent = [c for c in range(1, len(drawing.table()) + 1) if c not in present]
    negative = np.random.default_rng([seed, 5, index]).choice(absent, 20, replace=False)
    record = {
        "id": image_id,
        "file_name": os.path.basename(path),
        "height": image.shape[0],
        "width": image.shape[1],
        "neg_category_ids": sorted(int(c) for c in negative),
        "not_exhaustive_category_ids": [],
    }
    return record, annotations


def _write_both(folder: Path, name: str, info: dict, images: list[dict], annotations: list[dict]) -> None:
    """Write an annotation file in LVIS and in COCO format. ``info``: what the images were made with."""
    categories = [
        {"id": i, "name": g.name, "synonyms": [g.name, *g.synonyms], "frequency": g.frequency}
        for i, g in enumerate(drawing.table(), 1)
    ]
    for form in ("lvis", "coco"):
        if form == "coco":
            drop = {"neg_category_ids", "not_exhaustive_category_ids"}
            images = [{k: v for k, v in image.items() if k not in drop} for image in images]
            annotations = [{**a, "iscrowd": 0} for a in annotations]
        numbered = [{"id": i, **a} for i, a in enumerate(annotations, 1)]
        document = {"info": info, "images": images, "annotations": numbered, "categories": categories}
        write_text(folder / f"{form}_{name}.json", json.dumps(document))


def write_world(
    root: Path, seed: int = 0, sets: Sequence[str] = ("train", "dev", "val"), workers: int = 2, fraction: float = 1.0
) -> None:
    """Write sets of scenes: ``<set>/*.jpg`` and ``annotations/{lvis,coco}_<set>.json`` below ``root``.

    Training files have base annotations only; the ``*_all.json`` beside them also have the novel ones, for the oracle.
    A set whose annotation files exist is kept.

    Args:
        fraction: of each set's scenes (the first ones).

    Raises:
        UserError: a set exists, made with another seed or fraction.
    """
    annotation_dir = root / "annotations"
    rare = {i for i, glyph in enumerate(drawing.table(), 1) if glyph.frequency == "r"}
    for name in sets:
        kind = SETS[name]
        made_with, last_file = {"seed": seed, "fraction": fraction}, annotation_dir / f"coco_{name}.json"
        if last_file.exists():
            there = json.loads(last_file.read_text()).get("info")
            if there != made_with:
                raise UserError(f"{last_file}: was made with {there}, not with {made_with}; remove {root}")
            continue
        with cannot_write(root / name):
            (root / name).mkdir(parents=True, exist_ok=True)
        jobs = [(seed, i, kind, str(root / name / f"{i + 1:06d}.jpg")) for i in range(round(kind.count * fraction))]
        show = partial(tqdm, total=len(jobs), desc=f"scenes: {name}")
        if workers <= 1 or len(jobs) < CHUNK:  # starting processes takes longer than drawing so few
            done = list(show(map(_make_scene, jobs)))
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                done = list(show(pool.imap(_make_scene, jobs, chunksize=CHUNK)))
        images = [image for image, _ in done]
        everything = [a for _, annotations in done for a in annotations]
        kept = everything
        if name.endswith("train"):
            _write_both(annotation_dir, f"{name}_all", made_with, images, everything)
            kept = [a for a in everything if a["category_id"] not in rare]
        _write_both(annotation_dir, name, made_with, images, kept)


def contact_sheet(seed: int = 0) -> Image.Image:
    """Every class drawn once, in rows of ten; novel names in orange."""
    columns, cell, label = 10, drawing.CAPTIONED_SIZE, 14
    rows = -(-len(drawing.table()) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, glyph in enumerate(drawing.table()):
        x, y = i % columns * cell, i // columns * (cell + label)
        sheet.paste(Image.fromarray(drawing.captioned(seed, i)[0]), (x, y))
        colour = "darkorange" if glyph.frequency == "r" else "black"
        draw.text((x + 2, y + cell), glyph.name[:14], fill=colour)
    return sheet
