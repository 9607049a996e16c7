"""Read the files of sentence-transformers next to a plain model, which set pooling, prompt and similarity.

    modules.json                        list of modules: Transformer, Pooling, then Normalize, ...
    sentence_bert_config.json           max_seq_length, do_lower_case (also under older names)
    1_Pooling/config.json               pooling_mode, include_prompt
    config_sentence_transformers.json   prompts, default_prompt_name, similarity_fn_name

Every setting that affects vectors is either applied or refused by name, so vectors equal the library's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.normalizers import Lowercase, Sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from datamodules.files import read_json
from datamodules.records import UserError
from lightning_modules.encoders.pooling import POOLINGS

log = logging.getLogger(__name__)

SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Former keys of the pooling mode, in the order in which several modes are concatenated.
FORMER_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
SIMILARITIES = {"cosine": "cosine", "dot": "dot", "dot_score": "dot"}
# Keys of the transformer's file that affect the vectors, with the values that have no effect.
PLAIN_VALUES = {
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "processing_kwargs": (None, {}),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None, False),
    "backend": (None, "torch"),
}


@dataclass(frozen=True)
class SentenceFiles:
    """The settings of a model's files. None means that the file or the key does not exist.

    are_complete: whether the library wrote the folder, so that its defaults also apply.
    prompt: prefix of every text, "" for no prefix. pool_prompt: whether pooling includes the prompt.
    similarity: "cosine" or "dot".
    """

    are_complete: bool = False
    pooling: str | None = None
    normalize: bool = False
    max_length: int | None = None
    lower_case: bool = False
    prompt: str = ""
    pool_prompt: bool = True
    similarity: str | None = None


def read_sentence_files(name: str, pooling: str | None = None) -> SentenceFiles:
    """Read the files of a folder or hub name.

    pooling: pooling to use instead of the files' pooling.
    Raises UserError for a damaged file, and for an unsupported module or setting that affects the vectors.
    """
    modules = _read(name, "modules.json", list)
    pooling_folder, normalize = "1_Pooling", False
    if modules is not None:
        pooling_folder, normalize = _check_modules(name, modules)
    files = (_read(name, file) for file in TRANSFORMER_FILES)
    transformer: dict[str, Any] = next((content for content in files if content is not None), {})
    for key, values in PLAIN_VALUES.items():
        if transformer.get(key) not in values:
            _refuse(name, f"{TRANSFORMER_FILES[0]}: {key}={transformer[key]!r}", f"expected {values[-1]!r}")
    pooling_config = _read(name, f"{pooling_folder}/config.json")
    if pooling_config is None and modules is not None:
        raise UserError(f"{name}: {pooling_folder}/config.json is missing, but modules.json names it; restore the file")
    pooling_config = pooling_config or {}
    settings = _read(name, SETTINGS) or {}
    pooling = pooling or _pooling(name, pooling_folder, pooling_config)
    prompt = _default_prompt(name, settings)
    pool_prompt = _typed(name, pooling_config, "include_prompt", bool, True)
    if prompt and not pool_prompt and (pooling or "cls") == "cls":
        _refuse(name, f"{pooling_folder}: include_prompt=false with pooling cls", "expected another pooling")
    return SentenceFiles(
        are_complete=modules is not None,
        pooling=pooling,
        normalize=normalize,
        max_length=_typed(name, transformer, "max_seq_length", int, None),
        lower_case=_typed(name, transformer, "do_lower_case", bool, False),
        prompt=prompt,
        pool_prompt=pool_prompt,
        similarity=_similarity(name, settings),
    )


def lower_cased(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that lower-cases its input first, like the library with do_lower_case.

    Raises UserError if the tokenizer does not support this.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("do_lower_case: only fast tokenizers are supported")
    backend = tokenizer.backend_tokenizer
    if getattr(backend.normalizer, "lowercase", False):
        return tokenizer
    backend.normalizer = Sequence([Lowercase(), *([backend.normalizer] if backend.normalizer else [])])
    # Classes such as BertTokenizer would replace the normalizer when they are loaded again.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        truncation_side=tokenizer.truncation_side,
        **tokenizer.special_tokens_map,
    )


def check_prompt(name: str, tokenizer: PreTrainedTokenizerBase, prompt: str, used: str) -> None:
    """Raise UserError unless a prompt gives the same tokens as the prompt that replaces it."""
    for text in ("a", "The", "1"):
        if tokenizer(prompt + text)["input_ids"] != tokenizer(used + text)["input_ids"]:
            _refuse(name, f"{SETTINGS}: prompt {prompt!r}", "expected one that ends in a single space")


def _check_modules(name: str, modules: list[Any]) -> tuple[str, bool]:
    """Return the folder of the pooling module, and whether vectors are normalised.

    Raises UserError for any other module.
    """
    where = f"{name}: modules.json"
    kinds, folders = [], []
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise UserError(f"{where}: expected a list of objects with type and path, got {str(module)[:60]}")
        kinds.append(module["type"].rpartition(".")[2])
        folders.append(str(module.get("path") or ""))
        if not module["type"].startswith("sentence_transformers."):
            _refuse(name, f"modules.json: module {module['type']}", "its code would have to run")
    extra = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize", "Dropout")]
    if extra:
        _refuse(name, f"modules.json: module {extra[0]}", "expected Transformer, Pooling and Normalize")
    if kinds[:2] != ["Transformer", "Pooling"] or {"Transformer", "Pooling"} & set(kinds[2:]):
        _refuse(name, f"modules.json: modules {', '.join(kinds)}", "expected Transformer, Pooling, then Normalize")
    if folders[0]:
        _refuse(name, f"modules.json: the Transformer in {folders[0]}", "expected it in the folder itself")
    for kind, folder in zip(kinds[2:], folders[2:], strict=True):
        config = (_read(name, f"{folder}/config.json") or {}) if kind == "Normalize" else {}
        for key in ("module_input_name", "module_output_name"):
            if config.get(key) not in (None, "sentence_embedding"):
                _refuse(name, f"{folder}: {key}={config[key]!r}", "expected 'sentence_embedding'")
    return folders[1], "Normalize" in kinds


def _pooling(name: str, folder: str, config: Mapping[str, Any]) -> str | None:
    modes = config.get("pooling_mode")
    if modes is None and FORMER_MODES.keys() & config.keys():
        modes = [mode for key, mode in FORMER_MODES.items() if config.get(key)] or "mean"
    if modes is None:
        return "mean" if config else None
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLINGS:
        _refuse(name, f"{folder}/config.json: pooling {modes}", f"expected one of {', '.join(POOLINGS)}")
    return modes[0]


def _default_prompt(name: str, settings: Mapping[str, Any]) -> str:
    """Return the prompt that the library uses by default. Logs a warning if there are prompts but no default."""
    prompts = _typed(name, settings, "prompts", dict, {})
    default = _typed(name, settings, "default_prompt_name", str, None)
    if not all(isinstance(prompt, str | None) for prompt in prompts.values()):
        raise UserError(f"{name}: {SETTINGS}: prompts must be texts, got {str(prompts)[:80]}")
    if default is not None and default not in prompts:
        raise UserError(f"{name}: {SETTINGS}: default_prompt_name is {default!r}, which is not one of the prompts")
    if default is None and (others := sorted(key for key, prompt in prompts.items() if prompt)):
        log.warning("%s: prompts are ignored, because none of them is the default (%s)", name, ", ".join(others))
    return prompts.get(default) or ""


def _similarity(name: str, settings: Mapping[str, Any]) -> str | None:
    similarity = settings.get("similarity_fn_name")
    if similarity is None:
        return None
    if similarity not in SIMILARITIES:
        _refuse(name, f"{SETTINGS}: similarity_fn_name={similarity!r}", f"expected one of {', '.join(SIMILARITIES)}")
    return SIMILARITIES[similarity]


def _read(name: str, file: str, kind: type = dict) -> Any:
    """Return the content of a file, or None if the model does not have it."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return read_json(Path(path), kind, hint="") if path else None


def _typed(name: str, config: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name}: {key} must be of type {kind.__name__}, got {value!r:.60}")
    return value


def _refuse(name: str, what: str, reason: str) -> None:
    raise UserError(f"{name}: {what} is not supported ({reason}); ignoring it would change the vectors")
