"""The open part of a configuration: nodes with `_target_`, a class of ours and its arguments."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import UserError

PACKAGES = ("datamodules.", "lightning_modules.")


def check_target(key: str, node: Any, given: Sequence[str] = ()) -> type:
    """The class that a `_target_` node names, its arguments checked against the signature.

    given: arguments that the project provides. Raises UserError.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise UserError(f"{key}: expected a node with _target_, got {node!r}")
    target = node["_target_"]
    if not target.startswith(PACKAGES):
        raise UserError(f"{key}._target_: got {target!r}, allowed are classes of {' and '.join(PACKAGES)}*")
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}._target_: there is no module {module_name!r} ({error})") from error
    if not inspect.isclass(getattr(module, name, None)):
        classes = [n for n, o in inspect.getmembers(module, inspect.isclass) if o.__module__ == module_name]
        raise UserError(f"{key}._target_: {module_name} has no class {name!r}, it has {', '.join(classes)}")
    cls = getattr(module, name)
    _check_arguments(key, cls, {k: v for k, v in node.items() if k != "_target_"}, given)
    return cls


def _check_arguments(key: str, cls: type, arguments: Mapping[str, Any], given: Sequence[str]) -> None:
    """Names and types of a class's arguments, by a dataclass made from its signature."""
    hints = typing.get_type_hints(cls.__init__)
    parameters = [p for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.name not in given]
    allowed = [p.name for p in parameters]
    for name in arguments:
        if name not in allowed:
            close = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{key}: {cls.__name__} has no argument {name!r}; {hint}it has {', '.join(allowed)}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"{key}: {cls.__name__} needs the argument {parameter.name!r}")
    fields = [(p.name, hints.get(p.name, Any), field(default=MISSING)) for p in parameters]
    try:
        OmegaConf.merge(OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, fields)), dict(arguments))
    except OmegaConfBaseException as error:
        raise UserError(f"{key}.{error.full_key}: {str(error).splitlines()[0]}") from error


def instantiate(node: Mapping[str, Any], **given: Any) -> Any:
    """The object that a checked `_target_` node describes."""
    module, _, name = node["_target_"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    return cls(**{key: value for key, value in node.items() if key != "_target_"}, **given)
