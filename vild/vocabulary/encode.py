"""Names to text embeddings: prompts for each spelling, encoded and averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vild.utils.errors import NotAvailable
from vild.vocabulary.cache import TextCache
from vild.vocabulary.prompts import LearnedPrompts, fill

NAMES_AT_ONCE = 64


def encode_names(
    encode_text: Callable[..., Tensor],
    names: Sequence[str],
    synonyms: Sequence[Sequence[str]],
    prompts: list[str] | LearnedPrompts,
    cache: TextCache | None = None,
) -> Tensor:
    """Unit embeddings [C, D]: encode, normalise, mean over templates, normalise, mean over synonyms, normalise.

    ``prompts``: templates, or learned prompts, which are passed to ``encode_text`` as ``prompts``.
    """
    templates = key = prompts
    if isinstance(prompts, LearnedPrompts):
        encode_text, templates = partial(encode_text, prompts=prompts), prompts.templates
        key = [*templates, prompts.hash]
    spellings = [list(dict.fromkeys([name, *others])) for name, others in zip(names, synonyms, strict=True)]
    flat = [spelling for group in spellings for spelling in group]

    def embed(some: list[str]) -> Tensor:
        try:
            return _encode_spellings(encode_text, some, templates)
        except NotAvailable as error:
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            raise NotAvailable(f"vocabulary: '{some[0]}'{more} must be encoded: {error}") from error

    rows = cache.get(flat, key, embed) if cache else embed(flat)
    if len(flat) == len(names):
        return F.normalize(rows, dim=1).float()
    return F.normalize(torch.stack([g.mean(0) for g in rows.split([len(g) for g in spellings])]), dim=1).float()


def _encode_spellings(encode_text: Callable[[list[str]], Tensor], spellings: list[str], templates: list[str]) -> Tensor:
    means = []
    for start in range(0, len(spellings), NAMES_AT_ONCE):  # in chunks, not all [C * T, D] at once
        texts = [text for name in spellings[start : start + NAMES_AT_ONCE] for text in fill(templates, name)]
        means.append(F.normalize(encode_text(texts).unflatten(0, (-1, len(templates))).mean(1), dim=1))
    return torch.cat(means)
