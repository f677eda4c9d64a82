"""Text encoding with learned vectors in place of a prompt's words (CoOp, Zhou et al. 2022)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vild.utils.errors import UserError


class _InContext(nn.Module):
    """A token embedding in which the context replaces the embeddings of tokens 1 to L, after the start token."""

    def __init__(self, embedding: nn.Module, context: Tensor):
        super().__init__()
        self.embedding, self.context = embedding, context

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        context = self.context.to(embedded.dtype).expand(len(tokens), -1, -1)
        return torch.cat([embedded[:, :1], context, embedded[:, 1 + context.shape[1] :]], 1)


def encode_in_context(model: nn.Module, tokens: Tensor, context: Tensor) -> Tensor:
    """Text features [T, D], not normalised, of int64 tokens [T, S], with ``context`` [L, W] in place of tokens 1 to L.

    Calls ``encode_text`` on a shallow copy of the model with another token embedding: masks and pooling are open_clip's
    for every text tower, and other threads may use the model meanwhile. Differentiable in the context.
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
    """The token embedding of an open_clip model: in ``text`` of ``CustomTextCLIP`` and ``CoCa``, else of the model.

    Raises:
        UserError: another library's text tower.
    """
    tower = getattr(model, "text", model)
    embedding = getattr(tower, "token_embedding", None)
    if not isinstance(embedding, nn.Embedding):
        name = type(tower).__name__
        raise UserError(f"prompts cannot be learned for this teacher: its text tower, {name}, is not open_clip's own")
    return embedding
