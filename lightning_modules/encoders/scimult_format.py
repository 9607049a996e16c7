"""Checkpoints of SciMult's authors (github.com/yuzhimanhua/SciMult), and others of the same layout, in and out.

    model_dict       every tensor twice, under question_model. and ctx_model. (one shared tower)
    encoder_params   settings, flat or under "encoder"

An expert is a number there. Layers with experts are recognised by their keys:

    ...layer.<l>.attention.self.moe_{query,key,value}.<e>.*    ...layer.<l>.attention.output.moe_dense.<e>.*
    ...layer.<l>.moe_layer.{interm,output}_layers.<e>.*        ...expert_gate[.<l>].fwd_func.*

Checkpoints of DPR (Karpukhin et al., 2020) have the same layout without the level "encoder." and, mostly, two different
towers, of which one is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.records import UserError
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.moe import MoEEncoder, expert_layers
from lightning_modules.encoders.routed import RoutedEncoder
from lightning_modules.encoders.shared import SharedEncoder

EXPERTS = ("search", "link_prediction", "classification")  # by the reference's numbers
RULES = ("mod2", "mod3", "mod4", "mod6", "mod12", "ge6mod3", "le7mod3")  # that the reference knows
TOWERS = {"query": "question_model.", "document": "ctx_model."}
UNUSED = ("embeddings.position_ids", "pooler.")

# (pattern of a key there, our key); <e> is the expert's number there and its name here
ATTENTION = re.compile(
    r"(encoder\.layer\.(\d+)\.attention)\.(?:self\.moe_(query|key|value)|output\.moe_dense)\.(\d+)\.(\w+)"
)
FEED_FORWARD = re.compile(r"(encoder\.layer\.(\d+))\.moe_layer\.(interm|output)_layers\.(\d+)\.(.+)")
GATE = re.compile(r"encoder\.expert_gate\.(?:(\d+)\.)?fwd_func\.(\w+)")

OUR_ATTENTION = re.compile(r"(encoder\.layer\.\d+\.attention)\.(self|output\.dense)\.experts\.(\w+)\.(.+)")
OUR_FEED_FORWARD = re.compile(r"(encoder\.layer\.\d+)\.(intermediate|output)\.experts\.(\w+)\.(.+)")


def is_reference(checkpoint: Any) -> bool:
    return isinstance(checkpoint, Mapping) and {"model_dict", "encoder_params"} <= set(checkpoint)


def from_reference(
    checkpoint: Mapping[str, Any], backbone: nn.Module, tokenizer, source: str, tower: str | None = None
) -> tuple[Encoder, dict[str, Tensor]]:
    """An encoder, its weights not loaded, and the weights under its own names.

    backbone: a BERT of the checkpoint's shape. source: the checkpoint's name in errors. tower: "query" or "document",
    where they differ. Raises UserError for settings that have no counterpart here.
    """
    settings = checkpoint["encoder_params"]
    if not isinstance(settings, Mapping) or not isinstance(checkpoint["model_dict"], Mapping):
        raise UserError(f"{source}: model_dict and encoder_params are not as in a checkpoint of SciMult or DPR")
    settings = settings.get("encoder", settings)
    if settings.get("projection_dim"):
        raise UserError(
            f"{source}: has a projection of {settings['projection_dim']} dimensions, which is not supported"
        )
    if settings.get("factor_rep"):
        raise UserError(f"{source}: was trained with factor_rep, which is not supported")

    weights = _one_tower(checkpoint["model_dict"], source, tower)
    num_experts = max((int(m[4]) + 1 for key in weights if (m := _expert_key(key))), default=0)
    gates = {match[1] for key in weights if (match := GATE.fullmatch(key))}
    if gates:
        experts: Sequence[str] = tuple(f"expert{e}" for e in range(num_experts))
    else:
        experts = EXPERTS if num_experts == len(EXPERTS) else tuple(f"expert{e}" for e in range(num_experts))
    in_attention = {int(m[2]) for key in weights if (m := ATTENTION.fullmatch(key))}
    in_ffn = {int(m[2]) for key in weights if (m := FEED_FORWARD.fullmatch(key))}
    if bool(settings.get("use_infer_expert")) != bool(gates):
        raise UserError(
            f"{source}: encoder_params say use_infer_expert {bool(settings.get('use_infer_expert'))}, and the weights "
            f"hold {'a' if gates else 'no'} gate"
        )
    renamed = {_our_key(key, experts): tensor for key, tensor in weights.items()}

    mean = bool(settings.get("mean_pool"))  # the reference normalises its means
    common = {
        "pooling": "mean" if mean else "cls",
        "normalize": mean,
        # Their sequence_length is of training; they evaluate with all positions. max_length is a key of to_reference.
        "max_length": settings.get("max_length", backbone.config.max_position_embeddings),
    }
    if not num_experts:
        return SharedEncoder(backbone, tokenizer, {name: name for name in EXPERTS}, **common), renamed
    layers = sorted(in_attention | in_ffn)
    _check_settings(settings, num_experts, layers, backbone.config.num_hidden_layers, source)
    common |= {"attention": bool(in_attention), "ffn": bool(in_ffn), "layers": layers}
    if not gates:
        return MoEEncoder(backbone, tokenizer, {name: name for name in experts}, **common), renamed
    level = "token" if "tok" in str(settings.get("moe_type")) else "sequence"
    routed = RoutedEncoder(
        backbone,
        tokenizer,
        {name: name for name in EXPERTS},
        num_experts=num_experts,
        level=level,
        gate_per_layer=gates != {None},
        **common,
    )
    return routed, renamed


def _one_tower(model: Mapping[str, Tensor], source: str, tower: str | None) -> dict[str, Tensor]:
    """One tower's tensors by their names in a BERT. Without tower, both must be the same."""
    if tower not in (None, *TOWERS):
        raise UserError(f"tower: got {tower!r}, allowed are {' and '.join(TOWERS)}")
    level = "" if any(key.startswith(f"{p}embeddings.") for p in TOWERS.values() for key in model) else "encoder."
    prefixes = {name: f"{prefix}{level}" for name, prefix in TOWERS.items()}
    surplus = [key for key in model if not key.startswith(tuple(prefixes.values()))]
    if surplus:
        raise UserError(f"{source}: {len(surplus)} surplus keys ({', '.join(map(str, surplus[:3]))})")
    towers = {
        name: {
            key.removeprefix(prefix): tensor
            for key, tensor in model.items()
            if key.startswith(prefix) and not key.removeprefix(prefix).startswith(UNUSED)
        }
        for name, prefix in prefixes.items()
    }
    if tower:
        if not towers[tower]:
            raise UserError(f"{source}: has no {prefixes[tower]}* weights")
        return towers[tower]
    queries, documents = towers["query"], towers["document"]
    if not queries:
        raise UserError(f"{source}: has no {prefixes['query']}* weights")
    if documents and (queries.keys() != documents.keys() or any(not _same(queries[k], documents[k]) for k in queries)):
        raise UserError(
            f"{source}: has different towers for queries and documents; take one of them: tower=query or tower=document"
        )
    return queries


def _same(a: Tensor, b: Tensor) -> bool:
    """Equality that does not read what is stored once."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    stored_once = a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.shape == b.shape
    return stored_once or a.equal(b)


def _expert_key(key: str) -> re.Match | None:
    return ATTENTION.fullmatch(key) or FEED_FORWARD.fullmatch(key)


def _our_key(key: str, experts: Sequence[str]) -> str:
    """The reference's name of a tensor as ours."""
    if match := ATTENTION.fullmatch(key):
        head, _, projection, expert, rest = match.groups()
        name = experts[int(expert)]
        where = f"self.experts.{name}.{projection}" if projection else f"output.dense.experts.{name}"
        return f"backbone.{head}.{where}.{rest}"
    if match := FEED_FORWARD.fullmatch(key):
        head, _, part, expert, rest = match.groups()
        module = {"interm": "intermediate", "output": "output"}[part]
        return f"backbone.{head}.{module}.experts.{experts[int(expert)]}.{rest}"
    if match := GATE.fullmatch(key):
        return f"gates.{match[1] or 'all'}.{match[2]}"
    return f"backbone.{key}"


def _check_settings(settings: Mapping[str, Any], num_experts: int, layers: list[int], depth: int, source: str) -> None:
    """What the settings say must be what the tensors show."""
    if settings.get("num_expert") != num_experts:
        said = settings.get("num_expert")
        raise UserError(f"{source}: encoder_params say num_expert {said}, the weights hold {num_experts} experts")
    rule = str(settings.get("moe_type", "")).partition(":")[0]
    if rule and expert_layers(rule, depth) != layers:
        said = expert_layers(rule, depth)
        raise UserError(f"{source}: moe_type {rule} puts experts into layers {said}, the weights hold them in {layers}")


def to_reference(encoder: Encoder) -> dict[str, Any]:
    """A checkpoint as the authors' code reads it: both towers, settings, and what its loader expects beside them.

    Raises UserError for an encoder that the reference has no counterpart of.
    """
    if type(encoder) not in (SharedEncoder, MoEEncoder) or encoder.backbone.config.model_type != "bert":
        kind = f"{type(encoder).__name__} over {encoder.backbone.config.model_type}"
        raise UserError(f"{kind}: the reference's checkpoints hold SharedEncoder and MoEEncoder over bert alone")
    if (encoder.pooling == "mean") != encoder.normalize:
        raise UserError(
            f"pooling {encoder.pooling} with normalize {encoder.normalize}: the reference has either [CLS] as it is "
            "(encoder.pooling=cls) or normalised means (encoder.pooling=mean encoder.normalize=true)"
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
    # Its strict loading wants a pooler, which nothing reads.
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


def _their_key(key: str, experts: Sequence[str]) -> str:
    """Our name of a tensor of the backbone as the reference's."""
    if match := OUR_ATTENTION.fullmatch(key):
        head, part, expert, rest = match.groups()
        number = experts.index(expert)
        if part == "self":
            projection, _, rest = rest.partition(".")
            return f"{head}.self.moe_{projection}.{number}.{rest}"
        return f"{head}.output.moe_dense.{number}.{rest}"
    if match := OUR_FEED_FORWARD.fullmatch(key):
        head, part, expert, rest = match.groups()
        module = {"intermediate": "interm", "output": "output"}[part]
        return f"{head}.moe_layer.{module}_layers.{experts.index(expert)}.{rest}"
    return key


def _their_rule(encoder: MoEEncoder) -> str:
    """The reference's moe_type of an encoder's expert layers."""

    def fits(rule: str) -> bool:
        try:
            return expert_layers(rule, encoder.num_layers) == encoder.expert_layers
        except UserError:
            return False

    rule = next((rule for rule in RULES if fits(rule)), None)
    if rule is None:
        raise UserError(f"layers {encoder.expert_layers}: the reference knows {', '.join(RULES)} alone")
    return f"{rule}:" + "_".join(w for w, has in (("attn", encoder.attention), ("fwd", encoder.ffn)) if has)
