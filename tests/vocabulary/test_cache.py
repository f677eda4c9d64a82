"""The cache asks for a text once, in this process and the next, and never gets in the way."""

import threading

import torch

from vild.vocabulary.cache import TextCache
from vild.vocabulary.prompts import PROMPT_SETS

TEACHER = {"weights": "0123456789abcdef", "width": 4}


class Embedder:
    """Embeddings by spelling; keeps what it was asked for."""

    def __init__(self):
        self.asked: list[str] = []

    def __call__(self, spellings):
        self.asked += spellings
        return torch.stack([torch.full((4,), float(len(s))) for s in spellings])


def test_a_text_is_encoded_once(tmp_path):
    embed = Embedder()
    cache = TextCache(TEACHER, tmp_path)
    first = cache.get(["kite", "umbrella", "Kite"], PROMPT_SETS["photo"], embed)
    assert embed.asked == ["kite", "umbrella"] and first.tolist() == [[4] * 4, [8] * 4, [4] * 4]
    again = cache.get(["umbrella"], PROMPT_SETS["photo"], embed)
    assert len(embed.asked) == 2 and torch.equal(again[0], first[1])
    other_process = TextCache(TEACHER, tmp_path)
    assert torch.equal(other_process.get(["umbrella", "kite"], PROMPT_SETS["photo"], embed), first[[1, 0]])
    assert len(embed.asked) == 2


def test_what_an_embedding_depends_on_is_in_the_key(tmp_path):
    embed = Embedder()
    for prompts, teacher in [("photo", TEACHER), ("name", TEACHER), ("photo", {**TEACHER, "weights": "ff"})]:
        TextCache(teacher, tmp_path).get(["kite"], PROMPT_SETS[prompts], embed)
    assert embed.asked == ["kite"] * 3


def test_an_unknown_teacher_is_not_written(tmp_path):
    TextCache({}, tmp_path).get(["kite"], PROMPT_SETS["photo"], Embedder())
    assert not list(tmp_path.iterdir())


def test_a_broken_file_or_folder_is_done_without(tmp_path, caplog):
    cache = TextCache(TEACHER, tmp_path)
    cache.path.write_bytes(b"no database" * 100)
    assert cache.get(["kite"], PROMPT_SETS["photo"], Embedder()).tolist() == [[4] * 4]
    assert "is not used" in caplog.text and caplog.text.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert len(TextCache(TEACHER, tmp_path / "file").get(["kite"], PROMPT_SETS["photo"], Embedder())) == 1


def test_a_word_that_is_no_text_is_not_kept(tmp_path, caplog):
    assert TextCache(TEACHER, tmp_path).get(["\udcff"], PROMPT_SETS["photo"], Embedder()).shape == (1, 4)
    assert "is not used" in caplog.text


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("vild.vocabulary.cache.IN_MEMORY", 10)
    cache, embed = TextCache(TEACHER, None), Embedder()
    words = [f"word {n}" for n in range(30)]
    assert cache.get(words, PROMPT_SETS["name"], embed).shape == (30, 4)
    assert len(cache._memory) == 10
    cache.get(words[-10:], PROMPT_SETS["name"], embed)
    assert len(embed.asked) == 30


def test_many_threads_and_one_file(tmp_path):
    failures = []

    def ask(n: int) -> None:
        try:
            words = [f"word {i}" for i in range(n, n + 50)]
            found = TextCache(TEACHER, tmp_path).get(words, PROMPT_SETS["name"], Embedder())
            assert found[:, 0].tolist() == [float(len(w)) for w in words]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(0, 80, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
