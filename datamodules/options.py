"""Fields of option dataclasses, with a default, one line of help, and bounds."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from datamodules.records import UserError

MAX_NUMBER = 2**63 - 1
REQUIRED: Any = dataclasses.MISSING
ITEM_TYPES: dict[Any, Any] = {str: (str, "texts"), int: (int, "whole numbers"), float: ((int, float), "numbers")}


def option(
    default: Any = REQUIRED,
    help: str = "",
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str | int, ...] = (),
    key: str = "",
    positional: bool = False,
) -> Any:
    """Return a dataclass field with documentation and bounds.

    default: value if the user sets none. Lists and dictionaries are copied for each instance.
    help: one line for --help and for the reference of all keys.
    minimum, maximum: inclusive bounds. above, below: exclusive bounds.
    choices: allowed values, or allowed items of a list. A Literal type does not need them.
    key: name on the command line, by default the name of the field.
    positional: whether the value is the command's first argument instead of key=value. For a tuple, it is all arguments
        without =.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    metadata = {"help": help, "choices": choices, "key": key, "positional": positional}
    metadata["bounds"] = {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option_key(field: dataclasses.Field) -> str:
    """Return the name of an option on the command line."""
    return field.metadata.get("key") or field.name


def check_options(options: Any, prefix: str = "") -> None:
    """Raise UserError if a value of this dataclass, or of one inside it, is outside its bounds or choices.

    prefix: path of the dataclass in a configuration, such as "data.", for the message.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        key = prefix + option_key(field)
        value = getattr(options, field.name)
        choices = field.metadata.get("choices") or literal_choices(hints[field.name])
        check_items(key, value, hints[field.name])
        for path, item in _leaves(value, key):
            if dataclasses.is_dataclass(item):
                check_options(item, path + ".")
            elif choices and item not in choices:
                raise UserError(f"{path}: expected one of {', '.join(map(str, choices))}, got {item!r}")
            elif isinstance(item, int) and abs(item) > MAX_NUMBER:
                raise UserError(f"{path}: expected a number of at most 64 bits, got {_shortened(item)}")
            elif not _within(item, field.metadata.get("bounds", {})):
                raise UserError(f"{path}: expected {describe_bounds(field)}, got {item!r}")


def check_items(key: str, value: Any, hint: Any) -> None:
    """Raise UserError for an item of the wrong type: OmegaConf would accept lists and mappings as texts and numbers."""
    if get_origin(hint) not in (list, tuple, dict):
        return
    collection, item_hint = ("mapping", get_args(hint)[-1]) if get_origin(hint) is dict else ("list", get_args(hint)[0])
    kinds, words = ITEM_TYPES.get(item_hint, (object, ""))
    for item in value.values() if isinstance(value, Mapping) else value or ():
        if not isinstance(item, kinds):
            raise UserError(f"{key}: expected a {collection} of {words}, but it contains {item!r}")
        check_items(key, item, item_hint)


def check_number(name: str, value: float, **bounds: float) -> None:
    """Raise UserError if an argument is outside its bounds. bounds: minimum, above, maximum and below, as in option."""
    if not _within(value, bounds):
        raise UserError(f"{name}: expected {_in_words(bounds)}, got {value!r}")


def _shortened(number: int) -> str:
    digits = str(number) if number.bit_length() < 10_000 else "one of thousands of digits"
    return digits if len(digits) <= 40 else f"{digits[:20]}... ({len(digits)} digits)"


def literal_choices(hint: Any) -> tuple[Any, ...]:
    """Return the values of a Literal, an optional Literal or a collection of Literals; () for any other type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType, list, tuple):
        return next(filter(None, map(literal_choices, get_args(hint))), ())
    return ()


def describe_bounds(field: dataclasses.Field) -> str:
    """Return the range of a numeric field in words, such as "a number above 0"; "" without bounds."""
    return _in_words(field.metadata.get("bounds", {}))


def _in_words(bounds: Mapping[str, float]) -> str:
    words = {"minimum": "of at least", "above": "above", "maximum": "at most", "below": "below"}
    limits = " and ".join(
        f"{words[name]} {bound if isinstance(bound, int) else format(bound, 'g')}" for name, bound in bounds.items()
    )
    return f"a number {limits}" if limits else ""


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield a value, or the items of a collection, with its path. None means the default, and is skipped."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item, path)
    elif value is not None:
        yield path, value


def _within(value: Any, bounds: Mapping[str, float]) -> bool:
    if not bounds or isinstance(value, (str, bool)):
        return True
    return (
        math.isfinite(value)
        and value >= bounds.get("minimum", -math.inf)
        and value <= bounds.get("maximum", math.inf)
        and ("above" not in bounds or value > bounds["above"])
        and ("below" not in bounds or value < bounds["below"])
    )
