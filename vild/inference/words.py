"""Words to detect, as given to a tool or to the Python API: words, a words file, a vocabulary, or the name of a data
set."""

from __future__ import annotations

import os

from vild.data import datasets
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
