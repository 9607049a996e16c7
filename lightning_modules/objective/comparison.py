"""Rows against columns: the loss of one side of a batch.

Shapes: R rows, C columns, D dimensions, P positives and N hard negatives of a row (padded with -1).
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from lightning_modules.losses import comparable, info_nce, keep_own, kl_divergence, margin_mse
from lightning_modules.objective.options import ObjectiveOptions, TeacherOptions
from lightning_modules.objective.parts import in_parts, rows_at_once
from lightning_modules.objective.sides import Judge, Side


def compare(
    side: Side,
    options: ObjectiveOptions,
    temperature: float | Tensor,
    prefix: int | None = None,
    weight: float = 1.0,
    teacher: Judge | None = None,
) -> tuple[Tensor, ...]:
    """The loss, and to be logged accuracy, InfoNCE and distillation, all means over rows.

    prefix: leading dimensions that are compared, all by default. weight: of InfoNCE, beside which distillation has the
    teacher's.
    """

    def part_of_loss(rows: Tensor, columns: Tensor, temperature: float | Tensor, part: slice) -> tuple[Tensor, ...]:
        scores, positives, shares = rows @ columns.T, side.positives[part], side.shares[part]
        logits = scores / temperature
        if side.masks:
            masked = reduce(torch.logical_or, (mask(part) for mask in side.masks))
            logits = logits.masked_fill(keep_own(masked, positives), -math.inf)
        losses = weight * info_nce(logits, positives, options.positives, options.positives_in_denominator)
        hits = (logits.detach().argmax(1, keepdim=True) == positives).any(1).to(losses.dtype)
        contrastive, distilled = losses.detach(), torch.zeros_like(hits)
        if teacher is not None:
            distilled = distillation(scores, logits, side, part, teacher, options.teacher)
            losses = losses + options.teacher.weight * distilled
        return tuple((x / shares).sum() for x in (losses, hits, contrastive, distilled.detach()))

    rows, columns = (comparable(vectors[:, :prefix], options.similarity) for vectors in (side.rows, side.columns))
    at_once = rows_at_once(options.score_memory, columns, side.positives.shape[1])
    return in_parts(part_of_loss, at_once, rows, columns, temperature)


def distillation(
    scores: Tensor, logits: Tensor, side: Side, part: slice, teacher: Judge, options: TeacherOptions
) -> Tensor:
    """The loss (r,) to a teacher of some rows' scores (r, C), and of these divided by the temperature and masked."""
    positives, queries = side.positives[part], teacher.queries[part]
    if options.candidates == "batch":
        judged, candidates = queries @ teacher.gathered.T, logits > -math.inf
    else:
        own = torch.cat([positives, side.hard_negatives[part]], dim=1)  # (r, P + N)
        columns = own.clamp(min=0)
        scores, logits = scores.gather(1, columns), logits.gather(1, columns)
        candidates = (own >= 0) & (logits > -math.inf)
        judged = torch.einsum("rg,rcg->rc", queries, teacher.gathered[columns])
        places = torch.arange(positives.shape[1], device=own.device)
        positives = torch.where(positives < 0, positives, places)
    judged = judged.to(scores.dtype)
    if options.loss == "kl":
        return kl_divergence(logits, judged / options.temperature, candidates)
    return margin_mse(scores, judged, positives, candidates)
