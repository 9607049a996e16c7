"""Families of backbones. Each computes one Transformer layer of a Hugging Face model, sub-layer by sub-layer.

    Bert         BERT, RoBERTa, XLM-RoBERTa, CamemBERT: LayerNorm after each sub-layer, positions in the embeddings
    ModernBert   ModernBERT: LayerNorm before each sub-layer, rotary positions, sliding windows in most layers

Modules and parameters remain those of Hugging Face; only the forward pass is ours. It can therefore replace sub-modules
by Experts, and prepend a Prefix to the keys and values of attention.

Shapes: B texts, S positions attended to, L positions computed (S, or 1 if only the first one is needed), P positions of
a prefix, D hidden size, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from datamodules.records import UserError


class Experts(nn.Module):
    """One copy of a sub-module for each expert."""

    def __init__(self, module: nn.Module, names: Sequence[str]):
        super().__init__()
        self.experts = nn.ModuleDict({name: copy.deepcopy(module) for name in names})


def pick(module: nn.Module, expert: str | None) -> nn.Module:
    """Return an expert's copy of a module, or the module itself if it has no experts."""
    return module.experts[expert] if isinstance(module, Experts) else module


class Prefix(NamedTuple):
    """Additional keys and values of one layer, each (1, H, P, D / H), that all texts attend to."""

    keys: Tensor
    values: Tensor


class AttentionContext(NamedTuple):
    """Masks and positions of a batch. They are computed once and used by all layers.

    tokens: true for tokens and false for padding, (B, S).
    masks: attention type of a layer -> true where attention is allowed, (B, 1, 1, S) or (B, 1, S, S).
    rotations: attention type of a layer -> cosines and sines of the rotary positions, each (1, S, D / H).
    """

    tokens: Tensor
    masks: dict[str, Tensor]
    rotations: dict[str, tuple[Tensor, Tensor]]

    def select(self, rows: slice | Tensor) -> AttentionContext:
        """Return the context of some of the texts."""
        return self._replace(tokens=self.tokens[rows], masks={kind: mask[rows] for kind, mask in self.masks.items()})


class Family(Protocol):
    """Interface of all families.

    attention_modules, ffn_modules: names of the sub-modules of a layer that Experts can replace.
    max_positions: maximum number of tokens of a text.
    """

    attention_modules: tuple[str, ...]
    ffn_modules: tuple[str, ...]
    layers: nn.ModuleList
    max_positions: int

    def begin(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, AttentionContext]:
        """Return the embeddings (B, S, D) and the AttentionContext of a batch."""

    def attention(
        self,
        layer: nn.Module,
        hidden: Tensor,
        states: Tensor,
        context: AttentionContext,
        expert: str | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Compute attention and its residual connection, (B, L, D).

        states: all positions, (B, S, D). hidden: the first L positions, for which the output is computed, (B, L, D).
        """

    def prefix(self, layer: nn.Module, states: Tensor) -> Prefix:
        """Return the keys and values of states (1, P, D) in a layer. Positions start at 0."""

    def feed_forward(self, layer: nn.Module, hidden: Tensor, expert: str | None = None) -> Tensor:
        """Compute the feed-forward sub-layer and its residual connection, (B, L, D)."""

    def end(self, hidden: Tensor) -> Tensor:
        """Apply what follows the last layer, such as a final LayerNorm."""


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split states (B, L, D) into heads (B, H, L, D / H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, prefix: Prefix | None) -> Tensor:
    """Compute scaled dot-product attention and join the heads, (B, L, D). The prefix is prepended to key and value.

    query: (B, H, L, D / H). key, value: (B, H, S, D / H).
    """
    if prefix is not None:
        num_texts, num_prefix = len(query), prefix.keys.shape[2]
        key = torch.cat([prefix.keys.to(key.dtype).expand(num_texts, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix.values.to(value.dtype).expand(num_texts, -1, -1, -1), value], dim=2)
        mask = F.pad(mask, (num_prefix, 0), value=True)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        # On a CPU, torch's attention (forward and backward) takes 2.6 times as long in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(
                query.float(), key.float(), value.float(), attn_mask=mask, dropout_p=dropout
            ).to(query.dtype)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


class Bert:
    """BERT and RoBERTa."""

    attention_modules = ("attention.self", "attention.output.dense")  # LayerNorm stays shared (paper, section 3.2)
    ffn_modules = ("intermediate", "output")  # including LayerNorm

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self.layers = backbone.encoder.layer
        config = backbone.config
        # RoBERTa reserves the first positions for padding.
        reserved = 0 if config.model_type == "bert" else config.pad_token_id + 1
        self.max_positions = config.max_position_embeddings - reserved

    def begin(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, AttentionContext]:
        hidden = self.backbone.embeddings(input_ids=input_ids)
        tokens = attention_mask.bool()
        return hidden, AttentionContext(tokens, {"full": tokens[:, None, None, :]}, {})

    def attention(self, layer, hidden, states, context, expert=None, prefix=None):
        projections, output = pick(layer.attention.self, expert), layer.attention.output
        query, key, value = projections.query(hidden), projections.key(states), projections.value(states)
        heads = [split_heads(x, projections.num_attention_heads) for x in (query, key, value)]
        dropout = projections.dropout.p if projections.training else 0.0
        attended = attend(*heads, context.masks["full"], dropout, prefix)
        return output.LayerNorm(output.dropout(pick(output.dense, expert)(attended)) + hidden)

    def prefix(self, layer, states):
        projections = layer.attention.self
        heads = projections.num_attention_heads
        return Prefix(split_heads(projections.key(states), heads), split_heads(projections.value(states), heads))

    def feed_forward(self, layer, hidden, expert=None):
        return pick(layer.output, expert)(pick(layer.intermediate, expert)(hidden), hidden)

    def end(self, hidden: Tensor) -> Tensor:
        return hidden


class ModernBert:
    """ModernBERT."""

    attention_modules = ("attn",)  # the LayerNorm before it stays shared
    ffn_modules = ("mlp",)

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self.layers = backbone.layers
        self.max_positions = backbone.config.max_position_embeddings

    def begin(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, AttentionContext]:
        hidden = self.backbone.embeddings(input_ids=input_ids)
        length = input_ids.shape[1]
        tokens = attention_mask.bool()
        full = tokens[:, None, None, :]
        masks, window = {"full_attention": full, "sliding_attention": full}, self.backbone.config.sliding_window
        if length > window + 1:
            positions = torch.arange(length, device=input_ids.device)
            masks["sliding_attention"] = full & ((positions[:, None] - positions).abs() <= window)
        return hidden, AttentionContext(tokens, masks, self._rotations(hidden))

    def _rotations(self, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        kinds = set(self.backbone.config.layer_types)
        return {kind: self.backbone.rotary_emb(hidden, positions, kind) for kind in kinds}

    def attention(self, layer, hidden, states, context, expert=None, prefix=None):
        attn, length, size = pick(layer.attn, expert), hidden.shape[1], states.shape[-1]
        heads = layer.config.num_attention_heads
        normalized = layer.attn_norm(states)
        # One matrix projects to queries, keys and values. Queries are needed for L positions only.
        query_weight, key_value_weight = attn.Wqkv.weight.split([size, 2 * size])
        query_bias, key_value_bias = (None, None) if attn.Wqkv.bias is None else attn.Wqkv.bias.split([size, 2 * size])
        query = split_heads(F.linear(normalized[:, :length].contiguous(), query_weight, query_bias), heads)
        key, value = (
            split_heads(x, heads) for x in F.linear(normalized, key_value_weight, key_value_bias).chunk(2, -1)
        )
        cos, sin = context.rotations[layer.attention_type]
        query, _ = apply_rotary_pos_emb(query, query, cos[:, :length], sin[:, :length])
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        mask = context.masks[layer.attention_type]
        mask = mask[:, :, :length] if mask.shape[2] > 1 else mask
        attended = attend(query, key, value, mask, attn.attention_dropout if attn.training else 0.0, prefix)
        return hidden + attn.out_drop(attn.Wo(attended))

    def prefix(self, layer, states):
        projected = layer.attn.Wqkv(layer.attn_norm(states))
        _, key, value = (split_heads(x, layer.config.num_attention_heads) for x in projected.chunk(3, -1))
        key, _ = apply_rotary_pos_emb(key, key, *self._rotations(states)[layer.attention_type])
        return Prefix(key, value)

    def feed_forward(self, layer, hidden, expert=None):
        return hidden + pick(layer.mlp, expert)(layer.mlp_norm(hidden))

    def end(self, hidden: Tensor) -> Tensor:
        return self.backbone.final_norm(hidden)


FAMILIES: dict[str, type[Bert] | type[ModernBert]] = {
    "bert": Bert,
    "roberta": Bert,
    "xlm-roberta": Bert,
    "camembert": Bert,
    "modernbert": ModernBert,
}


def family_of(backbone: nn.Module) -> Family:
    """Return the family of a backbone. Raises UserError if it belongs to none of them."""
    model_type = getattr(getattr(backbone, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        kind = type(backbone).__name__ + (f" ({model_type})" if model_type else "")
        raise UserError(f"backbone: {kind} is not supported; expected a model of type {', '.join(FAMILIES)}")
    return FAMILIES[model_type](backbone)
