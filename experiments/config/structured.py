"""YAML files as dataclasses. Unknown keys, wrong types, missing values and bounds are reported with file and key."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.options import check_options
from datamodules.records import UserError
from experiments.config.suggest import did_you_mean, expected_one_of

T = TypeVar("T")


def read_yaml(path: Path, name: str = "") -> DictConfig:
    """Read a YAML file of keys and values. name: how to call the file in errors. Raises UserError."""
    name = name or str(path)
    try:
        node = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, UnicodeError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"{name}: expected keys with values")
    return node


def structured(schema: type[T], layers: Sequence[Any], source: str, prefix: str = "") -> T:
    """Merge layers of settings, the last one on top, into a dataclass.

    source: file, for errors. prefix: path of the settings in the file, such as "task.search.".
    """
    for layer in layers:
        refuse_unknown_keys(schema, layer, source, prefix)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *layers)
        if missing := OmegaConf.missing_keys(merged):
            raise UserError(f"{source}: no value for {', '.join(prefix + key for key in sorted(missing))}")
        settings: T = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {prefix}{describe(error)}") from error
    with prefixed(f"{source}: "):
        check_options(settings, prefix)
    return settings


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Put a key or a file before the messages of errors, which know only the names of their own arguments."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


def describe(error: OmegaConfBaseException) -> str:
    """Return the key and the first line of an OmegaConf error; the other lines repeat key and type."""
    key = f"{error.full_key}: " if error.full_key else ""
    return key + str(error).splitlines()[0]


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a dataclass. Names that users choose, such as tasks, are not keys."""
    for key, hint in typing.get_type_hints(schema).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{key}.")


def refuse_unknown_keys(schema: type, node: Any, source: str, prefix: str = "", others: Sequence[str] = ()) -> None:
    """Raise UserError for a key that the schema, a dataclass, does not have, at any depth.

    others: words that are not keys of the schema, but that the user may have meant.
    """
    for parent, key, siblings, is_section in _unknown_keys(schema, node, prefix):
        hint = did_you_mean(key, siblings, parent) if is_section or parent else ""
        hint = hint or did_you_mean(key, [*others, *keys(schema)])
        expected = siblings if parent else [*siblings, *others]
        raise UserError(f"{source}: unknown key {parent}{key}; {hint}{expected_one_of(expected, hint)}")


def _unknown_keys(hint: Any, node: Any, prefix: str) -> Iterator[tuple[str, str, list[str], bool]]:
    """Yield each unknown key: path of its section, key, keys of the section, and whether the key is itself a section.

    hint: type of the node; only dataclasses, and dicts and lists of them, have known keys.
    """
    item = typing.get_args(hint)[-1] if typing.get_args(hint) else None
    hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    if isinstance(node, ListConfig) and dataclasses.is_dataclass(item):
        children = dict.fromkeys(range(len(node)), item)
    elif not isinstance(node, DictConfig):
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
