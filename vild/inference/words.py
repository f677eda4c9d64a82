"""Words to detect, as given on a command line or a web page: a list, a text file, or the names of a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vild.data import datasets
from vild.utils.errors import UserError
from vild.utils.untrusted import read_bytes, refused_as
from vild.vocabulary.vocabulary import Vocabulary, first_duplicate


@dataclass(frozen=True)
class Words:
    """Class names, the synonyms of each (their embeddings are averaged), and, for the names of a data set, "base" or
    "novel" for each."""

    names: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    splits: tuple[str, ...] | None = None


def parse_words(lines: Sequence[str]) -> Words:
    """One class per line, "umbrella" or, with synonyms, "umbrella | parasol"; empty lines and "#" comments are skipped.

    Raises:
        UserError: no name, or a duplicate one.
    """
    groups = []
    for line in lines:
        spellings = [s.strip() for s in line.split("|") if s.strip()]
        if spellings and not line.lstrip().startswith("#"):
            groups.append(spellings)
    if not groups:
        raise UserError("vocabulary: it is empty; give at least one name")
    names = [group[0] for group in groups]
    if (twice := first_duplicate(names)) is not None:
        raise UserError(f"vocabulary: duplicate class name '{twice}'")
    return Words(tuple(names), tuple(tuple(group[1:]) for group in groups))


def read_words(text: str) -> Words | Vocabulary:
    """Read the value of ``--vocabulary``: "umbrella, chess knight | horse"; a text file with one class per line; a
    vocabulary file (``.safetensors``, used as it is); or the name of a registered data set.

    Raises:
        UserError: the file cannot be read, or holds no words.
    """
    if os.path.isfile(text):
        if text.endswith(".safetensors"):
            return Vocabulary.load(text)
        with refused_as(f"vocabulary: {text} is not a text file"):
            lines = read_bytes(text).decode().splitlines()
        return parse_words(lines)
    if text.endswith((".txt", ".safetensors")):
        raise UserError(f"vocabulary: {text} does not exist")
    if text in datasets.entries():
        classes = datasets.get_classes(text)
        return Words(classes.names, classes.synonyms, classes.splits)
    return parse_words(text.split(","))


def parse_thresholds(pairs: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Parse "kite=0.3" strings to scores by name; UserError for another form or a name not in ``names``."""
    found = {}
    for pair in pairs:
        name, _, value = pair.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"threshold '{pair}': write NAME=SCORE, for example kite=0.3") from None
        if name.strip() not in names:
            raise UserError(f"threshold '{pair}': '{name.strip()}' is not in the vocabulary")
    return found
