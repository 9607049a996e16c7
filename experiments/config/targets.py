"""Check and build the nodes of a configuration, which name a class (`_target_`) and its arguments.

The class is from this project, or from a package that the user allows on the command line (extend.packages).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.papers.views import VIEW_OF_KIND
from datamodules.readers import reader_class_of
from datamodules.readers.papers import PapersReader
from datamodules.records import Reader, UserError, is_in, prefixed
from experiments.config.schema import Config
from experiments.config.structured import MERGE_ERRORS, describe, did_you_mean, expected_one_of, unknown

PACKAGES = ("datamodules", "lightning_modules")
READERS = "datamodules.readers."
EXAMPLES = {READERS: "jsonl.JsonlReader, folder: FOLDER"}
IMPORTED = "import.json"  # a file that every import writes into its folder
VAR_POSITIONAL, VAR_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
ENCODER_ARGUMENTS = ("backbone", "tokenizer", "tasks", "instructions", "max_length")  # passed by build_encoder
LOSS_ARGUMENTS = ("tasks", "dimension", "objective")  # passed by build_module
JUDGE_ARGUMENTS = ("tasks", "packages")  # passed by build_mining
# Classes that have moved: old path -> new path. Old configurations still load.
MOVED: dict[str, str] = {
    "lightning_modules.mining.sharing.SharingMiner": "lightning_modules.mining.miners.SharingMiner",
}


def check_targets(config: Config) -> None:
    """Check all nodes of a configuration, and convert their arguments."""
    # Only here, because torch and transformers take seconds to import, and many commands do not load an experiment.
    from lightning_modules.auxiliary.auxiliary_loss import AuxiliaryLoss
    from lightning_modules.encoders.base import Encoder
    from lightning_modules.mining.miners import Miner
    from lightning_modules.mining.relabel import Judge

    allowed = config.extend.packages
    config.encoder = check_target("encoder", config.encoder, Encoder, ENCODER_ARGUMENTS, packages=allowed)
    if config.callbacks:
        from lightning import Callback  # only here, because Lightning takes seconds to import
    for name, node in config.callbacks.items():
        config.callbacks[name] = check_target(f"callbacks.{name}", node, Callback, packages=allowed)
    for name, node in config.losses.items():
        config.losses[name] = check_target(f"losses.{name}", node, AuxiliaryLoss, LOSS_ARGUMENTS, packages=allowed)
    for kind, base, provided in (("miner", Miner, ()), ("judge", Judge, JUDGE_ARGUMENTS)):
        node, nodes = getattr(config.mining, kind), getattr(config.mining, f"{kind}s")
        if node is not None:
            setattr(config.mining, kind, check_target(f"mining.{kind}", node, base, provided, packages=allowed))
        for name, node in nodes.items():
            key = f"mining.{kind}s"
            if name not in config.tasks:
                raise unknown(f"task in {key}", name, config.tasks)
            if node is not None:
                nodes[name] = check_target(f"{key}.{name}", node, base, provided, packages=allowed)
    check_readers(config)


def check_readers(config: Config) -> None:
    """Check the nodes of readers, and convert their arguments. A folder becomes a node with the matching reader."""
    for task, settings in config.task.items():
        for name, node in settings.data.items():
            key = f"task.{task}.data.{name}"
            node = with_reader(key, node, settings.kind)
            settings.data[name] = check_target(key, node, Reader, package=READERS, packages=config.extend.packages)


def check_target(
    key: str,
    node: Any,
    base: type = object,
    provided: Sequence[str] = (),
    package: str = "",
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """Check a node against the signature of its class. Return it with its arguments converted to their types.

    key: path of the node, for errors. base: required base class. provided: arguments that the project passes itself.
    package: package that `_target_` may omit (jsonl.JsonlReader).
    packages: further packages that the user allows. Raises UserError.
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        example = f", such as {{_target_: {EXAMPLES[package]}}}" if package in EXAMPLES else ""
        raise UserError(f"{key}: expected a node with _target_{example}, got {node!r}")
    cls = _import_class(key, node["_target_"], package, packages)
    path = f"{cls.__module__}.{cls.__name__}"
    if not issubclass(cls, base):
        raise UserError(f"{key}._target_: expected a subclass of {base.__name__}, got {path!r}")
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    if inspect.isabstract(cls):
        raise UserError(f"{key}._target_: expected a concrete class, got the abstract class {path!r}")
    return {"_target_": _full_path(node["_target_"], package)} | _check_arguments(key, cls, arguments, provided)


def _full_path(path: str, package: str) -> str:
    """Return the full, current dotted path of a class. package: package that the path may omit."""
    path = current_path(path)
    return current_path(package + path) if package and path.partition(".")[0] in _modules(package) else path


def _import_class(key: str, path: str, package: str, packages: Sequence[str]) -> type:
    path = _full_path(path, package)
    module_name, _, name = path.rpartition(".")
    if not is_in(module_name, [*PACKAGES, *packages]):
        first = path.partition(".")[0]
        hint = did_you_mean(first, _modules(package)) if package else ""
        start = "Expected" if hint else "expected"
        message = f"{key}._target_: {hint}{start} a class from {' or '.join([*PACKAGES, *packages])}, got {path!r}"
        if module_name and not hint:
            message += f"; if you trust the package, allow it on the command line: extend.packages=[{first}]"
        raise UserError(message)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        installed = "" if is_in(module_name, PACKAGES) else "; install the package, or add its folder to PYTHONPATH"
        raise UserError(f"{key}._target_: cannot import {module_name!r} ({error}){installed}") from error
    if not inspect.isclass(getattr(module, name, None)):
        classes = [n for n, o in inspect.getmembers(module, inspect.isclass) if o.__module__ == module_name]
        raise UserError(f"{key}._target_: {module_name} has no class {name!r}; {expected_one_of(classes)}")
    return getattr(module, name)


def _modules(package: str) -> list[str]:
    path = importlib.import_module(package.rstrip(".")).__path__
    return [module.name for module in pkgutil.iter_modules(path)]


def _check_arguments(key: str, cls: type, arguments: Mapping[str, Any], provided: Sequence[str]) -> dict[str, Any]:
    """Return the arguments, converted to the types in the class's signature."""
    signature = list(inspect.signature(cls.__init__).parameters.values())[1:]  # without self
    signature = [] if cls.__init__ is object.__init__ else signature
    variadic = {parameter.kind for parameter in signature} & {VAR_POSITIONAL, VAR_KEYWORD}
    signature = [each for each in signature if each.kind not in (VAR_POSITIONAL, VAR_KEYWORD)]
    parameters = {parameter.name: parameter for parameter in signature if parameter.name not in provided}
    for name in arguments:
        if name not in parameters and VAR_KEYWORD not in variadic:
            hint = did_you_mean(str(name), parameters)
            expected = expected_one_of(parameters, hint) if parameters else "expected no arguments"
            raise UserError(f"{key}: {cls.__name__} has no argument {name!r}; {hint}{expected}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            raise UserError(f"{key}: {cls.__name__} needs the argument {name!r}")
    fields = [(name, hint, field(default=MISSING)) for name, hint in _hints(cls, parameters | dict(arguments)).items()]
    try:
        schema = OmegaConf.structured(dataclasses.make_dataclass(cls.__name__, fields))
        converted = OmegaConf.to_container(OmegaConf.merge(schema, dict(arguments)))
    except MERGE_ERRORS as error:
        raise UserError(f"{key}.{describe(error)}") from error
    for name, value in converted.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{key}.{name}: expected a number, got nan")
    return {name: converted[name] for name in arguments}


def _hints(cls: type, names: Iterable[str]) -> dict[str, Any]:
    """Return the type of each argument. Types that OmegaConf does not know, as in other packages, become Any."""
    annotations, scope = getattr(cls.__init__, "__annotations__", {}), getattr(cls.__init__, "__globals__", {})
    known = {}
    for name in names:
        try:
            argument = types.SimpleNamespace(__annotations__={name: annotations.get(name, Any)})
            hint = typing.get_type_hints(argument, scope)[name]
            OmegaConf.structured(dataclasses.make_dataclass("Argument", [(name, hint, field(default=MISSING))]))
        # NameError: the type is only imported under TYPE_CHECKING.
        except (OmegaConfBaseException, NameError, TypeError, ValueError):
            hint = Any
        known[name] = hint
    return known


def with_reader(key: str, node: Any, kind: str) -> Any:
    """Add the reader's class to a node that only names a folder or a file.

    The class depends on the files in the folder. A file of papers or the folder of an import can serve any kind of
    task.

    key: path of the node, for errors. kind: kind of the task. Raises UserError if the folder is missing or its layout
        is not recognised.
    """
    if isinstance(node, str):
        node = {"folder": node}
    if not isinstance(node, Mapping) or "_target_" in node or not isinstance(node.get("folder"), str):
        return node
    folder = Path(node["folder"])
    if folder.is_file():
        rest = {name: value for name, value in node.items() if name != "folder"}
        target = f"{PapersReader.__module__}.{PapersReader.__name__}"
        return {"_target_": target, "source": str(folder), "view": VIEW_OF_KIND[kind]} | rest
    if is_library(folder):
        if not (folder / kind).is_dir():
            raise UserError(f"{key}: {folder} has no data for {kind}; {folder / IMPORTED} says why")
        folder = folder / kind
    with prefixed(f"{key}: "):
        reader = reader_class_of(folder)
    return {"_target_": f"{reader.__module__}.{reader.__name__}"} | dict(node) | {"folder": str(folder)}


def current_path(path: str) -> str:
    """Return the current dotted path of a class."""
    return MOVED.get(path, path)


def with_first_paths(text: str) -> str:
    """Return JSON text with the old path of every moved class, so that the hash in a run's folder stays the same."""
    for old, new in reversed(MOVED.items()):
        text = text.replace(f'"{new}"', f'"{old}"')
    return text


def is_library(path: Path) -> bool:
    """Return whether a path is a file of papers or the folder of an import, which can serve any kind of task."""
    return path.is_file() or (path / IMPORTED).is_file()


def accepts(node: Mapping[str, Any], name: str) -> bool:
    """Return whether the class of a checked node has an argument of this name."""
    return name in inspect.signature(_checked_class(node).__init__).parameters


def instantiate(node: Mapping[str, Any], key: str, /, **provided: Any) -> Any:
    """Create the object that a checked node describes.

    key: key of the node, the prefix of errors about its arguments.
    provided: further arguments, used if the class has them and the node does not set them.
    """
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    provided = {name: value for name, value in provided.items() if name not in arguments and accepts(node, name)}
    try:
        return _checked_class(node)(**arguments, **provided)
    except UserError as error:
        subject = re.match(r"\w*", str(error))[0]
        if subject == _checked_class(node).__name__:  # two collections may have the same reader
            raise UserError(f"{key}: {error}") from error
        if subject in provided or not accepts(node, subject):
            raise
        raise UserError(f"{key}.{error}") from error


def _checked_class(node: Mapping[str, Any]) -> type:
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)
