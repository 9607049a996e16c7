"""Recipes: YAML files that say which public files to download, and which training data to build from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from omegaconf import MISSING

from datamodules.options import option
from datamodules.readers.checks import SPLITS
from datamodules.records import Reader, UserError, check_name
from experiments.config.experiment import yaml_names
from experiments.config.overrides import check_override, parse_override
from experiments.config.structured import read_yaml, structured, unknown
from experiments.config.targets import check_target
from experiments.download.fetch import check_url

FOLDER = Path(__file__).parents[1] / "recipes"
COUNTS = ("documents", "queries", "pairs", "negatives")


@dataclass
class FileSpec:
    """A published file."""

    sha256: str | None = option(MISSING, "checksum; null trusts the first download")
    md5: str | None = option(None, "checksum, if only the MD5 is published")
    bytes: int | None = option(None, "size of the file", minimum=0)


@dataclass
class SourceSpec:
    """Files with a common URL and license."""

    page: str = option(MISSING, "web page that describes the files")
    terms: str = option(MISSING, "license or terms of use")
    url: str | None = option(MISSING, "URL of the folder with the files; null if they must be downloaded by hand")
    files: dict[str, FileSpec] = option(MISSING, "files by name")
    unpack: Literal["no", "zip", "tar"] = option("no", "archive type, if the files are archives")
    members: list[str] = option(["*"], "patterns of the archive members to unpack")


@dataclass
class OutputSpec:
    """A folder in BEIR layout, built from sources by a reader."""

    reader: dict[str, Any] = option(MISSING, "node of the reader; SOURCE:PATH is a path in a source's folder")
    splits: dict[str, list[str]] = option({}, "split -> the reader's splits that make it up; by default unchanged")
    without: dict[str, dict[str, Any]] = option({}, "optional source -> reader arguments to use if it is missing")
    expected: dict[str, int] = option({}, "published counts of documents, queries, pairs or negatives")
    note: str = option("", "reason for differences from the published counts")


@dataclass
class Recipe:
    """Sources, and the folders to build from them."""

    then: str = option("", "next command to suggest, with ROOT for data.root")
    sources: dict[str, SourceSpec] = option(MISSING, "sources by name")
    outputs: dict[str, OutputSpec] = option(MISSING, "outputs by the name of their folder")


def recipes() -> list[str]:
    """Return the names of the recipes in experiments/recipes."""
    return yaml_names(FOLDER)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load and check a recipe. Raises UserError with file and key.

    name: name of a recipe in experiments/recipes, or path of a YAML file.
    overrides: values to change, such as outputs.NAME.reader.seed=1.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        if name not in recipes():
            raise UserError(f"recipe: {unknown('recipe', name, [*recipes(), 'a YAML file'])}")
        path = FOLDER / f"{name}.yaml"
    for text in overrides:
        check_override(text)
    recipe = structured(Recipe, [read_yaml(path), *map(parse_override, overrides)], str(path))
    _check(path, recipe)
    return recipe


def _check(path: Path, recipe: Recipe) -> None:
    for name, source in recipe.sources.items():
        key = f"{path}: sources.{name}"
        _check_name(key, name)
        if not source.files:
            raise UserError(f"{key}.files: expected at least one file")
        if source.url is not None:
            check_url(f"{key}.url", source.url)
        for file, spec in source.files.items():
            _check_file(f"{key}.files.{file}", file, spec)
    for name, output in recipe.outputs.items():
        key = f"{path}: outputs.{name}"
        _check_name(key, name)
        if name in ("downloads", "unpacked"):
            raise UserError(f"{key}: this folder is reserved for the sources; use another name")
        _check_keys(f"{key}.splits", output.splits, SPLITS)
        _check_keys(f"{key}.expected", output.expected, COUNTS)
        for missing in ([], list(output.without)):
            check_target(f"{key}.reader", reader_node(output, missing), Reader)
        for source in {*needed_sources(output), *output.without} - recipe.sources.keys():
            raise UserError(f"{key}: {unknown('source', source, list(recipe.sources))}")


def _check_file(key: str, file: str, spec: FileSpec) -> None:
    parts = PurePosixPath(file).parts
    if not parts or file.startswith("/") or file.endswith(("/", ".part", ".sign")):
        raise UserError(f"{key}: expected the name of a file inside the source's folder")
    for part in parts:
        check_name(f"{key}:", part)
    for name, value, digits in (("sha256", spec.sha256, 64), ("md5", spec.md5, 32)):
        if value is not None and not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            raise UserError(f"{key}.{name}: expected {digits} digits from 0 to f, or null, got {value!r}")


def _check_keys(key: str, values: dict[str, Any], expected: Sequence[str]) -> None:
    for name in values:
        if name not in expected:
            raise UserError(f"{key}: {unknown('key', name, expected)}")


def _check_name(key: str, name: str) -> None:
    if not re.fullmatch("[a-z0-9_]+", str(name)):
        raise UserError(f"{key}: names may only have a to z, 0 to 9 and _")


def reader_node(output: OutputSpec, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Return an output's reader node. missing: optional sources that are not available."""
    node = dict(output.reader)
    for source in missing:
        node |= output.without[source]
    return node


def needed_sources(output: OutputSpec, missing: Sequence[str] = ()) -> list[str]:
    """Return the names of the sources that an output's reader uses. missing: unavailable optional sources."""
    sources: dict[str, None] = {}
    resolve_paths(reader_node(output, missing), lambda source: Path(sources.setdefault(source) or ""))
    return list(sources)


def resolve_paths(value: Any, folder_of: Callable[[str], Path]) -> Any:
    """Replace each SOURCE:PATH in a node by the path in the source's folder."""
    if isinstance(value, dict):
        return {key: resolve_paths(item, folder_of) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve_paths(item, folder_of) for item in value]
    if isinstance(value, str) and (match := re.fullmatch("([a-z0-9_]+):(.*)", value)):
        return str(folder_of(match[1]) / match[2])
    return value
