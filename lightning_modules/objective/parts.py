"""A loss over scores of which only some rows stand at a time, with the gradients of the whole.

Shapes: R rows, C columns, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

COPIES = 4  # matrices of a part that stand at once, measured: scores, softmax, masks and gradients

# rows (r, D), columns (C, D), temperature and which rows they are -> the part of the loss, and of what is logged
PartOfLoss = Callable[[Tensor, Tensor, float | Tensor, slice], tuple[Tensor, ...]]


def rows_at_once(memory: float, columns: Tensor, num_positives: int = 1) -> int:
    """Rows whose scores with all columns (C, D), and what is made of them, take at most memory MiB."""
    row = len(columns) * columns.element_size() * (COPIES + num_positives - 1)
    return max(1, int(memory * 2**20 / row))


def in_parts(
    function: PartOfLoss, at_once: int, rows: Tensor, columns: Tensor, temperature: float | Tensor
) -> tuple[Tensor, ...]:
    """The sums of what function gives for at_once rows at a time. The first, the loss, alone has gradients.

    They are the gradients of the whole for rows (R, D), columns (C, D) and temperature, and cost no product more: each
    part's are taken while its scores stand (as in Liger's fused losses, arXiv 2410.10989).
    """
    if len(rows) <= at_once:
        return function(rows, columns, temperature, slice(0, len(rows)))
    return _InParts.apply(function, at_once, rows, columns, temperature)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: PartOfLoss, at_once: int, rows: Tensor, columns: Tensor, temperature):
        wanted = ctx.needs_input_grad[2:]
        inputs = (rows, columns, temperature)
        gradients = [torch.zeros_like(x) if want else None for x, want in zip(inputs, wanted, strict=True)]
        totals: list[Tensor] = []
        for start in range(0, len(rows), at_once):
            part = slice(start, min(len(rows), start + at_once))
            leaves = [x.detach() if isinstance(x, Tensor) else x for x in (rows[part], columns, temperature)]
            needed = [leaf.requires_grad_() for leaf, want in zip(leaves, wanted, strict=True) if want]
            with torch.set_grad_enabled(bool(needed)):
                found = function(*leaves, part)
            if needed:
                places = [g[part] if g is gradients[0] else g for g in gradients if g is not None]
                for place, gradient in zip(places, torch.autograd.grad(found[0], needed), strict=True):
                    place += gradient
            totals = [(total + x.detach()) for total, x in zip(totals or [0.0] * len(found), found, strict=True)]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor):
        return None, None, *(None if gradient is None else upstream * gradient for gradient in ctx.saved_tensors)
