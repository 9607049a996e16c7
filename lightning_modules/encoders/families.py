"""Families of backbones. Each computes one Transformer layer of a Hugging Face model, sub-layer by sub-layer.

    Bert         BERT, RoBERTa, XLM-RoBERTa, CamemBERT: LayerNorm after each sub-layer, positions in the embeddings
    MPNet        MPNet: the same, plus a bias on the scores by distance of query and key, shared by all layers
    ModernBert   ModernBERT: LayerNorm before each sub-layer, rotary positions, sliding windows in most layers

Modules and parameters come from Hugging Face; only the forward pass is ours. It can therefore compute concatenated
texts without padding, replace sub-modules by Experts, and prepend a Prefix to the keys and values of attention.

Everything but attention is computed row by row, by functions of modules and tensors that torch can compile.

Shapes: T tokens of B texts, L positions computed (T, or B if only the first one of each text is needed), P positions of
a prefix, D hidden size, H heads, d dimensions of a head.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.packed import Tokens
from datamodules.records import UserError
from lightning_modules.encoders.attention import AttentionContext, Prefix, Settings, attend


class Experts(nn.Module):
    """One copy of a sub-module for each expert."""

    def __init__(self, module: nn.Module, names: Sequence[str]):
        super().__init__()
        self.experts = nn.ModuleDict({name: copy.deepcopy(module) for name in names})


def pick(module: nn.Module, expert: Any) -> Any:
    """Return an expert's copy of a module, or the module itself if it has no experts."""
    return module.experts[expert] if isinstance(module, Experts) else module


def any_expert(module: nn.Module) -> Any:
    """Return any expert's copy of a module, for settings that all copies share, or the module itself."""
    return next(iter(module.experts.values())) if isinstance(module, Experts) else module


def active_rate(dropout: nn.Dropout) -> float:
    """Return the rate of a dropout module, or 0 in inference."""
    return dropout.p if dropout.training else 0.0


@dataclass(frozen=True)
class Groups:
    """The rows of each expert in a batch whose texts have different experts.

    tokens: pairs of an expert and its rows among the T tokens. Each row is in exactly one pair.
    texts: the same for the B texts.

    Rows can be consecutive slices, so that they are computed without copying.
    """

    tokens: Sequence[tuple[str, slice | Tensor]]
    texts: Sequence[tuple[str, slice | Tensor]]


# One expert's name for all rows, the experts of groups of rows, or None without experts.
Choice = str | Groups | None


def by_expert(
    compute: Callable[..., Tensor],
    modules: Sequence[nn.Module],
    choice: Choice,
    context: AttentionContext,
    *inputs: Tensor,
) -> Tensor:
    """Compute each row with its expert, (L, ...).

    compute: function of the modules, and of rows of the inputs.
    modules: modules, with or without experts.
    inputs: tensors (L, ...).
    """
    if not isinstance(choice, Groups) or not any(isinstance(module, Experts) for module in modules):
        return compute(*(pick(module, choice) for module in modules), *inputs)
    groups = choice.tokens if len(inputs[0]) == context.tokens.num_tokens else choice.texts
    outputs = [compute(*(pick(m, expert) for m in modules), *(x[rows] for x in inputs)) for expert, rows in groups]
    indices = [rows for _, rows in groups if isinstance(rows, Tensor)]
    return torch.cat(outputs)[torch.cat(indices).argsort()] if indices else torch.cat(outputs)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of modules and rows.

    It is only compiled again for a new dtype, for inference, and for a single row, because the number of rows is
    dynamic and modules of the same kind share their code. Attention is not compiled, because its shapes differ in each
    batch.
    """
    return torch.compile(function, dynamic=True)


def num_graphs() -> int:
    """Return how many times this process has compiled a function."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Family(ABC):
    """Base class of all families.

    attention_modules, ffn_modules: names of the sub-modules of a layer that Experts can replace.
    inputs: modules that `begin` uses.
    max_positions: maximum number of tokens of a text.
    compiled: whether the functions of rows are compiled.
    distance_bias: function that returns the bias of an AttentionContext; None for families without a bias.
    """

    attention_modules: tuple[str, ...]
    ffn_modules: tuple[str, ...]
    inputs: Sequence[nn.Module]
    layers: nn.ModuleList
    max_positions: int
    compiled = False
    distance_bias: Callable[[], Tensor] | None = None

    def run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Call a function of modules and rows, compiled or not."""
        return (compiled(function) if self.compiled else function)(*arguments)

    @abstractmethod
    def begin(self, tokens: Tokens) -> tuple[Tensor, AttentionContext]:
        """Return the embeddings (T, D) and the AttentionContext of a batch."""

    @abstractmethod
    def attention(
        self,
        layer: nn.Module,
        hidden: Tensor,
        states: Tensor,
        context: AttentionContext,
        choice: Choice = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Compute attention and its residual connection, (L, D).

        states: all positions, (T, D).
        hidden: positions for which the output is computed, (L, D).
        """

    @abstractmethod
    def prefix(self, layer: nn.Module, states: Tensor, context: AttentionContext) -> Prefix:
        """Return the keys and values of a layer for the states of one text, (P, D)."""

    @abstractmethod
    def feed_forward(
        self, layer: nn.Module, hidden: Tensor, context: AttentionContext, choice: Choice = None
    ) -> Tensor:
        """Compute the feed-forward sub-layer and its residual connection, (L, D)."""

    def end(self, hidden: Tensor) -> Tensor:
        """Apply the modules after the last layer; by default, there are none."""
        return hidden

    def half_norms(self) -> list[nn.Module]:
        """Return the LayerNorms that compute in the type of matrix products in inference mode."""
        return []


def _in_autocast_type(x: Tensor) -> Tensor:
    """Cast a tensor to the type of matrix products."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _bert_output(dense: Any, output: Any, attended: Tensor, hidden: Tensor) -> Tensor:
    return _add_and_normalize(output.LayerNorm, output.dropout(dense(attended)), hidden)


def _mpnet_output(attn: Any, output: Any, attended: Tensor, hidden: Tensor) -> Tensor:
    return _bert_output(attn.o, output, attended, hidden)


def _bert_feed_forward(intermediate: Any, output: Any, hidden: Tensor) -> Tensor:
    return _add_and_normalize(output.LayerNorm, output.dropout(output.dense(intermediate(hidden))), hidden)


def _add_and_normalize(norm: nn.LayerNorm, x: Tensor, residual: Tensor) -> Tensor:
    """Return LayerNorm(x + residual) in x's dtype, computed in the norm's dtype.

    Under autocast, that is float32 in training. In inference mode, Encoder.casting casts the norms in `half_norms` too,
    because adding and normalising in float32 took a quarter of a forward pass on a GPU.
    """
    if torch.is_autocast_enabled(x.device.type) and norm.weight.dtype == x.dtype:
        with torch.autocast(x.device.type, enabled=False):  # autocast computes LayerNorm in float32
            return norm((x + residual).to(x.dtype))
    return norm(x.to(norm.weight.dtype) + residual).to(x.dtype)


class Bert(Family):
    """BERT and RoBERTa."""

    # LayerNorm after attention stays shared (paper, section 3.2).
    attention_modules: tuple[str, ...] = ("attention.self", "attention.output.dense")
    ffn_modules: tuple[str, ...] = ("intermediate", "output")  # including LayerNorm
    projections = ("query", "key", "value")
    attention_output: Callable[..., Tensor] = staticmethod(_bert_output)

    def __init__(self, backbone: Any):
        self.backbone = backbone
        self.inputs = [backbone.embeddings]
        self.layers = backbone.encoder.layer
        self.num_heads = backbone.config.num_attention_heads
        # RoBERTa reserves the first positions for padding.
        self.padding_id: Any = getattr(backbone.embeddings, "padding_idx", None)
        reserved = 0 if self.padding_id is None else self.padding_id + 1
        self.max_positions = backbone.config.max_position_embeddings - reserved

    def begin(self, tokens: Tokens) -> tuple[Tensor, AttentionContext]:
        positions = tokens.positions()
        embedded = positions if self.padding_id is None else self._roberta_positions(tokens)
        hidden = self.backbone.embeddings(input_ids=tokens.input_ids[None], position_ids=embedded[None])[0]
        bias = self.distance_bias() if self.distance_bias else None
        return _in_autocast_type(hidden), AttentionContext(tokens, positions, {}, bias)

    def _roberta_positions(self, tokens: Tokens) -> Tensor:
        """Return rows of the position embeddings. As in transformers, padding tokens within a text have no position."""
        counted = (tokens.input_ids != self.padding_id).long()
        total = F.pad(counted.cumsum(0), (1, 0))
        before = total[tokens.offsets[:-1]]
        return (total[1:] - tokens.spread(before)) * counted + self.padding_id

    def attention_parts(self, layer: Any) -> tuple[Any, Any, Any]:
        """Return three modules, which have the projections, the output projection, and dropout with LayerNorm."""
        attention = layer.attention
        return attention.self, attention.output.dense, attention.output

    def attention(self, layer, hidden, states, context, choice=None, prefix=None):
        inputs, output, norm = self.attention_parts(layer)

        def heads(name: str, rows: Tensor) -> Tensor:
            projected = by_expert(lambda module, x: getattr(module, name)(x), [inputs], choice, context, rows)
            return projected.unflatten(-1, (self.num_heads, -1))

        query, key, value = map(heads, self.projections, (hidden, states, states))
        dropout = active_rate(any_expert(inputs).dropout)
        attended = attend(query, key, value, context, Settings(dropout=dropout, prefix=prefix))
        compute = partial(self.run, self.attention_output)
        return by_expert(compute, [output, norm], choice, context, attended, hidden)

    def prefix(self, layer, states, context):
        inputs, (_, key, value) = self.attention_parts(layer)[0], self.projections
        keys, values = (getattr(inputs, name)(states).unflatten(-1, (self.num_heads, -1)) for name in (key, value))
        return Prefix(keys, values)

    def feed_forward(self, layer, hidden, context, choice=None):
        compute = partial(self.run, _bert_feed_forward)
        return by_expert(compute, [layer.intermediate, layer.output], choice, context, hidden)

    def half_norms(self):
        return [module for module in self.layers.modules() if isinstance(module, nn.LayerNorm)]


class MPNet(Bert):
    """MPNet (Song et al., 2020)."""

    attention_modules = ("attention.attn",)
    projections = ("q", "k", "v")
    attention_output = staticmethod(_mpnet_output)

    def __init__(self, backbone: Any):
        super().__init__(backbone)
        self.inputs = [backbone.embeddings, backbone.encoder.relative_attention_bias]

    def attention_parts(self, layer: Any) -> tuple[Any, Any, Any]:
        return layer.attention.attn, layer.attention.attn, layer.attention

    def distance_bias(self) -> Tensor:
        encoder, longest = self.backbone.encoder, self.max_positions
        table = encoder.relative_attention_bias  # (buckets, H)
        distances = torch.arange(1 - longest, longest, device=table.weight.device)
        return table(encoder.relative_position_bucket(distances)).T


class ModernBert(Family):
    """ModernBERT."""

    attention_modules: tuple[str, ...] = ("attn",)  # the LayerNorm before it stays shared
    ffn_modules: tuple[str, ...] = ("mlp",)

    def __init__(self, backbone: Any):
        self.backbone = backbone
        self.inputs = [backbone.embeddings]
        self.layers = backbone.layers
        self.num_heads = backbone.config.num_attention_heads
        self.max_positions = backbone.config.max_position_embeddings

    def begin(self, tokens: Tokens) -> tuple[Tensor, AttentionContext]:
        hidden, positions = self.backbone.embeddings(input_ids=tokens.input_ids[None])[0], tokens.positions()
        # In at least float32, because bfloat16 has too few digits for the angles of late positions.
        like = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        rotations = {
            kind: tuple(x[0] for x in self.backbone.rotary_emb(like, positions[None], kind))
            for kind in set(self.backbone.config.layer_types)
        }
        return hidden, AttentionContext(tokens, positions, rotations)

    def attention(self, layer, hidden, states, context, choice=None, prefix=None):
        first_only, kind = len(hidden) < len(states), layer.attention_type
        modules = [layer.attn_norm, layer.attn]
        cos, sin = context.rotations[kind]
        if first_only:
            query = self._heads(by_expert(partial(self.run, _query), modules, choice, context, hidden))
            key, value = by_expert(partial(self.run, _key_value), modules, choice, context, states).chunk(2, -1)
            key, value = self.run(rotated, self._heads(key), cos, sin), self._heads(value)
        else:
            size = states.shape[-1]
            both, value = by_expert(partial(self.run, _projected), modules, choice, context, states).split(
                [2 * size, size], -1
            )
            query, key = self.run(rotated, self._heads(both), cos, sin).chunk(2, 1)
            value = self._heads(value)
        window = self.backbone.config.sliding_window if kind == "sliding_attention" else None
        attn = any_expert(layer.attn)
        dropout = attn.attention_dropout if attn.training else 0.0
        attended = attend(query, key, value, context, Settings(window, dropout, prefix))
        return by_expert(partial(self.run, _modernbert_output), [layer.attn], choice, context, attended, hidden)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.backbone.config.hidden_size // self.num_heads))

    def prefix(self, layer, states, context):
        key, value = (self._heads(x) for x in _key_value(layer.attn_norm, layer.attn, states).chunk(2, -1))
        return Prefix(rotated(key, *context.rotations[layer.attention_type]), value)

    def feed_forward(self, layer, hidden, context, choice=None):
        compute = partial(self.run, _modernbert_feed_forward)
        return by_expert(compute, [layer.mlp_norm, layer.mlp], choice, context, hidden)

    def end(self, hidden: Tensor) -> Tensor:
        return self.backbone.final_norm(hidden)


def _projected(norm: Any, attn: Any, rows: Tensor) -> Tensor:
    """Return queries, keys and values, computed by one matrix."""
    return attn.Wqkv(norm(rows))


def _query(norm: Any, attn: Any, rows: Tensor) -> Tensor:
    size = rows.shape[-1]
    return _projected_by(attn.Wqkv, slice(size), norm(rows))


def _key_value(norm: Any, attn: Any, rows: Tensor) -> Tensor:
    size = rows.shape[-1]
    return _projected_by(attn.Wqkv, slice(size, None), norm(rows))


def _projected_by(linear: nn.Module, outputs: slice, rows: Tensor) -> Tensor:
    """Compute only some output dimensions of a linear layer."""
    if not isinstance(linear, nn.Linear):  # a LoRA layer, whose weight does not determine its output
        return linear(rows)[:, outputs]
    return F.linear(rows, linear.weight[outputs], None if linear.bias is None else linear.bias[outputs])


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (T, H, d) by their positions (Su et al., arXiv 2104.09864). cos, sin: (T, d)."""
    first, second = heads.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (heads * cos[:, None] + turned * sin[:, None]).to(heads.dtype)


def _modernbert_output(attn: Any, attended: Tensor, hidden: Tensor) -> Tensor:
    return hidden + attn.out_drop(attn.Wo(attended))


def _modernbert_feed_forward(norm: Any, mlp: Any, hidden: Tensor) -> Tensor:
    return hidden + mlp(norm(hidden))


FAMILIES: dict[str, Callable[[Any], Family]] = {
    "bert": Bert,
    "roberta": Bert,
    "xlm-roberta": Bert,
    "camembert": Bert,
    "mpnet": MPNet,
    "modernbert": ModernBert,
}


def family_of(backbone: PreTrainedModel) -> Family:
    """Return the family of a backbone. Raises UserError if it does not belong to any."""
    model_type = getattr(getattr(backbone, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        kind = type(backbone).__name__ + (f" ({model_type})" if model_type else "")
        raise UserError(f"backbone: {kind} is not supported; expected a model of type {', '.join(FAMILIES)}")
    return FAMILIES[model_type](backbone)
