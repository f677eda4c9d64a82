"""Words in every form in which people have them become the same classes, or one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from vild.inference.words import read_words
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import Words, parse_negatives, parse_words

BOTH = ("anchor", "umbrella")
FORMS = {
    "lines.txt": b"anchor\numbrella\n",
    "mark.txt": b"\xef\xbb\xbfanchor\r\numbrella\r\n",  # with a byte order mark, as Notepad writes
    "wide.txt": "anchor\numbrella\n".encode("utf-16"),
    "commas.txt": b"anchor, umbrella\n",
    "semicolons.txt": b"anchor; umbrella;\n",
    "wrapped.txt": b"# mine\n\nanchor,\n  umbrella,\n",
    "bullets.txt": b"- anchor\n- umbrella\n",
    "quoted.csv": b'"anchor","umbrella"\n',
    "list.json": b'["anchor", "umbrella"]',
    "list.txt": b'["anchor",\n "umbrella"]\n',
    "marked.json": b'\xef\xbb\xbf["anchor", "umbrella"]',
    "numbers.json": b'{"1": "umbrella", "0": "anchor"}',
    "data.yaml": b"path: x\nnc: 2\nnames: [anchor, umbrella]\n",
    "numbers.yaml": b"names:\n  0: anchor\n  1: umbrella\n",
    "block.yml": b"names:\n- anchor\n- umbrella\n",
    "yaml.txt": b"nc: 2\nnames:\n  0: anchor\n  1: umbrella\n",
    "bare.yaml": b"- anchor\n- umbrella\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_in_every_form_has_the_same_words(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    for given in (path, str(path)):
        assert read_words(given) == Words(BOTH, ((), ()))
    assert parse_negatives(str(path), files=True) == BOTH


@pytest.mark.parametrize(
    "given",
    ["anchor, umbrella", "anchor; umbrella", "anchor，umbrella", "anchor\numbrella", '["anchor", "umbrella"]',
     "['anchor', 'umbrella']", "[anchor, umbrella]", "\ufeffanchor,umbrella", ["anchor", "umbrella"], iter(BOTH),
     np.array(BOTH), {0: "anchor", 1: "umbrella"}, {"names": ["anchor", "umbrella"]}, ["anchor", "", " umbrella "]],
)  # fmt: skip
def test_words_in_every_form_are_the_same(given):
    assert read_words(given) == Words(BOTH, ((), ()))


def test_synonyms_in_every_form_are_the_same():
    expected = Words(("umbrella", "kite"), (("parasol",), ()))
    for given in ("umbrella | parasol, kite", ["umbrella | parasol", "kite"], '["umbrella|parasol", "kite"]'):
        assert parse_words(given) == expected
    for synonyms in ([["parasol"], []], ["parasol", ""], [("parasol", "Umbrella"), None], iter((["parasol"], ()))):
        assert parse_words(["umbrella", "kite"], synonyms) == expected
    assert parse_words("umbrella", "parasol; brolly").synonyms == (("parasol", "brolly"),)
    assert parse_words(["", "umbrella"], [["x"], ["parasol"]]) == Words(("umbrella",), (("parasol",),))
    assert parse_negatives("chair | stool, Chair") == ("chair", "stool")
    assert parse_negatives("flag") == ("flag",) and parse_negatives(()) == ()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("Kite, kite", "duplicate class name 'kite': case and '_' do not tell it from 'Kite'"),
        (["chess_knight", "chess knight"], "duplicate class name 'chess knight': case"),
        ("kite, kite", "duplicate class name 'kite'$"),
        ("umbrella | parasol, Parasol", "'parasol' is a synonym of 'umbrella' and a word of its own"),
        (["cat, dog", "sun"], "item 0 of the list, 'cat, dog', is not one word"),
        ("a | " + "x" * 300, "has 300 characters"),
        ("x" * 300, "has 300 characters"),
        ([1, 2], "item 0 is '1' .int., not a word"),
        (["a", None], "item 1 is 'None'"),
        (b"cat", "a list of words is expected, not bytes"),
        ({"cat": "dog"}, "a list of words is expected, or 'names' with one, not keys cat"),
        ('["cat", "do', "is not a list in JSON or YAML"),
        ("names: [yes, no]", "item 0 is 'True'"),
        (" ,; ", "it is empty"),
        ('"anchor, ship","umbrella"', "separators within quotes are not understood"),
        ("0: anchor\n1: umbrella", r"its lines are numbered \('0: anchor'\)"),
        ("1\tanchor\n2\tumbrella", "its lines are numbered"),
        ("caf\u00e9, cafe\u0301", "duplicate class name 'caf\u00e9'$"),  # one character, or two
        ("names: [anchor, umbrella]\nnc: 3", "it has 2 names, but nc is 3"),
        ({0: "anchor", 2: "umbrella"}, "its numbers have gaps: 0, 2"),
        # what looks like a file and is none is no class
        ("words.txt", "words.txt does not exist"),
        ("kite, words.JSON", "words.JSON does not exist"),
        ("./words", "./words does not exist"),
        ("C:\\words", "does not exist"),
        ("/nowhere/" + "x" * 300, "does not exist"),
        (Path("nowhere"), "vocabulary nowhere does not exist"),
        (Path("/"), "vocabulary / is not a file"),
        ("/", "vocabulary: / is not a file"),
    ],
)  # fmt: skip
def test_anything_else_is_one_line(given, reason):
    with pytest.raises(UserError, match=reason) as caught:
        read_words(given)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("synonyms", [["parasol"], "parasol", {"umbrella": ["parasol"]}, [[1], []], 3])
def test_synonyms_are_those_of_each_word(synonyms):
    with pytest.raises(UserError, match="synonyms: "):
        parse_words(["umbrella", "kite"], synonyms)


def test_files_that_hold_no_words_are_named(tmp_path):
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    (tmp_path / "bytes.txt").write_bytes(b"a\0b")
    (tmp_path / "path.yaml").write_text("path: x\nnc: 2\n")
    (tmp_path / "twice.txt").write_text("cat\nCat\n")
    for name, reason in [("coco.json", "not keys annotations, categories, images|not keys images"),
                         ("bytes.txt", "not a text file"), ("path.yaml", "not keys path, nc"),
                         ("twice.txt", "duplicate class name 'Cat'")]:  # fmt: skip
        with pytest.raises(UserError, match=reason) as caught:
            read_words(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_names_of_a_data_set_are_taken_as_they_are(teacher):
    """They may hold a comma or a bar; but two with one embedding would share their score."""
    odd = Words(("cup | mug", "jacket, winter"), ((), ("coat; winter",)), ("base", "novel"))
    made = Vocabulary.from_names(teacher, odd, prompts="name")
    assert (made.names, made.synonyms, made.splits) == (odd.names, odd.synonyms, odd.splits)
    with pytest.raises(UserError, match="duplicate class name 'kite'"):
        Vocabulary.from_names(teacher, Words(("Kite", "kite"), ((), ())))
    assert Vocabulary.from_names(teacher, "sun, cow", prompts="name").names == ("sun", "cow")
