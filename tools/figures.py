#!/usr/bin/env python3
"""Measure the figures of README and docs anew: every block <!-- figures: NAME --> by its command in tools/figures.yaml.

    tools/figures.py fuzz kills
    tools/figures.py --check

Without names, all of them, which takes many hours. A block is written, with command, commit, date and machine, as soon
as it is measured; one whose code has not changed since its commit, but for comments, is left out. So it can be stopped
and started again.

--check measures nothing: it fails where a block or its command is missing or malformed, and warns of blocks older than
the code they measure.
"""

import ast
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from vild.utils.command_line import make_parser
from vild.utils.errors import UserError, one_line_errors

REPOSITORY = Path(__file__).parent.parent
TABLE = "tools/figures.yaml"
START = r"<!-- figures: ([a-z0-9-]+) -->\n"
END = "<!-- /figures -->"
BLOCK = re.compile(rf"^{START}(.*?)^{END}$", re.M | re.S)
CAPTION = re.compile(r"\*`([^`\n]+)` · commit `([0-9a-f]{7,40})` · (\d{4}-\d\d-\d\d) · ([^*\n]+)\*\n$")
KEYS = {"page", "command", "take", "code"}


@one_line_errors
def main():
    parser = make_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="blocks (default: all)")
    parser.add_argument("--check", action="store_true", help="only check blocks and table")
    parser.add_argument("--machine", default=this_machine(), metavar="TEXT", help="this machine, for the captions")
    args = parser.parse_args()

    table = read_table(REPOSITORY)
    faults = check(REPOSITORY, table)
    if faults:
        raise UserError("; ".join(faults))
    unknown = set(args.names) - set(table)
    if unknown:
        raise UserError(f"{TABLE} has no block {', '.join(sorted(unknown))}; it has {', '.join(table)}")
    old = {name: newer for name in args.names or table if (newer := newer_code(REPOSITORY, table[name]))}
    if args.check:
        for page in sorted({table[name]["page"] for name in old}):
            names = [f"{name} ({newer})" for name, newer in old.items() if table[name]["page"] == page]
            print(f"warning: {page}: older than the code they measure: {', '.join(names)}")
        return
    print(f"{len(old)} of {len(args.names or table)} blocks are older than the code they measure", flush=True)
    for name in old:
        measure(REPOSITORY, name, table[name], args.machine)


def read_table(root: Path) -> dict[str, dict]:
    import yaml

    table = yaml.safe_load((root / TABLE).read_text())
    for name, entry in table.items():
        missing = KEYS - set(entry)
        if missing or set(entry) - KEYS - {"to", "keep"}:
            raise UserError(f"{TABLE}: {name}: needs {', '.join(sorted(KEYS))} (and to, keep); has {', '.join(entry)}")
        entry["name"] = name
    return table


def check(root: Path, table: dict[str, dict]) -> list[str]:
    """What is wrong with blocks and table, a line each."""
    faults, found = [], {}
    pages = {entry["page"] for entry in table.values()}
    pages |= {p.relative_to(root).as_posix() for p in (*root.glob("*.md"), *root.glob("docs/**/*.md"))}
    for page in sorted(pages):
        text = (root / page).read_text() if (root / page).is_file() else ""
        blocks = [m for m in BLOCK.finditer(text) if "<!-- figures" not in m[2]]
        if not len(blocks) == text.count("<!-- figures") == text.count(END):
            faults.append(f"{page}: a marker is malformed, or a block has no end")
        for block in blocks:
            name, caption = block[1], CAPTION.search(block[2])
            if name in found:
                faults.append(f"{page}: block {name} is also in {found[name]}")
            found[name] = page
            if name not in table:
                faults.append(f"{page}: block {name} has no command in {TABLE}")
            elif caption is None:
                faults.append(f"{page}: block {name} does not end with *`command` · commit `...` · date · machine*")
            elif caption[1] != table[name]["command"]:
                faults.append(f"{page}: block {name} is of another command than in {TABLE}: {caption[1]}")
    for name, entry in table.items():
        if found.get(name) != entry["page"]:
            faults.append(f"{entry['page']}: block {name} of {TABLE} is missing")
        faults += [f"{TABLE}: {name}: {path} does not exist" for path in measured(entry) if not any(root.glob(path))]
    return faults


def measured(entry: dict) -> list[str]:
    """What a block measures: its code, and the tool and the configs of its command; globs."""
    return [*entry["code"], *re.findall(r"(?:tools|configs)/\S+", entry["command"])]


def newer_code(root: Path, entry: dict) -> str:
    """The last commit that changed what a block measures, if it is younger than the block; else "". Comments and
    docstrings do not count."""
    commit = CAPTION.search(find_block(root, entry)[2])[2]
    try:
        files = git(root, "diff", "--name-only", commit, "HEAD", *pathspecs(entry)).splitlines()
    except subprocess.CalledProcessError:
        return f"its commit {commit} is not in this clone"
    changed = [path for path in files if meaning(root, commit, path) != meaning(root, "HEAD", path)]
    return git(root, "log", "-1", "--format=%h %cs", f"{commit}..HEAD", "--", *changed) if changed else ""


@cache
def meaning(root: Path, commit: str, path: str) -> str | None:
    """A file of a commit, without comments and docstrings where the language is known; None if it is not there."""
    import yaml

    try:
        text = git(root, "show", f"{commit}:{path}")
    except subprocess.CalledProcessError:
        return None
    if path.endswith(".yaml"):
        return repr(yaml.safe_load(text))
    if not path.endswith(".py"):
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def pathspecs(entry: dict) -> list[str]:
    """:func:`measured` for git, whose "*" would else reach into folders."""
    return ["--", *(f":(glob){path}" for path in measured(entry))]


def find_block(root: Path, entry: dict) -> re.Match:
    text = (root / entry["page"]).read_text()
    return next(m for m in BLOCK.finditer(text) if m[1] == entry["name"])


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def measure(root: Path, name: str, entry: dict, machine: str) -> None:
    """Run the command, in a folder of the code's version, and write the block."""
    changed = git(root, "status", "--porcelain", *pathspecs(entry))
    if changed:
        raise UserError(f"{name}: commit what it measures first: {changed.splitlines()[0].strip()}")
    version = git(root, "log", "-1", "--format=%h", *pathspecs(entry))
    folder = f"output/figures/{version}/"
    (root / folder).mkdir(parents=True, exist_ok=True)
    print(f"{name}: {entry['command']}", flush=True)
    command = entry["command"].replace("output/", folder)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    done = subprocess.run(command, shell=True, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{name}: status {done.returncode} of {command}\n{done.stdout[-2000:]}")
    body = CAPTION.sub("", find_block(root, entry)[2])
    body = taken(root, entry, folder, done.stdout, body)
    caption = f"*`{entry['command']}` · commit `{version}` · {datetime.date.today()} · {machine}*\n"
    path = root / entry["page"]
    text = path.read_text()  # anew: hours may have passed
    block = find_block(root, entry)
    new = f"<!-- figures: {name} -->\n{body.strip()}\n\n{caption}{END}"
    path.write_text(text[: block.start()] + new + text[block.end() :])


def taken(root: Path, entry: dict, folder: str, stdout: str, body: str) -> str:
    """The new text of a block; for a picture the old one, and the picture is replaced."""
    if entry["take"] == "stdout":
        return "```text\n" + "\n".join(line for line in stdout.splitlines() if re.search(entry["keep"], line)) + "\n```"
    name, _, heading = entry["take"].replace("output/", folder).partition("#")
    if name.endswith((".png", ".jpg")):
        from PIL import Image

        Image.open(root / name).convert("RGB").save(root / entry["to"], quality=90)
        return body
    text = (root / name).read_text()
    if name.endswith(".json"):
        return benchmark_table(json.loads(text))
    if heading:
        sections = dict(re.findall(r"^#+ (.*?)\n(.*?)(?=^#|\Z)", text, re.M | re.S))
        if heading not in sections:
            raise UserError(f"{name} has no section {heading}")
        return sections[heading]
    return text


def benchmark_table(rows: list[dict]) -> str:
    from vild.report.page import markdown_table

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    first = ("what", "baseline", "ratio")
    cells = [
        [*(cell(row.get(key)) for key in first), "; ".join(f"{k} {cell(v)}" for k, v in row.items() if k not in first)]
        for row in rows
    ]
    return markdown_table(("what", "baseline", "baseline/ours, time", "notes"), cells)


def this_machine() -> str:
    """ "2 cores, AMD EPYC 7B13"."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor() or platform.machine()}"


if __name__ == "__main__":
    main()
