"""Benchmarks as data: what stands in experiments/benchmarks/*.yaml, or in a file of the user's.

A file is a family: where its data come from, what its benchmarks have in common, and each of them by name.

    source: where to get the data, and how to lay them below data.root
    defaults: {keys of BenchmarkConfig}
    benchmarks:
      NAME: {keys of BenchmarkConfig}
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.matching import NameMatcher
from datamodules.records import WITHOUT_RELEVANT, Benchmark, Collection, Document, Qrels, UserError
from datamodules.tasks import Reader
from experiments.console import choice
from experiments.targets import check_target, instantiate
from lightning_modules.metrics import parse_metric
from lightning_modules.similarity import SIMILARITIES

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "benchmarks"
PATHS = ("folder", "labels")  # arguments of readers that are below data.root
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
    train_on: list[str] = field(default_factory=list)  # splits for a linear SVM, which then classifies; none to rank
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
        config.reader = check_target("reader", config.reader, Reader)
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
        for metric in config.metrics:
            parse_metric(metric)
        if config.names_first == "published" and "SciMultReader" not in config.reader["_target_"]:
            raise UserError("names_first: got published, which SciMultReader alone has (words finds them)")
        if both := set(config.splits) & set(config.train_on):
            raise UserError(f"train_on: {min(both)} is measured on, and cannot be trained on too")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def choose(suite: Mapping[str, BenchmarkConfig], names: Sequence[str]) -> dict[str, BenchmarkConfig]:
    """Some of a suite: "all", names, or beginnings of names that end in *. Raises UserError for others."""
    chosen: dict[str, BenchmarkConfig] = {}
    for wanted in names:
        found = [n for n in suite if wanted in (n, "all") or (wanted.endswith("*") and n.startswith(wanted[:-1]))]
        if not found:
            close = difflib.get_close_matches(wanted, suite, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"benchmarks: unknown {wanted!r}; {hint}there are all, {', '.join(suite)}")
        chosen |= {name: suite[name] for name in found}
    return chosen


class Collections:
    """Collections of readers below a folder; the last one is remembered, as several benchmarks share it."""

    def __init__(self, root: Path):
        self.root, self.last, self.collection = root, "", None

    def reader(self, config: BenchmarkConfig) -> Reader:
        paths = {key: str(self.root / value) for key, value in config.reader.items() if key in PATHS and value}
        return instantiate(config.reader | paths)

    def missing(self, config: BenchmarkConfig) -> str | None:
        """Why the data cannot be read, if they are not there."""
        try:
            files = self.reader(config).sources()
            if config.names_first == "published":
                self.reader(config).named_labels_file()
        except UserError as error:
            return str(error)
        return None if files else f"{config.reader.get('folder')}: holds no file of it"

    def of(self, config: BenchmarkConfig) -> Collection:
        key = json.dumps(config.reader, sort_keys=True)
        if key != self.last:
            self.last, self.collection = "", None  # the old one goes before the new one comes
            self.collection = self.reader(config).read()
            self.last = key
        return self.collection


@dataclass(frozen=True, slots=True)
class Limits:
    """For a first look: of each benchmark the first queries alone, and a smaller corpus; 0 for all."""

    queries: int = 0
    documents: int = 0


def build(name: str, config: BenchmarkConfig, collections: Collections, limits: Limits = Limits()) -> Benchmark:
    """A benchmark with its data. What limits cut makes a protocol of its own. Raises UserError."""
    try:
        collection = collections.of(config)
        queries, qrels = merged(collection, config.splits)
        protocol = config.protocol
        if 0 < limits.queries < len(queries):
            queries = dict(list(queries.items())[: limits.queries])
            qrels = {query: qrels[query] for query in queries}
            protocol += f"/first-{limits.queries}-queries"
        training = merged(collection, config.train_on) if config.train_on else None
        corpus, candidates = _candidates(config, collection.corpus, queries, qrels)
        if candidates is None and training is None and 0 < limits.documents < len(corpus):
            corpus = smaller(corpus, qrels, limits.documents)
            protocol += f"/{len(corpus)}-documents"
        first = _first(config, collections, corpus, queries)
        if config.documents == "title":
            corpus = {id: Document(id, document.title) for id, document in corpus.items()}
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return Benchmark(
        name=name,
        task=config.task,
        split="+".join(config.splits),
        corpus=corpus,
        queries=queries,
        qrels=qrels,
        exclude_query=config.exclude_query,
        protocol=protocol,
        metrics=tuple(config.metrics),
        candidates=candidates,
        first=first,
        similarity=config.similarity,
        without_relevant=config.without_relevant,
        training=training,
    )


def smaller(corpus: Mapping[str, Document], qrels: Qrels, count: int) -> dict[str, Document]:
    """The relevant documents, and as many of the first others as make count together, in the corpus's order."""
    relevant = {id for grades in qrels.values() for id, grade in grades.items() if grade > 0 and id in corpus}
    others = [id for id in corpus if id not in relevant]
    kept = relevant.union(others[: max(0, count - len(relevant))])
    return {id: document for id, document in corpus.items() if id in kept}


def merged(collection: Collection, splits: Sequence[str]):
    """Queries and judgements of several splits. Raises UserError if one is not there, or a query is in two."""
    qrels: dict[str, Mapping[str, int]] = {}
    for split in splits:
        if split not in collection.qrels:
            raise UserError(f"split: there is no {split!r}, the data have {', '.join(collection.qrels)}")
        if twice := next((query for query in collection.qrels[split] if query in qrels), None):
            raise UserError(f"splits {', '.join(splits)}: query {twice!r} is in two of them")
        qrels |= collection.qrels[split]
    return {query: collection.queries[query] for query in qrels}, qrels


def _candidates(config: BenchmarkConfig, corpus, queries, qrels):
    """The documents that are ranked, and which of them for which query, if these differ."""
    if config.candidates == "corpus":
        return corpus, None
    candidates = {query: list(qrels[query]) for query in queries}
    if config.exclude_query:
        candidates = {query: [id for id in ids if id != query] for query, ids in candidates.items()}
    wanted = {id for ids in candidates.values() for id in ids}
    return {id: corpus[id] for id in corpus if id in wanted}, candidates


def _first(config: BenchmarkConfig, collections: Collections, corpus, queries):
    """Query -> the labels that are named in it, where these stand first."""
    if config.names_first == "no":
        return None
    if config.names_first == "words":
        return NameMatcher(corpus).of_all(queries.values())
    named = collections.reader(config).named_labels()
    if strange := next((query for query in queries if query not in named), None):
        raise UserError(f"names_first: no names are published for query {strange!r}")
    labels = collections.of(config).corpus
    unknown = [id for query in queries for id in named[query] if id not in labels]
    if unknown:
        raise UserError(f"names_first: {len(unknown)} ids are no labels, first {unknown[0]!r}")
    return {query: [id for id in named[query] if id in corpus] for query in queries}
