"""Read and write checkpoints in the layout of SciMult's authors (github.com/yuzhimanhua/SciMult).

    model_dict       each tensor twice, under question_model. and ctx_model., because the towers are shared
    encoder_params   settings, flat or under "encoder"

Experts have numbers. The keys show which layers have experts:

    ...layer.<l>.attention.self.moe_{query,key,value}.<e>.*    ...layer.<l>.attention.output.moe_dense.<e>.*
    ...layer.<l>.moe_layer.{interm,output}_layers.<e>.*        ...expert_gate[.<l>].fwd_func.*

Checkpoints of DPR (Karpukhin et al., 2020) have the same layout, without the level "encoder.". Their two towers usually
differ, so the user must choose one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from datamodules.records import UserError
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.moe import MoEEncoder, expert_layers
from lightning_modules.encoders.routed import MAX_EXPERTS, RoutedEncoder
from lightning_modules.encoders.shared import SharedEncoder

EXPERTS = ("search", "link_prediction", "classification")  # number -> name
RULES = ("mod2", "mod3", "mod4", "mod6", "mod12", "ge6mod3", "le7mod3")  # layer rules of the authors' code
TOWERS = {"query": "question_model.", "document": "ctx_model."}
UNUSED = ("embeddings.position_ids", "pooler.")

# The authors' keys, in which an expert is a number.
ATTENTION = re.compile(
    r"(encoder\.layer\.(\d{1,4})\.attention)\.(?:self\.moe_(query|key|value)|output\.moe_dense)\.(\d{1,4})\.(\w+)"
)
FEED_FORWARD = re.compile(r"(encoder\.layer\.(\d{1,4}))\.moe_layer\.(interm|output)_layers\.(\d{1,4})\.(.+)")
GATE = re.compile(r"encoder\.expert_gate\.(?:(\d+)\.)?fwd_func\.(\w+)")

# Our keys, in which an expert is a name.
OUR_ATTENTION = re.compile(r"(encoder\.layer\.\d+\.attention)\.(self|output\.dense)\.experts\.(\w+)\.(.+)")
OUR_FEED_FORWARD = re.compile(r"(encoder\.layer\.\d+)\.(intermediate|output)\.experts\.(\w+)\.(.+)")


def is_reference(checkpoint: object) -> bool:
    """Return whether the content of a file has the authors' layout."""
    return isinstance(checkpoint, Mapping) and {"model_dict", "encoder_params"} <= set(checkpoint)


def from_reference(
    checkpoint: Mapping[str, Any],
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    tower: str | None = None,
) -> tuple[Encoder, dict[str, Tensor]]:
    """Return an encoder without weights, and the weights under its names. Raises UserError for unsupported settings.

    backbone: a BERT of the checkpoint's shape.
    source: name of the checkpoint, for error messages.
    tower: "query" or "document", needed if the two towers differ.
    """
    settings, model = checkpoint["encoder_params"], checkpoint["model_dict"]
    settings = settings.get("encoder", settings) if isinstance(settings, Mapping) else settings
    if not isinstance(settings, Mapping) or not isinstance(model, Mapping):
        raise UserError(
            f"{source}: model_dict and encoder_params must be mappings, as in checkpoints of SciMult or DPR"
        )
    if others := [key for key in model if not isinstance(key, str)]:
        raise UserError(f"{source}: the keys of model_dict must be names of tensors, got {others[0]!r}")
    if size := settings.get("projection_dim"):
        raise UserError(f"{source}: has a projection of {size} dimensions, which is not supported")
    if settings.get("factor_rep"):
        raise UserError(f"{source}: was trained with factor_rep, which is not supported")

    weights = _one_tower(model, source, tower)
    experts = _find_experts(weights, source)
    _check_settings(settings, experts, backbone.config.num_hidden_layers, source)
    names: Sequence[str] = EXPERTS
    if experts.gates or experts.number != len(EXPERTS):
        names = tuple(f"expert{e}" for e in range(experts.number))
    renamed = {_our_key(key, names): tensor for key, tensor in weights.items()}

    mean = bool(settings.get("mean_pool"))  # the authors' code normalizes means
    arguments = {
        "pooling": "mean" if mean else "cls",
        "normalize": mean,
        # The authors' sequence_length is for training; they evaluate with all positions. max_length is ours.
        "max_length": settings.get("max_length", backbone.config.max_position_embeddings),
    }
    tasks = {name: name for name in EXPERTS}
    if not experts.number:
        return SharedEncoder(backbone, tokenizer, tasks, **arguments), renamed
    arguments |= {"attention": bool(experts.attention), "ffn": bool(experts.ffn), "layers": experts.layers}
    if not experts.gates:
        return MoEEncoder(backbone, tokenizer, {name: name for name in names}, **arguments), renamed
    arguments |= {
        "num_experts": experts.number,
        "level": "token" if "tok" in str(settings.get("moe_type")) else "sequence",
        "gate_per_layer": experts.gates != {None},
    }
    return RoutedEncoder(backbone, tokenizer, tasks, **arguments), renamed


@dataclass(frozen=True)
class _Experts:
    """The experts of a checkpoint.

    attention, ffn: layers with experts in this sub-layer.
    gates: layers with a gate; None is a gate that all layers share.
    """

    number: int
    attention: set[int]
    ffn: set[int]
    gates: set[str | None]

    @property
    def layers(self) -> list[int]:
        return sorted(self.attention | self.ffn)


def _find_experts(keys: Iterable[str], source: str) -> _Experts:
    """Return the experts of a checkpoint. Raises UserError for impossible numbers."""
    attention = [match for key in keys if (match := ATTENTION.fullmatch(key))]
    ffn = [match for key in keys if (match := FEED_FORWARD.fullmatch(key))]
    numbers = sorted({int(match[4]) for match in attention + ffn})
    if numbers != list(range(len(numbers))) or len(numbers) > MAX_EXPERTS:
        shown = ", ".join(map(str, numbers[:5])) + (", ..." if numbers[5:] else "")
        raise UserError(f"{source}: expected experts with the numbers 0, 1, ... up to {MAX_EXPERTS - 1}, got {shown}")
    return _Experts(
        number=len(numbers),
        attention={int(match[2]) for match in attention},
        ffn={int(match[2]) for match in ffn},
        gates={match[1] for key in keys if (match := GATE.fullmatch(key))},
    )


def _one_tower(model: Mapping[str, Tensor], source: str, tower: str | None) -> dict[str, Tensor]:
    """Return the tensors of one tower by their names in a BERT. If no tower is given, both must be equal."""
    if tower not in (None, *TOWERS):
        raise UserError(f"tower: expected {' or '.join(TOWERS)}, got {tower!r}")
    level = "" if any(key.startswith(f"{p}embeddings.") for p in TOWERS.values() for key in model) else "encoder."
    prefixes = {name: f"{prefix}{level}" for name, prefix in TOWERS.items()}
    if unexpected := [key for key in model if not key.startswith(tuple(prefixes.values()))]:
        raise UserError(f"{source}: {len(unexpected)} unexpected keys ({', '.join(unexpected[:3])})")
    towers: dict[str, dict[str, Tensor]] = {name: {} for name in TOWERS}
    for name, prefix in prefixes.items():
        tensors = {key.removeprefix(prefix): tensor for key, tensor in model.items() if key.startswith(prefix)}
        towers[name] = {key: tensor for key, tensor in tensors.items() if not key.startswith(UNUSED)}
    chosen = tower or "query"
    if not towers[chosen]:
        raise UserError(f"{source}: has no {prefixes[chosen]}* weights")
    queries, documents = towers["query"], towers["document"]
    equal = queries.keys() == documents.keys() and all(_equal(queries[key], documents[key]) for key in queries)
    if tower is None and documents and not equal:
        raise UserError(f"tower: required, query or document, because the two towers of {source} differ")
    return towers[chosen]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal. If they share memory, their values are not read."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    shared = a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape
    return shared or a.equal(b)


def _our_key(key: str, experts: Sequence[str]) -> str:
    """Translate the authors' name for a tensor to ours."""
    if match := ATTENTION.fullmatch(key):
        head, _, projection, expert, rest = match.groups()
        name = experts[int(expert)]
        module = f"self.experts.{name}.{projection}" if projection else f"output.dense.experts.{name}"
        return f"backbone.{head}.{module}.{rest}"
    if match := FEED_FORWARD.fullmatch(key):
        head, _, kind, expert, rest = match.groups()
        module = {"interm": "intermediate", "output": "output"}[kind]
        return f"backbone.{head}.{module}.experts.{experts[int(expert)]}.{rest}"
    if match := GATE.fullmatch(key):
        return f"gates.{match[1] or 'all'}.{match[2]}"
    return f"backbone.{key}"


def _check_settings(settings: Mapping[str, Any], experts: _Experts, num_layers: int, source: str) -> None:
    """Raise UserError if the settings contradict the tensors."""
    use_gates, gates = bool(settings.get("use_infer_expert")), "a gate" if experts.gates else "no gate"
    if use_gates != bool(experts.gates):
        raise UserError(f"{source}: encoder_params have use_infer_expert {use_gates}, but the weights contain {gates}")
    if not experts.number:
        return
    if (number := settings.get("num_expert")) != experts.number:
        raise UserError(f"{source}: encoder_params have num_expert {number}, but the weights contain {experts.number}")
    rule = str(settings.get("moe_type", "")).partition(":")[0]
    if rule and (expected := expert_layers(rule, num_layers)) != (layers := experts.layers):
        raise UserError(f"{source}: moe_type {rule} means experts in layers {expected}, but the weights have {layers}")


def to_reference(encoder: Encoder) -> dict[str, Any]:
    """Return a checkpoint that the authors' code can load. Raises UserError if their code does not have the encoder."""
    if type(encoder) not in (SharedEncoder, MoEEncoder) or encoder.backbone.config.model_type != "bert":
        kind = f"{type(encoder).__name__} over {encoder.backbone.config.model_type}"
        raise UserError(f"the authors' format supports only SharedEncoder and MoEEncoder over bert, not {kind}")
    if encoder.pooling not in ("cls", "mean") or (encoder.pooling == "mean") != encoder.normalize:
        raise UserError(
            "the authors' format supports only pooling cls with normalize false, and pooling mean with normalize true, "
            f"not pooling {encoder.pooling} with normalize {str(encoder.normalize).lower()}"
        )
    experts = list(encoder.experts) if isinstance(encoder, MoEEncoder) else []
    if set(experts) == set(EXPERTS):
        experts = list(EXPERTS)
    tower = {
        _their_key(key.removeprefix("backbone."), experts): tensor.detach().cpu()
        for key, tensor in encoder.state_dict().items()
    }
    config = encoder.backbone.config
    tower["embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
    # The authors' code requires a pooler, but does not use it.
    tower["pooler.dense.weight"] = torch.zeros(config.hidden_size, config.hidden_size)
    tower["pooler.dense.bias"] = torch.zeros(config.hidden_size)
    return {
        "model_dict": {f"{prefix}encoder.{k}": v for prefix in TOWERS.values() for k, v in tower.items()},
        "optimizer_dict": {},
        "scheduler_dict": {},
        "offset": 0,
        "epoch": 0,
        "encoder_params": {
            "pretrained_model_cfg": config.name_or_path,
            "pretrained_file": None,
            "encoder_model_type": "hf_bert",
            "do_lower_case": True,
            "sequence_length": encoder.max_length,
            "max_length": encoder.max_length,
            "projection_dim": 0,
            "shared_encoder": True,
            "use_moe": bool(experts),
            "num_expert": len(experts),
            "use_infer_expert": False,
            "per_layer_gating": False,
            "moe_type": _their_rule(encoder) if isinstance(encoder, MoEEncoder) else "",
            "mean_pool": encoder.pooling == "mean",
            "factor_rep": False,
            "q_rep_method": "start_end_sum",
            "use_norm_rep": False,
        },
    }


def is_exported_reference(checkpoint: Any) -> bool:
    """Return whether to_reference wrote the content of a file. The authors' files have no max_length."""
    settings = checkpoint["encoder_params"] if is_reference(checkpoint) else None
    return isinstance(settings, Mapping) and "max_length" in settings


def _their_key(key: str, experts: Sequence[str]) -> str:
    """Translate our name for a backbone tensor to the authors' name."""
    if match := OUR_ATTENTION.fullmatch(key):
        head, module, expert, rest = match.groups()
        number = experts.index(expert)
        if module == "self":
            projection, _, rest = rest.partition(".")
            return f"{head}.self.moe_{projection}.{number}.{rest}"
        return f"{head}.output.moe_dense.{number}.{rest}"
    if match := OUR_FEED_FORWARD.fullmatch(key):
        head, module, expert, rest = match.groups()
        kind = {"intermediate": "interm", "output": "output"}[module]
        return f"{head}.moe_layer.{kind}_layers.{experts.index(expert)}.{rest}"
    return key


def _their_rule(encoder: MoEEncoder) -> str:
    """Return the authors' moe_type for an encoder's expert layers."""
    sub_layers = {"attn": encoder.attention, "fwd": encoder.ffn}
    for rule in RULES:
        with suppress(UserError):  # the rule selects no layer
            if expert_layers(rule, encoder.num_layers) == encoder.expert_layers:
                return f"{rule}:" + "_".join(name for name, has_experts in sub_layers.items() if has_experts)
    raise UserError(f"layers {encoder.expert_layers}: the authors' format supports only {', '.join(RULES)}")
