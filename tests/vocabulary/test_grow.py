"""Old and new names in one vocabulary."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vild.utils.errors import UserError
from vild.vocabulary.grow import find_classes, grow
from vild.vocabulary.vocabulary import Vocabulary


def make(names: dict[str, str], synonyms=None, seed=0) -> Vocabulary:
    rows = F.normalize(torch.randn(len(names), 8, generator=torch.Generator().manual_seed(seed)), dim=1)
    return Vocabulary(tuple(names), rows, tuple(names.values()), synonyms or ())


OLD = make({"sofa": "base", "Coffee_cup": "novel", "bat": "base", "bat (animal)": ""},
           (("couch",), ("mug",), ("club",), ("club",)))  # fmt: skip


def test_a_name_is_found_by_itself_by_case_and_by_its_only_synonym():
    assert find_classes(OLD, ["bat", "coffee cup", "couch", "club", "kite"]) == [2, 1, 0, None, None]
    assert find_classes(OLD, OLD.names) == [0, 1, 2, 3]


def test_a_name_of_its_own_goes_before_another_class_s_synonym():
    both = make({"cup": "base", "mug": "base"}, (("mug",), ()))
    assert find_classes(both, ["mug"]) == [1]


def test_the_grown_vocabulary_has_the_old_rows_and_the_new_ones_behind():
    new = make({"kite": "", "coffee cup": "", "drone": ""}, (("paper kite",), (), ()), seed=1)
    grown = grow(OLD, new)
    assert grown.names == (*OLD.names, "kite", "drone")
    assert grown.splits == ("base", "base", "base", "", "base", "base")  # what was novel is trained now
    assert torch.equal(grown.embeddings, torch.cat([OLD.embeddings, new.embeddings[[0, 2]]]))
    assert grown.synonyms == (*OLD.synonyms, ("paper kite",), ())
    assert OLD.splits[1] == "novel"
    again = grow(grown, new)
    assert again.names == grown.names and torch.equal(again.embeddings, grown.embeddings)


def test_what_rows_are_made_of_is_kept():
    by_example = replace(OLD, made_of=("", "2 example regions", "", ""))
    assert grow(by_example, make({"kite": ""})).made_of == (*by_example.made_of, "")
    assert grow(OLD, make({"kite": ""})).made_of == ()


def test_two_names_of_one_class_are_refused():
    with pytest.raises(UserError, match="'sofa' and 'couch' are both its class 'sofa'"):
        grow(OLD, make({"sofa": "", "couch": ""}))
