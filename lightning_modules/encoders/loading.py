"""Load encoders from all supported files, and initialize one encoder from another.

A description of an encoder consists of plain containers: its class, the arguments of its constructor, the configuration
of its backbone, and the files of its tokenizer. Checkpoints contain it, and so does config.json of an exported folder
(without the tokenizer). Only tensors and plain containers are unpickled.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from datamodules.records import UserError, check_choice, is_in, reason
from lightning_modules.checkpoint_files import read_checkpoint
from lightning_modules.encoders.backbone import (
    check_size,
    load_backbone,
    meta_backbone,
    quiet_transformers,
    reading,
)
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.families import family_of
from lightning_modules.encoders.instruct import PromptEncoder
from lightning_modules.encoders.lora import merge_lora
from lightning_modules.encoders.scimult_format import from_reference, is_reference
from lightning_modules.encoders.sentence_files import check_prompt, lower_cased, read_sentence_files
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.encoders.text_features import TextFeatures
from lightning_modules.losses import SIMILARITIES
from lightning_modules.parts import expert_in, without_expert

log = logging.getLogger(__name__)

DEFAULT_LENGTH = 512  # maximum number of tokens, for plain models without this setting
RUN_CHECKPOINTS = {  # in the order in which checkpoint_of looks for them
    "merged.ckpt": "average of the trained weights and the weights before training",
    "best.ckpt": "best on the dev data",
    "last.ckpt": "end of the training",
}
DEFAULT_TASKS = {"classification": "classification", "link_prediction": "link_prediction", "search": "search"}


def describe(encoder: Encoder) -> dict[str, Any]:
    """Return a description from which `build` makes the same encoder, without LoRA."""
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
    return describe_architecture(encoder) | {"tokenizer": files, "lora_scale": encoder.lora_scale}


def describe_architecture(encoder: Encoder) -> dict[str, Any]:
    """Return the description of an encoder without its tokenizer."""
    kind = type(encoder)
    return {
        "kind": f"{kind.__module__}.{kind.__name__}",
        "arguments": encoder.config,
        "backbone": json.loads(encoder.backbone.config.to_json_string(use_diff=False)),
        "similarity": encoder.similarity,
    }


def build(
    description: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str = "the encoder",
    packages: Sequence[str] = (),
) -> Encoder:
    """Build an encoder from its description, without weights. Raises UserError if the description is damaged.

    tokenizer: tokenizer of the encoder; by default, the description's.
    source: name of the loaded file, for error messages.
    packages: additional packages whose encoders may be built, as in load_encoder.
    """
    kind = _encoder_class(description.get("kind"), packages)
    quiet_transformers()
    try:
        if tokenizer is None:
            with tempfile.TemporaryDirectory() as folder:
                for file, text in description["tokenizer"].items():
                    (Path(folder) / Path(file).name).write_text(text, encoding="utf-8")
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        settings = dict(description["backbone"])
        check_size(settings)
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        encoder = kind(meta_backbone(config), tokenizer, **description["arguments"])
        if (similarity := description.get("similarity")) is not None:  # older descriptions do not have it
            encoder.similarity = check_choice("similarity", similarity, SIMILARITIES)
        return encoder
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # a damaged description can raise anything
        raise UserError(f"{source}: cannot build a {kind.__name__} from its description ({reason(error)})") from error


def _encoder_class(path: object, packages: Sequence[str]) -> type[Encoder]:
    """Import an encoder's class. Unlisted packages are refused, because importing them would run their code."""
    module, _, name = str(path).rpartition(".")
    packages = [packages] if isinstance(packages, str) else packages
    if not is_in(module, ["lightning_modules.encoders", *packages]):
        raise UserError(
            f"encoder {path!r}: only classes of lightning_modules.encoders and of the packages that you allow can be "
            f"loaded; if you trust the package {module.partition('.')[0]!r}, name it in packages (extend.packages of a "
            "command)"
        )
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        ours = is_in(module, ["lightning_modules"])
        problem = "this version of the project has no such class" if ours else f"it cannot be imported ({error})"
        raise UserError(f"encoder {path}: {problem}") from error
    if not (isinstance(kind, type) and issubclass(kind, Encoder)):
        raise UserError(f"encoder {path}: not a subclass of Encoder")
    return kind


def load_encoder(
    model: str | Path,
    tasks: Mapping[str, str] | None = None,
    backbone: str | Path | None = None,
    pooling: str | None = None,
    tower: str | None = None,
    adapters: Mapping[str, str] | None = None,
    key: str = "model",
    packages: Sequence[str] = (),
) -> Encoder:
    """Load an encoder, in eval mode. Raises UserError if the model is unsupported or damaged.

    model: a run's folder (checkpoint_of chooses the file), a checkpoint of this project, SciMult's authors or DPR, or
        the folder or hub name of a saved encoder, a plain BERT, RoBERTa, MPNet or ModernBERT, or a DPR encoder.
    tasks: task -> expert, for a plain model; by default the paper's three tasks.
    backbone: folder or hub name of the configuration and tokenizer. Checkpoints of the authors and of DPR need it.
    pooling: one of POOLINGS, for a plain model; by default from its sentence-transformers files, or else "cls". For any
        other model, a pooling that differs from the model's own raises UserError.
    tower: "query" or "document", for a DPR checkpoint.
    adapters: task -> folder or hub name of an adapter in SPECTER2's form, for a plain model.
    key: argument that names the model, for error messages.
    packages: additional packages or modules whose encoders may be loaded. Importing them runs their code, so name only
        packages that you trust.
    """
    from lightning_modules.encoders.adapters import with_adapters
    from lightning_modules.encoders.pretrained import load_pretrained

    path = Path(model)
    is_run = (path / "checkpoints").is_dir()
    if is_run:
        path = checkpoint_of(path)
    if is_plain(model, key):
        encoder = _load_plain(str(model), tasks or DEFAULT_TASKS, pooling, key)
    elif path.is_file():
        try:
            encoder = _load_checkpoint(path, backbone, tower, packages)
        except UserError as error:
            raise UserError(f"{error}{_other_checkpoints(path) if is_run else ''}") from error
    else:
        encoder = load_pretrained(model, packages=packages)
    if pooling and encoder.pooling != pooling:
        raise UserError(f"pooling: only plain models take it; {model} has its own, {encoder.pooling}")
    if not path.is_file():
        _warn_of_unused(model, backbone, tower)
    if adapters:
        encoder = with_adapters(encoder, adapters)
    return encoder.eval()


def check_serves(encoder: Encoder, tasks: Iterable[str], key: str) -> None:
    """Raise UserError unless an encoder serves all tasks. key: argument that names the encoder, for errors."""
    if missing := [task for task in tasks if task not in encoder.tasks]:
        raise UserError(f"{key}: has no task {', '.join(missing)} (its tasks are {', '.join(encoder.tasks)})")


def is_plain(model: str | Path, key: str = "model") -> bool:
    """Return whether a model is plain: neither an encoder of this project nor a checkpoint.

    Raises UserError if the model does not exist. key: argument that names the model, for error messages.
    """
    from lightning_modules.encoders.pretrained import is_pretrained

    path = Path(model)
    return not ((path / "checkpoints").is_dir() or path.is_file() or is_pretrained(model, key))


def checkpoint_of(run: Path) -> Path:
    """Return the first of RUN_CHECKPOINTS that a run has: merged with its start, best, or last."""
    for name in RUN_CHECKPOINTS:
        if (run / "checkpoints" / name).is_file():
            return run / "checkpoints" / name
    raise UserError(f"{run}: the run has no checkpoints/best.ckpt or last.ckpt yet")


def _other_checkpoints(path: Path) -> str:
    """Return advice for a run whose checkpoint cannot be loaded. path: this checkpoint."""
    others = [str(other) for name in RUN_CHECKPOINTS if (other := path.with_name(name)) != path and other.is_file()]
    advice = f". Instead of the run, you can name {' or '.join(others)}" if others else ""
    if path.name == "merged.ckpt":
        advice += ". To recreate merged.ckpt, repeat the command that trained the run"
    return advice


def _origin(path: Path, step: object) -> str:
    """Describe a checkpoint in words, without its run's folder. step: optimizer step, if known."""
    in_run = path.parent.name == "checkpoints"
    name = f"checkpoints/{path.name}" if in_run else path.name
    kind = f" ({RUN_CHECKPOINTS[path.name]})" if in_run and path.name in RUN_CHECKPOINTS else ""
    return f"{name} of step {step}{kind}" if isinstance(step, int) else name


def _load_plain(name: str, tasks: Mapping[str, str], pooling: str | None, key: str) -> Encoder:
    """Load a plain model with the settings of its sentence-transformers files, if any."""
    with reading(name, key):
        files = read_sentence_files(name, pooling)
    backbone, tokenizer = load_backbone(name, key)
    if files.lower_case:
        tokenizer = lower_cased(tokenizer)
    longest = files.max_length or (tokenizer.model_max_length if files.are_complete else DEFAULT_LENGTH)
    arguments: dict[str, Any] = {
        "pooling": files.pooling or "cls",
        "normalize": files.normalize,
        "max_length": min(longest, family_of(backbone).max_positions),
    }
    encoder: Encoder
    if files.prompt.strip():
        instructions = dict.fromkeys(tasks, files.prompt)
        encoder = PromptEncoder(backbone, tokenizer, tasks, instructions, files.pool_prompt, **arguments)
        check_prompt(name, tokenizer, files.prompt, next(iter(encoder.prompts.values())))
    else:
        encoder = SharedEncoder(backbone, tokenizer, tasks, **arguments)
    encoder.similarity = files.similarity
    return encoder


def _load_checkpoint(
    path: Path, backbone: str | Path | None, tower: str | None, packages: Sequence[str] = ()
) -> Encoder:
    """Load a checkpoint of this project, of SciMult's authors, or of DPR."""
    checkpoint = read_checkpoint(path)
    if is_reference(checkpoint):
        if backbone is None:
            raise UserError(
                f"backbone: required, because {path} has no configuration and tokenizer; set it to the folder or hub "
                f"name of a model with both"
            )
        empty, tokenizer = load_backbone(str(backbone), "backbone", with_weights=False)
        encoder, weights = from_reference(checkpoint, empty, tokenizer, str(path), tower)
        encoder.similarity = "dot"  # SciMult (paper, equation 2) and DPR
    elif isinstance(checkpoint, dict) and {"encoder", "state_dict"} <= set(checkpoint):
        if not isinstance(checkpoint["encoder"], Mapping) or not isinstance(checkpoint["state_dict"], Mapping):
            raise UserError(f"{path}: the entries encoder and state_dict must be mappings; the file is damaged")
        prefix = "encoder."
        weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        weights = merge_lora(weights, checkpoint["encoder"].get("lora_scale"), str(path))
        encoder = build(checkpoint["encoder"], source=str(path), packages=packages)
        _warn_of_unused(path, backbone, tower)
    else:
        raise UserError(f"{path}: not a checkpoint of this project (it has no description of an encoder)")
    load_weights(encoder, weights, str(path))
    encoder.origin = _origin(path, checkpoint.get("global_step"))
    return encoder


def _warn_of_unused(model: str | Path, backbone: str | Path | None, tower: str | None) -> None:
    for name, value in (("backbone", backbone), ("tower", tower)):
        if value is not None:
            message = "%s=%s is not used: %s has its own, unlike checkpoints of SciMult's authors and of DPR"
            log.warning(message, name, value, model)


def load_weights(encoder: Encoder, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into an encoder. Raises UserError if any are missing, unexpected or have the wrong shape.

    source: name of the loaded file, for error messages.
    """
    for name, features in encoder.features.items():
        if isinstance(keys := weights.get(f"features.{name}.keys"), Tensor) and keys.ndim == 1:
            cast(TextFeatures, features).resize(len(keys))
    parameters = encoder.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        is_whole = name in parameters and not parameters[name].is_floating_point()
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() == is_whole or tensor.is_complex():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            expected = "whole" if is_whole else "floating-point"
            raise UserError(f"{source}: {name} must contain {expected} numbers, got {kind}")
    if problems := weight_problems(weights, parameters):
        raise UserError(f"{source}: the weights do not fit this {type(encoder).__name__}: {problems}")
    for name, tensor in parameters.items():
        if tensor.is_meta:
            copied = weights[name].to(tensor.dtype, copy=True)
            module, _, leaf = name.rpartition(".")
            encoder.get_submodule(module).register_parameter(leaf, nn.Parameter(copied, tensor.requires_grad))
        else:
            with torch.no_grad():
                tensor.copy_(weights[name])


def weight_problems(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describe the weights that are missing, unexpected or have the wrong shape; "" without problems."""
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "with the wrong shape": [
            f"{name}: expected {tuple(tensor.shape)}, got {tuple(weights[name].shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    shown = [f"{len(v)} {k} ({'; '.join(v[:3])}{', ...' if v[3:] else ''})" for k, v in problems.items() if v]
    return ", ".join(shown)


def with_weights(encoder: Encoder, weights: Mapping[str, Tensor]) -> Encoder:
    """Return a new encoder with the same arguments and the given weights. LoRA matrices are merged into the weights."""
    copy = build(describe_architecture(encoder), encoder.tokenizer, packages=[type(encoder).__module__])
    name = type(encoder).__name__
    load_weights(copy, merge_lora(weights, encoder.lora_scale, name), name)
    return copy.to(encoder.device).eval()


def without_lora(encoder: Encoder) -> Encoder:
    """Return a copy of an encoder with its LoRA merged, or the encoder itself without LoRA."""
    return encoder if encoder.lora_scale is None else with_weights(encoder, encoder.state_dict())


def continue_from(source: Encoder, target: Encoder, name: str) -> None:
    """Initialize an encoder from a trained one (the paper's second stage, appendix C).

    From a SharedEncoder, each expert and instruction encoder starts as a copy of the shared weights; gates and adapters
    keep their initial values. A CrossStitchEncoder can also start from an MoEEncoder. Any other source must have the
    architecture of the target; additional experts are left out.

    name: name of the source, for messages.
    """
    weights = weights_for(source, target)
    source_experts, experts = ({expert_in(key) for key in keys} for keys in (weights, target.state_dict()))
    if experts > {None} and (left_out := source_experts - experts):
        names = ", ".join(sorted(map(str, left_out)))
        log.info("%s: left out experts that no task of this run uses: %s", name, names)
        weights = {key: tensor for key, tensor in weights.items() if expert_in(key) not in left_out}
    if isinstance(source, SharedEncoder):
        weights = {k: v for k, v in target.state_dict().items() if not dense_key(k).startswith("backbone.")} | weights
    load_weights(target, weights, name)


def weights_for(source: Encoder, target: Encoder) -> dict[str, Tensor]:
    """Return the weights of one encoder under the parameter names of another.

    From a SharedEncoder, each expert and instruction encoder of the target gets the shared weights. Parameters that
    only the target has get values without effect (Encoder.neutral_weights).
    """
    weights, neutral = source.state_dict(), target.neutral_weights()
    if not isinstance(source, SharedEncoder):
        return neutral | weights
    origins = {key: origin for key in target.state_dict() if (origin := dense_key(key)).startswith("backbone.")}
    unexpected = {key: tensor for key, tensor in weights.items() if key not in set(origins.values())}
    return neutral | {key: weights[origin] for key, origin in origins.items() if origin in weights} | unexpected


def dense_key(key: str) -> str:
    """Return the name that a parameter of an expert or instruction encoder has in a SharedEncoder."""
    return without_expert(re.sub(r"^instruction_backbone\.", "backbone.", key))
