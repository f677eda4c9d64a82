"""A vocabulary defines classes in the teacher's embedding space: names with one unit text embedding each.

File: a ``.safetensors`` with ``embeddings`` float32 [C, D]; everything else is JSON in its metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.files import write_tensors
from vild.utils.fingerprint import check_fingerprint
from vild.utils.untrusted import open_tensors, parse_json, refuse_wrong_file, refused_as
from vild.utils.weight_files import load_weights
from vild.vocabulary.cache import TextCache
from vild.vocabulary.encode import encode_names
from vild.vocabulary.prompts import LearnedPrompts, clean_name, find_prompts
from vild.vocabulary.regions import Gap, encode_examples
from vild.vocabulary.words import GivenWords, Words, check_length, check_names, parse_words

SPLITS = ("base", "novel", "")


@dataclass(frozen=True)
class Vocabulary:
    """C classes in a fixed order.

    Attributes:
        names: C distinct names.
        embeddings: float32 [C, D], unit rows.
        splits: per class "base", "novel" (held out in training) or "" (not in training, or unmarked).
        synonyms: per class, further names whose embeddings are averaged in.
        prompts: name of a prompt set, learned prompts, or "import".
        fingerprint: of the teacher (``vild.teacher.teacher``); {} if unknown (imported).
        logit_scale, logit_bias: of the teacher; the scale is None if unknown (imported, or of an older file).
        made_of: per class "" for a word, "2 example regions", "word and 2 example regions" or "linear probe of 9
            regions"; () if all are words.
    """

    names: tuple[str, ...]
    embeddings: Tensor
    splits: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...] = ()
    prompts: str | LearnedPrompts = "import"
    fingerprint: dict = field(default_factory=dict)
    logit_scale: float | None = None
    logit_bias: float = 0.0
    made_of: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.names:
            raise UserError("vocabulary: it is empty; give at least one name")
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise UserError(f"vocabulary: duplicate class name '{twice[0]}'")
        assert self.embeddings.shape[0] == len(self.names) == len(self.splits)
        assert set(self.splits) <= set(SPLITS)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def width(self) -> int:
        """D, the teacher's embedding width."""
        return self.embeddings.shape[1]

    def mask(self, split: str) -> Tensor:
        """bool [C]: which classes have the mark ``split``."""
        return torch.tensor([s == split for s in self.splits])

    @classmethod
    def from_names(
        cls,
        teacher,
        names: GivenWords | Words,
        *,
        prompts: str | Path | LearnedPrompts = "vild",
        splits: Sequence[str] | None = None,
        synonyms: Sequence[Sequence[str]] | None = None,
        cache: TextCache | None = None,
    ) -> Vocabulary:
        """Encode names with a :class:`~vild.teacher.teacher.Teacher` (paper, section 3.2 and appendix).

        Args:
            names: as for :func:`~vild.vocabulary.words.parse_words`; :class:`Words` are taken as they are.
            prompts: a prompt set's name or file.
            synonyms: for each name, further spellings.
            cache: used for names encoded before; must be of the same teacher.

        Raises:
            UserError: no name, a duplicate or too long name, an unknown prompt set or one for another teacher.
        """
        words = names if isinstance(names, Words) else parse_words(names, synonyms, files=True)
        if words is names:  # parse_words has checked the others
            check_names(words.names)
            for synonym in (s for group in words.synonyms for s in group):
                check_length(synonym)
        names, synonyms = words.names, words.synonyms
        found = find_prompts(prompts)
        embeddings = encode_names(teacher.encode_text, names, synonyms, found, cache)
        splits = tuple(splits or words.splits or ("",) * len(names))
        prompts = found if isinstance(found, LearnedPrompts) else prompts
        learned = teacher.logit_scale, teacher.logit_bias
        return cls(names, embeddings.cpu(), splits, synonyms, prompts, teacher.fingerprint, *learned)

    @classmethod
    def from_regions(
        cls, teacher, names: Sequence[str], images: Sequence[Tensor], boxes: Tensor, gap: Gap | None = None
    ) -> Vocabulary:
        """Classes by example, each the normalised mean of its regions' embeddings, as a store has them (1x and 1.5x
        crops).

        Args:
            names: of N regions; those with the same name stand for one class.
            images: N, the one that each region is in: uint8 RGB [3, H, W].
            boxes: float [N, 4], xyxy in pixels of their images.
            gap: makes the rows comparable with words (``Calibration.examples``); None: they are image embeddings.

        Raises:
            UserError: no region, or a name that is too long.
        """
        found, rows, made_of = encode_examples(teacher, names, images, boxes, gap)
        learned = {"logit_scale": teacher.logit_scale, "logit_bias": teacher.logit_bias}
        return cls(found, rows, ("",) * len(found), fingerprint=teacher.fingerprint, made_of=made_of, **learned)

    @classmethod
    def from_npy(
        cls,
        path: str | Path,
        names: GivenWords | Words,
        splits: Sequence[str] | None = None,
        fingerprint: dict | None = None,
    ) -> Vocabulary:
        """Import a matrix of text embeddings, [C, D] or [D, C] (distinguished by the number of names).

        ``fingerprint``: of the teacher that made the matrix (None: unknown; the vocabulary then matches no store).
        """
        words = names if isinstance(names, Words) else parse_words(names, files=True)
        names, splits = words.names, tuple(splits or words.splits or ("",) * len(words.names))
        with refused_as(f"vocabulary: {path} cannot be read as .npy"):
            refuse_wrong_file(path)
            # memory-mapped: an array larger than its file is rejected before memory is allocated
            matrix = np.lib.format.open_memmap(path, mode="r")
            if matrix.dtype.kind not in "fiu":
                raise ValueError(f"its dtype is {matrix.dtype}")
            matrix = np.array(matrix, np.float32)
            if not np.isfinite(matrix).all():
                raise ValueError("not every value is finite")
        if matrix.ndim != 2 or len(names) not in matrix.shape:
            raise UserError(f"{path}: shape {list(matrix.shape)} does not fit {len(names)} names")
        if matrix.shape[0] != len(names):
            matrix = matrix.T
        if fingerprint and fingerprint["width"] != matrix.shape[1]:
            raise UserError(f"{path}: the embeddings' width is {matrix.shape[1]}, the teacher's {fingerprint['width']}")
        embeddings = F.normalize(torch.from_numpy(np.ascontiguousarray(matrix)), dim=1)
        return cls(names, embeddings, splits, fingerprint=fingerprint or {})

    def state(self) -> dict:
        """Plain values and one tensor for a checkpoint; inverse of ``from_state``."""
        return {
            "embeddings": self.embeddings,
            "names": list(self.names),
            "splits": list(self.splits),
            "synonyms": [list(s) for s in self.synonyms],
            "prompts": self.prompts.state() if isinstance(self.prompts, LearnedPrompts) else self.prompts,
            "fingerprint": self.fingerprint,
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
            **({"made_of": list(self.made_of)} if self.made_of else {}),
        }

    @classmethod
    def from_state(cls, state: dict, where: str = "vocabulary") -> Vocabulary:
        """Inverse of ``state``; UserError with ``where`` for an invalid state."""
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
            state.get("logit_scale"),
            state.get("logit_bias", 0.0),
            tuple(state.get("made_of", ())),
        )

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        state = self.state()
        embeddings = state.pop("embeddings").contiguous()
        write_tensors(path, {"embeddings": embeddings}, {"vild": json.dumps(state)})

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary file, or the vocabulary of a checkpoint (``.pth``)."""
        if not Path(path).is_file():
            raise UserError(f"vocabulary: {path} does not exist; tools/build_vocabulary.py makes one")
        if str(path).endswith(".pth"):
            state = load_weights(path).get("vocabulary")
            if state is None:
                raise UserError(f"checkpoint {path} has no vocabulary: it is not one of vild's")
            return cls.from_state(state, f"checkpoint {path}: its content")
        with refused_as(f"vocabulary: {path} is not a vocabulary file"), open_tensors(path) as file:
            state = {**parse_json((file.metadata() or {})["vild"]), "embeddings": file.get_tensor("embeddings")}
        return cls.from_state(state, f"vocabulary: {path}")

    def marked_by(self, trained: Vocabulary) -> Vocabulary:
        """The same classes with the marks of the classes of ``trained`` (the vocabulary a detector was trained with)
        that share a name or synonym: "base", or "novel" if it was held out; "" if there is none."""
        known = {s: mark for i, mark in enumerate(trained.splits) for s in trained.spellings(i)}
        marks = [{known.get(s, "") for s in self.spellings(i)} for i in range(len(self))]
        splits = (next((mark for mark in ("base", "novel") if mark in some), "") for some in marks)
        return replace(self, splits=tuple(splits))

    def spellings(self, index: int) -> set[str]:
        """Name and synonyms of a class, normalised as for prompts."""
        return {clean_name(n) for n in (self.names[index], *(self.synonyms[index] if self.synonyms else ()))}

    def take(self, order: Sequence[int]) -> Vocabulary:
        """The classes with indices ``order``, in that order."""
        pick = lambda values: tuple(values[i] for i in order)  # noqa: E731
        texts = {"names": pick(self.names), "splits": pick(self.splits)}
        for key in ("synonyms", "made_of"):
            texts[key] = pick(getattr(self, key)) if getattr(self, key) else ()
        return replace(self, **texts, embeddings=self.embeddings[list(order)])


def _check_state(state: dict) -> None:
    """ValueError, TypeError or KeyError unless a state has the form of ``Vocabulary.state``."""

    def texts(values) -> bool:
        return isinstance(values, list | tuple) and all(isinstance(v, str) for v in values)

    names, fingerprint, embeddings = state["names"], state["fingerprint"], state["embeddings"]
    if not texts(names):
        raise ValueError("names are not a list of strings")
    if not texts(state["splits"]) or len(state["splits"]) != len(names) or not set(state["splits"]) <= set(SPLITS):
        raise ValueError(f"splits are not one of {SPLITS} per name")
    if len(state["synonyms"]) not in (0, len(names)) or not all(map(texts, state["synonyms"])):
        raise ValueError("synonyms are not a list of strings per name")
    if not texts(made_of := state.get("made_of", ())) or len(made_of) not in (0, len(names)):
        raise ValueError("made_of is not a string per name")
    if not isinstance(state["prompts"], str | dict):
        raise ValueError("prompts have the wrong type")
    if not isinstance(embeddings, Tensor) or embeddings.dtype != torch.float32 or embeddings.ndim != 2:
        raise ValueError("embeddings are not a float32 matrix")
    if len(embeddings) != len(names) or not embeddings.isfinite().all():
        raise ValueError(f"embeddings {list(embeddings.shape)} for {len(names)} names, or not finite")
    check_fingerprint(fingerprint, embeddings.shape[1])
    scale, bias = state.get("logit_scale"), state.get("logit_bias", 0.0)
    if not (scale is None or (isinstance(scale, float) and 0 < scale < float("inf"))) or not isinstance(bias, float):
        raise ValueError(f"logit_scale {scale} or logit_bias {bias} is not a teacher's")
