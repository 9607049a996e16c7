"""Where a backbone and its tokenizer come from: a folder, the hub, an installed package, or a random start."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer
from transformers.utils import logging as transformers_logging

from datamodules.records import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PACKAGE = "package:"


@dataclass
class BackboneOptions:
    """name: a folder, a hub name, or "package:NAME", an installed Python package whose get_model_path() is a folder.
    With no name, or a package that is not installed, a BERT of the shape in config is drawn at random, and its
    vocabulary of vocab_size words is taken from the training texts. dropout: of embeddings and sub-layers;
    attention_dropout: of attention weights. Either None leaves the backbone's own.
    """

    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 8192
    dropout: float | None = None
    attention_dropout: float | None = None


def package_folder(name: str) -> str | None:
    """The model folder of an installed package, or None if it is not installed."""
    try:
        return str(importlib.import_module(name.removeprefix(PACKAGE)).get_model_path())
    except ImportError:
        return None


def word_vocabulary(texts: Iterable[str], size: int) -> dict[str, int]:
    """The size most frequent words of the texts, with special tokens and single characters, token -> id.

    Characters, alone and within words, spell what is not among the words. Ties are broken by the alphabet, so that
    equal texts give equal vocabularies (trained word pieces differ from process to process).
    """
    splitter = BertTokenizer(vocab={token: i for i, token in enumerate(SPECIAL_TOKENS)}).backend_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        normal = splitter.normalizer.normalize_str(text)
        counts.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normal))
    characters = sorted({character for word in counts for character in word})
    tokens = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    if len(tokens) > size:
        raise UserError(f"backbone.vocab_size: got {size}, but special tokens and characters alone are {len(tokens)}")
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    return {token: i for i, token in enumerate((tokens + words)[:size])}


def random_backbone(config: dict[str, Any], vocabulary: dict[str, int]) -> tuple[nn.Module, BertTokenizer]:
    """A BERT drawn at random (torch's generator) and its tokenizer. config: fields of transformers.BertConfig."""
    known = BertConfig().to_dict()
    if config.get("num_hidden_layers") == 0:
        raise UserError("backbone.config.num_hidden_layers: got 0, allowed are numbers above 0")
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise UserError(f"backbone.config: {', '.join(unknown)} are no fields of transformers.BertConfig")
    try:
        bert = BertConfig(vocab_size=len(vocabulary), **config)
        backbone = BertModel(bert, add_pooling_layer=False)
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"backbone.config: {' '.join(str(error).split())}") from error
    tokenizer = BertTokenizer(vocab=vocabulary)
    return backbone, tokenizer


def load_backbone(name: str, key: str = "backbone.name") -> tuple[nn.Module, Any]:
    """Backbone and tokenizer from a folder or the hub.

    key: where the name came from, for errors. Raises UserError if there is none of that name, or it cannot be reached.
    """
    hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not ("/" in name and Path(name).parent.is_dir())
    if not Path(name).exists() and not hub_name:
        raise UserError(f"{key}: {name!r} is no file or folder here, nor a name of the hub")
    transformers_logging.set_verbosity_error()  # the report of the pooler that we leave out
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        backbone = AutoModel.from_pretrained(name, add_pooling_layer=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: {name!r} cannot be loaded from a folder or the hub: {reason}") from error
    return backbone, tokenizer


def set_dropout(backbone: nn.Module, dropout: float | None, attention_dropout: float | None) -> None:
    """Set dropout of hidden states and of attention weights, where given."""
    attention = {id(module.dropout) for module in backbone.modules() if hasattr(module, "query")}
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            p = attention_dropout if id(module) in attention else dropout
            if p is not None:
                module.p = p
    if dropout is not None:
        backbone.config.hidden_dropout_prob = dropout
    if attention_dropout is not None:
        backbone.config.attention_probs_dropout_prob = attention_dropout
