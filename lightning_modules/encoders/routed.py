"""Learned routing: a gate chooses the expert of each text or token, regardless of its task.

    training    Each text is sent to one expert, sampled by a hard Gumbel softmax. All experts are computed, so that the
                straight-through estimate gives the gate a gradient (Jang et al., 2017).
    inference   Only the expert that the gate prefers is computed.

As in TASER (Cheng et al., ACL 2023), a gate is a linear map of the state of [CLS] or of each token, before the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.options import check_number
from datamodules.packed import Tokens
from datamodules.records import UserError, check_choice
from lightning_modules.encoders.attention import AttentionContext
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.families import Groups
from lightning_modules.encoders.moe import add_experts

MAX_EXPERTS = 1024
LEVELS = ("sequence", "token")


class RoutedEncoder(Encoder):
    """An encoder whose experts are chosen by a gate.

    num_experts: number of experts of each expert layer, E.
    attention, ffn, layers: sub-layers that have experts, as in MoEEncoder.
    level: "sequence" to route texts, or "token" to route tokens (only in the feed-forward sub-layer).
    gate_per_layer: whether each expert layer has its own gate, or all share one.
    entropy_weight: weight of the gates' mean negative entropy (in nats) in the loss. A positive weight keeps gates
        undecided, so that all experts are tried (the sign in TASER, whose own runs use 0). A negative weight makes them
        decide.
    """

    groups_texts = True

    def __init__(
        self,
        backbone: PreTrainedModel,
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
        if not 2 <= num_experts <= MAX_EXPERTS:
            raise UserError(f"num_experts: expected 2 to {MAX_EXPERTS:,}, got {num_experts}")
        check_choice("level", level, LEVELS)
        if level == "token" and attention:
            raise UserError("level: tokens are routed only in the feed-forward sub-layer; set attention=false")
        check_number("gumbel_temperature", gumbel_temperature, minimum=1e-6, maximum=1e6)
        self.attention, self.ffn, self.layers = attention, ffn, layers if isinstance(layers, str) else list(layers)
        self.num_experts, self.level, self.gate_per_layer = num_experts, level, gate_per_layer
        self.gumbel_temperature, self.entropy_weight = gumbel_temperature, entropy_weight
        self.experts = tuple(f"expert{i}" for i in range(num_experts))
        self.expert_layers = add_experts(self, layers, self.experts, attention, ffn)
        names = [str(i) for i in self.expert_layers] if gate_per_layer else ["all"]
        gates = {name: nn.Linear(self.dimension, num_experts) for name in names}
        self.gates = nn.ModuleDict(gates)
        for gate in gates.values():
            nn.init.normal_(gate.weight, std=0.02)
            nn.init.zeros_(gate.bias)

    def forward_with_penalty(self, tokens: Tokens, task: str) -> tuple[Tensor, Tensor]:
        self.expert_of(task)
        with self.casting():
            hidden, context = self.begin(tokens)
            hidden, entropies = self._routed_layers(range(self.num_layers), hidden, context)
            return self.pool(hidden, context, task), -self.entropy_weight * torch.stack(entropies).mean()

    def _layers(self, indices: range, states: Tensor, context: AttentionContext, condition: Condition) -> Tensor:
        return self._routed_layers(indices, states, context)[0]

    def _routed_layers(self, indices: range, states: Tensor, context: AttentionContext) -> tuple[Tensor, list[Tensor]]:
        """Compute layers one after the other. Return the states after them, and the mean entropy of each gate."""
        entropies = []
        for index in indices:
            hidden, condition = self._computed_positions(index, states, context), Condition()
            if index in self.expert_layers:
                gate = self.gates[str(index) if self.gate_per_layer else "all"]
                inputs = hidden if self.level == "token" else states[context.tokens.offsets[:-1]]
                logits = gate(inputs).float()  # (L, E) or (B, E)
                gates = torch.distributions.Categorical(logits=logits, validate_args=False)  # no wait for the logits
                entropies.append(gates.entropy().mean())
                condition = self._route(self._choose(logits), len(hidden), context)
            states = self._compute_layer(index, hidden, states, context, condition)
        return states, entropies

    def _choose(self, logits: Tensor) -> Tensor:
        """Return the choice of experts, one-hot in the shape of the logits."""
        if self.training:
            return F.gumbel_softmax(logits, tau=self.gumbel_temperature, hard=True)
        return F.one_hot(logits.argmax(-1), self.num_experts)

    def _route(self, choice: Tensor, num_computed: int, context: AttentionContext) -> Condition:
        """Return the condition of a layer. choice: one-hot, for each computed position or for each text."""
        if self.training:
            all_computed = num_computed == context.tokens.num_tokens
            return Condition(
                routing=context.tokens.spread(choice) if self.level == "sequence" and all_computed else choice
            )
        rows = choice.argmax(-1)
        by_text = self._groups(rows)
        return Condition(
            experts=Groups(
                tokens=by_text if self.level == "token" else self._groups(context.tokens.spread(rows)), texts=by_text
            )
        )

    def _groups(self, choice: Tensor) -> list[tuple[str, Tensor]]:
        """Return the rows of each expert. choice: expert of each row."""
        rows = ((name, (choice == i).nonzero()[:, 0]) for i, name in enumerate(self.experts))
        return [(name, indices) for name, indices in rows if len(indices)]

    def layer(self, index, hidden, states, context, condition):
        if condition.routing is None:
            return super().layer(index, hidden, states, context, condition)
        layer, family, routing = self.family.layers[index], self.family, condition.routing
        choices = self.experts if self.attention else [None]
        hidden = _mixed([family.attention(layer, hidden, states, context, expert) for expert in choices], routing)
        choices = self.experts if self.ffn else [None]
        return _mixed([family.feed_forward(layer, hidden, context, expert) for expert in choices], routing)


def _mixed(outputs: list[Tensor], routing: Tensor) -> Tensor:
    """Add the outputs of all experts, (L, D) each, weighted by the routing, (L, E)."""
    if len(outputs) == 1:
        return outputs[0]
    return reduce(torch.add, (routing[:, i, None].to(output.dtype) * output for i, output in enumerate(outputs)))
