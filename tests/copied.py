"""Commands as a person copies them: of fenced blocks and of the examples in ``--help``, read by bash itself."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "tools/README.md",
                *REPOSITORY.glob("configs/**/*.md"), REPOSITORY / "datasets/README.md"])  # fmt: skip
SCRIPTS = sorted([*REPOSITORY.glob("tools/*.py"), *REPOSITORY.glob("datasets/*.py")])
PROGRAMS = ("hf", "make", "pip", "python", "srun", "torchrun")
# how a block for bash begins
SHELL = re.compile(rf"^\s*(\w+=|export |source |tools/|datasets/|({'|'.join(PROGRAMS)}) )")
# stands in for every program: writes down how it was called
RECORD = """#!/bin/sh
{ printf '%s\\0' "$DETECTRON2_DATASETS" "${0#$HERE/}" "$@"; printf '\\n'; } >> "$HERE/calls"
"""


class Command(NamedTuple):
    data: str  # DETECTRON2_DATASETS
    words: tuple[str, ...]  # program and arguments


def blocks_of(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page, or the indented examples of a script, with what is optional in them."""
    if page.suffix == ".md":
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
        return [text for marked, text in fenced if marked == language]
    paragraphs = re.split(r"\n\n+", ast.get_docstring(ast.parse(page.read_text())))
    examples = (text for text in paragraphs if SHELL.match(text) and "--" in text)
    return [re.sub(r"\[((?:--|KEY).*?)\](?=\s|$)", r"\1", example) for example in examples]


def commands_of(page: Path, folder: Path) -> list[Command]:
    """What bash calls when the blocks of a page are pasted one after the other, in an empty ``folder``."""
    for program in (*(p.relative_to(REPOSITORY).as_posix() for p in SCRIPTS), *(f"bin/{p}" for p in PROGRAMS)):
        path = folder / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORD)
        path.chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    (folder / "calls").touch()
    blocks = [block for block in blocks_of(page) if SHELL.match(re.sub(r"^#.*\n", "", block))]
    environment = {"HERE": str(folder), "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": "/home/user"}
    subprocess.run(["bash", "-eu"], input="\n".join(blocks), text=True, cwd=folder, env=environment, check=True)
    calls = (folder / "calls").read_bytes().decode().split("\0\n")[:-1]
    found = (call.split("\0") for call in calls)
    return [Command(data, (program.removeprefix("bin/"), *words)) for data, program, *words in found]
