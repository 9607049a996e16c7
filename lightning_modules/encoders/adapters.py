"""Adapters: one small bottleneck per expert after each feed-forward sub-layer (Houlsby et al., 2019).

They have the form of SPECTER2's adapters (Singh et al., 2023), whose files are read without the library `adapters`:

    dense = W_out gelu(W_in h)        x = LayerNorm(dense + h)        y = LayerNorm(W_up relu(W_down x) + dense + h)

A new adapter has W_up = 0, so that y = x and the encoder equals its backbone.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from datamodules.files import read_regular
from datamodules.records import UserError, check_choice
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.encoders.backbone import reading
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.moe import check_expert_names
from lightning_modules.encoders.shared import SharedEncoder


class Bottleneck(nn.Module):
    """Project down, activate, project up. A new bottleneck returns zeros."""

    def __init__(self, size: int, bottleneck: int, activation: str):
        super().__init__()
        self.down, self.up = nn.Linear(size, bottleneck), nn.Linear(bottleneck, size)
        self.activation = ACT2FN[activation]
        nn.init.normal_(self.down.weight, std=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.up(self.activation(self.down(hidden)))


class AdapterEncoder(Encoder):
    """An encoder whose layers end with the task's adapter.

    reduction_factor: hidden size divided by the size of the bottleneck.
    activation: activation function of the bottleneck.
    freeze_backbone: whether only the adapters are trained.
    document_tasks: task -> the task whose adapter encodes its documents. All other tasks use their own adapter.
        SPECTER2's search needs this. An encoder with document_tasks cannot be trained.
    """

    has_idle_parameters = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Mapping[str, str],
        reduction_factor: int = 16,
        activation: str = "relu",
        freeze_backbone: bool = True,
        document_tasks: dict[str, str] | None = None,
        pooling: str = "cls",
        normalize: bool = False,
        max_length: int = 256,
    ):
        super().__init__(backbone, tokenizer, tasks, pooling, normalize, max_length)
        if backbone.config.model_type == "modernbert":
            raise UserError("backbone: a ModernBertModel cannot have adapters; they need the LayerNorm of a BERT layer")
        if not 1 <= reduction_factor <= self.dimension:
            raise UserError(f"reduction_factor: expected 1 to {self.dimension}, got {reduction_factor}")
        check_choice("activation", activation, ACT2FN)
        self.reduction_factor, self.activation, self.freeze_backbone = reduction_factor, activation, freeze_backbone
        self.document_tasks = dict(document_tasks or {})
        for name in (*self.document_tasks, *self.document_tasks.values()):
            self.expert_of(name)
        self.experts = tuple(dict.fromkeys(self.tasks.values()))
        check_expert_names(self.experts)
        size = self.dimension // reduction_factor
        self.adapters = nn.ModuleDict()
        for expert in self.experts:
            layers = [Bottleneck(self.dimension, size, activation) for _ in range(self.num_layers)]
            self.adapters[expert] = nn.ModuleList(layers)
        if freeze_backbone:
            backbone.requires_grad_(False)

    def add_expert(self, name: str, like: str) -> None:
        check_expert_names([name])
        self.experts += (name,)
        self.adapters[name] = copy.deepcopy(self.adapters[like]).requires_grad_(True)

    def document_task(self, task: str) -> str:
        return self.document_tasks.get(task, task)

    def served_by(self, task: str) -> str:
        return self.expert_of(task)

    def condition(self, task: str) -> Condition:
        return Condition(experts=self.expert_of(task))

    def layer(self, index, hidden, states, context, condition):
        adapters: Any = self.adapters[condition.experts]
        layer, adapter = self.family.layers[index], adapters[index]
        hidden = self.family.attention(layer, hidden, states, context)
        output = layer.output
        residual = output.dropout(output.dense(layer.intermediate(hidden))) + hidden  # dense + h in the formula
        return output.LayerNorm(adapter(output.LayerNorm(residual)) + residual)


KEY = re.compile(r"(?:bert\.)?encoder\.layer\.(\d+)\.output\.adapters\.[^.]+\.adapter_(down\.0|up)\.(weight|bias)")
# The configuration of SPECTER2's adapters. With any other values, an adapter computes a different function.
FORM = dict.fromkeys(["output_adapter", "original_ln_before", "original_ln_after", "residual_before_ln"], True)
FORM |= dict.fromkeys(["mh_adapter", "ln_before", "ln_after", "adapter_residual_before_ln"], False)
# Optional fields of the file.
OPTIONAL_FORM: dict[str, Any] = dict.fromkeys(["is_parallel", "use_gating", "phm_layer", "cross_adapter"], False)
OPTIONAL_FORM |= {"scaling": 1.0, "inv_adapter": None, "leave_out": []}


@dataclass(frozen=True)
class Adapter:
    """An adapter read from files. weights: state_dict of its Bottlenecks, one per layer."""

    reduction_factor: int
    activation: str
    weights: dict[str, Tensor]


def with_adapters(encoder: Encoder, adapters: Mapping[str, str]) -> AdapterEncoder:
    """Add adapters, saved by the library `adapters`, to a plain encoder. Raises UserError if one does not fit.

    adapters: task -> folder or hub name. The key "search.documents" is for an adapter that encodes only the
        documents of the task search.
    """
    if type(encoder) is not SharedEncoder:
        raise UserError(f"adapters: expected a plain model to add them to, got a {type(encoder).__name__}")
    tasks = {key: key.replace(".", "_") for key in adapters}  # names of experts cannot contain a dot
    loaded = {tasks[key]: read_adapter(name, f"adapters.{key}") for key, name in adapters.items()}
    forms = {(adapter.reduction_factor, adapter.activation) for adapter in loaded.values()}
    if len(forms) > 1:
        raise UserError(f"adapters: expected one reduction factor and activation for all, got {forms}")
    reduction_factor, activation = forms.pop()
    document_tasks = {key.partition(".")[0]: task for key, task in tasks.items() if key.endswith(".documents")}
    arguments = encoder.config | {"tasks": {task: task for task in loaded}}
    arguments |= {"reduction_factor": reduction_factor, "activation": activation, "document_tasks": document_tasks}
    result = AdapterEncoder(encoder.backbone, encoder.tokenizer, **arguments)
    for key, task in tasks.items():
        weights, expected = loaded[task].weights, result.adapters[task].state_dict()
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
            size = result.dimension // reduction_factor
            shape = f"{result.num_layers} layers of dimension {result.dimension}, with bottleneck {size}"
            raise UserError(f"adapters.{key}: {adapters[key]} does not fit; expected an adapter for {shape}")
        result.adapters[task].load_state_dict(weights)
    result.similarity = encoder.similarity
    return result


def read_adapter(name: str, key: str) -> Adapter:
    """Read an adapter from a folder or the hub. key: argument with the name, for error messages."""
    with reading(name, key):
        patterns = ["adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"]
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=patterns))
        config = json.loads(read_regular(folder / "adapter_config.json"))["config"]
        safe = folder / "adapter.safetensors"
        state = load_file(safe) if safe.is_file() else read_checkpoint(folder / "pytorch_adapter.bin")
        missing = [field for field in (*FORM, "reduction_factor", "non_linearity") if field not in config]
        if missing:
            raise ValueError(f"adapter_config.json has no {', '.join(missing)}")
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError("the weights file must contain only tensors")
    _check_form(config, f"{key}: {name}")
    weights = {}
    for weight, tensor in state.items():
        if not (match := KEY.fullmatch(str(weight))):
            raise UserError(f"{key}: {name} has an unexpected weight {weight}")
        weights[f"{match[1]}.{match[2].removesuffix('.0')}.{match[3]}"] = tensor
    return Adapter(int(config["reduction_factor"]), config["non_linearity"], weights)


def _check_form(config: Mapping[str, Any], source: str) -> None:
    """Raise UserError if an adapter is not configured like SPECTER2's."""
    for field, value in (FORM | OPTIONAL_FORM).items():
        if config.get(field, value) != value:
            raise UserError(f"{source}: {field} must be {value!r}, got {config[field]!r}")
    factor, activation = config["reduction_factor"], config["non_linearity"]
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 1 <= factor < 1e6 or factor != int(factor):
        raise UserError(f"{source}: reduction_factor must be a whole number of at least 1, got {factor!r}")
    if not isinstance(activation, str):
        raise UserError(f"{source}: non_linearity must be a name, got {activation!r}")
