"""How hard does each objective pull at the region embeddings? The norms of their gradients on real batches, beside
that of L1 at the weight of the config: losses of different kinds are compared by what they do, not by their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vild.modeling.distillation import Distillation, distill_weight
from vild.modeling.objectives import Objective, RegionBatch, load_word_lists, parse_objectives
from vild.modeling.schedule import parse_loss_weights

PROGRESS = 0.5  # of the training, where weights and parameters are schedules
L1 = parse_objectives([{"NAME": "l1"}])[0]


@torch.no_grad()
def embed_regions(model: nn.Module, inputs: Sequence[dict]) -> tuple[Tensor, list]:
    """A trained detector's unit embeddings [M, D] of the distilled regions of a training batch, and these, as
    Instances of each image on its device."""
    distill = [x["distill"].to(model.device) for x in inputs]
    features = model.backbone(model.preprocess_image(inputs).tensor)
    return model.roi_heads.region_embeddings(features, [d.proposal_boxes for d in distill]), distill


def gradient_norm(objective: Objective, regions: RegionBatch) -> float:
    """The norm of the gradient [M, D] of an objective of weight 1 on the student's unit embeddings. What points along
    an embedding is taken out of it: normalisation lets nothing of that through to the network."""
    student = regions.student.detach().requires_grad_()
    values = {key: v if isinstance(v, str) else v(PROGRESS) for key, v in objective.parameters.items()}
    loss = objective.function(replace(regions, student=student), **values)
    (gradient,) = torch.autograd.grad(loss, student)
    return (gradient - (gradient * student).sum(1, keepdim=True) * student).detach().norm().item()


def mean_norms(
    objectives: Sequence[Objective], temperatures: Sequence[float], model: nn.Module, batches: Sequence[Sequence[dict]]
) -> list[float]:
    """Of each objective the mean of :func:`gradient_norm` over batches, at its classifier's temperature; NaN for one
    that looks at feature maps, which pulls elsewhere."""
    heads, totals = model.roi_heads, [0.0] * len(objectives)
    lists = load_word_lists(objectives, model.vocabulary)
    distillation = Distillation([*objectives], 1.0, lists).to(model.device)
    for inputs in batches:
        regions = distillation.regions(*embed_regions(model, inputs), heads.classifier, {})
        for n, (objective, temperature) in enumerate(zip(objectives, temperatures, strict=True)):
            own = replace(regions, temperature=temperature)
            totals[n] += float("nan") if objective.function.needs_maps else gradient_norm(objective, own)
    return [total / len(batches) for total in totals]


def scale_of(cfg, name: str, width: int) -> float:
    """What a training multiplies an objective's WEIGHT by: ``DISTILL_WEIGHT``, and the loss's of ``LOSS_WEIGHTS``."""
    scale = distill_weight(cfg.MODEL.VILD.DISTILL_WEIGHT, width)
    weight = parse_loss_weights(cfg.MODEL.VILD.LOSS_WEIGHTS).get(f"loss_{name}")
    return scale if weight is None else scale * weight(PROGRESS)


def shares(weighted: Sequence[tuple[str, Objective, float]], norms: Sequence[float], l1: float, share: float) -> list:
    """Rows of the table.

    Args:
        weighted: (row of the grid, objective, :func:`scale_of` the row).
        norms: of the objectives, at weight 1.
        l1: L1's norm times its weight in the config.
        share: of ``l1`` that the proposed weight gives.

    Returns:
        [row, objective, weight, norm, share of L1's, proposed weight] each; a weight is the scale times WEIGHT.
    """
    rows = []
    for (name, objective, scale), norm in zip(weighted, norms, strict=True):
        weight = scale * objective.weight(PROGRESS)
        rows.append([name, objective.name, weight, norm, weight * norm / l1, share * l1 / norm if norm else None])
    return rows
