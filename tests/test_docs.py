"""The documentation: its links lead somewhere, and its commands use flags that exist."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "tools/README.md",
                *REPOSITORY.glob("configs/**/*.md"), REPOSITORY / "datasets/README.md",
                *REPOSITORY.glob("docs/**/*.ipynb")])  # fmt: skip


def commands_of(page: Path) -> list[list[str]]:
    """The arguments of each `tools/X.py ...` in the page's code blocks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = (line[line.index("tools/") :] for line in lines if re.search(r"(^|\s)tools/\w+\.py", line))
    return [shlex.split(line.replace("...", ""), comments=True) for line in found]


@cache
def flags_of(tool: str) -> set[str]:
    done = subprocess.run([sys.executable, REPOSITORY / tool, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_commands_use_tools_and_flags_that_exist():
    commands = [(page, command) for page in PAGES for command in commands_of(page)]
    assert len(commands) > 40
    wrong = [
        f"{page.name}: {command[0]} {flag}"
        for page, command in commands
        for flag in (word.split("=")[0] for word in command[1:] if word.startswith("--"))
        if flag not in flags_of(command[0])
    ]
    assert not wrong


def test_configs_that_commands_name_exist():
    named = {word for page in PAGES for command in commands_of(page) for word in command if word.startswith("configs/")}
    assert len(named) > 3 and not [name for name in named if not (REPOSITORY / name).is_file()]
