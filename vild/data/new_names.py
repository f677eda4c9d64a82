"""Training sets that annotate some of a vocabulary's classes only, as a few images with new names do
(``MODEL.VILD.OLD_STUDENT``)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vild.data import datasets
from vild.utils.errors import UserError
from vild.vocabulary.grow import find_classes
from vild.vocabulary.vocabulary import Vocabulary


def class_indices(vocabulary: Vocabulary, name: str) -> dict[int, int]:
    """The data set's base classes: index there to index in the vocabulary.

    Raises:
        UserError: one of them is no base class of the vocabulary.
    """
    classes = datasets.get_classes(name)
    base = [k for k, mark in enumerate(classes.splits) if mark == "base"]
    found = dict(zip(base, find_classes(vocabulary, [classes.names[k] for k in base]), strict=True))
    for k, at in found.items():
        if at is None or vocabulary.splits[at] != "base":
            what = "not in the vocabulary" if at is None else f"marked '{vocabulary.splits[at]}' in the vocabulary"
            raise UserError(f"data set '{name}': its base class '{classes.names[k]}' is {what} (tools/finetune.py "
                            "makes one of old and new names)")  # fmt: skip
    return found


def unlabelled_classes(vocabulary: Vocabulary, names: Sequence[str]) -> Tensor:
    """bool [C]: the base classes that training sets do not annotate.

    Raises:
        UserError: as :func:`class_indices`, or the sets annotate different classes.
    """
    labelled = [{*class_indices(vocabulary, name).values()} for name in names]
    if any(some != labelled[0] for some in labelled):
        raise UserError(f"DATASETS.TRAIN {tuple(names)}: with an old student they must annotate the same classes")
    base = vocabulary.mask("base")
    base[sorted(labelled[0])] = False
    return base


def load_dicts(name: str, vocabulary: Vocabulary | None) -> list[dict]:
    """:func:`datasets.load_dicts` of a training set; with a vocabulary, each ``category_id`` is an index of it."""
    records = datasets.load_dicts(name)
    if vocabulary is not None:
        indices = class_indices(vocabulary, name)
        for annotation in (a for record in records for a in record["annotations"]):
            annotation["category_id"] = indices[annotation["category_id"]]
    return records
