"""Learned routing: a gate chooses the expert of each text, or of each token, whatever its task.

    training    Each text is sent to one expert, sampled by a hard Gumbel softmax. All experts are computed, so that the
                straight-through estimate gives the gate a gradient (Jang et al., 2017).
    inference   Only the expert that the gate prefers is computed.

As in TASER (Cheng et al., ACL 2023), a gate is a linear map of the state of [CLS] or of each token, before the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from datamodules.records import UserError
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.families import AttentionContext
from lightning_modules.encoders.moe import add_experts, expert_layers

LEVELS = ("sequence", "token")


class RoutedEncoder(Encoder):
    """An encoder whose experts are chosen by a gate.

    num_experts: number of experts of each expert layer, E.
    attention, ffn, layers: sub-layers that have experts, as in MoEEncoder.
    level: "sequence" to route texts, or "token" to route tokens (only in the feed-forward sub-layer).
    gate_per_layer: whether each expert layer has its own gate, or all share one.
    entropy_weight: weight of the gates' mean negative entropy (in nats) in the loss. A positive weight keeps gates
        undecided, so that all experts are tried (TASER's sign; its own runs use 0). A negative one makes them decide.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        num_experts: int = 3,
        attention: bool = False,
        ffn: bool = True,
        layers: str | list[int] = "mod2",
        level: str = "sequence",
        gate_per_layer: bool = True,
        gumbel_temperature: float = 1.0,
        entropy_weight: float = 0.0,
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__(backbone, tokenizer, tasks, pooling, normalize, max_length)
        if num_experts < 2:
            raise UserError(f"num_experts: expected at least 2, got {num_experts}")
        if level not in LEVELS:
            raise UserError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
        if not (attention or ffn):
            raise UserError("a routed encoder needs experts in attention, ffn or both")
        if level == "token" and attention:
            raise UserError("level: tokens are routed only in the feed-forward sub-layer; set attention=false")
        if gumbel_temperature <= 0:
            raise UserError(f"gumbel_temperature: expected a number above 0, got {gumbel_temperature}")
        self.attention, self.ffn, self.layers = attention, ffn, layers if isinstance(layers, str) else list(layers)
        self.num_experts, self.level, self.gate_per_layer = num_experts, level, gate_per_layer
        self.gumbel_temperature, self.entropy_weight = gumbel_temperature, entropy_weight
        self.experts = tuple(f"expert{i}" for i in range(num_experts))
        self.expert_layers = expert_layers(layers, self.num_layers)
        add_experts(self.family, self.expert_layers, self.experts, attention, ffn)
        names = [str(i) for i in self.expert_layers] if gate_per_layer else ["all"]
        self.gates = nn.ModuleDict({name: nn.Linear(self.dimension, num_experts) for name in names})
        for gate in self.gates.values():
            nn.init.normal_(gate.weight, std=0.02)
            nn.init.zeros_(gate.bias)

    def forward_with_penalty(self, input_ids: Tensor, attention_mask: Tensor, task: str) -> tuple[Tensor, Tensor]:
        self.expert_of(task)
        hidden, context = self.family.begin(input_ids, attention_mask)
        hidden, entropies = self._routed_layers(range(self.num_layers), hidden, context)
        return self.pool(hidden, attention_mask, task), -self.entropy_weight * torch.stack(entropies).mean()

    def _layers(self, indices: range, states: Tensor, context: AttentionContext, condition: Condition) -> Tensor:
        return self._routed_layers(indices, states, context)[0]

    def _routed_layers(self, indices: range, states: Tensor, context: AttentionContext) -> tuple[Tensor, list[Tensor]]:
        """Compute layers one after the other. Return the states after them, and the mean entropy of each gate."""
        entropies = []
        for index in indices:
            hidden, condition = self._computed_positions(index, states), Condition()
            if index in self.expert_layers:
                gate = self.gates[str(index) if self.gate_per_layer else "all"]
                logits = gate(hidden if self.level == "token" else states[:, 0]).float()  # (B, L, E) or (B, E)
                entropies.append(self._entropy(logits, context))
                condition = Condition(routing=self._choose(logits))
            states = self._compute_layer(index, hidden, states, context, condition)
        return states, entropies

    def _choose(self, logits: Tensor) -> Tensor:
        """Return the choice of experts, one-hot in the shape of the logits."""
        if self.training:
            return F.gumbel_softmax(logits, tau=self.gumbel_temperature, hard=True)
        return F.one_hot(logits.argmax(-1), self.num_experts)

    def _entropy(self, logits: Tensor, context: AttentionContext) -> Tensor:
        """Return the mean entropy of a gate's distribution over experts, in nats. Padding does not count."""
        entropies = torch.distributions.Categorical(
            logits=logits, validate_args=False
        ).entropy()  # validation reads values
        if self.level == "sequence":
            return entropies.mean()
        tokens = context.tokens[:, : entropies.shape[1]]
        return (entropies * tokens).sum() / tokens.sum()

    def layer(self, index, hidden, states, context, condition):
        layer, family, routing = self.family.layers[index], self.family, condition.routing
        if routing is None:
            return super().layer(index, hidden, states, context, condition)
        if self.attention:
            hidden = self._by_expert(
                lambda rows, expert: family.attention(layer, hidden[rows], states[rows], context.select(rows), expert),
                routing,
            )
        else:
            hidden = family.attention(layer, hidden, states, context)
        if not self.ffn:
            return family.feed_forward(layer, hidden)
        inputs = hidden.flatten(0, 1) if self.level == "token" else hidden  # (B L, D), or (B, L, D)
        outputs = self._by_expert(
            lambda rows, expert: family.feed_forward(layer, inputs[rows], expert), routing.flatten(0, -2)
        )
        return outputs.view_as(hidden)

    def _by_expert(self, compute: Callable[[slice | Tensor, str], Tensor], routing: Tensor) -> Tensor:
        """Compute each row with its expert.

        compute: function that takes rows and the name of an expert, and returns their outputs.
        routing: one-hot choice of an expert, (number of rows, E).
        """
        if self.training:
            outputs = [compute(slice(None), expert) for expert in self.experts]
            shape = (-1,) + (1,) * (outputs[0].ndim - 1)
            return sum(routing[:, i].view(shape).to(out.dtype) * out for i, out in enumerate(outputs))
        choice = routing.argmax(-1)
        rows_of = {i: (choice == i).nonzero()[:, 0] for i in choice.unique().tolist()}
        outputs = torch.cat([compute(rows, self.experts[i]) for i, rows in rows_of.items()])
        return outputs[torch.cat(list(rows_of.values())).argsort()]
