"""Read YAML files into dataclasses. Errors name the file and the key, and suggest a correction for a misspelt key."""

from __future__ import annotations

import dataclasses
import difflib
import io
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.files import read_regular
from datamodules.options import check_options
from datamodules.records import UserError, prefixed

T = TypeVar("T")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Names in other frameworks -> our names.
SYNONYMS = {
    "learning_rate": "lr",
    "adam_epsilon": "eps",
    "wd": "weight_decay",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "steps": "max_steps",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "grad_clip": "gradient_clip_val",
    "max_grad_norm": "gradient_clip_val",
    "max_seq_length": "max_length",
    "logging_steps": "log_every_n_steps",
    "gpus": "devices",
    "output_dir": "dir",
}
# TypeError: a list instead of a mapping, or vice versa.
MERGE_ERRORS = (OmegaConfBaseException, TypeError)
MAX_YAML, MAX_DEPTH, MAX_VALUES = 10_000_000, 50, 100_000  # bytes per file, levels, and values after expanding aliases


def read_yaml(path: Path, name: str = "") -> DictConfig:
    """Read a YAML file of keys and values. name: name of the file in errors. Raises UserError."""
    name = name or str(path)
    try:
        node = OmegaConf.load(io.StringIO(yaml_text(path)))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{name}: expected a YAML mapping (`key: value` lines)")
    return node


def yaml_text(path: Path) -> str:
    """Return the text of a YAML file, unless it is nested too deeply or its aliases expand too far.

    Raises OSError, UnicodeError and yaml.YAMLError.
    """
    text = read_regular(path, MAX_YAML)
    sizes, names, anchors = [0], [""], {}  # size and anchor of each open collection, and size by anchor
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size = sizes.pop()
            anchors[names.pop()] = size
            sizes[-1] += size
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
            anchors[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in names:
                raise yaml.YAMLError(f"line {event.start_mark.line + 1}: *{event.anchor} contains itself")
            sizes[-1] += anchors.get(event.anchor, 0)
        if len(sizes) > MAX_DEPTH:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: nested deeper than {MAX_DEPTH} levels")
        if sizes[-1] > MAX_VALUES:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: more than {MAX_VALUES:,} values")
    return text


def structured(schema: type[T], layers: Sequence[Any], source: str, prefix: str = "") -> T:
    """Merge layers of settings into a dataclass. Later layers override earlier ones.

    source: file, for errors. prefix: path of the settings in the file, such as "task.search.".
    """
    for layer in layers:
        refuse_unknown_keys(schema, layer, source, prefix)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *layers)
        if missing := OmegaConf.missing_keys(merged):
            raise UserError(f"{source}: no value for {', '.join(prefix + key for key in sorted(missing))}")
        settings: T = OmegaConf.to_object(merged)
    except MERGE_ERRORS as error:
        raise UserError(f"{source}: {prefix}{describe(error)}") from error
    with prefixed(f"{source}: "):
        check_options(settings, prefix)
    return settings


def restore_yes_and_no(hint: Any, node: Any) -> None:
    """Turn booleans back into "yes" and "no" where these are choices, because YAML reads both words as booleans.

    hint: type of the node; only dataclasses have choices.
    """
    if not (dataclasses.is_dataclass(hint) and isinstance(node, DictConfig)):
        return
    for key, child in typing.get_type_hints(hint).items():
        if key not in node or OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        word = {True: "yes", False: "no"}.get(node[key]) if isinstance(node[key], bool) else None
        if word in typing.get_args(child):
            node[key] = word
        restore_yes_and_no(child, node[key])


def describe(error: OmegaConfBaseException | TypeError) -> str:
    """Return the key and the first line of an OmegaConf error. The other lines repeat the key and type."""
    if isinstance(error, TypeError):
        return "expected a list and got a mapping, or vice versa"
    key, message = f"{error.full_key}: " if error.full_key else "", str(error).splitlines()[0]
    is_null = "is not Optional" in message or "NoneType is not a subclass" in message
    return key + ("expected a value, got null" if is_null else message)


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a dataclass. Names that users choose, such as task names, are not keys."""
    for key, hint in typing.get_type_hints(schema).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{key}.")


def refuse_unknown_keys(schema: type, node: Any, source: str, prefix: str = "", others: Sequence[str] = ()) -> None:
    """Raise UserError if a key at any depth is not in the schema (a dataclass), or a value of another kind replaces a
    section, a list or a mapping.

    others: words to suggest that are not keys of the schema.
    """
    with prefixed(f"{source}: "):
        for parent, key, siblings, is_section in _unknown_keys(schema, node, prefix):
            hint = did_you_mean(key, siblings, parent) if is_section or parent else ""
            hint = hint or did_you_mean(key, [*others, *keys(schema)])
            expected = siblings if parent else [*siblings, *others]
            raise UserError(f"unknown key {parent}{key}; {hint}{expected_one_of(expected, hint)}")


def _unknown_keys(hint: Any, node: Any, prefix: str) -> Iterator[tuple[str, str, list[str], bool]]:
    """Yield each unknown key: the section's path, the key, the section's known keys, and whether the key is a section.

    hint: type of the node. Only dataclasses, and dicts and lists of dataclasses, have known keys.
    """
    item = typing.get_args(hint)[-1] if typing.get_args(hint) else None
    hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    key, kind = prefix.removesuffix("."), typing.get_origin(hint)
    if node is not None and kind is list and not isinstance(node, ListConfig):
        fits = isinstance(node, DictConfig) == dataclasses.is_dataclass(item)
        raise UserError(f"{key}: expected a list, " + (f"write {key}=[{node}]" if fits else f"got {node!r}"))
    if node is not None and kind is dict and not isinstance(node, DictConfig):
        raise UserError(f"{key}: expected a mapping, got {node!r}")
    if isinstance(node, ListConfig) and dataclasses.is_dataclass(item):
        children = dict.fromkeys(range(len(node)), item)
    elif not isinstance(node, DictConfig):
        if hints and node is not None:
            raise UserError(f"{key}: expected keys below it ({', '.join(hints)}), got {node!r}")
        return
    elif hints:
        children = {key: hints.get(key) for key in node}
    else:
        children = dict.fromkeys(node, item) if dataclasses.is_dataclass(item) else {}
    for key, child in children.items():
        if child is None:
            yield prefix, str(key), list(hints), isinstance(node._get_node(key), DictConfig)  # such as optm in optm.lr
        elif not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield from _unknown_keys(child, node[key], f"{prefix}{key}.")


def did_you_mean(word: str, expected: Iterable[str], prefix: str = "") -> str:
    """Return a suggestion for an error message, such as "did you mean run.seed? ", or "" if no word is similar.

    Prefers the same word in another case, then dotted keys that end in it, then the most similar word.
    prefix: path to put before each suggestion.
    """
    expected, lower = list(dict.fromkeys(expected)), word.lower()
    synonym = SYNONYMS.get(_last_part(lower))
    suggestions = (
        [name for name in expected if name.lower() == lower]
        or [name for name in expected if synonym and _last_part(name) == synonym]
        or [name for name in expected if _last_part(name.lower()) == lower]
        or _most_similar(word, expected)
    )
    return f"did you mean {' or '.join(f'{prefix}{name}' for name in suggestions[:3])}? " if suggestions else ""


def unknown(what: str, word: str, expected: Sequence[str]) -> UserError:
    """Return the error for a word that is not among the expected ones, with a suggestion."""
    hint = did_you_mean(word, expected)
    return UserError(f"unknown {what} {word!r}; {hint}{expected_one_of(expected, hint)}")


def expected_one_of(expected: Iterable[str], hint: str = "") -> str:
    """Return the end of an error message: the expected words. After a suggestion (hint), it starts a new sentence."""
    return f"{'Expected' if hint else 'expected'} one of {', '.join(expected)}"


def _most_similar(word: str, expected: Iterable[str]) -> list[str]:
    forms: dict[str, list[str]] = {}  # lower-case name, or last part of a dotted name -> names
    for name in expected:
        for form in {name.lower()} if "." in word else {name.lower(), _last_part(name.lower())}:
            forms.setdefault(form, []).append(name)
    close = difflib.get_close_matches(word.lower(), forms, n=1)
    return [max(forms[close[0]], key=lambda name: difflib.SequenceMatcher(None, word, name).ratio())] if close else []


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
