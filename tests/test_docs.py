"""The documentation: its links lead somewhere. (test_commands.py runs its commands.)"""

import re

import pytest
from pycocotools import mask as mask_api

from tests import copied
from tests.conftest import REPOSITORY
from vild.glyphs import drawing
from vild.glyphs.world import SETS

PAGES = [*copied.PAGES, *REPOSITORY.glob("docs/**/*.ipynb")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_the_example_regions_are_objects():
    """Of the first validation scene, as it is drawn: a region of something else finds nothing."""
    _, placed = drawing.scene(SETS["val"].offset, 0, **SETS["val"].options)
    masks = {drawing.table()[thing.index].name: thing.mask.astype("uint8", order="F") for thing in placed}
    page = (REPOSITORY / "docs/tutorials/search-by-example.md").read_text()
    found = re.findall(r"000001\.jpg(?::|\", \()(\d+), ?(\d+), ?(\d+), ?(\d+)(?:=(\w+))?", page)
    assert len(found) == 4
    for x0, y0, x1, y1, name in found:
        thing = mask_api.encode(masks["cow" if name == "cow" else "shamrock"])
        box = [[int(x0), int(y0), int(x1) - int(x0), int(y1) - int(y0)]]
        assert mask_api.iou(box, [mask_api.toBbox(thing)], [0]).item() > 0.9
