"""Prompt learning: context vectors in place of a prompt's words, trained on regions of base objects.

Sources: Zhou et al., "Learning to Prompt for Vision-Language Models" (CoOp, IJCV 2022), with a unified context before
the name; for background regions, Du et al., "Learning to Prompt for Open-Vocabulary Object Detection with
Vision-Language Model" (DetPro, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou
from tqdm import tqdm

from vild.teacher.clip import ClipTeacher
from vild.teacher.context import encode_in_context, token_embedding
from vild.teacher.teacher import Teacher
from vild.utils.errors import UserError
from vild.vocabulary.prompts import LearnedPrompts, fill

BACKGROUND, LEFT_OUT = -1, -2
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.3  # with a base object: at least, at most


def starting_prompts(teacher: Teacher, words: str) -> LearnedPrompts:
    """The prompts before learning: the context [L, W] has the token embeddings of words such as "a photo of a".

    Raises:
        UserError: no words, or a teacher without CLIP's text tower and tokenizer.
    """
    if not isinstance(teacher, ClipTeacher):
        raise UserError(f"prompts cannot be learned for teacher '{teacher.name}': it is not a model of open_clip")
    embedding = token_embedding(teacher.model)
    if not isinstance(teacher.tokenizer, open_clip.SimpleTokenizer):
        tokenizer = type(teacher.tokenizer).__name__
        raise UserError(f"prompts cannot be learned for teacher '{teacher.name}': {tokenizer} is not CLIP's tokenizer")
    ids = teacher.tokenizer.encode(words)
    if not ids or "{" in words:
        raise UserError(f"words: '{words}' is not what a prompt can begin with, as 'a photo of a' is")
    context = embedding(torch.tensor(ids, device=teacher.device)).detach().float().cpu()
    return LearnedPrompts(words, context, teacher.fingerprint)


def match(boxes: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
    """Labels int64 [N] of boxes [N, 4] xyxy: that of the base object of highest IoU (``truth`` [G, 4]), BACKGROUND away
    from all of them, LEFT_OUT in between."""
    if len(truth) == 0:
        return torch.full((len(boxes),), BACKGROUND)
    iou, nearest = box_iou(boxes, truth).max(1)
    found = torch.where(iou >= FOREGROUND_IOU, labels[nearest], LEFT_OUT)
    return found.where(iou > BACKGROUND_IOU, BACKGROUND)


def context_loss(logits: Tensor, labels: Tensor, background: float = 0.0) -> Tensor:
    """Scalar, from logits [R, C] and labels int64 [R]: the mean cross-entropy of labelled regions (CoOp), plus
    ``background`` times that of BACKGROUND regions against the uniform distribution (DetPro)."""
    log_p, named = logits.log_softmax(1), labels >= 0
    away = -log_p[labels == BACKGROUND].mean(1)
    parts = [(1.0, -log_p[named].gather(1, labels[named, None])), (background, away)]
    return sum(weight * part.mean() for weight, part in parts if len(part))


def learn(
    teacher: Teacher,
    embeddings: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    words: str = "a photo of a",
    steps: int = 200,
    batch: int = 512,
    learning_rate: float = 2e-3,
    background: float = 0.0,
    seed: int = 0,
) -> LearnedPrompts:
    """Train a context on regions, at the teacher's temperature and with its weights frozen. AdamW, cosine schedule;
    deterministic on a CPU.

    Args:
        embeddings: the teacher's region embeddings, unit float [N, D].
        labels: int64 [N], indices into ``names`` or BACKGROUND.
        names: of the base classes.
        words: initial context, one vector per token.
        batch: regions per step, drawn with replacement.
        background: loss weight of the BACKGROUND regions; 0 leaves them out.

    Returns:
        the prompts; their record has names, steps, seed, and the accuracy on labelled regions in percent before and
        after.

    Raises:
        UserError: no labelled region, words too long, or a teacher of which :func:`starting_prompts` cannot be made.
    """
    if not (labels >= 0).any():
        raise UserError("prompts: there is no region of a base object to learn from")
    start = starting_prompts(teacher, words)
    context = nn.Parameter(start.context.to(teacher.device, copy=True))
    prompts = [text for name in names for text in fill(start.templates, name)]
    length, longest = max((len(teacher.tokenizer.encode(text)), text) for text in prompts)
    room = teacher.model.context_length - 2  # without the start and end tokens
    if length > room:
        raise UserError(f"words: '{longest}' has {length} tokens, the teacher reads {room}")
    tokens = teacher.tokenizer(prompts).to(teacher.device)
    embeddings, labels = embeddings.to(teacher.device, torch.float32, copy=True), labels.to(teacher.device)
    if not background:
        embeddings, labels = embeddings[labels >= 0], labels[labels >= 0]
    known = labels >= 0
    scale = teacher.model.logit_scale.detach().exp()

    def texts() -> Tensor:
        return F.normalize(encode_in_context(teacher.model, tokens, context).float(), dim=1)

    @torch.no_grad()
    def accuracy() -> float:
        right = (embeddings[known] @ texts().T).argmax(1) == labels[known]
        return round(100 * right.float().mean().item(), 2)

    record = {"regions": int(known.sum()), "background": background, "steps": steps, "seed": seed}
    record |= {"names": list(names), "accuracy": [accuracy()]}
    optimizer = torch.optim.AdamW([context], learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    draw = torch.Generator().manual_seed(seed)
    progress = tqdm(range(steps), desc="prompts")
    for _ in progress:
        rows = torch.randint(len(labels), (min(batch, len(labels)),), generator=draw).to(teacher.device)
        loss = context_loss(scale * embeddings[rows] @ texts().T, labels[rows], background)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    record["accuracy"].append(accuracy())
    return replace(start, context=context.detach().cpu(), record=record)
