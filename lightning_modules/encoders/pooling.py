"""Pooling: one vector from the states of a text's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")  # as in sentence-transformers


def pooled(pooling: str, hidden: Tensor, offsets: Tensor, positions: Tensor, skipped: int = 0) -> Tensor:
    """Return a vector for each text, (B, D). pooling: one of POOLINGS except "cls".

    hidden: states of the last layer, (T, D).
    offsets: start of each text, and T, (B + 1,).
    positions: position of each token in its text, (T,).
    skipped: number of positions at the start of a text to leave out.
    """
    if pooling == "lasttoken":
        return hidden[offsets[1:] - 1]
    included = (positions >= skipped)[:, None]
    if pooling == "max":
        hidden = hidden.masked_fill(~included, float("-inf")) if skipped else hidden
        return torch.segment_reduce(hidden, "max", offsets=offsets.long(), unsafe=True)
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # bfloat16 sums of 200 tokens are 1 % off
    if pooling == "weightedmean":  # weights 1, 2, ... from the start of the text
        hidden = hidden * (positions + 1)[:, None]
    if skipped:
        hidden = hidden * included
    sums = torch.segment_reduce(hidden, "sum", offsets=offsets.long(), unsafe=True)
    lengths = offsets.diff()
    totals = {
        "mean": lengths - skipped,
        "mean_sqrt_len_tokens": (lengths - skipped).sqrt(),
        "weightedmean": (lengths * (lengths + 1) - skipped * (skipped + 1)) / 2,
    }
    return sums / totals[pooling][:, None].to(sums.dtype)
