"""Words to detect, in every form in which people have them: one reader for tools, words files, the Python API and the
page.

In a text, commas, semicolons and line ends separate words, "|" separates the synonyms of one, and lines that start with
"#" are comments. A text in brackets is a list (JSON, or YAML's short form). An item of a list is one word. YOLO's
data.yaml is read for its ``names``, in a list or by number.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vild.utils.errors import UserError
from vild.utils.untrusted import parse_json, parse_yaml, read_bytes, refused_as
from vild.vocabulary.prompts import clean_name

SEPARATORS = re.compile("[,;，；、]")  # the last three are those of Chinese and Japanese keyboards
LONGEST_NAME = 200  # characters; CLIP truncates at 77 tokens
FILES = (".cfg", ".csv", ".data", ".json", ".jsonl", ".labels", ".list", ".lst", ".md", ".names", ".npy", ".npz",
         ".pkl", ".pt", ".pth", ".safetensors", ".toml", ".tsv", ".txt", ".xml", ".yaml", ".yml")  # fmt: skip
LIST = re.compile(r"""\s*([\[{]\s*["'].*|\[.*\]|\{.*\})\s*""", re.DOTALL)
NAMES = re.compile(r"^names\s*:", re.MULTILINE)  # of a data.yaml
QUOTED = re.compile(r'(?:^|[,;])\s*"[^"]*[,;][^"]*"\s*(?:[,;]|$)')  # a separator within quotes, as in CSV
NUMBERED = re.compile(r"(\d+)\s*[:.\t ]\s*\S")  # a line of a label map
PATH = re.compile(r"(~|\.{0,2})[/\\]|[A-Za-z]:[/\\]")  # how one begins
GivenWords = str | Path | Iterable[str] | Mapping[int, str]


@dataclass(frozen=True)
class Words:
    """Class names, the synonyms of each (their embeddings are averaged), and, for the names of a data set, "base" or
    "novel" for each."""

    names: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    splits: tuple[str, ...] | None = None


def parse_words(given: GivenWords, synonyms: Sequence[Sequence[str]] | None = None, *, files: bool = False) -> Words:
    """Read words in any of the forms above.

    Args:
        given: a text, or a list of words.
        synonyms: for each word further spellings, in a list or a text.
        files: a text may also name a words file; one that looks like a file and does not exist is an error.

    Raises:
        UserError: no word, a duplicate one (also by case or "_": the two would have one embedding and share its score),
            one of more than LONGEST_NAME characters, or a form that is none of the above.
    """
    where, groups = _read(given, files)
    if synonyms:
        more = _read_synonyms(synonyms, len(groups))
        groups = [group and group + others for group, others in zip(groups, more, strict=True)]
    groups = [_distinct(group) if len(group) > 1 else group for group in groups if group]
    check_names([group[0] for group in groups], where)
    owners = {clean_name(group[0]): group[0] for group in groups}
    for name, *others in groups:
        for other in others:
            check_length(other, where)
            if clean_name(other) in owners:
                raise UserError(f"{where}: '{other}' is a synonym of '{name}' and a word of its own")
    return Words(tuple(group[0] for group in groups), tuple(tuple(group[1:]) for group in groups))


def parse_negatives(given: GivenWords, *, files: bool = False) -> tuple[str, ...]:
    """As :func:`parse_words`, but synonyms are words of their own, duplicates are dropped, and there may be none."""
    _, groups = _read(given, files, "negatives")
    return tuple(_distinct([spelling for group in groups for spelling in group]))


def check_names(names: Sequence[str], where: str = "vocabulary") -> None:
    """UserError unless there are names, each is short enough and no two are the same for a text encoder."""
    if not names:
        raise UserError(f"{where}: it is empty; give at least one name")
    seen: dict[str, str] = {}
    for name in names:
        check_length(name, where)
        clean = clean_name(name)
        if (other := seen.get(clean)) is not None:
            why = "" if other == name else f": case and '_' do not tell it from '{other}'"
            raise UserError(f"{where}: duplicate class name '{name}'{why}")
        seen[clean] = name


def check_length(name: str, where: str = "vocabulary") -> None:
    """UserError for a name of more than LONGEST_NAME characters."""
    if len(name) > LONGEST_NAME:
        raise UserError(f"{where}: '{name[:30]}...' has {len(name):,} characters, more than {LONGEST_NAME}")


def _read(given: GivenWords, files: bool, where: str = "vocabulary") -> tuple[str, list[list[str]]]:
    """Where the words are from, for messages; and the spellings of each word."""
    if isinstance(given, os.PathLike) or (files and isinstance(given, str) and os.path.isfile(given)):
        where = f"{where} {os.fspath(given)}"
        return where, _read_file(os.fspath(given), where)
    if not isinstance(given, str):
        return where, _of_items(given, where)
    groups = _of_text(given, where)
    missing = [s for group in groups for s in group if s.lower().endswith(FILES)]
    missing = [given.strip()] if _is_path(given.strip()) else missing
    if files and missing:
        raise UserError(f"{where}: {missing[0]} {'is not a file' if os.path.exists(missing[0]) else 'does not exist'}")
    return where, groups


def _is_path(text: str) -> bool:
    folder = os.path.dirname(text)
    return bool(PATH.match(text) or (folder and os.path.isdir(folder)))


def _read_file(path: str, where: str) -> list[list[str]]:
    if not os.path.isfile(path):
        raise UserError(f"{where} does not exist" if not os.path.exists(path) else f"{where} is not a file")
    with refused_as(f"{where} is not a text file"):
        content = read_bytes(path)
        wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # as some editors of Windows write
        text = content.decode("utf-16" if wide else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it has zero bytes")
    return _of_text(text, where, path.lower().endswith((".json", ".yaml", ".yml")))


def _of_text(text: str, where: str, structured: bool = False) -> list[list[str]]:
    text = text.lstrip("\ufeff")
    if structured or LIST.fullmatch(text) or NAMES.search(text):
        with refused_as(f"{where}: is not a list in JSON or YAML"):
            try:
                document = parse_json(text)
            except ValueError:
                document = parse_yaml(text)
        return _of_items(document, where)
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if not line.lstrip().startswith("#")]
    _check_lines(lines, where)
    parts = (part for line in lines for part in SEPARATORS.split(line))
    return [group for part in parts if (group := _spellings(part))]


def _check_lines(lines: Sequence[str], where: str) -> None:
    """UserError for lines of a CSV file with quoted separators, or of a numbered list."""
    if quoted := next((line for line in lines if QUOTED.search(line)), None):
        raise UserError(f"{where}: {quoted[:60]}: separators within quotes are not understood; give a list in JSON")
    numbers = [int(found[1]) for line in lines if line and (found := NUMBERED.match(line))]
    if len(numbers) > 1 and len(numbers) == sum(map(bool, lines)) and _consecutive(numbers):
        raise UserError(f"{where}: its lines are numbered ('{lines[0][:40]}'); give the names alone, or a list in YAML")


def _consecutive(numbers: Sequence[int]) -> bool:
    return [*numbers] == [*range(numbers[0], numbers[0] + len(numbers))]


def _of_items(document: object, where: str) -> list[list[str]]:
    """The spellings of each item, none of an empty one."""
    if isinstance(document, Mapping) and "names" in document:
        count, document = document.get("nc"), document["names"]
        if isinstance(count, int) and isinstance(document, Mapping | list) and count != len(document):
            raise UserError(f"{where}: it has {len(document)} names, but nc is {count}")
    if isinstance(document, str):
        return _of_text(document, where)
    if isinstance(document, Mapping):
        try:
            numbers = {int(key): word for key, word in document.items()}
        except (TypeError, ValueError):
            keys = ", ".join(map(str, [*document][:5]))
            raise UserError(f"{where}: a list of words is expected, or 'names' with one, not keys {keys}") from None
        if numbers and not _consecutive(sorted(numbers)):
            raise UserError(f"{where}: its numbers have gaps: {', '.join(map(str, sorted(numbers)[:5]))}")
        document = [numbers[number] for number in sorted(numbers)]
    if not isinstance(document, Iterable) or isinstance(document, bytes):
        raise UserError(f"{where}: a list of words is expected, not {type(document).__name__}")
    items = [*document]
    for number, item in enumerate(items):
        if not isinstance(item, str):
            kind = type(item).__name__
            raise UserError(f"{where}: item {number} is {str(item)[:40]!r} ({kind}), not a word in quotes")
        if SEPARATORS.search(item) or "\n" in item.strip():
            raise UserError(f"{where}: item {number} of the list, '{item[:60]}', is not one word: give each as an item "
                            "of its own, and synonyms after '|'")  # fmt: skip
    return [_spellings(item) for item in items]


def _read_synonyms(given: object, count: int) -> list[list[str]]:
    """The further spellings of each of ``count`` words."""
    given = [given] if isinstance(given, str) and count == 1 else given
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable) or len(rows := [*given]) != count:
        raise UserError(f"synonyms: give a list with the further spellings of each word ({count} here)")
    rows = [SEPARATORS.split(row) if isinstance(row, str) else row or () for row in rows]
    for row in rows:
        if not isinstance(row, list | tuple) or not all(isinstance(spelling, str) for spelling in row):
            raise UserError(f"synonyms: {str(row)[:40]} is not a list of spellings")
    return [[s for spelling in row for s in _spellings(spelling)] for row in rows]


def _spellings(text: str) -> list[str]:
    """The parts between "|", without what is not printable (a byte order mark, a lone surrogate) and extra spaces."""
    return [*_parts(text)]


@lru_cache(maxsize=1 << 16)  # a page or a server asks for the same thousands of words again and again
def _parts(text: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFC", text)  # an accent may be a character of its own
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    parts = (" ".join(part.split()) for part in text.split("|"))
    parts = (part[1:-1].strip() if part[:1] in "\"'" and part[-1:] == part[:1] else part for part in parts)
    return tuple(part for part in parts if part)


def _distinct(spellings: Sequence[str]) -> list[str]:
    """Without those that are the same but for case or "_"."""
    first: dict[str, str] = {}
    for spelling in spellings:
        first.setdefault(clean_name(spelling), spelling)
    return [*first.values()]
