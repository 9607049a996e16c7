"""Parse the key=value arguments of a command into a typed dataclass, and print --help."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from datamodules.options import REQUIRED, check_options, describe_bounds, literal_choices, option_key
from datamodules.records import UserError
from experiments.config.structured import unknown
from experiments.shared.plain import say

T = TypeVar("T")
SWITCH = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}


def parse(options: type[T], arguments: Sequence[str]) -> T:
    """Parse the arguments of a command. With --help, print all options and exit.

    Raises UserError for an unknown key, a missing value, a wrong type, or a value outside its bounds.
    """
    _print_help(options, arguments)
    values, rest = _values(options, arguments)
    if rest:  # first, because the unknown key may be a misspelt required key
        word, equals, _ = rest[0].partition("=")
        if not equals:
            raise UserError(f"command line: expected key=value, got {word!r}")
        raise UserError(f"command line: {unknown('key', word, option_keys(options))} (or --help)")
    return _checked(options, values)


def parse_known(options: type[T], arguments: Sequence[str], further: type | None = None) -> tuple[T, list[str]]:
    """Return the options, and the arguments that are not options, such as keys of an experiment.

    further: dataclass whose keys the remaining arguments may set, for --help.
    """
    _print_help(options, arguments, further)
    values, rest = _values(options, arguments)
    return _checked(options, values), rest


def _values(options: type, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return field name -> value for the options, and the arguments that are not options."""
    hints, values, rest = get_type_hints(options), {}, list(arguments)
    fields = {option_key(field): field for field in dataclasses.fields(options)}
    for field in fields.values():
        if not field.metadata.get("positional"):
            continue
        if get_origin(hints[field.name]) is tuple:  # paths may contain commas
            values[field.name] = tuple(word for word in rest if "=" not in word)
            rest = [word for word in rest if "=" in word]
        elif rest and "=" not in rest[0]:
            values[field.name] = _convert(option_key(field), hints[field.name], rest.pop(0))
    others = []
    for argument in rest:
        key, equals, text = argument.partition("=")
        if equals and key in fields:
            values[fields[key].name] = _convert(key, hints[fields[key].name], text)
        else:
            others.append(argument)
    return values, others


def _checked(options: type[T], values: Mapping[str, Any]) -> T:
    for field in dataclasses.fields(options):
        if default_of(field) is REQUIRED and values.get(field.name) in (None, "", ()):
            raise UserError(f"{option_key(field)}: required, {field.metadata['help']}")
    parsed = options(**values)
    check_options(parsed)
    return parsed


def named_values(key: str, texts: Iterable[str], expected: str, optional: bool = False) -> dict[str, str]:
    """Return NAME -> VALUE from texts such as NAME:VALUE. Raises UserError for other texts, or if a name has two
    values.

    expected: form of a text, for the message. optional: whether :VALUE may be left out; the value is then "".
    """
    values: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition(":")
        if not name or not (value or optional):
            raise UserError(f"{key}: expected {expected}, got {text!r}")
        if name in values:
            raise UserError(f"{key}: expected one value for {name}, got {values[name]!r} and {value!r}")
        values[name] = value
    return values


def option_keys(options: type) -> list[str]:
    """Return the keys of a command's options."""
    return [option_key(field) for field in dataclasses.fields(options)]


def _print_help(options: type, arguments: Sequence[str], further: type | None = None) -> None:
    if {"--help", "-h"}.intersection(arguments):
        say(usage(options))
        if further:
            lines = option_lines(further)
            say("\n".join(["", "keys of the experiment (--cfg prints their values and stops):", "", *lines]))
        sys.exit(0)


def usage(options: type) -> str:
    """Return the text of --help: what the command does, and the type, default and meaning of each option."""
    positional = "".join(
        f" {option_key(field).upper()}" for field in dataclasses.fields(options) if field.metadata.get("positional")
    )
    usage_line = f"usage: {command_of(options)}{positional} [key=value ...]"
    return "\n".join([inspect.getdoc(options) or "", "", usage_line, "", *option_lines(options)])


def option_lines(options: type, prefix: str = "") -> Iterator[str]:
    """Yield two lines per option of a dataclass, including nested ones. prefix: path of the options ("optim.")."""
    hints, width = get_type_hints(options), min(shutil.get_terminal_size().columns, 120)
    for field in dataclasses.fields(options):
        key, hint, default = prefix + option_key(field), hints[field.name], default_of(field)
        nested, suffix = nested_options(hint)
        if nested is None:
            yield f"  {key.upper() if field.metadata.get('positional') else f'{key}={type_name(hint)}'}"
            shown = "required" if default in (REQUIRED, MISSING) else f"default: {as_argument(default)}"
            shown = "" if default in (None, "", (), [], {}) else shown
            text = "; ".join(filter(None, (field.metadata.get("help", ""), describe_bounds(field), shown)))
            yield textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        else:
            yield from option_lines(nested, f"{key}{suffix}.")


def nested_options(hint: Any) -> tuple[type | None, str]:
    """Return the dataclass in a field, if any, and the suffix of its keys: "", ".NAME" in a dict, "[i]" in a list."""
    if dataclasses.is_dataclass(hint):
        return hint, ""
    item = get_args(hint)[-1] if get_args(hint) else None
    if dataclasses.is_dataclass(item):
        return item, ".NAME" if get_origin(hint) is dict else "[i]"
    return None, ""


def command_of(options: type) -> str:
    """Return how the user started this command: scimult train, or python -m experiments.train."""
    name = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) or options.__module__
    if len(sys.orig_argv) > 2 and Path(sys.orig_argv[1]).stem == "scimult":
        return f"scimult {sys.orig_argv[2]}"
    return f"python -m {name}"


def as_argument(value: Any) -> str:
    """Format the value of an option as on the command line."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of an option, or REQUIRED."""
    return field.default if field.default_factory is REQUIRED else field.default_factory()


def type_name(hint: Any) -> str:
    """Return the name of a type in --help: its choices, or INTEGER, NUMBER, PATH, TEXT, ..."""
    if choices := literal_choices(hint):
        return "|".join(filter(None, map(str, choices)))
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(type_name(each) for each in get_args(hint) if each is not type(None))
    if get_origin(hint) in (tuple, list):
        name = type_name(get_args(hint)[0])
        return f"{name},{name},..."
    if get_origin(hint) is dict:
        return "{NAME: VALUE, ...}"
    return {bool: "yes|no", int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(hint, "TEXT")


def _convert(key: str, hint: Any, text: str) -> Any:
    """Convert the text of an option to its type. Choices and bounds are checked later, by check_options."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if text in ("", "null"):
            return None
        return _convert(key, next(each for each in get_args(hint) if each is not type(None)), text)
    if origin in (tuple, list):
        text = text[1:-1] if text[:1] + text[-1:] == "[]" else text  # keys of an experiment have brackets
        return origin(_convert(key, get_args(hint)[0], item.strip()) for item in text.split(",") if item)
    if hint is bool:
        if text.lower() not in SWITCH:
            raise UserError(f"{key}: expected yes or no, got {text!r}")
        return SWITCH[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise UserError(f"{key}: expected {kind}, got {text!r}") from None
    if hint is Path and not text:
        raise UserError(f"{key}: expected a path, got an empty value")
    return text if origin is Literal else hint(text)
