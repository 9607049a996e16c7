"""Merge layers of an experiment: replaced `_target_` nodes, and folders in the place of a task's data.

task.search.data=/data/mine                  only this collection, called mine
task.search.data=[/data/mine, /data/other]   only these
task.search.data={mine: {...}}               only these, each with the node of its reader
task.search.data.mine=/data/mine             this one in addition to the scale's
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import UserError
from experiments.config.moved import current_path
from experiments.config.schema import Config
from experiments.config.structured import describe, refuse_unknown_keys


def merge(config: DictConfig, layer: DictConfig, source: str, others: Sequence[str] = ()) -> DictConfig:
    """Merge a layer over the configuration. A node with another `_target_` replaces the old one with its arguments.

    source: name of the layer, for errors. others: words that an unknown key may be meant for. Raises UserError.
    """
    refuse_unknown_keys(Config, layer, source, others=others)
    _clear_replaced_targets(config, layer)
    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        value = OmegaConf.select(layer, error.full_key) if error.full_key else None
        if "is not a ListConfig" in str(error) and value is not None:
            raise UserError(f"{source}: {error.full_key}: expected a list, write {error.full_key}=[{value}]") from error
        raise UserError(f"{source}: {describe(error)}") from error


def merge_overrides(config: DictConfig, overrides: Sequence[str], others: Sequence[str]) -> DictConfig:
    """Merge overrides such as "optim.lr=1e-4". others: as for merge.

    make passes them in any order. So the data of a whole task is replaced first, then single collections, and all other
    keys follow.
    """
    parsed = [(text, layer := _parse(text), _replacement(text, layer)) for text in overrides]
    parsed.sort(key=lambda each: 2 if each[2] is None else int(each[2].collection is not None))
    tasks = set(config.task)
    for text, layer, replacement in parsed:
        if replacement and replacement.task in tasks:
            data = config.task[replacement.task].data
            if replacement.collection is None:
                data.clear()
            else:
                data.pop(replacement.collection, None)
        config = merge(config, layer, f"command line ({text})", others)
    return config


def check_override(text: str) -> str:
    """Return an override unchanged. Raises UserError unless it is key=value."""
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise UserError(f"command line: expected key=value, got {text!r}")
    if key == "experiment":
        raise UserError("command line: the experiment is the first argument, not a key (make train EXP=...)")
    return text


def _parse(text: str) -> DictConfig:
    try:
        return OmegaConf.create(_none_as_null(OmegaConf.to_container(OmegaConf.from_dotlist([text]))))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"command line: {text!r} cannot be read ({str(error).splitlines()[0]})") from error


def _none_as_null(node: Any) -> Any:
    """Replace the word None by null: W&B's agent writes values as Python prints them."""
    if isinstance(node, dict):
        return {key: _none_as_null(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_none_as_null(value) for value in node]
    return None if node == "None" else node


def _clear_replaced_targets(config: DictConfig, layer: DictConfig) -> None:
    for key in layer:
        has_no_value = OmegaConf.is_missing(layer, key) or OmegaConf.is_interpolation(layer, key)
        if has_no_value or key not in config or OmegaConf.is_missing(config, key):
            continue
        old, new = config[key], layer[key]
        if isinstance(old, DictConfig) and isinstance(new, DictConfig):
            if "_target_" in new and "_target_" in old and not _same_class(new["_target_"], old["_target_"]):
                config[key] = {}
            else:
                _clear_replaced_targets(old, new)


def _same_class(one: Any, other: Any) -> bool:
    return current_path(str(one)) == current_path(str(other))


@dataclass(frozen=True)
class Replacement:
    """What an override replaces: one collection of a task, or all of them (None)."""

    task: str
    collection: str | None


def _replacement(text: str, layer: DictConfig) -> Replacement | None:
    """Return what an override replaces, or None if it only adds or changes settings. Folders in layer become nodes.

    text: the override that layer was parsed from. Raises UserError for a value that is neither a folder nor a node.
    """
    key = text.partition("=")[0]
    match = re.fullmatch(r"task\.([^.]+)\.data(?:\.([^.]+))?", key)
    if match is None:
        return None
    task, name = match.groups()
    data = OmegaConf.to_container(layer)["task"][task]["data"]
    if name:
        if not _is_folder(data[name]):
            return None
        layer.task[task].data[name] = {"folder": data[name]}
        return Replacement(task, name)
    folders = [data] if isinstance(data, str) else data
    if isinstance(folders, list) and folders and all(map(_is_folder, folders)):
        layer.task[task].data = _nodes_by_name(key, folders)
    elif not isinstance(data, dict) or not data:
        raise UserError(f"{key}: expected FOLDER, [FOLDER, ...] or {{NAME: node of a reader, ...}}, got {data!r}")
    return Replacement(task, None)


def _is_folder(value: Any) -> bool:
    """Return whether a value names a folder: it is not a node, and not a reference such as ${task.search.data.mine}."""
    return isinstance(value, str) and not value.startswith("${task.")


def _nodes_by_name(key: str, folders: list[str]) -> dict[str, dict[str, str]]:
    nodes: dict[str, dict[str, str]] = {}
    for folder in folders:
        name = re.sub(r"[^\w-]", "_", Path(folder).name) or "data"
        if name in nodes:
            example = f"{key}={{a: {nodes[name]['folder']}, b: {folder}}}"
            raise UserError(f"{key}: two folders are called {name}; give them names: {example}")
        nodes[name] = {"folder": folder}
    return nodes
