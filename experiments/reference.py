"""Write docs/reference.md: every key of an experiment, and the options of every command."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

import experiments
import experiments.bench
from datamodules.files import write_text
from datamodules.options import REQUIRED, describe_bounds, option, option_key
from experiments.__main__ import MODULES, commands
from experiments.config.arguments import (
    as_argument,
    default_of,
    nested_options,
    option_keys,
    parse,
    type_name,
)
from experiments.config.experiment import ExperimentOptions
from experiments.config.experiment import experiments as experiment_names
from experiments.config.schema import Config
from experiments.config.structured import keys
from experiments.config.study_file import StudySettings
from experiments.shared.console import entry_point
from experiments.shared.plain import say

PATH = Path(__file__).parents[1] / "docs" / "reference.md"
HEAD = """# Reference of all keys

Written by `python -m experiments.reference` from the dataclasses in the code. Do not edit.

Settings come from files in a fixed order, and the last one wins: `experiments/base.yaml`, `scale/<SCALE>.yaml`,
`tasks/*.yaml`, `<EXPERIMENT>.yaml`, and `key=value` on the command line.
"""
NAMES = {module: name for name, module in MODULES.items()}  # module -> command and make target
NOT_TARGETS = {"reference": "python -m experiments.reference", "sample": "scimult sample"}
COMPLETION = """# Completes the command scimult in bash and zsh. Written by scimult --completion.
[ -n "$ZSH_VERSION" ] && autoload -U +X bashcompinit && bashcompinit
_scimult() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" words=""
  local experiments="{experiments}" keys="{keys}"
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  [ "$COMP_CWORD" = 1 ] && words="{commands}"
  [[ "$cur" == "=" || "${{COMP_WORDS[COMP_CWORD-1]}}" == "=" ]] && return  # a value, perhaps a file
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  [[ "${{COMPREPLY[0]}}" == *= ]] && type compopt > /dev/null 2>&1 && compopt -o nospace
}}
complete -o default -F _scimult scimult"""
TABLE = "| key | value | default | meaning |\n| --- | --- | --- | --- |"


@dataclass(kw_only=True)
class ReferenceOptions:
    """Write docs/reference.md: every key of an experiment, and the options of every command."""

    output: Path = option(PATH, "file to write")


def main(arguments: Sequence[str]) -> None:
    options = parse(ReferenceOptions, arguments)
    write_text(options.output, reference())
    say(f"wrote {options.output}")


def reference() -> str:
    """Return the whole page."""
    lines = [HEAD, "## Keys of an experiment", *_sections(Config), "## Studies", *_sections(StudySettings)]
    lines += ["## Options of commands", *_commands()]
    return "\n\n".join(line.strip() for line in lines) + "\n"


def _sections(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the heading and table of a dataclass, then of each dataclass inside it."""
    hints = get_type_hints(schema)
    rows, inner = [], []
    for field in dataclasses.fields(schema):
        nested, suffix = nested_options(hints[field.name])
        if nested:
            inner.append((nested, f"{prefix}{field.name}{suffix}."))
        if nested is None or suffix:
            rows.append(_row(f"{prefix}{field.name}", field, hints[field.name]))
    title = f"### `{prefix.removesuffix('.')}`" if prefix else ""
    yield "\n\n".join(filter(None, (title, inspect.getdoc(schema), "\n".join([TABLE, *rows]) if rows else "")))
    for nested, path in inner:
        yield from _sections(nested, path)


def _row(key: str, field: dataclasses.Field, hint: Any) -> str:
    bounds = describe_bounds(field).removeprefix("a number ").removeprefix("of ")
    value = ", ".join(filter(None, (_type_words(hint), bounds)))
    cells = (f"`{key}`", value, _default(field), field.metadata.get("help", ""))
    return f"| {' | '.join(re.sub(r'(?<!`)[|]', ', ', cell) for cell in cells)} |"


def _type_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is dict:
        value = "settings" if dataclasses.is_dataclass(arguments[1]) else _type_words(arguments[1])
        return f"name -> {value}"
    if origin is list and dataclasses.is_dataclass(arguments[0]):
        return "list of settings"
    if hint is Any:
        return "any value"
    words = type_name(hint).partition(",")[0]
    if "|" not in words:
        words = words.lower().replace("text", "string") + ("s" if origin in (list, tuple) else "")
    return f"list of {words}" if origin in (list, tuple) else words


def _default(field: dataclasses.Field) -> str:
    value = default_of(field)
    if value in (REQUIRED, MISSING):
        return "required"
    if isinstance(value, Path) and value.is_absolute():
        value = value.relative_to(PATH.parents[1])
    text = str(value) if isinstance(value, dict) else as_argument(value)
    return f"`{text}`" if text and value not in ({}, []) else ""


def _commands() -> Iterator[str]:
    for package in (experiments, experiments.bench):
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
            module = f"{package.__name__}.{info.name}"
            if not info.ispkg and (options := options_of(importlib.import_module(module))):
                yield _command(module, options)


def options_of(module: ModuleType) -> type | None:
    """Return the options of a command, the dataclass NAMEOptions in its module."""
    for name, value in reversed(vars(module).items()):  # the last one, because earlier ones may be its bases
        if name.endswith("Options") and dataclasses.is_dataclass(value) and value.__module__ == module.__name__:
            return value
    return None


def completion() -> str:
    """Return a script for bash and zsh that completes commands, experiments and keys."""
    sections = list(keys(Config))
    leaves = [key for key in sections[1:] if not any(other.startswith(f"{key}.") for other in sections)]
    cases = []
    for name in commands():
        options = options_of(importlib.import_module(f"experiments.{MODULES.get(name, name)}"))
        words = [f"{key}=" for key in option_keys(options)] if options else []
        if options and issubclass(options, ExperimentOptions):
            words = ["$experiments", "$keys", "--cfg", *(word for word in words if word != "experiment=")]
        cases.append(f'    {name}) words="{" ".join([*words, "--help"])}" ;;')
    return COMPLETION.format(
        commands=" ".join([*commands(), "--help", "--version"]),
        experiments=" ".join(experiment_names()),
        keys=" ".join(f"{key}=" for key in leaves),  # all but the experiment, which is an argument
        cases="\n".join(cases),
    )


def _command(module: str, options: type) -> str:
    hints = get_type_hints(options)
    name = module.rpartition(".")[2]
    target = (
        f"make bench BENCH={name}" if ".bench." in module else NOT_TARGETS.get(name, f"make {NAMES.get(name, name)}")
    )
    rows = [_row(option_key(field), field, hints[field.name]) for field in dataclasses.fields(options)]
    parts = (f"### `{module}`", f"`{target}`", inspect.getdoc(options), "\n".join([TABLE, *rows]) if rows else "")
    return "\n\n".join(filter(None, parts))


if __name__ == "__main__":
    entry_point(main)
