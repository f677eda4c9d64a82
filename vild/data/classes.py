"""Base and novel classes of a data set: the categories of an annotation file, marked by a split file
(``vild/data/splits/*.json``; format: datasets/README.md)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from vild.data.annotations import read_json
from vild.utils.errors import UserError, count_of

SPLIT_DIR = Path(__file__).parent / "splits"
MARKS = {"base": "base", "novel": "novel", "offered": ""}  # list of a split file -> mark of its classes
ALL = "all"  # in place of a list: every category


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their category ids. ``splits``: "base", "novel" or "" (offered
    to the detector, but neither trained nor scored)."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    splits: tuple[str, ...]
    frequencies: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Split:
    """A split file. ``rules`` maps "base", "novel" and "offered" each to a tuple of names, a set of frequencies or ALL;
    ``ids``: official category ids by name, for the split of a particular data set."""

    path: Path
    rules: dict[str, tuple[str, ...] | frozenset[str] | str]
    ids: dict[str, int] = field(default_factory=dict)

    def names(self, key: str) -> tuple[str, ...]:
        """The names in a list; () for frequencies or ALL."""
        rule = self.rules[key]
        return rule if isinstance(rule, tuple) else ()

    def mark(self, category: dict) -> str | None:
        """The mark of a category; None if the split leaves it out."""
        for key, rule in self.rules.items():
            if rule == ALL or category.get("frequency" if isinstance(rule, frozenset) else "name") in rule:
                return MARKS[key]
        return None

    def absent(self, categories: list[dict], keys: tuple[str, ...] = tuple(MARKS)) -> list[str]:
        """The split's names that are not among the categories."""
        present = {c["name"] for c in categories}
        return [n for key in keys for n in self.names(key) if n not in present]

    def check_official(self, categories: list[dict], keys: tuple[str, ...], where: str | Path) -> None:
        """UserError unless the categories include all names of the lists ``keys`` with their official ids."""
        if missing := self.absent(categories, keys):
            raise UserError(
                f"{where}: not the official file: its categories lack {count_of(len(missing), 'name')} of split "
                f"{self.path.stem}, first '{missing[0]}'"
            )
        for c in categories:
            if c["id"] != self.ids.get(c["name"], c["id"]):
                raise UserError(
                    f"{where}: not the official file: category '{c['name']}' has id {c['id']}, not "
                    f"{self.ids[c['name']]} as in split {self.path.stem}"
                )


def read_split(name: str, root: Path) -> Split:
    """Read a split by its name in ``vild/data/splits``, or by its path (below ``root`` or the working directory)."""
    places = [SPLIT_DIR / f"{name}.json", root / name, Path(name)]
    path = next((p for p in places if os.path.isfile(p)), None)
    if path is None:
        raise UserError(
            f"split '{name}' is neither in vild/data/splits nor a file (below {root} or the working directory)"
        )
    content = read_json(path)
    try:
        rules = {key: _rule(content[key]) for key in ("base", "novel")} | {"offered": _rule(content.get("offered", []))}
        ids = {str(n): int(i) for n, i in content.get("ids", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f'split {path}: not of the form {{"base": [...], "novel": [...]}} ({error})') from error
    split = Split(path, rules, ids)
    seen: dict[str, str] = {}
    for key in MARKS:
        for n in split.names(key):
            if n in seen:
                both = f"both {seen[n]} and {key}" if seen[n] != key else f"listed twice in {key}"
                raise UserError(f"split {path}: '{n}' is {both}")
            seen[n] = key
    return split


def _rule(value: list | dict | str) -> tuple[str, ...] | frozenset[str] | str:
    """Parse a list of names, {"frequency": ["f", ...]}, or "all"."""
    if value == ALL:
        return ALL
    values = value["frequency"] if isinstance(value, dict) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{str(values)[:40]} is not a list of strings")
    return frozenset(values) if isinstance(value, dict) else tuple(values)


def make_classes(categories: list[dict], split: Split) -> Classes:
    """The categories that a split includes, ordered by id."""
    chosen = [(c, mark) for c in sorted(categories, key=lambda c: c["id"]) if (mark := split.mark(c)) is not None]
    return Classes(
        tuple(c["id"] for c, _ in chosen),
        tuple(c["name"] for c, _ in chosen),
        tuple(mark for _, mark in chosen),
        tuple(c.get("frequency", "") for c, _ in chosen),
        tuple(tuple(s for s in c.get("synonyms", ()) if s != c["name"]) for c, _ in chosen),
    )
