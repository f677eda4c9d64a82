import json

import numpy as np
import pytest

from vild.glyphs import drawing
from vild.glyphs.world import contact_sheet, write_world
from vild.utils.errors import UserError


def test_the_table():
    table = drawing.table()
    assert len(table) >= 50 and sum(g.frequency == "r" for g in table) >= 15
    assert len({g.name for g in table}) == len(table)
    points = [p for g in table for p in g.code_points]
    assert len(set(points)) == len(points)  # no drawing has two names
    names = [n for g in table for n in {g.name, *g.synonyms}]
    assert len(set(names)) == len(names)


def test_every_glyph_draws_something_of_its_own():
    shapes = {}
    for glyph in drawing.table():
        for point in glyph.code_points:
            silhouette, ink = drawing._silhouette_and_ink(point)
            assert np.asarray(ink).max() == 255 and np.asarray(silhouette).mean() > 10
            shapes[point] = np.asarray(ink.resize((32, 32)), float)
    # a font without the glyph draws the same box for all
    stack = np.stack(list(shapes.values())).reshape(len(shapes), -1)
    distance = np.abs(stack[:, None] - stack[None]).mean(-1) + 255 * np.eye(len(stack))
    assert distance.min() > 4


def test_a_seed_fixes_a_scene():
    (a, placed_a), (b, placed_b), (c, _) = (drawing.scene(s, 5) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert all(np.array_equal(x.mask, y.mask) for x, y in zip(placed_a, placed_b, strict=True))


def test_boxes_hold_their_masks_tightly():
    for index in range(10):
        image, placed = drawing.scene(0, index)
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        for thing in placed:
            x0, y0, x1, y1 = (int(v) for v in thing.box)
            inside = thing.mask[y0:y1, x0:x1]
            assert inside.sum() == thing.mask.sum() >= 40
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_visible_masks_do_not_overlap():
    for index in range(10):
        _, placed = drawing.scene(0, index)
        assert sum(t.mask.astype(int) for t in placed).max() <= 1


def test_scenes_without_novel_objects():
    table = drawing.table()
    seen = {table[t.index].frequency for i in range(30) for t in drawing.scene(0, i, novel=False)[1]}
    assert seen == {"f", "c"}


def test_captioned_images_go_through_the_names():
    for index in (0, 1, len(drawing.table()) + 1):
        image, which, box = drawing.captioned(0, index)
        assert which == index % len(drawing.table()) and image.shape == (80, 80, 3)
        assert box[2] > box[0] and box[3] > box[1]
    assert drawing.captioned(0, 0, background=True)[1] == -1


@pytest.mark.parametrize("form", ["lvis", "coco"])
def test_annotation_files(world, form):
    folder = world / "glyphs" / "annotations"
    train, everything, val = (
        json.loads((folder / f"{form}_{n}.json").read_text()) for n in ("train", "train_all", "val")
    )
    frequency = {c["id"]: c["frequency"] for c in train["categories"]}
    assert len(frequency) == 60  # novel categories are kept, as in lvis_v1_train_norare
    assert "r" not in {frequency[a["category_id"]] for a in train["annotations"]}
    assert "r" in {frequency[a["category_id"]] for a in everything["annotations"]}
    assert "r" in {frequency[a["category_id"]] for a in val["annotations"]}
    for document in (train, everything, val):
        ids = [a["id"] for a in document["annotations"]]
        assert len(set(ids)) == len(ids)
        for image in document["images"]:
            assert ("neg_category_ids" in image) == (form == "lvis")
            if form == "lvis":
                present = {a["category_id"] for a in document["annotations"] if a["image_id"] == image["id"]}
                assert image["neg_category_ids"] and not present & set(image["neg_category_ids"])


def test_the_world_is_the_same_for_a_seed_and_kept(tmp_path):
    for name in ("a", "b"):
        write_world(tmp_path / name, seed=3, sets=("dev",), workers=1, fraction=0.02)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes() == path.read_bytes()
    image = next((tmp_path / "a" / "dev").glob("*.jpg"))
    image.unlink()
    write_world(tmp_path / "a", seed=3, sets=("dev",), workers=1, fraction=0.02)
    assert not image.exists()  # a set whose annotations are there is not made again
    with pytest.raises(UserError, match="was made with .*'seed': 3.*not with .*'seed': 4"):
        write_world(tmp_path / "a", seed=4, sets=("dev",), workers=1, fraction=0.02)


def test_contact_sheet_shows_every_name():
    sheet = contact_sheet()
    assert sheet.size == (800, 6 * 94)
