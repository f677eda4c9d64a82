"""What joins a vocabulary later: names that a detector learns, and examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from vild.utils.errors import UserError
from vild.utils.fingerprint import check_same_teacher
from vild.vocabulary.prompts import clean_name
from vild.vocabulary.vocabulary import Vocabulary


def find_classes(vocabulary: Vocabulary, names: Sequence[str]) -> list[int | None]:
    """For each name the class that is called so (case and "_" apart), else the only one with this synonym, else None.

    Raises:
        UserError: two of the names are the same class.
    """
    own = {clean_name(name): i for i, name in reversed([*enumerate(vocabulary.names)])}
    own |= {name: i for i, name in enumerate(vocabulary.names)}
    spellings = [vocabulary.spellings(i) for i in range(len(vocabulary))]
    count = Counter(spelling for some in spellings for spelling in some)
    synonyms = {s: i for i, some in enumerate(spellings) for s in some if count[s] == 1}
    found: dict[str, int | None] = {}
    for name in names:
        at = own.get(name, own.get(clean_name(name), synonyms.get(clean_name(name))))
        if at is not None and at in found.values():
            other = next(n for n, i in found.items() if i == at)
            raise UserError(f"vocabulary: '{other}' and '{name}' are both its class '{vocabulary.names[at]}'")
        found[name] = at
    return [found[name] for name in names]


def grow(old: Vocabulary, new: Vocabulary) -> Vocabulary:
    """The classes of ``old`` in their order, then those of ``new`` that it lacks. All of ``new`` are marked base; those
    that ``old`` has keep its embedding."""
    at = find_classes(old, new.names)
    more = [n for n, i in enumerate(at) if i is None]
    splits = ["base" if i in at else mark for i, mark in enumerate(old.splits)] + ["base"] * len(more)
    of_old, of_new = (v.synonyms or ((),) * len(v) for v in (old, new))
    made_old, made_new = (v.made_of or ("",) * len(v) for v in (old, new))
    return replace(
        old,
        names=(*old.names, *(new.names[n] for n in more)),
        embeddings=torch.cat([old.embeddings, new.embeddings[more]]),
        splits=tuple(splits),
        synonyms=(*of_old, *(of_new[n] for n in more)),
        made_of=(*made_old, *(made_new[n] for n in more)) if old.made_of or new.made_of else (),
    )


def kept_from(file: str | Path, grown: Vocabulary, given: str) -> Vocabulary:
    """The vocabulary of an interrupted training, from its file.

    Args:
        grown: the one that its arguments give now.
        given: these arguments, for the message.

    Raises:
        UserError: the file has other names or marks.
    """
    then = Vocabulary.load(file)
    if (then.names, then.splits) != (grown.names, grown.splits):
        raise UserError(f"--resume: {file} has other names or marks than {given} give; take another --output-dir")
    return then


def with_examples(words: Vocabulary, examples: Vocabulary) -> Vocabulary:
    """The classes of ``words``, those that ``examples`` has too (by name or synonym) as the normalised mean of both
    rows, and then its others.

    Raises:
        UserError: the two are of different teachers.
    """
    if words.fingerprint and examples.fingerprint:
        check_same_teacher(examples.fingerprint, "examples: their embedding", words.fingerprint, "the vocabulary")
    known = {spelling: i for i in range(len(words)) for spelling in words.spellings(i)}
    places = [known.get(clean_name(name)) for name in examples.names]
    rows, made_of = words.embeddings.clone(), [*(words.made_of or ("",) * len(words))]
    for row, made, place in zip(examples.embeddings, examples.made_of, places, strict=True):
        if place is not None:
            rows[place] += row
            made_of[place] = f"{made_of[place] or 'word'} and {made}"
    changed = [place for place in places if place is not None]
    rows[changed] = F.normalize(rows[changed], dim=1)  # no bit of the others
    new = [i for i, place in enumerate(places) if place is None]
    return replace(
        words,
        names=(*words.names, *(examples.names[i] for i in new)),
        embeddings=torch.cat([rows, examples.embeddings[new]]),
        splits=(*words.splits, *(examples.splits[i] for i in new)),
        synonyms=words.synonyms and (*words.synonyms, *((),) * len(new)),
        made_of=(*made_of, *(examples.made_of[i] for i in new)),
    )
