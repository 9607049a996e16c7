"""Recipes: which public files make which training data. One is a YAML file in experiments/recipes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.readers.fields import SPLITS
from datamodules.records import UserError
from datamodules.tasks import Reader
from experiments.config.experiment import names
from experiments.config.targets import check_target

FOLDER = Path(__file__).parents[1] / "recipes"
COUNTS = ("documents", "queries", "pairs", "negatives")


@dataclass
class FileSpec:
    """sha256: null where it is not known: then that of the first download is held on to. bytes: of the whole file."""

    sha256: str | None = MISSING
    md5: str | None = None
    bytes: int | None = None


@dataclass
class SourceSpec:
    """page: where it is described. terms: of its use. url: what precedes the files' names; null where they can only be
    placed by hand. unpack: its files are archives, of which the members that match a pattern are taken.
    """

    page: str = MISSING
    terms: str = MISSING
    url: str | None = MISSING
    files: dict[str, FileSpec] = MISSING
    unpack: Literal["no", "zip", "tar"] = "no"
    members: list[str] = field(default_factory=lambda: ["*"])


@dataclass
class OutputSpec:
    """A folder in BEIR layout.

    reader: its node; SOURCE:PATH stands for a path in a source's folder. splits: of the folder -> those of the reader
    that they are made of; none for all as they are. without: source -> arguments of the reader while its files are not
    there, which makes the source one that may lack. expected: counts as published. note: how it differs from that.
    """

    reader: dict[str, Any] = MISSING
    splits: dict[str, list[str]] = field(default_factory=dict)
    without: dict[str, dict[str, Any]] = field(default_factory=dict)
    expected: dict[str, int] = field(default_factory=dict)
    note: str = ""


@dataclass
class Recipe:
    """then: the command to go on with, with ROOT for data.root."""

    then: str = ""
    sources: dict[str, SourceSpec] = MISSING
    outputs: dict[str, OutputSpec] = MISSING


def recipes() -> list[str]:
    return names(FOLDER)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe, checked. overrides: such as outputs.NAME.reader.seed=1. Raises UserError with file and key."""
    try:
        layer = OmegaConf.load(path)
        if not isinstance(layer, DictConfig):
            raise UserError(f"{path}: expected keys with values")
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), layer, OmegaConf.from_dotlist(list(overrides)))
        if missing := OmegaConf.missing_keys(merged):
            raise UserError(f"{path}: no value for {', '.join(sorted(missing))}")
        recipe: Recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        where = f"{path}: {error.full_key}" if error.full_key else str(path)
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    except (yaml.YAMLError, OSError, UnicodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    _check(path, recipe)
    return recipe


def _check(path: Path, recipe: Recipe) -> None:
    for name, source in recipe.sources.items():
        key = f"{path}: sources.{name}"
        _is_name(key, name)
        if not source.files:
            raise UserError(f"{key}.files: name at least one")
        if source.url is not None and not re.match("https?://", source.url):
            raise UserError(f"{key}.url: got {source.url!r}, allowed are http:// and https://")
        for file, spec in source.files.items():
            _check_file(f"{key}.files.{file}", file, spec)
    for name, output in recipe.outputs.items():
        key = f"{path}: outputs.{name}"
        _is_name(key, name)
        if name in ("downloads", "unpacked"):
            raise UserError(f"{key}: this folder is taken; give the output another name")
        for given, allowed in ((output.splits, SPLITS), (output.expected, COUNTS)):
            if unknown := [one for one in given if one not in allowed]:
                raise UserError(f"{key}: unknown {unknown[0]!r}, allowed are {', '.join(allowed)}")
        for lacking in ([], list(output.without)):
            check_target(f"{key}.reader", node(output, lacking), Reader)
        for source in {*needed(output), *output.without} - recipe.sources.keys():
            raise UserError(f"{key}: there is no source {source!r}, there are {', '.join(recipe.sources)}")


def _check_file(key: str, file: str, spec: FileSpec) -> None:
    parts = PurePosixPath(file).parts
    if not parts or parts[0] == "/" or ".." in parts or file.endswith((".part", ".sign")):
        raise UserError(f"{key}: the name must be that of a file in its folder")
    for name, value, digits in (("sha256", spec.sha256, 64), ("md5", spec.md5, 32)):
        if value is not None and not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            raise UserError(f"{key}.{name}: got {value!r}, expected {digits} digits from 0 to f, or null")


def _is_name(key: str, name: str) -> None:
    if not re.fullmatch("[a-z0-9_]+", str(name)):
        raise UserError(f"{key}: names are made of a to z, 0 to 9 and _")


def node(output: OutputSpec, lacking: Sequence[str] = ()) -> dict[str, Any]:
    """The node of an output's reader while some of the sources that may lack do."""
    found = dict(output.reader)
    for source in lacking:
        found |= output.without[source]
    return found


def needed(output: OutputSpec, lacking: Sequence[str] = ()) -> list[str]:
    """The sources that it names."""
    found: dict[str, None] = {}
    with_folders(node(output, lacking), lambda source: Path(found.setdefault(source) or ""))
    return list(found)


def with_folders(value: Any, folder: Callable[[str], Path]) -> Any:
    """A node, or a part of one, with each SOURCE:PATH as a path in the source's folder."""
    if isinstance(value, dict):
        return {key: with_folders(one, folder) for key, one in value.items()}
    if isinstance(value, list):
        return [with_folders(one, folder) for one in value]
    if isinstance(value, str) and (match := re.fullmatch("([a-z0-9_]+):(.*)", value)):
        return str(folder(match[1]) / match[2])
    return value
