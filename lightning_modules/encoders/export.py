"""Encoders as something that any tool loads, without this project.

save_dense       one task as a plain BERT, RoBERTa or ModernBERT folder, with the files of sentence-transformers
save_onnx        ONNX of such a folder
average          a general model: every expert the mean of all
save_reference   a checkpoint in the layout of SciMult's authors
"""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from datamodules.records import UserError
from lightning_modules.encoders.backbone import (
    backbone_without_memory,
    give_usual_rights,
    options_of,
    quiet_transformers,
)
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.instruct import PromptEncoder
from lightning_modules.encoders.loading import dense_key, load_weights
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.scimult_format import to_reference
from lightning_modules.encoders.shared import SharedEncoder

AVERAGE = "average"


def dense(encoder: Encoder, task: str) -> Encoder:
    """The encoder of one task without experts: a SharedEncoder, or PromptEncoder, of the same vectors.

    task: or "average", for the mean of all experts. Raises UserError for an encoder that has no such form.
    """
    if type(encoder) not in (SharedEncoder, MoEEncoder, PromptEncoder):
        raise UserError(
            f"{type(encoder).__name__} has no plain form: its vectors depend on more than a plain model computes "
            "(format=pretrained keeps it whole)"
        )
    if task == AVERAGE and not isinstance(encoder, MoEEncoder):
        raise UserError(f"{type(encoder).__name__} has no experts to average")
    expert = None if task == AVERAGE else encoder.expert_of(task)
    groups: dict[str, list[Tensor]] = {}
    for key, tensor in encoder.state_dict().items():
        own = re.search(r"\.experts\.(\w+)", key)
        if own is None or expert in (None, own[1]):
            groups.setdefault(dense_key(key), []).append(tensor)
    config = copy.deepcopy(encoder.backbone.config)
    arguments: dict[str, Any] = {name: getattr(encoder, name) for name in ("pooling", "normalize", "max_length")}
    kind: type[Encoder] = SharedEncoder
    if isinstance(encoder, PromptEncoder):
        kind = PromptEncoder
        arguments |= {"instructions": {task: encoder.instructions[task]}, "pool_prompt": encoder.pool_prompt}
    plain = kind(backbone_without_memory(config), encoder.tokenizer, {task: expert or task}, **arguments)
    load_weights(
        plain, {key: torch.stack(group).mean(0) if group[1:] else group[0] for key, group in groups.items()}, task
    )
    return plain.eval()


def average(encoder: Encoder) -> Encoder:
    """A general model: a SharedEncoder of the mean of all experts, under the encoder's tasks."""
    plain = dense(encoder, AVERAGE)
    plain.tasks = dict(encoder.tasks)
    return plain


def save_dense(encoder: Encoder, task: str, folder: str | Path, similarity: str = "dot") -> Path:
    """Write one task ("average" for the mean of all experts) as a plain folder, made if it is not there.

    It holds config.json, model.safetensors and the tokenizer, as transformers knows them, and what
    sentence-transformers, text-embeddings-inference and others read beside: pooling, normalisation, prompt, similarity.
    """
    folder, plain = Path(folder), dense(encoder, task)
    quiet_transformers()
    plain.backbone.save_pretrained(folder)
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.model_max_length = plain.max_length
    tokenizer.save_pretrained(folder)
    modules = ["Transformer", "Pooling", "Normalize"] if plain.normalize else ["Transformer", "Pooling"]
    paths = ["" if name == "Transformer" else f"{i}_{name}" for i, name in enumerate(modules)]
    prompts = plain.prompts
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(zip(modules, paths, strict=True))
        ],
        "sentence_bert_config.json": {"max_seq_length": plain.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": prompts,
            "default_prompt_name": task if prompts else None,
            "similarity_fn_name": similarity,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": plain.dimension,
            "pooling_mode_cls_token": plain.pooling == "cls",
            "pooling_mode_mean_tokens": plain.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            # Only a mean can leave the prompt out: [CLS] stands before it.
            "include_prompt": plain.pooling == "cls" or not isinstance(plain, PromptEncoder) or plain.pool_prompt,
        },
    }
    for path in paths[1:]:
        (folder / path).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    give_usual_rights(folder)
    return folder


class _Pooled(nn.Module):
    """A plain model with its pooling, as ONNX is to hold it."""

    def __init__(self, model: nn.Module, pooling: str, normalize: bool):
        super().__init__()
        self.model, self.pooling, self.normalize = model, pooling, normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        pooled = hidden[:, 0] if self.pooling == "cls" else (hidden * weights).sum(1) / weights.sum(1)
        return hidden, F.normalize(pooled, dim=-1) if self.normalize else pooled


def save_onnx(folder: str | Path) -> Path:
    """Write onnx/model.onnx into a folder of save_dense.

    Inputs input_ids and attention_mask (B, L) int64; outputs last_hidden_state (B, L, D) and sentence_embedding (B, D).
    Raises UserError if the packages that write it are missing, or the prompt is not part of the mean.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("onnx: needs the packages onnx and onnxscript (make install EXTRAS=cpu,onnx)") from error
    quiet_transformers()
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # what they optimise, and that torchvision is not there
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = Path(folder)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    if not pooling["include_prompt"]:
        raise UserError("onnx: an encoder with pool_prompt=false needs to know the prompt, which ONNX does not")
    # Eager attention, because its masks are plain arithmetic.
    config = AutoConfig.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", **options_of(config))
    way = "cls" if pooling["pooling_mode_cls_token"] else "mean"
    module = _Pooled(model, way, (folder / "2_Normalize").is_dir()).eval()
    ids = torch.ones((2, 8), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    target = folder / "onnx" / "model.onnx"
    target.parent.mkdir(exist_ok=True)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        module,
        (ids, mask),
        target,
        input_names=["input_ids", "attention_mask"],
        output_names=["last_hidden_state", "sentence_embedding"],
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        dynamo=True,
        verbose=False,
    )
    return target


def save_reference(encoder: Encoder, path: str | Path) -> Path:
    """Write a checkpoint in the layout of SciMult's authors, whole or not at all."""
    path = Path(path)
    checkpoint = to_reference(encoder)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(checkpoint, unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    return path
