"""The measured blocks of README and docs: found, checked, told to be old, written anew."""

import re
import runpy
import subprocess

import pytest

from tests.conftest import REPOSITORY
from vild.utils.errors import UserError

figures = runpy.run_path(str(REPOSITORY / "tools/figures.py"))
TABLE = """
speed: {page: README.md, command: "mkdir -p output/x; printf '# R\\\\n## Fast\\\\n|a|\\\\n|-|\\\\n|2|\\\\n## Slow\\\\n|9|\\\\n' > output/x/r.md",
        take: "output/x/r.md#Fast", code: [code]}
kills: {page: docs/a.md, command: "echo 1 killed; echo noise", take: stdout, keep: killed, code: [code]}
"""  # noqa: E501


def block(name: str, command: str, commit: str) -> str:
    caption = f"*`{command}` · commit `{commit}` · 2026-01-01 · two cores*"
    return f"before\n<!-- figures: {name} -->\n|a|\n|-|\n|1|\n\n{caption}\n<!-- /figures -->\nafter\n"


@pytest.fixture
def git(tmp_path):
    def run(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)

    return run


@pytest.fixture
def root(tmp_path, git):
    """A repository with two blocks, as old as their code."""
    for name in ("tools", "docs", "code"):
        (tmp_path / name).mkdir()
    (tmp_path / "tools/figures.yaml").write_text(TABLE)
    (tmp_path / "code/a").write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "code")
    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    commands = {name: entry["command"] for name, entry in figures["read_table"](tmp_path).items()}
    (tmp_path / "README.md").write_text(block("speed", commands["speed"], commit))
    (tmp_path / "docs/a.md").write_text(block("kills", commands["kills"], commit))
    git("add", "-A")
    git("commit", "-qm", "docs")
    return tmp_path


def check(root):
    return figures["check"](root, figures["read_table"](root))


@pytest.mark.parametrize(
    ("page", "old", "new", "fault"),
    [
        ("README.md", "<!-- /figures -->\n", "", "README.md: a marker is malformed, or a block has no end"),
        ("README.md", "<!-- figures: speed -->", "<!-- figures:speed -->", "README.md: a marker is malformed"),
        ("README.md", "figures: speed", "figures: pace", "block pace has no command"),
        ("docs/a.md", "figures: kills", "figures: speed", "block speed is also in README.md"),
        ("docs/a.md", "echo 1 killed", "echo 2 killed", "block kills is of another command"),
        ("docs/a.md", " · 2026-01-01", "", "block kills does not end with"),
        ("tools/figures.yaml", "code: [code]", "code: [none]", "none does not exist"),
    ],
)
def test_faults(root, page, old, new, fault):
    assert check(root) == []
    text = (root / page).read_text()
    assert old in text
    (root / page).write_text(text.replace(old, new))
    assert any(fault in line for line in check(root))


def test_a_missing_block(root):
    (root / "docs/a.md").write_text("nothing\n")
    assert check(root) == ["docs/a.md: block kills of tools/figures.yaml is missing"]


def test_what_a_block_measures(root, git):
    """Its code, whose patterns stay in their folder, and the tool and the configs of its command."""
    entry = {**figures["read_table"](root)["speed"], "code": ["code/*"], "command": "tools/x.py --grid configs/g.yaml"}
    for path, counts in (("code/deeper/b", False), ("code/c", True), ("tools/x.py", True), ("configs/g.yaml", True)):
        before = git("rev-parse", "--short", "HEAD").stdout.strip()
        (root / "README.md").write_text(block("speed", entry["command"], before))
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text("")
        git("add", "-A")
        git("commit", "-qm", path)
        assert bool(figures["newer_code"](root, entry)) == counts, path


def test_only_what_its_code_has_left_behind_is_old_and_measured(root, git):
    table = figures["read_table"](root)
    assert not figures["newer_code"](root, table["speed"])
    (root / "code/a").write_text("2")
    with pytest.raises(UserError, match="commit what it measures first: M code/a"):
        figures["measure"](root, "speed", table["speed"], "four cores")
    git("commit", "-qam", "faster")
    assert figures["newer_code"](root, table["speed"]) and figures["newer_code"](root, table["kills"])
    figures["measure"](root, "speed", table["speed"], "four cores")
    text = (root / "README.md").read_text()
    assert "\n|a|\n|-|\n|2|\n\n*`mkdir" in text and "\n|1|\n" not in text and "\n|9|\n" not in text
    assert text.startswith("before\n") and text.endswith("· four cores*\n<!-- /figures -->\nafter\n")
    assert not figures["newer_code"](root, table["speed"]) and figures["newer_code"](root, table["kills"])
    assert check(root) == []
    figures["measure"](root, "kills", table["kills"], "four cores")
    assert re.search(r"```text\n1 killed\n```\n\n\*`echo", (root / "docs/a.md").read_text())


@pytest.mark.parametrize(
    ("path", "then", "now", "old"),
    [
        ("code/a.py", 'def f():\n    """Twice."""\n    return 2\n', "def f():\n    # two\n\n    return 2\n", False),
        ("code/a.py", 'def f():\n    """Twice."""\n    return 2\n', "def f():\n    return 3\n", True),
        ("code/a.py", "a = 1", None, True),
        ("code/a.yaml", "# Cost: an hour\nrows: {a: 1}\n", "# Cost: two hours\nrows:\n  a: 1\n", False),
        ("code/a.yaml", "rows: {a: 1}\n", "rows: {a: 2}\n", True),
        ("code/a.json", "1", "2", True),
    ],
)
def test_comments_and_docstrings_make_no_block_old(root, git, path, then, now, old):
    entry = figures["read_table"](root)["speed"]
    (root / path).write_text(then)
    git("add", "-A")
    git("commit", "-qm", "then")
    commit = git("rev-parse", "--short", "HEAD").stdout.strip()
    (root / "README.md").write_text(block("speed", entry["command"], commit))
    (root / path).unlink() if now is None else (root / path).write_text(now)
    git("add", "-A")
    git("commit", "-qm", "now")
    assert bool(figures["newer_code"](root, entry)) == old


def test_a_command_that_fails_leaves_the_block(root):
    table = figures["read_table"](root)
    before = (root / "docs/a.md").read_text()
    with pytest.raises(UserError, match="kills: status 3 of"):
        figures["measure"](root, "kills", {**table["kills"], "command": "exit 3"}, "four cores")
    assert (root / "docs/a.md").read_text() == before


def test_rows_of_a_benchmark():
    rows = [{"what": "crops", "baseline": "PIL", "ratio": 2.3049, "baseline_s": 1.5, "note": "a|b"}]
    table = figures["benchmark_table"](rows)
    assert re.sub(" +", " ", table.splitlines()[-1]) == r"| crops | PIL | 2.305 | baseline_s 1.5; note a\|b |"
