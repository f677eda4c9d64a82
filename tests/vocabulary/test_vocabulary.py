import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vild.utils.errors import UserError
from vild.vocabulary.encode import NAMES_AT_ONCE, encode_names
from vild.vocabulary.prompts import PROMPT_SETS, fill
from vild.vocabulary.vocabulary import Vocabulary


def test_saved_and_loaded_is_the_same(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "v.safetensors")
    loaded = Vocabulary.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.embeddings, vocabulary.embeddings)
    assert (loaded.names, loaded.splits, loaded.synonyms) == (
        vocabulary.names, vocabulary.splits, vocabulary.synonyms,
    )  # fmt: skip
    assert loaded.fingerprint == vocabulary.fingerprint and loaded.prompts == vocabulary.prompts


def test_from_names_is_the_mean_over_templates_then_synonyms(teacher):
    vocabulary = Vocabulary.from_names(teacher, ["sun", "cow"], synonyms=[[], ["ox", "cow"]])
    rows = []
    for names in (["sun"], ["cow", "ox"]):
        means = [F.normalize(teacher.encode_text(fill(PROMPT_SETS["vild"], n)).mean(0), dim=0) for n in names]
        rows.append(F.normalize(torch.stack(means).mean(0), dim=0))
    torch.testing.assert_close(vocabulary.embeddings, torch.stack(rows))
    torch.testing.assert_close(vocabulary.embeddings.norm(dim=1), torch.ones(2))
    assert vocabulary.fingerprint == teacher.fingerprint


def test_order_of_names_does_not_matter(teacher):
    names = ["sun", "cow", "umbrella"]
    forward = Vocabulary.from_names(teacher, names, prompts="photo")
    backward = Vocabulary.from_names(teacher, names[::-1], prompts="photo")
    torch.testing.assert_close(forward.embeddings, backward.embeddings.flip(0))
    assert forward.take([2, 1, 0]).names == backward.names


@pytest.mark.parametrize("transposed", [False, True])
def test_npy_in_either_orientation(tmp_path, transposed):
    matrix = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    np.save(tmp_path / "m.npy", matrix.T if transposed else matrix)
    vocabulary = Vocabulary.from_npy(tmp_path / "m.npy", list("abcde"))
    expected = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    np.testing.assert_allclose(vocabulary.embeddings.numpy(), expected, rtol=1e-6)
    assert vocabulary.width == 16


def test_npy_of_another_size_is_refused(tmp_path):
    np.save(tmp_path / "m.npy", np.zeros((4, 16), np.float32))
    with pytest.raises(UserError, match=r"m\.npy.*\[4, 16\].*5 names"):
        Vocabulary.from_npy(tmp_path / "m.npy", list("abcde"))


@pytest.mark.parametrize("names", [[], ["", "  "]])
def test_empty_is_refused(teacher, names):
    with pytest.raises(UserError, match="empty"):
        Vocabulary.from_names(teacher, names)


def test_twice_the_same_name_is_refused(teacher):
    with pytest.raises(UserError, match="duplicate class name 'sun'"):
        Vocabulary.from_names(teacher, ["sun", "cow", "sun"])


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Vocabulary.load(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "junk.safetensors")


def test_names_are_encoded_many_at_a_time_as_one_by_one():
    """Over the limit of names a call, with synonyms on the seam; each text has a vector of its own."""

    def encode_text(texts):
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(sum(t.encode()))) for t in texts]
        return F.normalize(torch.stack(rows), dim=1)

    names = [f"thing {n * n}" for n in range(NAMES_AT_ONCE + 3)]
    synonyms = [[f"stuff {n}", "more"] if n % 5 else [] for n in range(len(names))]
    together = encode_names(encode_text, names, synonyms, PROMPT_SETS["vild"])
    alone = [encode_names(encode_text, [n], [s], PROMPT_SETS["vild"]) for n, s in zip(names, synonyms, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    means = [F.normalize(encode_text(fill(PROMPT_SETS["vild"], n)).mean(0), dim=0) for n in (names[1], *synonyms[1])]
    torch.testing.assert_close(together[1], F.normalize(torch.stack(means).mean(0), dim=0))
