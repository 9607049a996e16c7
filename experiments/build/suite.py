"""Benchmark files: those in experiments/benchmarks, or your own.

A file has a family of benchmarks (see Family):

    source: where to get the data, and how to lay them out below data.root
    defaults: {keys of BenchmarkConfig}
    benchmarks:
      NAME: {keys of BenchmarkConfig}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from datamodules.options import option
from datamodules.records import (
    LEARNS,
    LOSSES,
    SIMILARITIES,
    WITHOUT_RELEVANT,
    Probe,
    Reader,
    UserError,
    check_choice,
    prefixed,
)
from experiments.config.structured import did_you_mean, read_yaml, refuse_unknown_keys, structured
from experiments.config.targets import READERS, check_target
from lightning_modules.retrieval.metrics import check_metric

FOLDER = Path(__file__).parents[1] / "benchmarks"


@dataclass
class Family:
    """A file of benchmarks that share settings."""

    source: str = option("", "where the data come from")
    defaults: dict[str, Any] = option({}, "settings of all benchmarks of the file")
    benchmarks: dict[str, Any] = option({}, "benchmark -> its own settings")


@dataclass
class BenchmarkConfig:
    """The data and the protocol of a benchmark."""

    protocol: str = option(MISSING, "id of the protocol; change it when ranking or measuring changes")
    task: str = option(MISSING, "task whose expert ranks")
    reader: Any = option(MISSING, "reader of the data, a _target_ node whose folder is below data.root")
    splits: list[str] = option(["test"], "splits with the queries; several are merged")
    metrics: list[str] = option(MISSING, "metrics, the main one first")
    candidates: str = option(
        "corpus", "documents ranked for a query: the whole corpus, or only judged documents", choices=("corpus", "own")
    )
    exclude_query: bool = option(False, "leave the document with the query's id out of the ranking")
    train_on: list[str] = option([], "splits that a linear model learns from; if empty, documents are ranked")
    probe: Probe = field(default_factory=Probe, metadata={"help": "what the linear model learns, and how"})
    names_first: str = option(
        "no",
        "rank first the labels named in the paper: published (from the authors' files) or words (by our search)",
        choices=("no", "published", "words"),
    )
    documents: str = option(
        "whole", "text of a document: title and text, or only the title", choices=("whole", "title")
    )
    similarity: str = option("", "similarity of vectors, by default the model's own", choices=("", *SIMILARITIES))
    without_relevant: str = option(
        "skip", "queries without relevant documents: leave them out, count 0, or fail", choices=WITHOUT_RELEVANT
    )
    source: str = option("", "where to get the data, if not from the family's source")
    note: str = option("", "how this benchmark differs from similar ones")


def load_suite(paths: Iterable[Path] = ()) -> dict[str, BenchmarkConfig]:
    """Return all benchmarks by name. paths: files to read, by default the project's. Raises UserError."""
    suite: dict[str, BenchmarkConfig] = {}
    for path in paths or sorted(FOLDER.glob("*.yaml")):
        for name, config in _read_family(Path(path)).items():
            if name in suite:
                raise UserError(f"{path}: benchmark {name!r} is defined twice")
            suite[name] = config
    return suite


def choose(suite: Mapping[str, BenchmarkConfig], names: Sequence[str]) -> dict[str, BenchmarkConfig]:
    """Choose benchmarks of a suite by "all", names, or prefixes that end in *. Raises UserError for other names."""
    chosen: dict[str, BenchmarkConfig] = {}
    for wanted in names:
        matches = [n for n in suite if wanted in (n, "all") or (wanted.endswith("*") and n.startswith(wanted[:-1]))]
        if not matches:
            hint = did_you_mean(wanted, suite)
            raise UserError(f"benchmarks: unknown {wanted!r}; {hint}Expected all or some of {', '.join(suite)}")
        chosen |= {name: suite[name] for name in matches}
    return chosen


def _read_family(path: Path) -> dict[str, BenchmarkConfig]:
    family = read_yaml(path)
    if not isinstance(family.get("benchmarks"), DictConfig):
        raise UserError(f"{path}: expected the key benchmarks, and optionally source and defaults")
    refuse_unknown_keys(Family, family, str(path))
    return {str(name): _read_benchmark(path, family, name) for name in family.benchmarks}


def _read_benchmark(path: Path, family: DictConfig, name: str) -> BenchmarkConfig:
    if not re.fullmatch(r"[a-z0-9_]+", str(name)):
        raise UserError(
            f"{path}: benchmark {name!r}: expected a name of a to z, digits and _, because it becomes a file name"
        )
    layers = [{"source": family.get("source", "")}, family.get("defaults"), family.benchmarks[name]]
    if not all(isinstance(layer, DictConfig | dict | None) for layer in layers):
        raise UserError(
            f"{path}: benchmark {name!r}: expected a mapping under its name and under defaults, got a value"
        )
    config = structured(BenchmarkConfig, [OmegaConf.create(layer or {}) for layer in layers], str(path), f"{name}.")
    with prefixed(f"{path}: {name}."):
        _check(config)
    return config


def _check(config: BenchmarkConfig) -> None:
    config.reader = check_target("reader", config.reader, Reader, package=READERS)
    if not config.metrics or not config.splits:
        raise UserError("metrics, splits: expected at least one of each")
    if both := set(config.splits) & set(config.train_on):
        raise UserError(f"train_on: {min(both)} is also in splits; a probe must not learn from its test papers")
    for metric in config.metrics:
        check_metric(metric, config.probe.learns if config.train_on else "ranking")
    _check_probe(config.probe, bool(config.train_on))
    if config.names_first == "published" and "SciMultReader" not in config.reader["_target_"]:
        raise UserError("names_first: published needs reader=SciMultReader; set it, or names_first=words")


def _check_probe(probe: Probe, used: bool) -> None:
    if not used and probe != Probe():
        raise UserError("probe: needs train_on, the splits that a linear model learns from")
    for key, value, choices in (("learns", probe.learns, LEARNS), ("loss", probe.loss, LOSSES)):
        check_choice(f"probe.{key}", value, choices)
    if not probe.costs or min(probe.costs) <= 0:
        raise UserError(f"probe.costs: expected positive numbers, at least one, got {probe.costs}")
    if probe.samples < 0 or probe.draws < 1:
        raise UserError(
            f"probe: expected samples of at least 0 and draws of at least 1, got {probe.samples} and {probe.draws}"
        )
    if probe.samples and probe.learns == "number":
        raise UserError("probe.samples: few-shot learning needs learns=class or learns=labels, got number")
