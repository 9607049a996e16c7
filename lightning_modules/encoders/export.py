"""Export encoders to formats that other tools load without this project.

save_dense       one task as a plain BERT, RoBERTa, MPNet or ModernBERT folder with the files of sentence-transformers
save_onnx        an ONNX model in such a folder
average          a general model, whose weights are the mean of all experts
save_reference   a checkpoint in the layout of SciMult's authors
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from datamodules.files import atomic_file
from datamodules.records import UserError, explained
from lightning_modules.encoders.backbone import (
    apply_umask,
    meta_backbone,
    options_of,
    quiet_transformers,
    write_checksum,
)
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.instruct import PromptEncoder
from lightning_modules.encoders.loading import dense_key, load_weights, without_lora
from lightning_modules.encoders.moe import MoEEncoder
from lightning_modules.encoders.scimult_format import to_reference
from lightning_modules.encoders.sentence_files import FORMER_MODES
from lightning_modules.encoders.shared import SharedEncoder
from lightning_modules.parts import expert_in

AVERAGE = "average"


def dense(encoder: Encoder, task: str) -> Encoder:
    """Return a SharedEncoder or PromptEncoder that computes one task's vectors. Raises UserError if that is impossible.

    task: a task of the encoder, or "average" for the mean of all experts.
    """
    if type(encoder) not in (SharedEncoder, MoEEncoder, PromptEncoder):
        problem = "has no plain form, because a plain model cannot compute the same vectors"
        raise UserError(f"{type(encoder).__name__} {problem}; save the whole encoder instead")
    if task == AVERAGE and not isinstance(encoder, MoEEncoder):
        raise UserError(f"{type(encoder).__name__} has no experts to average")
    encoder, expert = without_lora(encoder), None if task == AVERAGE else encoder.expert_of(task)
    tensors: dict[str, list[Tensor]] = {}  # name without expert -> tensors of the selected experts
    for key, tensor in encoder.state_dict().items():
        if expert is None or expert_in(key) in (None, expert):
            tensors.setdefault(dense_key(key), []).append(tensor)
    arguments: dict[str, Any] = {name: getattr(encoder, name) for name in ("pooling", "normalize", "max_length")}
    kind: type[Encoder] = SharedEncoder
    if isinstance(encoder, PromptEncoder):
        kind = PromptEncoder
        arguments |= {"instructions": {task: encoder.instructions[task]}, "pool_prompt": encoder.pool_prompt}
    backbone = meta_backbone(copy.deepcopy(encoder.backbone.config))
    plain = kind(backbone, encoder.tokenizer, {task: expert or task}, **arguments)
    load_weights(plain, {key: torch.stack(t).mean(0) if t[1:] else t[0] for key, t in tensors.items()}, task)
    plain.similarity = encoder.similarity
    return plain.eval()


def average(encoder: Encoder) -> Encoder:
    """Return a general model for the same tasks: a SharedEncoder with the mean of all experts."""
    plain = dense(encoder, AVERAGE)
    plain.tasks = dict(encoder.tasks)
    return plain


def save_dense(encoder: Encoder, task: str, folder: str | Path, similarity: str | None = None) -> Path:
    """Write one task as a plain folder for transformers, sentence-transformers and text-embeddings-inference.

    task: a task of the encoder, or "average" for the mean of all experts.
    similarity: similarity of vectors, "dot" or "cosine"; by default as in training, or dot if unknown.
    """
    folder, plain = Path(folder), dense(encoder, task)
    quiet_transformers()
    plain.backbone.save_pretrained(folder)
    write_checksum(folder)
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.model_max_length = plain.max_length
    tokenizer.save_pretrained(folder)
    for name, content in _sentence_transformers_files(plain, task, similarity or plain.similarity or "dot").items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if plain.normalize:
        (folder / "2_Normalize").mkdir(exist_ok=True)
    apply_umask(folder)
    return folder


def _sentence_transformers_files(plain: Encoder, task: str, similarity: str) -> dict[str, Any]:
    """Return the files of sentence-transformers: name -> content."""
    modules = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if plain.normalize else {})
    prompts = plain.prompts
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(modules.items())
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
            **{key: mode == plain.pooling for key, mode in FORMER_MODES.items()},
            # Only mean pooling can exclude the prompt.
            "include_prompt": plain.pooling == "cls" or not isinstance(plain, PromptEncoder) or plain.pool_prompt,
        },
    }


class _Pooled(nn.Module):
    """A plain model and its pooling, for ONNX."""

    def __init__(self, model: nn.Module, pooling: str, normalize: bool):
        super().__init__()
        self.model, self.pooling, self.normalize = model, pooling, normalize

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        pooled = hidden[:, 0] if self.pooling == "cls" else (hidden * weights).sum(1) / weights.sum(1)
        return hidden, F.normalize(pooled, dim=-1) if self.normalize else pooled


def save_onnx(folder: str | Path) -> Path:
    """Write onnx/model.onnx into a folder written by save_dense. Raises UserError if a package is missing.

    Inputs: input_ids, attention_mask, int64 (B, L). Outputs: last_hidden_state (B, L, D), sentence_embedding (B, D).
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("onnx: the packages onnx and onnxscript are not installed") from error
    quiet_transformers()
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # they log optimizations, and that torchvision is missing
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = Path(folder)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    if not pooling["include_prompt"]:
        raise UserError("onnx: pool_prompt=false is not supported; an ONNX model does not know where the prompt ends")
    options = options_of(AutoConfig.from_pretrained(folder))
    # The masks of eager attention are plain arithmetic, which ONNX supports.
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", **options)
    kind = next(mode for key, mode in FORMER_MODES.items() if pooling[key])
    if kind not in ("cls", "mean"):
        raise UserError(f"onnx: pooling {kind} is not supported; expected cls or mean")
    module = _Pooled(model, kind, (folder / "2_Normalize").is_dir()).eval()
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
    """Write a checkpoint in the layout of SciMult's authors. If writing fails, an existing file is kept."""
    path, checkpoint = Path(path), to_reference(without_lora(encoder))
    with explained(f"{path}: cannot be written", OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save(checkpoint, file)
    return path
