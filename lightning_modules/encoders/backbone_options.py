"""Options of a backbone and of LoRA, in a module without heavy imports."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from datamodules.options import option
from datamodules.records import UserError


@dataclass
class LoraOptions:
    """LoRA: train two small matrices for each linear layer, instead of its weights. Needs the package peft."""

    rank: int = option(0, "rank of the two matrices; 0: no LoRA", minimum=0, maximum=100_000)
    alpha: float = option(16.0, "the product of the two matrices is multiplied by alpha / rank", above=0, maximum=1e6)
    dropout: float = option(0.0, "dropout on the inputs of the matrices", minimum=0, below=1)
    targets: list[str] = option(
        [],
        "name endings of linear layers, such as [query, value]; by default, attention and all layers of experts",
    )


@dataclass
class BackboneOptions:
    """The Transformer inside the encoder. Without a name, or if its package is not installed, it is a random BERT."""

    name: str | None = option(
        None, "folder, hub name, or package:NAME (an installed package whose get_model_path() returns a folder)"
    )
    config: dict[str, Any] = option({}, "shape of a random BERT: fields of transformers.BertConfig")
    vocab_size: int = option(
        8192, "number of tokens of a random BERT, taken from the training texts", minimum=1, maximum=10_000_000
    )
    dropout: float | None = option(
        None, "dropout of embeddings and sub-layers, by default the backbone's", minimum=0, below=1
    )
    attention_dropout: float | None = option(
        None, "dropout of attention weights, by default the backbone's", minimum=0, below=1
    )
    lora: LoraOptions = field(default_factory=LoraOptions)


def check_peft() -> None:
    """Raise UserError if the package peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("lora: the package peft is not installed (pip install peft)")
