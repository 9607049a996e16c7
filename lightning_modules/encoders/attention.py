"""Attention within the texts of a packed batch, in one of three ways.

    varlen   one call of torch's flash attention for all texts (GPUs, bf16 and fp16, without dropout and bias)
    runs     one call of torch's attention for each run of texts of equal length, without copies of texts (CPUs)
    padded   one call for all texts, padded to the longest, with a mask (GPUs, if varlen cannot be used)

Shapes: T tokens of B texts, L positions computed (T, or B if only the first one of each text is needed), P positions of
a prefix, H heads, d dimensions of a head, S tokens of the longest text, M positions of the backbone, D = H x d.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from datamodules.packed import Tokens

VARLEN_ARGUMENTS = inspect.signature(varlen_attn).parameters  # torch 2.10 has neither windows nor splits
# With one split, a text's vector does not depend on the other texts in the batch.
NUM_SPLITS = {"num_splits": 1} if "num_splits" in VARLEN_ARGUMENTS else {}


class Prefix(NamedTuple):
    """Additional keys and values of one layer, each (P, H, d), that all texts attend to."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Settings:
    """Settings that differ between layers.

    window: maximum distance between positions that attend to each other; None for no limit.
    dropout: dropout rate of attention weights.
    prefix: keys and values that all positions attend to, regardless of the window.
    """

    window: int | None = None
    dropout: float = 0.0
    prefix: Prefix | None = None


@dataclass(frozen=True)
class AttentionContext:
    """Positions of the texts in a packed batch, computed once for all layers, without waiting for the device.

    tokens: the batch.
    positions: position of each token in its text, (T,).
    rotations: attention type of a layer -> cosines and sines of the rotary positions, each (T, d).
    bias: number to add to a key's score in all layers, by distance from the query, -(M-1), ..., M-1, (H, 2M-1); None
        for no bias.
    """

    tokens: Tokens
    positions: Tensor
    rotations: dict[str, tuple[Tensor, Tensor]]
    bias: Tensor | None = None

    @cached_property
    def slots(self) -> Tensor:
        """Index of each token in the flattened padded batch, (T,), from 0 to B x S - 1."""
        texts = torch.arange(len(self.tokens), device=self.positions.device)
        return self.tokens.spread(texts) * self.tokens.max_length + self.positions

    @cached_property
    def mask(self) -> Tensor:
        """Whether a position of the padded batch is a token, (B, S)."""
        positions = torch.arange(self.tokens.max_length, device=self.positions.device)
        return positions < self.tokens.offsets.diff()[:, None]

    @cached_property
    def _prefixed_rows(self) -> dict[int, Tensor]:
        return {}

    def prefixed_rows(self, size: int) -> Tensor:
        """Return rows of [prefix; tokens], (P + T, ...), that give each text its own copy of the prefix.

        size: number of positions in the prefix, P. The result has the shape (T + B x P,).
        """
        if size not in self._prefixed_rows:
            tokens, starts = self.tokens, self.tokens.offsets[:-1]
            count = tokens.num_tokens + size * len(tokens)
            lengths = tokens.offsets.diff() + size
            shift = torch.arange(len(tokens), device=starts.device) * size
            start, new_start = (
                torch.repeat_interleave(x, lengths, output_size=count) for x in (starts, starts + shift)
            )
            position = torch.arange(count, device=starts.device) - new_start
            self._prefixed_rows[size] = torch.where(position < size, position, position + start)
        return self._prefixed_rows[size]


def attend(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, settings: Settings) -> Tensor:
    """Compute scaled dot-product attention within each text and join the heads, (L, D).

    query: (L, H, d). If L = B, these are the first positions of the texts.
    key, value: (T, H, d).
    """
    if settings.window is not None and context.tokens.max_length <= settings.window + 1:
        settings = replace(settings, window=None)
    kernel = choose_kernel(query, context, settings)
    return kernel(query, key, value, context, settings).flatten(1)


def choose_kernel(query: Tensor, context: AttentionContext, settings: Settings) -> Callable[..., Tensor]:
    """Return the fastest function that can compute this attention, (L, H, d)."""
    if query.device.type == "cpu":
        return attend_runs
    if query.dtype not in (torch.bfloat16, torch.float16) or settings.dropout or context.bias is not None:
        return attend_padded
    if settings.window is None:
        return attend_varlen
    # varlen_attn aligns windows with the last key, so queries and keys must have the same positions.
    same_positions = settings.prefix is None and len(query) == context.tokens.num_tokens
    return attend_varlen if same_positions and "window_size" in VARLEN_ARGUMENTS else attend_padded


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, settings: Settings) -> Tensor:
    assert not settings.dropout, "varlen_attn has no dropout"
    window, prefix = settings.window, settings.prefix
    offsets, length = context.tokens.offsets, context.tokens.max_length
    key_offsets, key_length = offsets, length
    if prefix is not None:
        size = len(prefix.keys)
        rows = context.prefixed_rows(size)
        key, value = (
            torch.cat([extra.to(x.dtype), x]).index_select(0, rows)
            for extra, x in ((prefix.keys, key), (prefix.values, value))
        )
        shift = torch.arange(len(offsets), dtype=offsets.dtype, device=offsets.device) * size
        key_offsets, key_length = offsets + shift, length + size
    if len(query) < context.tokens.num_tokens:
        offsets, length = torch.arange(len(offsets), dtype=offsets.dtype, device=offsets.device), 1
    limits: dict[str, Any] = {} if window is None else {"window_size": (window, window)}
    limits |= NUM_SPLITS
    return varlen_attn(query, key, value, offsets, key_offsets, length, key_length, **limits)  # type: ignore[return-value]


def attend_runs(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, settings: Settings) -> Tensor:
    dtype, runs, window = query.dtype, context.tokens.runs, settings.window
    if dtype == torch.bfloat16 and query.requires_grad:
        # On a CPU, torch's attention (forward and backward) takes 2.6 times as long in bfloat16 as in float32.
        query, key, value = query.float(), key.float(), value.float()
    counts, sizes = [count for count, _ in runs], [count * length for count, length in runs]
    first_only = len(query) < len(key)
    # The backward pass of split writes each gradient once. With slices, it would also write zeros for all other rows.
    pieces = zip(query.split(counts if first_only else sizes), key.split(sizes), value.split(sizes), strict=True)
    outputs = []
    for (count, length), piece in zip(runs, pieces, strict=True):
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in piece)
        mask = None
        if window is not None and length > window + 1:
            mask = within_window(length, window, q.device)[: q.shape[2]]
        outputs.append(_padded_attention(q, k, v, mask, context, settings).flatten(0, 1))
    return torch.cat(outputs).to(dtype)


def attend_padded(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, settings: Settings) -> Tensor:
    tokens, shape = context.tokens, (len(context.tokens), context.tokens.max_length)

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, context.slots, x)
        return rows.unflatten(0, shape).transpose(1, 2)

    first_only = len(query) < tokens.num_tokens
    q = query[:, :, None] if first_only else padded(query)
    mask = context.mask[:, None, None, :]
    if settings.window is not None:
        mask = mask & within_window(tokens.max_length, settings.window, query.device)[: q.shape[2]]
    attended = _padded_attention(q, padded(key), padded(value), mask, context, settings).flatten(0, 1)
    return attended if first_only else attended.index_select(0, context.slots)


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, context: AttentionContext, settings: Settings
) -> Tensor:
    """Compute attention (B, L, H, d) of queries (B, H, L, d) to the prefix and to keys and values (B, H, S, d).

    mask: whether a query attends to a key (excluding the prefix), bool.
    """
    prefix, num_keys = settings.prefix, [key.shape[2]]
    if prefix is not None:
        key, value = (
            torch.cat([extra.to(x.dtype).transpose(0, 1).expand(len(x), -1, -1, -1), x], dim=2)
            for extra, x in ((prefix.keys, key), (prefix.values, value))
        )
        num_keys = [len(prefix.keys), *num_keys]
        mask = mask if mask is None else F.pad(mask, (len(prefix.keys), 0), value=True)
    if context.bias is not None:
        bias = torch.cat([bias_of_keys(context.bias, query.shape[2], number) for number in num_keys], dim=-1)
        bias = bias.to(query.dtype)[None]  # cast late, because the backward pass of bias_of_keys adds up many gradients
        mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=settings.dropout)
    return attended.transpose(1, 2)


def bias_of_keys(bias: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Return the bias of each query and key, (H, num_queries, num_keys). Both start at position 0.

    bias: bias by distance, (H, 2M-1), as in AttentionContext.
    """
    first = bias.shape[1] // 2 - (num_queries - 1)  # column of the distance from the last query to the first key
    rows = bias[:, first : first + num_queries + num_keys - 1].unfold(1, num_keys, 1)
    return rows.flip(1)  # before, the last query had the first row


def within_window(length: int, window: int, device: torch.device) -> Tensor:
    """Return whether two positions are at most `window` apart, (length, length) bool."""
    positions = torch.arange(length, device=device)
    return (positions[:, None] - positions).abs() <= window
