"""A vocabulary turns the teacher's space into classes: names, one unit text embedding each, and their origin.

File: one ``.safetensors`` with ``embeddings`` float32 [C, D]; everything else as JSON in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.files import write_tensors
from vild.utils.fingerprint import check_fingerprint
from vild.utils.untrusted import open_tensors, parse_json, refused_as
from vild.utils.weight_files import load_weights
from vild.vocabulary.cache import TextCache
from vild.vocabulary.prompts import LearnedPrompts, clean_name, fill, find_prompts

SPLITS = ("base", "novel", "")
NAMES_AT_ONCE = 64
LONGEST_NAME = 200  # characters; CLIP reads 77 tokens and drops the rest


@dataclass(frozen=True)
class Vocabulary:
    """C classes in a fixed order.

    Attributes:
        names: C different names.
        embeddings: float32 [C, D], unit rows.
        splits: per class "base", "novel" or "" (unmarked).
        synonyms: per class, further names that were averaged in.
        prompts: name of the prompt set, learned prompts themselves (so that they go where it goes), or "import".
        fingerprint: the teacher's (see ``vild.teacher.teacher``); {} when unknown (imported).
    """

    names: tuple[str, ...]
    embeddings: Tensor
    splits: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()
    prompts: str | LearnedPrompts = "import"
    fingerprint: dict = field(default_factory=dict)

    def __post_init__(self):
        if not self.names:
            raise UserError("vocabulary: it is empty; give at least one name")
        if (twice := first_twice(self.names)) is not None:
            raise UserError(f"vocabulary: the name '{twice}' stands in it twice")
        assert self.embeddings.shape[0] == len(self.names) == len(self.splits)
        assert set(self.splits) <= set(SPLITS)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def width(self) -> int:
        """D, the teacher's embedding width."""
        return self.embeddings.shape[1]

    def mask(self, split: str) -> Tensor:
        """bool [C]: which classes carry the mark ``split``."""
        return torch.tensor([s == split for s in self.splits])

    @classmethod
    def from_names(
        cls,
        teacher,
        names: Sequence[str],
        *,
        prompts: str | Path | LearnedPrompts = "vild",
        splits: Sequence[str] | None = None,
        synonyms: Sequence[Sequence[str]] | None = None,
        cache: TextCache | None = None,
    ) -> Vocabulary:
        """Encode names with a :class:`~vild.teacher.teacher.Teacher` (paper, section 3.2 and appendix), or take their
        embeddings from a cache of that teacher's. ``prompts``: a prompt set's name or file.

        Raises:
            UserError: no name, a name twice or too long, an unknown prompt set, or one learned for another teacher.
        """
        names = tuple(n.strip() for n in names if n.strip())
        synonyms = tuple(tuple(s) for s in synonyms) if synonyms else ((),) * len(names)
        if not names:
            raise UserError("vocabulary: it is empty; give at least one name")
        found = find_prompts(prompts)
        for name in (n for group in (names, *synonyms) for n in group):
            if len(name) > LONGEST_NAME:
                raise UserError(f"vocabulary: '{name[:30]}...' has {len(name):,} characters, more than {LONGEST_NAME}")
        embeddings = encode_names(teacher.encode_text, names, synonyms, found, cache)
        splits = tuple(splits) if splits else ("",) * len(names)
        prompts = found if isinstance(found, LearnedPrompts) else prompts
        return cls(names, embeddings.cpu(), splits, synonyms, prompts, teacher.fingerprint)

    @classmethod
    def from_npy(
        cls,
        path: str | Path,
        names: Sequence[str],
        splits: Sequence[str] | None = None,
        fingerprint: dict | None = None,
    ) -> Vocabulary:
        """Import a matrix of text embeddings, [C, D] or [D, C] (told apart by the number of names).

        ``fingerprint``: of the teacher the matrix is known to come from (None: unknown; such a vocabulary fits
        no store).
        """
        with refused_as(f"vocabulary: {path} cannot be read as .npy"):
            # mapped: an array that is larger than its file is refused before memory is taken for it
            matrix = np.lib.format.open_memmap(path, mode="r")
            if matrix.dtype.kind not in "fiu":
                raise ValueError(f"it holds {matrix.dtype}")
            matrix = np.array(matrix, np.float32)
            if not np.isfinite(matrix).all():
                raise ValueError("not every value is finite")
        if matrix.ndim != 2 or len(names) not in matrix.shape:
            raise UserError(f"{path}: shape {list(matrix.shape)} does not fit {len(names)} names")
        if matrix.shape[0] != len(names):
            matrix = matrix.T
        if fingerprint and fingerprint["width"] != matrix.shape[1]:
            raise UserError(f"{path}: its embeddings are {matrix.shape[1]} wide, the teacher's {fingerprint['width']}")
        embeddings = F.normalize(torch.from_numpy(np.ascontiguousarray(matrix)), dim=1)
        splits = tuple(splits) if splits else ("",) * len(names)
        return cls(tuple(names), embeddings, splits, fingerprint=fingerprint or {})

    def state(self) -> dict:
        """Plain values and one tensor, for a checkpoint; ``from_state`` is its inverse."""
        return {
            "embeddings": self.embeddings,
            "names": list(self.names),
            "splits": list(self.splits),
            "synonyms": [list(s) for s in self.synonyms],
            "prompts": self.prompts.state() if isinstance(self.prompts, LearnedPrompts) else self.prompts,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_state(cls, state: dict, where: str = "vocabulary") -> Vocabulary:
        """UserError, naming ``where`` it is from, for a state of another form."""
        with refused_as(f"{where} is not a vocabulary of vild's"):
            _check_state(state)
            prompts = state["prompts"]
            prompts = LearnedPrompts.from_state(prompts) if isinstance(prompts, dict) else prompts
        return cls(
            tuple(state["names"]),
            state["embeddings"],
            tuple(state["splits"]),
            tuple(tuple(s) for s in state["synonyms"]),
            prompts,
            state["fingerprint"],
        )

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        state = self.state()
        embeddings = state.pop("embeddings").contiguous()
        write_tensors(path, {"embeddings": embeddings}, {"vild": json.dumps(state)})

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary file, or the vocabulary inside a checkpoint (``.pth``)."""
        if not Path(path).is_file():
            raise UserError(f"vocabulary: {path} does not exist; tools/build_vocabulary.py makes one")
        if str(path).endswith(".pth"):
            state = load_weights(path).get("vocabulary")
            if state is None:
                raise UserError(f"checkpoint {path} holds no vocabulary: it is not one of vild's")
            return cls.from_state(state, f"checkpoint {path}: what it holds")
        with refused_as(f"vocabulary: {path} is not a vocabulary file"), open_tensors(path) as file:
            state = {**parse_json((file.metadata() or {})["vild"]), "embeddings": file.get_tensor("embeddings")}
        return cls.from_state(state, f"vocabulary: {path}")

    def marked_by(self, trained: Vocabulary) -> Vocabulary:
        """The same classes, "base" where a name or synonym is one of a base class of ``trained``, else "novel": what
        a detector that was trained on those has and has not met."""
        known = {s for i, mark in enumerate(trained.splits) if mark == "base" for s in trained.spellings(i)}
        splits = ("base" if self.spellings(i) & known else "novel" for i in range(len(self)))
        return replace(self, splits=tuple(splits))

    def spellings(self, index: int) -> set[str]:
        """The names of a class, cleaned as for prompts."""
        return {clean_name(n) for n in (self.names[index], *(self.synonyms[index] if self.synonyms else ()))}

    def take(self, order: Sequence[int]) -> Vocabulary:
        """The classes ``order`` (indices into this vocabulary), in that order."""
        pick = lambda values: tuple(values[i] for i in order)  # noqa: E731
        synonyms = pick(self.synonyms) if self.synonyms else ()
        return replace(
            self,
            names=pick(self.names),
            embeddings=self.embeddings[list(order)],
            splits=pick(self.splits),
            synonyms=synonyms,
        )


def first_twice(names: Sequence[str]) -> str | None:
    """The first name that was there before."""
    seen: set[str] = set()
    return next((n for n in names if n in seen or seen.add(n)), None)


def _check_state(state: dict) -> None:
    """ValueError, TypeError or KeyError unless a state is of the form that ``Vocabulary.state`` gives."""

    def texts(values) -> bool:
        return isinstance(values, list | tuple) and all(isinstance(v, str) for v in values)

    names, fingerprint, embeddings = state["names"], state["fingerprint"], state["embeddings"]
    if not texts(names):
        raise ValueError("names are no list of texts")
    if not texts(state["splits"]) or len(state["splits"]) != len(names) or not set(state["splits"]) <= set(SPLITS):
        raise ValueError(f"splits are not one of {SPLITS} for each name")
    if len(state["synonyms"]) not in (0, len(names)) or not all(map(texts, state["synonyms"])):
        raise ValueError("synonyms are no list of texts for each name")
    if not isinstance(state["prompts"], str | dict):
        raise ValueError("prompts are of another kind")
    if not isinstance(embeddings, Tensor) or embeddings.dtype != torch.float32 or embeddings.ndim != 2:
        raise ValueError("embeddings are no matrix of float32")
    if len(embeddings) != len(names) or not embeddings.isfinite().all():
        raise ValueError(f"embeddings {list(embeddings.shape)} of {len(names)} names, or not finite")
    check_fingerprint(fingerprint, embeddings.shape[1])


def encode_names(
    encode_text: Callable[..., Tensor],
    names: Sequence[str],
    synonyms: Sequence[Sequence[str]],
    prompts: list[str] | LearnedPrompts,
    cache: TextCache | None = None,
) -> Tensor:
    """Unit embeddings [C, D]: encode, L2, mean over templates, L2, mean over synonyms, L2.

    ``prompts``: templates, or learned ones, which ``encode_text`` then is given as ``prompts``.
    """
    templates = key = prompts
    if isinstance(prompts, LearnedPrompts):
        encode_text, templates = partial(encode_text, prompts=prompts), prompts.templates
        key = [*templates, prompts.hash]
    spellings = [list(dict.fromkeys([name, *others])) for name, others in zip(names, synonyms, strict=True)]
    flat = [spelling for group in spellings for spelling in group]

    def embed(some: list[str]) -> Tensor:
        return _encode_spellings(encode_text, some, templates)

    rows = cache.get(flat, key, embed) if cache else embed(flat)
    if len(flat) == len(names):
        return F.normalize(rows, dim=1).float()
    return F.normalize(torch.stack([g.mean(0) for g in rows.split([len(g) for g in spellings])]), dim=1).float()


def _encode_spellings(encode_text: Callable[[list[str]], Tensor], spellings: list[str], templates: list[str]) -> Tensor:
    means = []
    for start in range(0, len(spellings), NAMES_AT_ONCE):  # enough texts to fill a batch, not all [C * T, D] at once
        texts = [text for name in spellings[start : start + NAMES_AT_ONCE] for text in fill(templates, name)]
        means.append(F.normalize(encode_text(texts).unflatten(0, (-1, len(templates))).mean(1), dim=1))
    return torch.cat(means)
