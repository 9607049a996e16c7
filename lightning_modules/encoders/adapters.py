"""Adapters: a small bottleneck after the feed-forward sub-layer of each layer, one per expert (Houlsby et al., 2019).

The form is that of SPECTER2 (Singh et al., 2023). Its adapters are read without the library `adapters`:

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
from transformers import PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from datamodules.records import UserError
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.encoders.backbone import reading
from lightning_modules.encoders.base import Condition, Encoder
from lightning_modules.encoders.families import AttentionContext
from lightning_modules.encoders.moe import check_expert_names
from lightning_modules.encoders.shared import SharedEncoder


class Bottleneck(nn.Module):
    """A projection to a few dimensions, an activation, and a projection back. Returns zeros until it is trained."""

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
    """An encoder whose layers end with the adapter of their task.

    reduction_factor: hidden size divided by the size of the bottleneck.
    activation: activation function of the bottleneck.
    freeze_backbone: whether only the adapters are trained.
    document_tasks: task -> the task whose adapter encodes its documents, if it is another one (SPECTER2's search). Such
        an encoder can only be used for inference.

    The other arguments are those of Encoder.
    """

    has_idle_parameters = True

    def __init__(
        self,
        backbone: nn.Module,
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
        if activation not in ACT2FN:
            raise UserError(f"activation: expected one of {', '.join(ACT2FN)}, got {activation!r}")
        self.reduction_factor, self.activation, self.freeze_backbone = reduction_factor, activation, freeze_backbone
        self.document_tasks = dict(document_tasks or {})
        for name in (*self.document_tasks, *self.document_tasks.values()):
            self.expert_of(name)
        self.experts = tuple(dict.fromkeys(self.tasks.values()))
        check_expert_names(self.experts)
        size = self.dimension // reduction_factor
        self.adapters = nn.ModuleDict(
            {
                expert: nn.ModuleList(Bottleneck(self.dimension, size, activation) for _ in range(self.num_layers))
                for expert in self.experts
            }
        )
        if freeze_backbone:
            backbone.requires_grad_(False)

    @property
    def config(self) -> dict[str, Any]:
        names = ("reduction_factor", "activation", "freeze_backbone", "document_tasks")
        return super().config | {name: getattr(self, name) for name in names}

    @property
    def num_shared_layers(self) -> int:
        return 0

    def add_expert(self, name: str, like: str) -> None:
        check_expert_names([name])
        self.experts += (name,)
        self.adapters[name] = copy.deepcopy(self.adapters[like]).requires_grad_(True)

    def document_task(self, task: str) -> str:
        return self.document_tasks.get(task, task)

    def served_by(self, task: str) -> str:
        return self.expert_of(task)

    def condition(self, task: str) -> Condition:
        return Condition(expert=self.expert_of(task))

    def layer(
        self, index: int, hidden: Tensor, states: Tensor, context: AttentionContext, condition: Condition
    ) -> Tensor:
        layer, adapter = self.family.layers[index], self.adapters[condition.expert][index]
        hidden = self.family.attention(layer, hidden, states, context)
        output = layer.output
        residual = output.dropout(output.dense(layer.intermediate(hidden))) + hidden  # dense + h in the formula
        return output.LayerNorm(adapter(output.LayerNorm(residual)) + residual)


KEY = re.compile(r"(?:bert\.)?encoder\.layer\.(\d+)\.output\.adapters\.[^.]+\.adapter_(down\.0|up)\.(weight|bias)")
# The configuration of a SPECTER2 adapter. Adapters of other forms compute something else.
FORM = {
    "mh_adapter": False,
    "output_adapter": True,
    "ln_before": False,
    "ln_after": False,
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
}
OPTIONAL_FORM = {  # may be missing in the file
    "scaling": 1.0,
    "is_parallel": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "leave_out": [],
    "cross_adapter": False,
}


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from files.

    weights: state of a list with one Bottleneck per layer.
    """

    reduction_factor: int
    activation: str
    weights: dict[str, Tensor]


def with_adapters(encoder: Encoder, adapters: Mapping[str, str]) -> AdapterEncoder:
    """Return an encoder with the backbone of a plain one and with adapters that the library `adapters` has saved.

    adapters: task -> folder or hub name. "search.documents" is the adapter for the documents of task search, if they
        have another one than its queries.

    Raises UserError if an adapter has another form or shape.
    """
    if type(encoder) is not SharedEncoder:
        raise UserError(f"adapters: expected a plain model to add them to, got a {type(encoder).__name__}")
    tasks = {key: key.replace(".", "_") for key in adapters}  # names of experts cannot contain a dot
    loaded = {tasks[key]: read_adapter(name, f"adapters.{key}") for key, name in adapters.items()}
    forms = {(adapter.reduction_factor, adapter.activation) for adapter in loaded.values()}
    if len(forms) > 1:
        raise UserError(f"adapters: expected one reduction factor and activation for all, got {forms}")
    reduction_factor, activation = forms.pop()
    result = AdapterEncoder(
        encoder.backbone,
        encoder.tokenizer,
        {task: task for task in loaded},
        reduction_factor=reduction_factor,
        activation=activation,
        document_tasks={key.partition(".")[0]: task for key, task in tasks.items() if key.endswith(".documents")},
        pooling=encoder.pooling,
        normalize=encoder.normalize,
        max_length=encoder.max_length,
    )
    for key, task in tasks.items():
        weights, expected = loaded[task].weights, result.adapters[task].state_dict()
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
            size = result.dimension // reduction_factor
            raise UserError(
                f"adapters.{key}: {adapters[key]} does not fit a backbone of {result.num_layers} layers of "
                f"{result.dimension}, bottleneck {size}"
            )
        result.adapters[task].load_state_dict(weights)
    return result


def read_adapter(name: str, key: str) -> Adapter:
    """Read an adapter from a folder or the hub.

    key: argument that the name comes from, for error messages. Raises UserError.
    """
    with reading(name, key):
        patterns = ["adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"]
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=patterns))
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["config"]
        safe = folder / "adapter.safetensors"
        state = load_file(safe) if safe.is_file() else read_checkpoint(folder / "pytorch_adapter.bin")
        missing = [field for field in (*FORM, "reduction_factor", "non_linearity") if field not in config]
        if missing:
            raise ValueError(f"adapter_config.json has no {', '.join(missing)}")
        if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError("the file of weights contains something else")
    _check_form(config, f"{key}: {name}")
    weights = {}
    for full, tensor in state.items():
        if not (match := KEY.fullmatch(str(full))):
            raise UserError(f"{key}: {name} has an unexpected key {full}")
        weights[f"{match[1]}.{match[2].removesuffix('.0')}.{match[3]}"] = tensor
    return Adapter(int(config["reduction_factor"]), config["non_linearity"], weights)


def _check_form(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError if the configuration of an adapter is not that of SPECTER2."""
    for field, value in (FORM | OPTIONAL_FORM).items():
        if config.get(field, value) != value:
            raise UserError(f"{where}: {field} must be {value!r}, got {config[field]!r}")
    factor, activation = config["reduction_factor"], config["non_linearity"]
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 1 <= factor < 1e6 or factor != int(factor):
        raise UserError(f"{where}: reduction_factor must be a whole number of at least 1, got {factor!r}")
    if not isinstance(activation, str):
        raise UserError(f"{where}: non_linearity must be a name, got {activation!r}")
