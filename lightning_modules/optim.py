"""Parameter groups and learning-rate schedule for AdamW."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.records import UserError
from lightning_modules.optim_options import OptimOptions
from lightning_modules.parts import check_parts, expert_in, value_of, without_expert


def freeze(model: nn.Module, lr_scale: Mapping[str, float]) -> None:
    """Freeze the parts whose learning rate is 0, so that they get no gradients. Raises UserError if no part is left."""
    for name, parameter in model.named_parameters():
        if not value_of(name, lr_scale, 1.0):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("lr_scale: freezes all trained parts of the encoder; set one of them above 0")


def parameter_groups(model: nn.Module, options: OptimOptions, num_layers: int) -> list[dict]:
    """Group the trained parameters by learning rate and weight decay.

    lr_scale multiplies the learning rate of a part (parts.py). Raises UserError for a part that the model does not
    have. With layer_decay, layer i of n has the learning rate lr * layer_decay ** (n - 1 - i), and the embeddings have
    lr * layer_decay ** n. The parameters of layer i have "layer.<i>." or "layers.<i>." in their names.
    """
    check_parts("lr_scale", options.lr_scale, dict(model.named_parameters()))
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = without_expert(name)  # an expert may be called "layer" or "embeddings"
        layer = re.search(r"\.layers?\.(\d+)\.", module)
        layers_above = num_layers - 1 - int(layer[1]) if layer else num_layers if ".embeddings." in module else 0
        scale = options.layer_decay**layers_above * value_of(name, options.lr_scale, 1.0)
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "lr": options.lr * scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


class ExpertDecay:
    """Pull experts towards their mean after each step of an optimizer, by the share lr * strength of their distance.

    Like AdamW's weight decay (arXiv 1711.05101), which pulls towards 0, it is decoupled from the gradient. Raises
    UserError if the encoder has no experts.
    """

    def __init__(self, encoder: nn.Module, strength: float):
        self.strength = strength
        counterparts: dict[str, list[nn.Parameter]] = defaultdict(list)  # name without expert -> one per expert
        for name, parameter in encoder.named_parameters():
            if expert_in(name):
                counterparts[without_expert(name)].append(parameter)
        if not counterparts:
            raise UserError("expert_decay: this encoder has no experts; set it to 0")
        self.counterparts = list(counterparts.values())

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for experts in self.counterparts:
            mean = torch.stack(list[Tensor](experts)).mean(0)
            for expert in experts:
                if lr := rates.get(expert):  # frozen parameters have no rate
                    expert.lerp_(mean, min(1.0, lr * self.strength))


def schedule(name: str, warmup: float, total_steps: int) -> Callable[[int], float]:
    """Return a function from the step to the factor of the peak learning rate: a linear warm-up, then a schedule.

    name: schedule of OptimOptions. warmup: share of all steps.
    """
    return partial(_factor, name, max(1, round(warmup * total_steps)), total_steps)


def _factor(name: str, warmup_steps: int, total_steps: int, step: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    share = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if name == "cosine":
        return (1 + math.cos(math.pi * share)) / 2  # arXiv 1608.03983, equation 5, without restarts
    return 1 - share if name == "linear" else 1.0
