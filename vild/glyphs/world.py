"""Write the built-in world to disk: images, LVIS-form and COCO-form annotations, a contact sheet."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api
from tqdm import tqdm

from vild.glyphs import drawing
from vild.utils.errors import UserError
from vild.utils.files import cannot_write, write_text


@dataclass(frozen=True)
class SceneSet:
    """How one set of scenes is made. ``offset`` keeps the sets' random streams apart."""

    count: int
    offset: int
    novel: bool = True
    uniform: bool = False
    val_styles: bool = False


# dev is there to choose settings on; val is looked at once. Only val draws in styles that training lacks.
CHUNK = 50  # scenes that a process is given at a time
SETS = {
    "train": SceneSet(2000, 1),
    "nonovel_train": SceneSet(2000, 1, novel=False),
    "dev": SceneSet(200, 2, uniform=True),
    "val": SceneSet(400, 3, uniform=True, val_styles=True),
}


def _categories() -> list[dict]:
    return [
        {"id": i, "name": g.name, "synonyms": [g.name, *g.synonyms], "frequency": g.frequency}
        for i, g in enumerate(drawing.table(), 1)
    ]


def _make_scene(job: tuple[int, int, SceneSet, str]) -> tuple[dict, list[dict]]:
    """Draw and save one scene; returns its image record and its annotations (LVIS form, without ids)."""
    seed, index, kind, path = job
    image, placed = drawing.scene(
        seed * 1000 + kind.offset, index, novel=kind.novel, uniform=kind.uniform, val_styles=kind.val_styles
    )
    with cannot_write(path):
        Image.fromarray(image).save(path, quality=95)
    image_id = index + 1
    annotations = []
    for thing in placed:
        x0, y0, x1, y1 = thing.box
        rle = mask_api.encode(np.asfortranarray(thing.mask.astype(np.uint8)))
        annotations.append(
            {
                "image_id": image_id,
                "category_id": thing.index + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": float(thing.mask.sum()),
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


def _write_json(path: Path, info: dict, images: list[dict], annotations: list[dict], lvis: bool) -> None:
    """One annotation file, whole or not at all. ``info``: what the images were made with."""
    if not lvis:
        drop = {"neg_category_ids", "not_exhaustive_category_ids"}
        images = [{k: v for k, v in image.items() if k not in drop} for image in images]
        annotations = [{**a, "iscrowd": 0} for a in annotations]
    annotations = [{"id": i, **a} for i, a in enumerate(annotations, 1)]
    document = {"info": info, "images": images, "annotations": annotations, "categories": _categories()}
    write_text(path, json.dumps(document))


def write_world(
    root: Path,
    seed: int = 0,
    sets: tuple[str, ...] = ("train", "dev", "val"),
    workers: int = 2,
    fraction: float = 1.0,
) -> None:
    """Write sets of scenes under ``root``; a set whose annotation files exist is kept (UserError if it was made
    with another seed or fraction).

    ``fraction`` of each set's scenes are made (the first ones), for trying things.

    ``<set>/*.jpg`` and ``annotations/{lvis,coco}_<set>.json``. Training files hold base annotations only, as
    the detector may read them; ``*_all.json`` beside them also hold the novel ones, for the oracle.
    """
    annotation_dir = root / "annotations"
    with cannot_write(annotation_dir):
        annotation_dir.mkdir(parents=True, exist_ok=True)
    rare = {c["id"] for c in _categories() if c["frequency"] == "r"}
    for name in sets:
        kind = SETS[name]
        made_with, last_file = {"seed": seed, "fraction": fraction}, annotation_dir / f"coco_{name}.json"
        if last_file.exists():
            there = json.loads(last_file.read_text()).get("info")
            if there != made_with:
                raise UserError(f"{last_file}: was made with {there}, not with {made_with}; remove {root}")
            continue
        with cannot_write(root / name):
            (root / name).mkdir(exist_ok=True)
        jobs = [(seed, i, kind, str(root / name / f"{i + 1:06d}.jpg")) for i in range(round(kind.count * fraction))]
        show = partial(tqdm, total=len(jobs), desc=f"scenes: {name}")
        if workers <= 1 or len(jobs) < CHUNK:  # starting processes takes longer than drawing so few
            done = list(show(map(_make_scene, jobs)))
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                done = list(show(pool.imap(_make_scene, jobs, chunksize=CHUNK)))
        images = [image for image, _ in done]
        everything = [a for _, annotations in done for a in annotations]
        for form in ("lvis", "coco"):
            kept = everything
            if name.endswith("train"):
                _write_json(annotation_dir / f"{form}_{name}_all.json", made_with, images, everything, form == "lvis")
                kept = [a for a in everything if a["category_id"] not in rare]
            _write_json(annotation_dir / f"{form}_{name}.json", made_with, images, kept, form == "lvis")


def contact_sheet(seed: int = 0) -> Image.Image:
    """Every name drawn once, with its frequency: rows of ten, novel names in orange."""
    columns, cell, label = 10, drawing.CAPTIONED_SIZE, 14
    rows = -(-len(drawing.table()) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, glyph in enumerate(drawing.table()):
        x, y = i % columns * cell, i // columns * (cell + label)
        sheet.paste(Image.fromarray(drawing.captioned(seed, i)[0]), (x, y))
        colour = "darkorange" if glyph.frequency == "r" else "black"
        draw.text((x + 2, y + cell), f"{glyph.name[:14]}", fill=colour)
    return sheet
