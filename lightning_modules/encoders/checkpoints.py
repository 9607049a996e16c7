"""Encoders in and out of files.

An encoder is described by plain containers (kind, arguments, backbone configuration, tokenizer files), which stand in
every training checkpoint and in encoder.json of an exported folder. Nothing is unpickled beyond tensors and those.
"""

from __future__ import annotations

import importlib
import json
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from datamodules.records import UserError
from lightning_modules.encoders.backbone import load_backbone
from lightning_modules.encoders.base import Encoder, max_positions
from lightning_modules.encoders.reference import from_reference, is_reference
from lightning_modules.encoders.shared import SharedEncoder

DESCRIPTION, WEIGHTS = "encoder.json", "model.safetensors"
DEFAULT_TASKS = {"classification": "classification", "link_prediction": "link_prediction", "search": "search"}


def describe(encoder: Encoder) -> dict[str, Any]:
    """All that build needs, in plain containers."""
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
    kind = type(encoder)
    return {
        "kind": f"{kind.__module__}.{kind.__name__}",
        "arguments": encoder.config,
        "backbone": json.loads(encoder.backbone.config.to_json_string(use_diff=False)),
        "tokenizer": files,
    }


def build(description: Mapping[str, Any]) -> Encoder:
    """An encoder of that description, its weights not loaded."""
    module, _, name = description["kind"].rpartition(".")
    if not module.startswith("lightning_modules.encoders."):
        raise UserError(f"encoder of kind {description['kind']!r}: only those of lightning_modules.encoders are built")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"there is no encoder {description['kind']} in this version of the project") from error
    with tempfile.TemporaryDirectory() as folder:
        for file, text in description["tokenizer"].items():
            (Path(folder) / Path(file).name).write_text(text, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = dict(description["backbone"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    backbone = AutoModel.from_config(config, add_pooling_layer=False)
    return kind(backbone, tokenizer, **description["arguments"])


def save_encoder(encoder: Encoder, folder: str | Path) -> Path:
    """Write encoder.json, model.safetensors and the tokenizer's files to a folder, made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).write_text(json.dumps(describe(encoder), indent=2), encoding="utf-8")
    encoder.tokenizer.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, folder / WEIGHTS)
    return folder


def load_encoder(
    model: str | Path,
    tasks: Mapping[str, str] | None = None,
    backbone: str | Path | None = None,
    pooling: str = "cls",
    key: str = "model",
) -> Encoder:
    """An encoder, in eval mode, from a run's folder (its best checkpoint, else its last), a checkpoint, an exported
    folder, a checkpoint of SciMult's authors, or a plain BERT (folder or hub name).

    tasks, pooling: of a plain BERT; task -> expert, by default the paper's three. backbone: folder or hub name with
    configuration and tokenizer, which the authors' checkpoints do not have. key: where model came from, for errors.

    Raises UserError if it is none of these, is damaged, or its weights do not fit its description.
    """
    path = Path(model)
    if (path / "checkpoints").is_dir():
        path = checkpoint_of(path)
    if (path / DESCRIPTION).is_file():
        encoder = _load_exported(path)
    elif path.is_file():
        encoder = _load_checkpoint(path, backbone)
    else:
        backbone, tokenizer = load_backbone(str(model), key)
        longest = min(512, max_positions(backbone.config))
        encoder = SharedEncoder(backbone, tokenizer, tasks or DEFAULT_TASKS, pooling, max_length=longest)
    return encoder.eval()


def checkpoint_of(run: Path) -> Path:
    """The best checkpoint of a run, else its last."""
    for name in ("best.ckpt", "last.ckpt"):
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise UserError(f"{run}: the run has no checkpoint yet (looked for checkpoints/best.ckpt and last.ckpt)")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, tensors and plain containers only, memory-mapped."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(f"{path}: is no checkpoint, or a damaged one ({str(error).splitlines()[0]})") from error
    return checkpoint


def _load_checkpoint(path: Path, backbone: str | Path | None) -> Encoder:
    checkpoint = read_checkpoint(path)
    if is_reference(checkpoint):
        return _load_reference(checkpoint, path, backbone)
    if not isinstance(checkpoint, dict) or "encoder" not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(f"{path}: is no checkpoint of this project (it has no description of its encoder)")
    prefix = "encoder."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    encoder = build(checkpoint["encoder"])
    load_weights(encoder, weights, str(path))
    return encoder


def _load_reference(checkpoint: Mapping[str, Any], path: Path, backbone: str | Path | None) -> Encoder:
    if backbone is None:
        raise UserError(
            f"{path}: has no configuration and tokenizer of its BERT: name a folder or hub name by backbone="
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        model = AutoModel.from_config(AutoConfig.from_pretrained(backbone), add_pooling_layer=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"backbone: cannot load {str(backbone)!r} ({str(error).splitlines()[0]})") from error
    encoder, weights = from_reference(checkpoint, model, tokenizer, str(path))
    load_weights(encoder, weights, str(path))
    return encoder


def _load_exported(folder: Path) -> Encoder:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the exported encoder cannot be read ({error})") from error
    if not isinstance(description, dict) or not {"kind", "arguments", "backbone", "tokenizer"} <= set(description):
        raise UserError(f"{folder / DESCRIPTION}: is no description of an encoder")
    encoder = build(description)
    load_weights(encoder, weights, str(folder / WEIGHTS))
    return encoder


def load_weights(encoder: Encoder, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into an encoder.

    Raises UserError naming the first keys that are missing, surplus or of another shape.
    """
    own = encoder.state_dict()
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
    encoder.load_state_dict(weights)


def continue_from(source: Encoder, target: Encoder, name: str) -> None:
    """Give a new encoder the weights of a trained one (the paper's second stage, appendix C).

    From a shared encoder every expert starts as a copy of the shared weights; otherwise both must have the same layout.
    name: of the source, in errors.
    """
    weights = source.state_dict()
    if isinstance(source, SharedEncoder):
        weights = {key: weights[dense_key(key)] for key in target.state_dict() if dense_key(key) in weights}
    load_weights(target, weights, name)


def dense_key(key: str) -> str:
    """The key, in a backbone without experts, of what a parameter of an expert is a copy of."""
    head, found, tail = key.partition(".attention.experts.")
    if found:
        _, part, rest = tail.split(".", 2)
        return f"{head}.attention.{'self' if part == 'self' else 'output.dense'}.{rest}"
    head, found, tail = key.partition(".feed_forward.experts.")
    if found:
        return f"{head}.{tail.split('.', 1)[1]}"
    head, found, tail = key.partition(".attention.LayerNorm.")
    return f"{head}.attention.output.LayerNorm.{tail}" if found else key
