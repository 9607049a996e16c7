"""Benchmarks as data: what stands in experiments/benchmarks/*.yaml, or in a file of the user's.

A file is a family: where its data come from, what its benchmarks have in common, and each of them by name.

    source: where to get the data, and how to lay them below data.root
    defaults: {keys of BenchmarkConfig}
    benchmarks:
      NAME: {keys of BenchmarkConfig}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.records import LEARNS, LOSSES, WITHOUT_RELEVANT, Probe, UserError
from datamodules.tasks import Reader
from experiments.config.suggest import did_you_mean
from experiments.config.targets import READERS, check_target
from experiments.shared.console import choice
from lightning_modules.retrieval.metrics import check_metric
from lightning_modules.retrieval.similarity import SIMILARITIES

FOLDER = Path(__file__).parents[1] / "benchmarks"
CANDIDATES = ("corpus", "own")
NAMES_FIRST = ("no", "published", "words")
DOCUMENTS = ("whole", "title")


@dataclass
class BenchmarkConfig:
    """One benchmark: data and protocol."""

    protocol: str = MISSING  # its id; whoever ranks or measures otherwise takes another
    task: str = MISSING  # whose expert ranks
    reader: Any = MISSING  # a node with _target_; its folder is below data.root
    splits: list[str] = field(default_factory=lambda: ["test"])  # several are merged
    metrics: list[str] = MISSING  # the main one first
    candidates: str = "corpus"  # what is ranked for a query: the corpus, or its own judged documents (own)
    exclude_query: bool = False  # leave the document with the query's id out of its ranking
    train_on: list[str] = field(default_factory=list)  # splits that a linear model learns from; none to rank
    probe: Probe = field(default_factory=Probe)  # what it learns, and how
    names_first: str = "no"  # labels that are named in the paper stand first: as published, or found by words
    documents: str = "whole"  # title and text, or the title alone
    similarity: str = ""  # dot, cosine or l2; by default the model's own
    without_relevant: str = "skip"  # what queries without relevant documents count: skip, zero, or error
    source: str = ""  # of its data, where it is not the family's
    note: str = ""  # how it differs from others of its name


def load_suite(paths: Iterable[Path] = ()) -> dict[str, BenchmarkConfig]:
    """All benchmarks by name. paths: of files, by default the project's. Raises UserError."""
    suite: dict[str, BenchmarkConfig] = {}
    for path in paths or sorted(FOLDER.glob("*.yaml")):
        for name, config in _family(Path(path)).items():
            if name in suite:
                raise UserError(f"{path}: a benchmark {name!r} is there already")
            suite[name] = config
    return suite


def _family(path: Path) -> dict[str, BenchmarkConfig]:
    try:
        family = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(family, DictConfig) or not isinstance(family.get("benchmarks"), DictConfig):
        raise UserError(f"{path}: expected keys with values, benchmarks among them")
    _known(path, "", family, ("source", "defaults", "benchmarks"))
    return {name: _config(path, family, name) for name in family.benchmarks}


def _config(path: Path, family: DictConfig, name: str) -> BenchmarkConfig:
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(f"{path}: benchmark {name!r}: names are of a to z, digits and _, as files are named by them")
    keys = [key.name for key in dataclasses.fields(BenchmarkConfig)]
    layers = [OmegaConf.create({"source": family.get("source", "")})]
    for layer in (family.get("defaults") or OmegaConf.create({}), family.benchmarks[name] or OmegaConf.create({})):
        _known(path, f"{name}.", layer, keys)
        layers.append(layer)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), *layers)
        if missing := OmegaConf.missing_keys(merged):
            raise UserError(f"{path}: {name}: no value for {', '.join(sorted(missing))}")
        config: BenchmarkConfig = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {name}.{error.full_key}: {str(error).splitlines()[0]}") from error
    _check(f"{path}: {name}", config)
    return config


def _known(path: Path, prefix: str, node: DictConfig, allowed: Sequence[str]) -> None:
    for key in node:
        if key not in allowed:
            raise UserError(f"{path}: unknown key {prefix}{key}, allowed are {', '.join(allowed)}")


def _check(where: str, config: BenchmarkConfig) -> None:
    try:
        config.reader = check_target("reader", config.reader, Reader, package=READERS)
        for key, allowed in (
            ("candidates", CANDIDATES),
            ("names_first", NAMES_FIRST),
            ("documents", DOCUMENTS),
            ("similarity", ("", *SIMILARITIES)),
            ("without_relevant", WITHOUT_RELEVANT),
        ):
            choice(key, getattr(config, key), allowed)
        if not config.metrics or not config.splits:
            raise UserError("metrics and splits: name at least one")
        if both := set(config.splits) & set(config.train_on):
            raise UserError(f"train_on: {min(both)} is measured on, and cannot be trained on too")
        for metric in config.metrics:
            check_metric(metric, config.probe.learns if config.train_on else "ranking")
        _check_probe(config.probe, bool(config.train_on))
        if config.names_first == "published" and "SciMultReader" not in config.reader["_target_"]:
            raise UserError("names_first: got published, which SciMultReader alone has (words finds them)")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_probe(probe: Probe, used: bool) -> None:
    if not used and probe != Probe():
        raise UserError("probe: is for a linear model, which train_on names the training splits of")
    choice("probe.learns", probe.learns, LEARNS)
    choice("probe.loss", probe.loss, LOSSES)
    if not probe.costs or min(probe.costs) <= 0:
        raise UserError(f"probe.costs: got {probe.costs}, allowed are numbers above 0, at least one")
    if probe.samples < 0 or probe.draws < 1:
        raise UserError(f"probe: got samples {probe.samples} and draws {probe.draws}, allowed are from 0 and from 1 on")
    if probe.samples and probe.learns == "number":
        raise UserError("probe.samples: few-shot learning is of classes and labels")


def choose(suite: Mapping[str, BenchmarkConfig], names: Sequence[str]) -> dict[str, BenchmarkConfig]:
    """Some of a suite: "all", names, or beginnings of names that end in *. Raises UserError for others."""
    chosen: dict[str, BenchmarkConfig] = {}
    for wanted in names:
        found = [n for n in suite if wanted in (n, "all") or (wanted.endswith("*") and n.startswith(wanted[:-1]))]
        if not found:
            hint = did_you_mean(wanted, suite)
            raise UserError(f"benchmarks: unknown {wanted!r}; {hint}there are all, {', '.join(suite)}")
        chosen |= {name: suite[name] for name in found}
    return chosen
