"""Checkpoints of SciMult's authors (github.com/yuzhimanhua/SciMult), and others of the same layout, as our encoders.

    model_dict       every tensor twice, under question_model. and ctx_model. (one shared tower)
    encoder_params   settings, flat or under "encoder"

An expert is a number there. Layers with experts are recognised by their keys:

    ...layer.<l>.attention.self.moe_{query,key,value}.<e>.*    ...layer.<l>.attention.output.moe_dense.<e>.*
    ...layer.<l>.moe_layer.{interm,output}_layers.<e>.*
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from datamodules.records import UserError
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.moe import MoEEncoder, expert_layers
from lightning_modules.encoders.shared import SharedEncoder

EXPERTS = ("search", "link_prediction", "classification")  # by the reference's numbers
TOWERS = ("question_model.", "ctx_model.")
ATTENTION = re.compile(
    r"(encoder\.layer\.\d+\.attention)\.(?:self\.moe_(query|key|value)|output\.moe_dense)\.(\d+)\.(\w+)"
)
FEED_FORWARD = re.compile(r"(encoder\.layer\.\d+)\.moe_layer\.(interm|output)_layers\.(\d+)\.(.+)")
UNUSED = ("embeddings.position_ids", "pooler.")


def is_reference(checkpoint: Any) -> bool:
    return isinstance(checkpoint, Mapping) and {"model_dict", "encoder_params"} <= set(checkpoint)


def from_reference(checkpoint: Mapping[str, Any], backbone: nn.Module, tokenizer, source: str) -> tuple[Encoder, dict]:
    """An encoder, its weights not loaded, and the weights under its own names.

    backbone: a BERT of the checkpoint's shape. source: the checkpoint's name in errors. Raises UserError for settings
    that have no counterpart here.
    """
    settings = checkpoint["encoder_params"]
    settings = settings.get("encoder", settings)
    for key in ("use_infer_expert", "per_layer_gating", "factor_rep"):
        if settings.get(key):
            raise UserError(f"{source}: was trained with {key}, which is not supported")
    if settings.get("projection_dim"):
        raise UserError(
            f"{source}: has a projection of {settings['projection_dim']} dimensions, which is not supported"
        )

    tower = _one_tower(checkpoint["model_dict"], source)
    num_experts = max((int(m[3]) + 1 for key in tower if (m := _expert_key(key))), default=0)
    experts = EXPERTS if num_experts == len(EXPERTS) else tuple(f"expert{e}" for e in range(num_experts))
    with_attention = {_layer(key) for key in tower if ATTENTION.fullmatch(key)}
    with_ffn = {_layer(key) for key in tower if FEED_FORWARD.fullmatch(key)}
    weights = {f"backbone.{_renamed(key, experts, with_attention)}": tensor for key, tensor in tower.items()}

    mean = bool(settings.get("mean_pool"))  # the reference normalises its means
    common = {
        "pooling": "mean" if mean else "cls",
        "normalize": mean,
        "max_length": backbone.config.max_position_embeddings,
    }
    if not num_experts:
        return SharedEncoder(backbone, tokenizer, {name: name for name in EXPERTS}, **common), weights
    layers = sorted(with_attention | with_ffn)
    _check_settings(settings, num_experts, layers, backbone.config.num_hidden_layers, source)
    encoder = MoEEncoder(
        backbone,
        tokenizer,
        {name: name for name in experts},
        attention=bool(with_attention),
        ffn=bool(with_ffn),
        layers=layers,
        **common,
    )
    return encoder, weights


def _one_tower(model: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The query tower's tensors by their names in a BERT; the document tower must be the same."""
    towers = [
        {
            name: tensor
            for key, tensor in model.items()
            if key.startswith(f"{prefix}encoder.") and not (name := key[len(prefix) + 8 :]).startswith(UNUSED)
        }
        for prefix in TOWERS
    ]
    surplus = [key for key in model if not key.startswith(tuple(f"{prefix}encoder." for prefix in TOWERS))]
    if surplus:
        raise UserError(f"{source}: {len(surplus)} surplus keys ({', '.join(surplus[:3])})")
    queries, documents = towers
    if not queries:
        raise UserError(f"{source}: has no question_model.encoder.* weights")
    if documents and (queries.keys() != documents.keys() or any(not queries[k].equal(documents[k]) for k in queries)):
        raise UserError(f"{source}: has different towers for queries and documents; only shared ones are supported")
    return queries


def _expert_key(key: str) -> re.Match | None:
    return ATTENTION.fullmatch(key) or FEED_FORWARD.fullmatch(key)


def _layer(key: str) -> int:
    return int(key.split(".")[2])


def _renamed(key: str, experts: tuple[str, ...], with_attention: set[int]) -> str:
    """The reference's name of a tensor as ours. In a layer with attention experts the shared LayerNorm moves up."""
    if match := ATTENTION.fullmatch(key):
        head, projection, expert, rest = match.groups()
        part = f"self.{projection}" if projection else "dense"
        return f"{head}.experts.{experts[int(expert)]}.{part}.{rest}"
    if match := FEED_FORWARD.fullmatch(key):
        head, part, expert, rest = match.groups()
        module = {"interm": "intermediate", "output": "output"}[part]
        return f"{head}.feed_forward.experts.{experts[int(expert)]}.{module}.{rest}"
    shared_norm = ".attention.output.LayerNorm."
    if shared_norm in key and _layer(key) in with_attention:
        return key.replace(shared_norm, ".attention.LayerNorm.")
    return key


def _check_settings(settings: Mapping[str, Any], num_experts: int, layers: list[int], depth: int, source: str) -> None:
    """What the settings say must be what the tensors show."""
    if settings.get("num_expert") != num_experts:
        said = settings.get("num_expert")
        raise UserError(f"{source}: encoder_params say num_expert {said}, the weights hold {num_experts} experts")
    rule = str(settings.get("moe_type", "")).partition(":")[0]
    if rule and expert_layers(rule, depth) != layers:
        said = expert_layers(rule, depth)
        raise UserError(f"{source}: moe_type {rule} puts experts into layers {said}, the weights hold them in {layers}")
