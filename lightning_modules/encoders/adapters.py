"""Adapters: a small bottleneck after every layer's feed-forward sub-layer, one for each expert (Houlsby et al., 2019).

The form is that of SPECTER2 (Singh et al., 2023), whose adapters are read without the library that they were made with:

    dense = W_out gelu(W_in h)        x = LayerNorm(dense + h)        y = LayerNorm(W_up relu(W_down x) + dense + h)

With W_up at zero, y is x: at first the encoder equals the backbone.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from datamodules.records import UserError
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.encoders.backbone import reading
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.families import Surroundings
from lightning_modules.encoders.moe import check_expert_names
from lightning_modules.encoders.shared import SharedEncoder


class Bottleneck(nn.Module):
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
    """An encoder whose every layer ends with its task's bottleneck adapter.

    reduction_factor: hidden size over bottleneck. activation: of the bottleneck. freeze_backbone: only adapters are
    trained. document_tasks: task -> the task whose adapter its documents are encoded with, where that is another
    (SPECTER2's search); such an encoder is for inference. Further arguments as in Encoder.
    """

    has_idle_parameters = True

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer,
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
            raise UserError("backbone ModernBertModel cannot be given adapters: they end with a BERT layer's LayerNorm")
        if not 1 <= reduction_factor <= self.dimension:
            raise UserError(f"reduction_factor: got {reduction_factor}, allowed are 1 to {self.dimension}")
        if activation not in ACT2FN:
            raise UserError(f"activation: got {activation!r}, allowed are {', '.join(ACT2FN)}")
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

    def guide(self, task: str) -> str:
        return self.expert_of(task)

    def layer(self, index: int, hidden: Tensor, context: Tensor, around: Surroundings, guide: str) -> Tensor:
        layer = self.family.layers[index]
        hidden = self.family.attention(layer, hidden, context, around)
        output = layer.output
        residual = output.dropout(output.dense(layer.intermediate(hidden))) + hidden
        return output.LayerNorm(self.adapters[guide][index](output.LayerNorm(residual)) + residual)


KEY = re.compile(r"(?:bert\.)?encoder\.layer\.(\d+)\.output\.adapters\.[^.]+\.adapter_(down\.0|up)\.(weight|bias)")
# What a SPECTER2 adapter's configuration says; other forms compute something else.
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
PLAIN = {  # may be left out
    "scaling": 1.0,
    "is_parallel": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
    "leave_out": [],
    "cross_adapter": False,
}


def with_adapters(encoder: Encoder, adapters: Mapping[str, str]) -> AdapterEncoder:
    """A plain encoder with adapters from folders or the hub, as the library `adapters` saves them.

    adapters: task -> folder or hub name; "search.documents" names that of the documents of task search, where
    queries and documents have different ones. Raises UserError if one has another form or shape.
    """
    if type(encoder) is not SharedEncoder:
        raise UserError(f"adapters: are for a plain model, not for a {type(encoder).__name__}")
    read = {name: read_adapter(name, f"adapters.{task}") for task, name in adapters.items()}
    forms = {(config["reduction_factor"], config["non_linearity"]) for config, _ in read.values()}
    if len(forms) > 1:
        raise UserError(f"adapters: have different reduction factors or activations ({forms})")
    reduction_factor, activation = forms.pop()
    sources = {task.replace(".", "_"): name for task, name in adapters.items()}
    documents = {task.partition(".")[0]: task.replace(".", "_") for task in adapters if task.endswith(".documents")}
    found = AdapterEncoder(
        encoder.backbone,
        encoder.tokenizer,
        {task: task for task in sources},
        reduction_factor=int(reduction_factor),
        activation=activation,
        document_tasks=documents,
        pooling=encoder.pooling,
        normalize=encoder.normalize,
        max_length=encoder.max_length,
    )
    for task, name in sources.items():
        weights, own = read[name][1], found.adapters[task].state_dict()
        if weights.keys() != own.keys() or any(weights[key].shape != own[key].shape for key in own):
            shape = f"{found.num_layers} layers of {found.dimension}, bottleneck {found.dimension // reduction_factor}"
            raise UserError(f"adapters.{task}: {name} does not fit a backbone of {shape}")
        found.adapters[task].load_state_dict(weights)
    return found


def read_adapter(name: str, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's configuration and its weights as those of a list of Bottlenecks. key: where name came from."""
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
            raise ValueError("the file of weights holds something else")
    for field, value in (FORM | PLAIN).items():
        if config.get(field, value) != value:
            raise UserError(f"{key}: {name} has {field} {config[field]!r}, supported is {value!r}")
    factor = config["reduction_factor"]
    if (
        not isinstance(factor, int | float)
        or isinstance(factor, bool)
        or not 1 <= factor < 1e6
        or factor != int(factor)
    ):
        raise UserError(f"{key}: {name} has reduction_factor {factor!r}, supported is a whole number from 1")
    if not isinstance(config["non_linearity"], str):
        raise UserError(f"{key}: {name} has non_linearity {config['non_linearity']!r}, expected a name")
    weights = {}
    for full, tensor in state.items():
        if not (match := KEY.fullmatch(str(full))):
            raise UserError(f"{key}: {name} has a surplus key {full}")
        weights[f"{match[1]}.{match[2].removesuffix('.0')}.{match[3]}"] = tensor
    return config, weights
