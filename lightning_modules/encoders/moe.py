"""Mixture of experts: sub-layers that are specialized by task (paper, section 3.2).

    MHAExpert   the query, key, value and output projections of attention; LayerNorm is shared
    FFNExpert   both projections of the feed-forward sub-layer, and its LayerNorm (ModernBERT's is shared)

Only the expert of the task is computed. Experts start as copies of the backbone's sub-layers, so a new encoder equals
its backbone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.packed import Tokens
from datamodules.records import UserError
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.families import Experts, Groups
from lightning_modules.encoders.lora import unfreeze
from lightning_modules.parts import can_name_module

RULES = "mod2, mod3, ... (every second, third, ... layer), ge6mod3, le7mod3, last2, all, or a list of layers from 0"


def expert_layers(rule: str | Sequence[int], num_layers: int) -> list[int]:
    """Return the layers that have experts, counted from 0. Raises UserError if the rule does not select any.

    rule: "modK" (every K-th layer), "lastK" (the last K layers), "all", a list of layers, or one of the authors' rules:
        of twelve layers, "ge6mod3" selects 5, 8 and 11, and "le7mod3" selects 0, 3 and 6.
    """
    if isinstance(rule, str):
        every, last = re.fullmatch(r"mod([1-9]\d{0,3})", rule), re.fullmatch(r"last([1-9]\d{0,3})", rule)
        if every:
            layers = [i for i in range(num_layers) if (i + 1) % int(every[1]) == 0]
        elif last:
            layers = [i for i in range(num_layers) if i >= num_layers - int(last[1])]
        elif rule == "all":
            layers = list(range(num_layers))
        elif rule == "ge6mod3":
            layers = [i for i in range(5, num_layers) if (i + 1) % 3 == 0]
        elif rule == "le7mod3":
            layers = [i for i in range(min(7, num_layers)) if i % 3 == 0]
        else:
            raise UserError(f"layers: expected {RULES}, got {rule!r}")
    else:
        layers = sorted(set(rule))
        if wrong := [i for i in layers if not 0 <= i < num_layers]:
            raise UserError(f"layers: got {wrong}, but the backbone has layers 0 to {num_layers - 1}")
    if not layers:
        raise UserError(f"layers: {rule!r} does not select any of the backbone's {num_layers} layers")
    return layers


class MoEEncoder(Encoder):
    """An encoder whose expert layers are specialized by task.

    attention: whether attention has experts (the paper's MHAExpert).
    ffn: whether the feed-forward sub-layer has experts (the paper's FFNExpert). Both together are possible.
    layers: the layers that have experts, as a rule or a list (see expert_layers). The paper uses "mod2".
    """

    has_idle_parameters = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        attention: bool = True,
        ffn: bool = False,
        layers: str | list[int] = "mod2",
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__(backbone, tokenizer, tasks, pooling, normalize, max_length)
        self.attention, self.ffn, self.layers = attention, ffn, layers if isinstance(layers, str) else list(layers)
        self.experts = tuple(dict.fromkeys(self.tasks.values()))
        check_expert_names(self.experts)
        self.expert_layers = add_experts(self, layers, self.experts, attention, ffn)
        self._add_parameters()

    def _add_parameters(self) -> None:
        """Add the additional parameters of a subclass with the same arguments."""

    @property
    def num_shared_layers(self) -> int:
        return self.expert_layers[0]

    def served_by(self, task: str) -> str:
        return self.expert_of(task)

    def condition(self, task: str) -> Condition:
        return Condition(experts=self.expert_of(task))

    def add_expert(self, name: str, like: str) -> None:
        check_expert_names([name])
        self.experts += (name,)
        for module in self.backbone.modules():
            if isinstance(module, Experts):
                module.experts[name] = copy.deepcopy(module.experts[like])
                unfreeze(module.experts[name])

    def _forward_mixed(self, tokens: Tokens, tasks: Sequence[str]) -> Tensor:
        """Sort texts by expert, so that everything except the experts is computed for the whole batch at once."""
        experts = [self.expert_of(task) for task in tasks]
        names = list(dict.fromkeys(experts))
        order = sorted(range(len(experts)), key=lambda i: names.index(experts[i]))
        tokens = tokens.select(order)
        ends = {experts[text]: i + 1 for i, text in enumerate(order)}  # end of each expert's texts
        starts = np.cumsum((0, *tokens.lengths)).tolist()
        by_text, by_token, start = [], [], 0
        for name, end in ends.items():
            by_text.append((name, slice(start, end)))
            by_token.append((name, slice(starts[start], starts[end])))
            start = end
        hidden, context = self.begin(tokens)
        condition = Condition(experts=Groups(tokens=by_token, texts=by_text))
        vectors = self.pool(self._layers(range(self.num_layers), hidden, context, condition), context, tasks[0])
        return vectors[torch.tensor(order, device=vectors.device).argsort()]


def check_expert_names(experts: Sequence[str]) -> None:
    """Raise UserError if torch would not accept a name for a submodule."""
    for name in experts:
        if not (re.fullmatch(r"[A-Za-z]\w*", name) and can_name_module(name)):
            raise UserError(
                f"expert {name!r}: expected a name of letters, digits and _ that starts with a letter and is not an "
                "attribute of torch.nn.ModuleDict or torch.nn.ParameterDict"
            )


def add_experts(
    encoder: Encoder, layers: str | Sequence[int], experts: Sequence[str], attention: bool, ffn: bool
) -> list[int]:
    """Replace sub-layers by experts, which start as copies of them, and return the layers that now have experts.

    layers: rule or list of the layers, as in expert_layers.
    attention, ffn: sub-layers to replace, at least one.
    """
    if not (attention or ffn):
        raise UserError("attention, ffn: both are false, so no layer has experts; set one of them to true")
    family, indices = encoder.family, expert_layers(layers, encoder.num_layers)
    modules = (family.attention_modules if attention else ()) + (family.ffn_modules if ffn else ())
    for index in indices:
        for name in modules:
            module = family.layers[index].get_submodule(name)
            family.layers[index].set_submodule(name, Experts(module, experts))
    return indices
