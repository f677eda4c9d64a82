"""Words to detect, as given to a tool or to the Python API: words, a words file, a vocabulary, or the name of a data
set."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vild.data import datasets
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import GivenWords, Words, parse_words


def read_words(given: GivenWords | Words | Vocabulary) -> Words | Vocabulary:
    """Read the value of ``--vocabulary``: words or a words file (``vild/vocabulary/words.py``), a vocabulary file
    (``.safetensors``, or a checkpoint; used as it is), or the name of a registered data set.

    Raises:
        UserError: the file does not exist or cannot be read, or the words are none (:func:`parse_words`).
    """
    if isinstance(given, Words | Vocabulary):
        return given
    if isinstance(given, str | os.PathLike) and os.fspath(given).endswith((".safetensors", ".pth")):
        return Vocabulary.load(given)
    if isinstance(given, str) and not os.path.isfile(given) and given in datasets.entries():
        classes = datasets.get_classes(given)
        return Words(classes.names, classes.synonyms, classes.splits)
    return parse_words(given, files=True)


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
