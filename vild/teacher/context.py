"""Text encoding with learned vectors in place of a prompt's words (CoOp, Zhou et al. 2022)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vild.utils.errors import UserError


class _InContext(nn.Module):
    """A token embedding with the embeddings of tokens 1 to L, after the start token, exchanged for a context."""

    def __init__(self, embedding: nn.Module, context: Tensor):
        super().__init__()
        self.embedding, self.context = embedding, context

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        context = self.context.to(embedded.dtype).expand(len(tokens), -1, -1)
        return torch.cat([embedded[:, :1], context, embedded[:, 1 + context.shape[1] :]], 1)


def encode_in_context(model: nn.Module, tokens: Tensor, context: Tensor) -> Tensor:
    """Text features [T, D], not normalised, of int64 tokens [T, S] whose tokens 1 to L stand for ``context`` [L, W].

    It is the model's own ``encode_text``, on a copy that shares every weight but the token embedding: the model is
    not touched, other threads may use it, and masks and pooling are open_clip's, whichever text tower it is.
    Differentiable in the context.
    """
    shared = _shallow(model)
    tower = shared
    if hasattr(model, "text"):
        tower = shared.text = _shallow(model.text)
    tower.token_embedding = _InContext(token_embedding(model), context)
    return shared.encode_text(tokens)


def _shallow(module: nn.Module) -> nn.Module:
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other


def token_embedding(model: nn.Module) -> nn.Embedding:
    """Of open_clip's text towers: ``CLIP`` has its own on the model, ``CustomTextCLIP`` and ``CoCa`` in ``text``."""
    embedding = getattr(getattr(model, "text", model), "token_embedding", None)
    if not isinstance(embedding, nn.Embedding):
        tower = type(getattr(model, "text", model)).__name__
        raise UserError(f"prompts cannot be learned for this teacher: its text tower, {tower}, is not open_clip's own")
    return embedding
