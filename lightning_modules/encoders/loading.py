"""Encoders out of files of every kind, and out of one another.

An encoder is described by plain containers (kind, arguments, backbone configuration, tokenizer files), which stand in
every training checkpoint and, without the tokenizer, in config.json of an exported folder. Nothing is unpickled beyond
tensors and those.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from datamodules.records import UserError
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.encoders.backbone import (
    backbone_without_memory,
    empty_backbone,
    load_backbone,
    quiet_transformers,
    reading,
    reason,
)
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.families import family_of
from lightning_modules.encoders.instruct import PromptEncoder
from lightning_modules.encoders.scimult_format import from_reference, is_reference
from lightning_modules.encoders.shared import SharedEncoder

log = logging.getLogger(__name__)

DEFAULT_TASKS = {"classification": "classification", "link_prediction": "link_prediction", "search": "search"}


def describe(encoder: Encoder) -> dict[str, Any]:
    """All that build needs, in plain containers."""
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
    return describe_architecture(encoder) | {"tokenizer": files}


def describe_architecture(encoder: Encoder) -> dict[str, Any]:
    kind = type(encoder)
    return {
        "kind": f"{kind.__module__}.{kind.__name__}",
        "arguments": encoder.config,
        "backbone": json.loads(encoder.backbone.config.to_json_string(use_diff=False)),
    }


def build(description: Mapping[str, Any], tokenizer=None, source: str = "the encoder") -> Encoder:
    """An encoder of that description. Its parameters have no memory yet: they are given by load_weights.

    tokenizer: by default that of the description. source: where it came from, for errors. Raises UserError.
    """
    kind = _kind(description.get("kind"))
    quiet_transformers()
    try:
        if tokenizer is None:
            with tempfile.TemporaryDirectory() as folder:
                for file, text in description["tokenizer"].items():
                    (Path(folder) / Path(file).name).write_text(text, encoding="utf-8")
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        settings = dict(description["backbone"])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        return kind(backbone_without_memory(config), tokenizer, **description["arguments"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # whatever a damaged description leads to
        raise UserError(f"{source}: its description builds no {kind.__name__} ({reason(error)})") from error


def _kind(path: Any) -> type[Encoder]:
    module, _, name = str(path).rpartition(".")
    if not module.startswith("lightning_modules.encoders."):
        raise UserError(f"encoder of kind {path!r}: only those of lightning_modules.encoders are built")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"there is no encoder {path} in this version of the project") from error
    if not (isinstance(kind, type) and issubclass(kind, Encoder)):
        raise UserError(f"there is no encoder {path}: that is something else")
    return kind


def load_encoder(
    model: str | Path,
    tasks: Mapping[str, str] | None = None,
    backbone: str | Path | None = None,
    pooling: str | None = None,
    tower: str | None = None,
    adapters: Mapping[str, str] | None = None,
    key: str = "model",
) -> Encoder:
    """An encoder, in eval mode, from any of these:

    a run's folder (its best checkpoint, else its last), or a checkpoint; a folder that save_pretrained wrote, or the
    hub name of such a one; a checkpoint of SciMult's authors or of DPR; a plain BERT, RoBERTa, ModernBERT, or one of
    DPR's two (folder or hub name), alone or with adapters in the form of SPECTER2's.

    tasks, pooling: of a plain model; task -> expert, by default the paper's three; "cls" or "mean", by default what its
    sentence-transformers files say, else "cls". backbone: folder or hub name with
    configuration and tokenizer, which the authors' checkpoints do not have. tower: "query" or "document", of a DPR
    checkpoint. adapters: task -> folder or hub name of its adapter. key: where model came from, for errors.

    Raises UserError if it is none of these, is damaged, or its weights do not fit its description.
    """
    from lightning_modules.encoders.adapters import with_adapters
    from lightning_modules.encoders.pretrained import is_pretrained, load_pretrained

    path = Path(model)
    if (path / "checkpoints").is_dir():
        path = checkpoint_of(path)
    if path.is_file():
        encoder = _load_checkpoint(path, backbone, tower)
    elif is_pretrained(model, key):
        encoder = load_pretrained(model)
    else:
        encoder = _load_plain(str(model), tasks or DEFAULT_TASKS, pooling, key)
    if adapters:
        encoder = with_adapters(encoder, adapters)
    return encoder.eval()


def _load_plain(name: str, tasks: Mapping[str, str], pooling: str | None, key: str) -> Encoder:
    """A plain model, with what its sentence-transformers files say, if it has some."""
    backbone, tokenizer = load_backbone(name, key)

    def beside(file: str) -> Any:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(path).read_text(encoding="utf-8")) if path else None

    with reading(name, key):
        way = beside("1_Pooling/config.json") or {}
        kinds = [module["type"].rpartition(".")[2] for module in beside("modules.json") or []]
        settings = beside("config_sentence_transformers.json") or {}
        prompts = settings.get("prompts") or {}
        longest = (beside("sentence_bert_config.json") or {}).get("max_seq_length") or 512
    if pooling is None:
        mean = way.get("pooling_mode_mean_tokens") or way.get("pooling_mode") == "mean"
        pooling = "mean" if mean else "cls"
    common = {"pooling": pooling, "normalize": "Normalize" in kinds}
    prompt = (prompts.get(settings.get("default_prompt_name") or "") or "").strip()
    if prompt:
        longest = min(longest, family_of(backbone).max_positions)
        common |= {"pool_prompt": way.get("include_prompt", True), "max_length": longest}
        return PromptEncoder(backbone, tokenizer, tasks, dict.fromkeys(tasks, prompt), **common)
    if any(prompts.values()):
        log.warning(
            "%s: has prompts (%s), and none is its default: texts are taken as they are", name, ", ".join(prompts)
        )
    encoder = SharedEncoder(backbone, tokenizer, tasks, max_length=3, **common)
    encoder.max_length = min(longest, encoder.family.max_positions)
    return encoder


def checkpoint_of(run: Path) -> Path:
    """The best checkpoint of a run, else its last."""
    for name in ("best.ckpt", "last.ckpt"):
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise UserError(f"{run}: the run has no checkpoint yet (looked for checkpoints/best.ckpt and last.ckpt)")


def _load_checkpoint(path: Path, backbone: str | Path | None, tower: str | None) -> Encoder:
    checkpoint = read_checkpoint(path)
    if is_reference(checkpoint):
        if backbone is None:
            raise UserError(
                f"{path}: has no configuration and tokenizer of its BERT: name a folder or hub name by backbone= "
                "(or write it once with format=pretrained, by make export)"
            )
        empty, tokenizer = empty_backbone(str(backbone), "backbone")
        encoder, weights = from_reference(checkpoint, empty, tokenizer, str(path), tower)
    elif isinstance(checkpoint, dict) and {"encoder", "state_dict"} <= set(checkpoint):
        prefix = "encoder."
        if not isinstance(checkpoint["encoder"], Mapping) or not isinstance(checkpoint["state_dict"], Mapping):
            raise UserError(f"{path}: encoder and state_dict are not as in a checkpoint of this project")
        weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        encoder = build(checkpoint["encoder"], source=str(path))
    else:
        raise UserError(f"{path}: is no checkpoint of this project (it has no description of its encoder)")
    load_weights(encoder, weights, str(path))
    return encoder


def load_weights(encoder: Encoder, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into an encoder, one after the other.

    Raises UserError naming the first keys that are missing, surplus or of another shape.
    """
    own = encoder.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{source}: {name} holds {kind}, expected floating-point numbers")
    misfits = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    problems = {
        "missing": [k for k in own if k not in weights],
        "surplus": [k for k in weights if k not in own],
        "of another shape": [f"{k} {tuple(weights[k].shape)} there, {tuple(own[k].shape)} here" for k in misfits],
    }
    found = [f"{len(v)} {k} ({'; '.join(v[:3])}{', ...' if len(v) > 3 else ''})" for k, v in problems.items() if v]
    if found:
        raise UserError(
            f"{source}: the weights are of another architecture than {type(encoder).__name__}: {', '.join(found)}"
        )
    for name, tensor in own.items():
        if tensor.is_meta:
            copied = weights[name].to(tensor.dtype, copy=True)
            module, _, leaf = name.rpartition(".")
            encoder.get_submodule(module).register_parameter(leaf, nn.Parameter(copied, tensor.requires_grad))
        else:
            with torch.no_grad():
                tensor.copy_(weights[name])


def continue_from(source: Encoder, target: Encoder, name: str) -> None:
    """Give a new encoder the weights of a trained one (the paper's second stage, appendix C).

    From a shared encoder every expert, instruction encoder, gate and adapter starts as in a new encoder over the shared
    weights; otherwise both must have the same layout. name: of the source, in errors.
    """
    weights = source.state_dict()
    if isinstance(source, SharedEncoder):
        new = {key: tensor for key, tensor in target.state_dict().items() if not dense_key(key).startswith("backbone.")}
        dense = {key: dense_key(key) for key in target.state_dict() if key not in new}
        surplus = {key: tensor for key, tensor in weights.items() if key not in dense.values()}
        weights = {key: weights[origin] for key, origin in dense.items() if origin in weights} | new | surplus
    load_weights(target, weights, name)


def dense_key(key: str) -> str:
    """The key, in a backbone without experts, of what a parameter is a copy of at first."""
    key = re.sub(r"^instruction_backbone\.", "backbone.", key)
    return re.sub(r"\.experts\.\w+", "", key)
