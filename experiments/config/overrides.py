"""Parse key=value arguments that set keys of an experiment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import UserError
from experiments.config.targets import is_library


def packages_in(overrides: Sequence[str]) -> list[str]:
    """Return the extend.packages that overrides set."""
    allowed: Any = []
    for text in overrides:
        extend = OmegaConf.to_container(parse_override(text)).get("extend") if text.startswith("extend") else None
        if isinstance(extend, dict) and "packages" in extend:
            allowed = extend["packages"]
    return [name for name in allowed if isinstance(name, str)] if isinstance(allowed, list) else []


def check_override(text: str) -> None:
    """Raise UserError unless the text is key=value."""
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise UserError(f"command line: expected key=value, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"command line: {text!r} is not UTF-8") from error
    if key == "experiment":
        raise UserError("command line: the experiment is the first argument, not a key (make train EXP=...)")


def parse_override(text: str) -> DictConfig:
    value = text.partition("=")[2].strip()
    try:
        read = yaml.safe_load(value)
        if isinstance(read, str) and read != value and value[0] not in "'\"":
            raise UserError(f"command line: the value of {text!r} is read as {read!r}; put it in quotes")
        return OmegaConf.create(_none_as_null(OmegaConf.to_container(OmegaConf.from_dotlist([text]))))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"command line: {text!r} cannot be read ({str(error).splitlines()[0]})") from error
    except RecursionError as error:
        raise UserError(f"command line: {text[:60]!r}... is nested too deeply") from error


def _none_as_null(node: Any) -> Any:
    """Replace None by null, because W&B's agent writes values as Python prints them."""
    if isinstance(node, dict):
        return {key: _none_as_null(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_none_as_null(value) for value in node]
    return None if node == "None" else node


def replaced_data(text: str, layer: DictConfig) -> str | None:
    """Return the key of the data that an override replaces, or None if it only sets keys. Turns folders into nodes.

        task.search.data=/data/mine                  use only this collection, called mine
        task.search.data=[/data/mine, /data/other]   use only these two
        task.search.data={mine: {...}}               use only these, each with the node of its reader
        task.search.data.mine=/data/mine             add this one to the scale's collections

    layer: the parsed text. Raises UserError for a value that is neither a folder nor a node.
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
        return key
    folders = [data] if isinstance(data, str) else data
    if isinstance(folders, list) and folders and all(map(_is_folder, folders)):
        layer.task[task].data = _nodes_by_name(key, folders, task)
    elif not isinstance(data, dict) or not data:
        raise UserError(f"{key}: expected FOLDER, [FOLDER, ...] or {{NAME: node of a reader, ...}}, got {data!r}")
    return key


def _is_folder(value: Any) -> bool:
    """Return whether a value is a folder, not a node or a reference such as ${task.search.data.mine}."""
    return isinstance(value, str) and not value.startswith("${task.")


def _nodes_by_name(key: str, folders: list[str], task: str) -> dict[str, dict[str, str]]:
    """Return a node for each folder, named after it. A library serves several tasks, so its name includes the task."""
    nodes: dict[str, dict[str, str]] = {}
    for folder in folders:
        name = re.sub(r"[^\w-]", "_", Path(folder).name) or "data"
        name = f"{name}_{task}" if is_library(Path(folder)) else name
        if name in nodes:
            example = f"{key}={{a: {nodes[name]['folder']}, b: {folder}}}"
            raise UserError(f"{key}: two folders are called {name}; give them names: {example}")
        nodes[name] = {"folder": folder}
    return nodes
