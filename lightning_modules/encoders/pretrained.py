"""Our encoders as transformers knows models: a folder with config.json, model.safetensors and the tokenizer's files.

    encoder.save_pretrained(folder)     MoEEncoder.from_pretrained(folder)     AutoModel.from_pretrained(folder).encoder

AutoModel needs this module to be imported first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from datamodules.records import UserError
from lightning_modules.encoders.backbone import give_usual_rights, quiet_transformers, reading
from lightning_modules.encoders.base import Encoder
from lightning_modules.encoders.loading import build, describe_architecture, load_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class SciMultConfig(PreTrainedConfig):
    """kind: the encoder's class. arguments: of its constructor. backbone: configuration of the model inside."""

    model_type = "scimult"

    kind: str = ""
    arguments: dict[str, Any] | None = None
    backbone: dict[str, Any] | None = None

    def to_json_string(self, use_diff: bool = True) -> str:
        """As transformers writes it, but tasks in their own order, which numbers experts in other layouts."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"


class SciMultModel(PreTrainedModel):
    """An encoder in a form that transformers loads and saves; encoder is the encoder itself."""

    config_class = SciMultConfig

    def __init__(self, config: SciMultConfig, encoder: Encoder | None = None):
        super().__init__(config)
        if encoder is None:
            raise UserError("a configuration alone makes no encoder: use from_pretrained, or build it in Python")
        self.encoder = encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, task: str, token_type_ids: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """pooler_output: vectors (B, D) of texts for a task. input_ids, attention_mask: (B, L).

        token_type_ids, which tokenizers give, are not used: they are 0, as in training.
        """
        return BaseModelOutputWithPooling(pooler_output=self.encoder(input_ids, attention_mask, task))

    def save_pretrained(self, folder: str | Path, *arguments, **options) -> None:
        super().save_pretrained(folder, *arguments, **options)
        self.encoder.tokenizer.save_pretrained(folder)
        give_usual_rights(Path(folder))

    @classmethod
    def from_pretrained(cls, name: str | Path, *arguments, config: SciMultConfig | None = None, **options):
        """The model of a folder or hub name. Of transformers' options, revision alone has an effect."""
        encoder = load_pretrained(name, revision=options.get("revision"))
        return cls(config or SciMultConfig(**describe_architecture(encoder)), encoder).eval()


AutoConfig.register("scimult", SciMultConfig, exist_ok=True)
AutoModel.register(SciMultConfig, SciMultModel, exist_ok=True)


def save_encoder(encoder: Encoder, folder: str | Path) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files to a folder, made if it is not there."""
    quiet_transformers()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    SciMultModel(SciMultConfig(**describe_architecture(encoder)), encoder).save_pretrained(folder)
    return folder


def is_pretrained(name: str | Path, key: str) -> bool:
    """Whether a folder, or a hub name, holds one of our encoders.

    key: where the name came from, for errors. Raises UserError if it holds no model, or cannot be reached.
    """
    with reading(str(name), key):
        return _settings(name).get("model_type") == "scimult"


def _settings(name: str | Path) -> Mapping[str, Any]:
    """What stands in a model's config.json."""
    return PreTrainedConfig.get_config_dict(name)[0]


def load_pretrained(name: str | Path, revision: str | None = None) -> Encoder:
    """The encoder of a folder that save_encoder wrote, or of its hub name, in eval mode."""
    with reading(str(name), "model"):
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name), revision=revision))
        description = _settings(folder)
        if description.get("model_type") != "scimult" or not {"kind", "arguments", "backbone"} <= set(description):
            raise UserError(f"{folder / CONFIG}: is no description of an encoder of this project")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoder = build(description, tokenizer, str(folder / CONFIG))
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error})") from error
    prefix = "encoder."
    load_weights(encoder, {k.removeprefix(prefix): v for k, v in weights.items()}, str(folder / WEIGHTS))
    return encoder.eval()
