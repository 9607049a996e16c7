"""Backbones and their tokenizers, from a folder, the hub or an installed package, or randomly initialized."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from datamodules.files import read_json, regular, write_json
from datamodules.records import UserError, prefixed, reason
from datamodules.store import checksum
from lightning_modules.encoders.families import FAMILIES

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PACKAGE = "package:"
WEIGHTS, CHECKSUM = "model.safetensors", "checksum.json"
# Upper limits, far above any published text encoder.
MAX_SIZES = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 10_000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 10_000_000,
    "type_vocab_size": 100_000,
}
MAX_PARAMETERS = 20_000_000_000
Tokenizer = transformers.PreTrainedTokenizerBase


def package_folder(name: str) -> str | None:
    """Return the model folder of an installed package, or None if it is not installed.

    Raises UserError if the package does not contain a model, or if the name is not a valid package name.
    """
    module = name.removeprefix(PACKAGE)
    if not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{name}: expected the name of an installed package, got {module!r}")
    try:
        package = importlib.import_module(module)
    except ImportError:
        return None
    if not callable(getattr(package, "get_model_path", None)):
        raise UserError(f"{name}: the package {module} has no get_model_path(), so it does not contain a model")
    return str(package.get_model_path())


def installed(model: str, key: str = "model") -> str:
    """Return the folder of a package:NAME. Return any other model unchanged. Raises UserError if it is not installed.

    key: argument that names the model, for error messages.
    """
    if not model.startswith(PACKAGE):
        return model
    if folder := package_folder(model):
        return folder
    raise UserError(f"{key}: the package {model.removeprefix(PACKAGE)} is not installed")


def word_vocabulary(texts: Iterable[str], size: int, required: Iterable[str] = ()) -> dict[str, int]:
    """Return token -> id for special tokens, all characters, and the most frequent words of texts.

    All other words are spelled in characters. Ties are broken alphabetically, so that equal texts give equal
    vocabularies (trained word pieces differ from one process to the next).

    size: maximum number of tokens.
    required: texts whose words come first, even if they are rare.
    """
    splitter = BertTokenizer(vocab={token: i for i, token in enumerate(SPECIAL_TOKENS)}).backend_tokenizer

    def split(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))]

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split(text))
    required_words = {word for text in required for word in split(text)}
    counts.update(required_words)
    characters = sorted({character for word in counts for character in word})
    tokens = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    if len(tokens) > size:
        raise UserError(f"vocab_size: got {size}, but special tokens and characters alone are {len(tokens)}")
    words = sorted((word for word in counts if len(word) > 1), key=lambda w: (w not in required_words, -counts[w], w))
    return {token: i for i, token in enumerate((tokens + words)[:size])}


def check_size(config: Mapping[str, Any]) -> None:
    """Raise UserError if a backbone is too large for any machine, before memory is allocated for it.

    A small file that asks for a billion layers must not fill the memory. config: fields of config.json.
    """
    sizes = {name: config.get(name) or 0 for name in MAX_SIZES}
    for name, size in sizes.items():
        if not isinstance(size, int) or not 0 <= size <= MAX_SIZES[name]:
            raise UserError(f"{name}: expected a whole number up to {MAX_SIZES[name]:,}, got {str(size)[:60]}")
    hidden, layers, inner = (sizes[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    rows = sizes["vocab_size"] + sizes["max_position_embeddings"] + sizes["type_vocab_size"]
    if (count := layers * (4 * hidden**2 + 2 * hidden * inner) + rows * hidden) > MAX_PARAMETERS:
        raise UserError(f"expected at most {MAX_PARAMETERS:,} parameters, got about {count:,}")


def random_backbone(config: dict[str, Any], vocabulary: dict[str, int]) -> tuple[nn.Module, BertTokenizer]:
    """Return a randomly initialized BERT and its tokenizer. config: fields of transformers.BertConfig."""
    if config.get("num_hidden_layers") == 0:
        raise UserError("backbone config: num_hidden_layers must be at least 1, got 0")
    if unknown := sorted(set(config) - set(BertConfig().to_dict())):
        raise UserError(f"backbone config: transformers.BertConfig has no field {', '.join(unknown)}")
    with prefixed("backbone config: "):
        check_size(config)
    try:
        bert = BertConfig(vocab_size=len(vocabulary), **config)
        backbone = BertModel(bert, add_pooling_layer=False)
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"backbone config: {' '.join(str(error).split())}") from error
    return backbone, BertTokenizer(vocab=vocabulary)


def load_backbone(name: str, key: str = "name", with_weights: bool = True) -> tuple[PreTrainedModel, Tokenizer]:
    """Load a backbone of one of the FAMILIES, or the BERT inside a DPR encoder, and its tokenizer.

    name: folder or hub name.
    key: argument with the name, for error messages.
    with_weights: whether to load the weights. If not, parameters are on the meta device, and DPR is not supported.
    Raises UserError if the model is missing, damaged or unsupported.
    """
    with reading(name, key):
        with prefixed(f"{key}: {name!r}: config.json: "):
            check_size(PreTrainedConfig.get_config_dict(name)[0])
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        check_family(config, name, key, *(["dpr"] if with_weights else []))
        if config.model_type == "dpr":
            return bert_of_dpr(name, config), tokenizer
        if not with_weights:
            return meta_backbone(config), tokenizer
        check_checksum(Path(name))
        options = options_of(config) | {"trust_remote_code": False}
        model, info = AutoModel.from_pretrained(name, output_loading_info=True, **options)
        if (Path(name) / "adapter_config.json").exists() or getattr(model, "_hf_peft_config_loaded", False):
            problem = "contains an adapter of peft (adapter_config.json), which is not supported"
            raise UserError(f"{key}: {name!r} {problem}; save the model after merge_and_unload()")
        check_complete(name, info)
        return model, tokenizer


def check_complete(name: str, info: dict[str, Any]) -> None:
    """Raise UserError unless a model's file has exactly the weights of the layers, ignoring poolers and heads.

    Otherwise, transformers would initialize missing weights at random. info: loading info of from_pretrained.
    """
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    unexpected = [key for key in info["unexpected_keys"] if re.search(r"\.layers?\.\d+\.|embeddings\.", key)]
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": info["mismatched_keys"]}
    for problem, keys in problems.items():
        if keys:
            examples = ", ".join(map(str, sorted(keys, key=str)[:3]))
            raise UserError(f"{name}: the weights do not fit config.json: {len(keys)} {problem} ({examples})")


@contextmanager
def reading(name: str, key: str) -> Iterator[None]:
    """Convert all errors raised while reading a model to UserError.

    name: folder, file or hub name.
    key: argument with the name, for error messages.
    """
    hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not ("/" in name and Path(name).parent.is_dir())
    if not Path(name).exists() and not hub_name:
        raise UserError(f"{key}: {name!r} is not an existing file or folder, and not a valid hub name")
    quiet_transformers()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise all kinds of errors for damaged or unrelated files
        raise UserError(f"{key}: {name!r} cannot be loaded from a folder or the hub: {reason(error)}") from error


def write_checksum(folder: Path) -> None:
    """Write the CRC-32 of the weights in a folder to checksum.json."""
    write_json(folder / CHECKSUM, {WEIGHTS: checksum(folder / WEIGHTS)})


def check_checksum(folder: Path) -> None:
    """Raise UserError if the weights in a folder do not match its checksum.json. Folders without this file pass."""
    if not (folder / CHECKSUM).exists():
        return
    if read_json(folder / CHECKSUM).get(WEIGHTS) != checksum(regular(folder / WEIGHTS)):
        raise UserError(
            f"{folder / WEIGHTS}: was changed or damaged after the export; export the model again, or delete "
            f"{CHECKSUM} if you changed the weights yourself"
        )


def apply_umask(folder: Path) -> None:
    """Give the files in a folder default permissions. Some libraries make them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~mask)


def quiet_transformers() -> None:
    """Silence the progress bars of transformers, and its warnings about the pooler, which we do not use."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def check_family(config: PreTrainedConfig, name: str, key: str, *others: str) -> None:
    """Raise UserError unless a model's type is in one of the FAMILIES, or is one of the additional types."""
    if config.model_type not in (*FAMILIES, *others):
        types = " or ".join([", ".join(FAMILIES), *others])
        raise UserError(f"{key}: {name!r} is a model of type {config.model_type}; expected {types}")


def options_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return options for AutoModel: no pooler, and parameters in float32 whatever the file's precision."""
    options: dict[str, Any] = {"dtype": torch.float32}
    return options if config.model_type == "modernbert" else options | {"add_pooling_layer": False}


def meta_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a backbone whose parameters are on the meta device. Its buffers, such as positions, are real."""
    with no_init_weights():
        backbone = AutoModel.from_config(config, **options_of(config))
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.to("meta")))
    return backbone


def bert_of_dpr(name: str, config: PreTrainedConfig) -> BertModel:
    """Load the BERT inside one of DPR's two encoders (Karpukhin et al., 2020), saved by transformers."""
    kind = (config.architectures or ["DPRQuestionEncoder"])[0]
    towers = {"DPRQuestionEncoder": "question_encoder", "DPRContextEncoder": "ctx_encoder"}
    if kind not in towers:
        raise UserError(f"{name}: expected a {' or '.join(towers)}, got a {kind}")
    if config.projection_dim:
        raise UserError(f"{name}: has a projection of {config.projection_dim} dimensions, which is not supported")
    model, info = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    check_complete(name, info)
    tower = getattr(model, towers[kind]).bert_model
    settings = {k: v for k, v in config.to_dict().items() if k in BertConfig().to_dict() and k != "model_type"}
    bert = BertModel(BertConfig(**settings), add_pooling_layer=False)
    bert.load_state_dict({key: tensor for key, tensor in tower.state_dict().items() if not key.startswith("pooler.")})
    return bert.eval()


def set_dropout(backbone: PreTrainedModel, dropout: float | None, attention_dropout: float | None) -> None:
    """Set the dropout of hidden states and attention weights, in modules and config. None leaves it unchanged."""
    queries = ("query", "q")  # self-attention of BERT and MPNet
    attention = {id(m.dropout) for m in backbone.modules() if any(hasattr(m, name) for name in queries)}
    module: Any
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            p = attention_dropout if id(module) in attention else dropout
            if p is not None:
                module.p = p
        if attention_dropout is not None and hasattr(module, "attention_dropout"):  # a number in ModernBERT
            module.attention_dropout = attention_dropout
    fields = dict.fromkeys(["hidden_dropout_prob", "embedding_dropout", "mlp_dropout"], dropout)
    fields |= dict.fromkeys(["attention_probs_dropout_prob", "attention_dropout"], attention_dropout)
    for name, value in fields.items():
        if value is not None and hasattr(backbone.config, name):
            setattr(backbone.config, name, value)
