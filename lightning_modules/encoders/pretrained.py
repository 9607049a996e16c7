"""Encoders as transformers models: folders with config.json, model.safetensors and the files of the tokenizer.

checksum.json contains the CRC-32 of the weights, so that damaged copies are not loaded.

    encoder.save_pretrained(folder)     MoEEncoder.from_pretrained(folder)     AutoModel.from_pretrained(folder).encoder

AutoModel knows this model type once this module has been imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from datamodules.files import regular
from datamodules.packed import Tokens
from datamodules.records import UserError, explained
from lightning_modules.encoders.backbone import (
    WEIGHTS,
    apply_umask,
    check_checksum,
    quiet_transformers,
    reading,
    write_checksum,
)
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import build, describe_architecture, load_weights, without_lora

CONFIG = "config.json"


class SciMultConfig(PreTrainedConfig):
    """Description of an encoder, as in loading.describe_architecture.

    kind: dotted path of the encoder's class.
    similarity: similarity that the encoder was trained with, or None if unknown.
    """

    model_type = "scimult"

    kind: str = ""
    arguments: dict[str, Any] | None = None
    backbone: dict[str, Any] | None = None
    similarity: str | None = None

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return JSON with unsorted keys, because the order of tasks is the order of experts in the authors' format."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"


class SciMultModel(PreTrainedModel):
    """A transformers model that wraps an encoder."""

    config_class = SciMultConfig

    def __init__(self, config: SciMultConfig, encoder: Encoder | None = None):
        super().__init__(config)
        if encoder is None:
            raise UserError("SciMultModel needs an encoder: use from_pretrained, or pass encoder=")
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, task: str, token_type_ids: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Return the vectors (B, D) of texts (B, S) for a task, as pooler_output.

        token_type_ids: accepted because tokenizers return them, but ignored, because all types are 0 in training.
        """
        tokens = Tokens.from_padded(input_ids, attention_mask)
        return BaseModelOutputWithPooling(pooler_output=self.encoder(tokens, task))

    def save_pretrained(self, folder: str | Path, *arguments, **options) -> None:
        super().save_pretrained(folder, *arguments, **options)
        self.encoder.tokenizer.save_pretrained(folder)
        write_checksum(Path(folder))
        apply_umask(Path(folder))

    @classmethod
    def from_pretrained(cls, name: str | Path, *arguments, config: SciMultConfig | None = None, **options) -> Self:
        """Load the model from a folder or the hub. The only option of transformers that has an effect is revision."""
        encoder = load_pretrained(name, revision=options.get("revision"))
        return cls(config or SciMultConfig(**describe_architecture(encoder)), encoder).eval()


AutoConfig.register("scimult", SciMultConfig, exist_ok=True)
AutoModel.register(SciMultConfig, SciMultModel, exist_ok=True)


def save_encoder(encoder: Encoder, folder: str | Path) -> Path:
    """Write an encoder, its tokenizer and the checksum of its weights to a folder, which is created if needed."""
    quiet_transformers()
    encoder, folder = without_lora(encoder), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    SciMultModel(SciMultConfig(**describe_architecture(encoder)), encoder).save_pretrained(folder)
    return folder


def is_pretrained(name: str | Path, key: str) -> bool:
    """Return whether a folder or hub name contains one of our encoders. Raises UserError if there is no model.

    key: argument that the name comes from, for error messages.
    """
    with reading(str(name), key):
        return PreTrainedConfig.get_config_dict(name)[0].get("model_type") == "scimult"


def load_pretrained(name: str | Path, revision: str | None = None, packages: Sequence[str] = ()) -> Encoder:
    """Load an encoder in eval mode, from a folder written by save_encoder or from the hub.

    packages: additional packages whose encoders may be loaded, as in load_encoder.
    """
    with reading(str(name), "model"):
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), revision=revision))
        description, _ = PreTrainedConfig.get_config_dict(folder)
        if description.get("model_type") != "scimult" or not {"kind", "arguments", "backbone"} <= set(description):
            raise UserError(f"{folder / CONFIG}: does not describe an encoder of this project")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoder = build(description, tokenizer, str(folder / CONFIG), packages)
    with explained(f"{folder / WEIGHTS}: cannot be read", OSError, SafetensorError):
        check_checksum(folder)
        weights = load_file(regular(folder / WEIGHTS))
    weights = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    load_weights(encoder, weights, str(folder / WEIGHTS))
    return encoder.eval()
