"""The documentation: its links lead somewhere. (test_commands.py runs its commands.)"""

import re

import pytest

from tests import copied
from tests.conftest import REPOSITORY

PAGES = [*copied.PAGES, *REPOSITORY.glob("docs/**/*.ipynb")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
