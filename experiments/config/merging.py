"""Settings over settings: what is written over what, and keys that there are not."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import UserError
from experiments.config.moved import current_path
from experiments.config.schema import Config, TaskConfig
from experiments.config.suggest import did_you_mean


def first_line(error: Exception) -> str:
    """What OmegaConf's errors say, without the key and type that follow."""
    return str(error).splitlines()[0]


def merge(config: DictConfig, layer: DictConfig, source: str, beside: Sequence[str] = ()) -> DictConfig:
    """layer over config. A node with another `_target_` replaces the old one: their arguments are not mixed.

    source: of the layer, in errors. beside: what else might have been meant by an unknown key. Raises UserError.
    """
    refuse_unknown_keys(Config, layer, "", source, beside)
    _forget_replaced_targets(config, layer)
    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        value = OmegaConf.select(layer, error.full_key) if error.full_key else None
        if "is not a ListConfig" in str(error) and value is not None:
            raise UserError(f"{source}: {error.full_key}: expected a list, write {error.full_key}=[{value}]") from error
        raise UserError(f"{source}: {error.full_key}: {first_line(error)}") from error


def keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """All keys of a schema with dots, but for what is below names that users give."""
    for key, hint in typing.get_type_hints(schema).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{prefix}{key}.")


def refuse_unknown_keys(schema: type, node: Any, prefix: str, source: str, beside: Sequence[str] = ()) -> None:
    """Raise UserError for a key that a schema, a dataclass, does not have.

    prefix: what stands before its keys. source, beside: as for merge.
    """
    if not isinstance(node, DictConfig):
        return
    hints = typing.get_type_hints(schema)
    for key in node:
        if key not in hints:
            nodes = isinstance(node._get_node(key), DictConfig)  # such as optm in optm.lr
            hint = did_you_mean(str(key), hints, prefix) if nodes or prefix else ""
            hint = hint or did_you_mean(str(key), [*beside, *keys()])
            more = f", and {', '.join(beside)}" if beside and not prefix else ""
            raise UserError(f"{source}: unknown key {prefix}{key}; {hint}allowed here: {', '.join(hints)}{more}")
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if dataclasses.is_dataclass(hints[key]):
            refuse_unknown_keys(hints[key], node[key], f"{prefix}{key}.", source)
        elif hints[key] == dict[str, TaskConfig] and isinstance(node[key], DictConfig):
            for name in node[key]:
                refuse_unknown_keys(TaskConfig, node[key][name], f"{prefix}{key}.{name}.", source)


def _forget_replaced_targets(config: DictConfig, layer: DictConfig) -> None:
    for key in layer:
        nothing = OmegaConf.is_missing(layer, key) or OmegaConf.is_interpolation(layer, key)
        if nothing or key not in config or OmegaConf.is_missing(config, key):
            continue
        old, new = config[key], layer[key]
        if isinstance(old, DictConfig) and isinstance(new, DictConfig):
            if "_target_" in new and "_target_" in old and not _same_class(new["_target_"], old["_target_"]):
                config[key] = {}
            else:
                _forget_replaced_targets(old, new)


def _same_class(one: Any, other: Any) -> bool:
    return current_path(str(one)) == current_path(str(other))
