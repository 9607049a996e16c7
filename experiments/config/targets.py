"""The open part of a configuration: nodes with `_target_`, a class of ours and its arguments."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import UserError
from experiments.config.moved import current_path
from experiments.config.suggest import did_you_mean

PACKAGES = ("datamodules.", "lightning_modules.")
READERS = "datamodules.readers."
EXAMPLES = {READERS: "jsonl.JsonlReader, folder: FOLDER"}


def check_target(key: str, node: Any, base: type = object, given: Sequence[str] = (), home: str = "") -> dict[str, Any]:
    """The `_target_` node with its arguments checked against the class's signature, and converted to its types.

    base: what the class must be. given: arguments that the project provides. home: a package whose classes may be
    named without it (jsonl.JsonlReader). Raises UserError.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        hint = f", such as {{_target_: {EXAMPLES[home]}}}" if home in EXAMPLES else ""
        raise UserError(f"{key}: expected a node with _target_{hint}, got {node!r}")
    target = current_path(node["_target_"])
    if home and target.partition(".")[0] in _modules(home):
        target = current_path(home + target)
    if not target.startswith(PACKAGES):
        hint = did_you_mean(target.partition(".")[0], _modules(home)) if home else ""
        raise UserError(f"{key}._target_: got {target!r}; {hint}allowed are classes of {' and '.join(PACKAGES)}*")
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}._target_: there is no module {module_name!r} ({error})") from error
    if not inspect.isclass(getattr(module, name, None)):
        classes = [n for n, o in inspect.getmembers(module, inspect.isclass) if o.__module__ == module_name]
        raise UserError(f"{key}._target_: {module_name} has no class {name!r}, it has {', '.join(classes)}")
    cls = getattr(module, name)
    if not issubclass(cls, base):
        raise UserError(f"{key}._target_: got {target!r}, which is no {base.__name__}")
    return {"_target_": target} | _checked(key, cls, {k: v for k, v in node.items() if k != "_target_"}, given)


def _modules(package: str) -> list[str]:
    found = importlib.import_module(package.rstrip("."))
    return [module.name for module in pkgutil.iter_modules(found.__path__)]


def _checked(key: str, cls: type, arguments: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """Arguments with names and types of a class's signature, by a dataclass made from it."""
    hints = typing.get_type_hints(cls.__init__)
    parameters = [p for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.name not in given]
    allowed = [p.name for p in parameters]
    for name in arguments:
        if name not in allowed:
            hint = did_you_mean(str(name), allowed)
            raise UserError(f"{key}: {cls.__name__} has no argument {name!r}; {hint}it has {', '.join(allowed)}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"{key}: {cls.__name__} needs the argument {parameter.name!r}")
    fields = [(p.name, hints.get(p.name, Any), field(default=MISSING)) for p in parameters]
    try:
        schema = OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, fields))
        converted = OmegaConf.to_container(OmegaConf.merge(schema, dict(arguments)))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}") from error
    return {name: converted[name] for name in arguments}


def taken(node: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Which of the names are arguments of a checked node's class."""
    module, _, name = node["_target_"].rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters
    return [name for name in names if name in parameters]


def instantiate(node: Mapping[str, Any], **given: Any) -> Any:
    """The object that a checked `_target_` node describes."""
    module, _, name = node["_target_"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return cls(**{key: value for key, value in node.items() if key != "_target_"}, **given)
