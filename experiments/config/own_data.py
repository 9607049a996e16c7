"""A user's collections in few words: task.NAME.data=FOLDER, or FOLDER as the node of a collection.

task.search.data=/data/mine                  this collection, called mine, instead of the scale's
task.search.data=[/data/mine, /data/other]   these
task.search.data={mine: {...}}               these nodes
task.search.data.mine=/data/mine             this one beside the scale's
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from datamodules.readers import reader_class_of
from datamodules.records import UserError


def replaced(text: str, layer: DictConfig) -> tuple[str, str | None] | None:
    """What an override puts something else in the place of: a task and its collection, or None for all of them.

    text: the override that the layer was read from, in which folders become nodes. None for an override that adds or
    changes something. Raises UserError for what is neither folders nor nodes.
    """
    key = text.partition("=")[0]
    found = re.fullmatch(r"task\.([^.]+)\.data(?:\.([^.]+))?", key)
    if found is None:
        return None
    task, name = found.groups()
    data = OmegaConf.to_container(layer)["task"][task]["data"]
    if name:
        if not _is_folder(data[name]):
            return None
        layer.task[task].data[name] = {"folder": data[name]}
        return task, name
    folders = [data] if isinstance(data, str) else data
    if isinstance(folders, list) and folders and all(map(_is_folder, folders)):
        layer.task[task].data = _by_name(key, folders)
    elif not isinstance(data, dict) or not data:
        raise UserError(f"{key}: got {data!r}, expected FOLDER, [FOLDER, ...] or {{NAME: node of a reader, ...}}")
    return task, None


def _is_folder(value: Any) -> bool:
    """Whether a value is a folder's name, and no node, nor another collection's (${task.search.data.mine})."""
    return isinstance(value, str) and not value.startswith("${task.")


def _by_name(key: str, folders: list[str]) -> dict[str, dict[str, str]]:
    nodes: dict[str, dict[str, str]] = {}
    for folder in folders:
        name = re.sub(r"[^\w-]", "_", Path(folder).name) or "data"
        if name in nodes:
            both = f"{key}={{a: {nodes[name]['folder']}, b: {folder}}}"
            raise UserError(f"{key}: two are called {name}; give them names: {both}")
        nodes[name] = {"folder": folder}
    return nodes


def with_reader(key: str, node: Any) -> Any:
    """The node of a collection with its reader's class, which the folder tells where the node does not.

    Raises UserError if there is no such folder, or if it is in none of the layouts that are told by their files.
    """
    if isinstance(node, str):
        node = {"folder": node}
    if not isinstance(node, Mapping) or "_target_" in node or not isinstance(node.get("folder"), str):
        return node
    try:
        reader = reader_class_of(node["folder"])
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return {"_target_": f"{reader.__module__}.{reader.__name__}"} | dict(node)
