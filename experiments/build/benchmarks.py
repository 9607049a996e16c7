"""Build the benchmarks of a command, from a suite, a folder, or a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from datamodules.options import option
from datamodules.readers import reader_class_of
from datamodules.readers.checks import SPLIT_NAMES
from datamodules.records import Benchmark, Collection, Document, Qrels, Reader, UserError, plain_protocol, prefixed
from datamodules.text import NameMatcher
from experiments.build.suite import BenchmarkConfig, choose, load_suite
from experiments.config.schema import Config
from experiments.config.targets import instantiate
from experiments.shared.output import name_of

log = logging.getLogger(__name__)

PATH_ARGUMENTS = ("folder", "labels", "judgements")  # arguments of readers that are paths below data.root


@dataclass(kw_only=True)
class SuiteOptions:
    """Benchmarks of a suite."""

    benchmarks: tuple[str, ...] = option(
        (), "benchmarks of experiments/benchmarks: all, or names or prefixes such as scidocs*; list shows them"
    )
    data_root: Path | None = option(None, "folder that holds the data of the benchmarks", key="data.root")
    suite: Path | None = option(None, "file with your own benchmarks, instead of experiments/benchmarks")

    def check_suite(self) -> None:
        """Raise UserError unless these options fit together."""
        if self.suite and not self.suite.is_file():
            raise UserError(f"suite: {self.suite} is not a file")
        if self.suite and not self.benchmarks:
            raise UserError("suite: set benchmarks=all (or names of its benchmarks) and data.root=FOLDER")
        if bool(self.benchmarks) != bool(self.data_root):
            raise UserError("benchmarks, data.root: set both (the benchmarks, and the folder with their data)")


@dataclass(kw_only=True)
class BenchmarkOptions(SuiteOptions):
    """The data to evaluate on: benchmarks of a suite, a folder, or by default the collections of a run."""

    max_queries: int = option(
        0, "maximum number of queries per benchmark, evenly spaced (changes the protocol); 0: all", minimum=0
    )
    max_documents: int = option(
        0, "number of documents per corpus, including all relevant ones (changes the protocol); 0: all", minimum=0
    )
    beir: Path | None = option(None, "folder in BEIR layout or with JSON lines; needs task=")
    task: str = option(
        "",
        "task whose expert ranks. Required with beir=. With benchmarks=, it replaces each benchmark's own task. With "
        "neither, only this task is evaluated",
    )
    split: str = option(
        "test",
        "split of beir= or of the run's collections. With benchmarks=, a split other than test replaces each "
        "benchmark's own split and changes the protocol: choose recipes on dev",
    )
    exclude: Literal["auto", "yes", "no"] = option(
        "auto",
        "leave a query's own id out of its ranking; auto: for tasks of the kind link_prediction, or if all queries are "
        "documents word for word",
    )
    run: Path | None = option(None, "run whose collections to evaluate on, by default the model's")
    similarity: tuple[Literal["dot", "cosine", "l2"], ...] = option(
        (),
        "similarity of vectors, or several; by default the one the model was trained with, else cosine. "
        "It changes the protocol of benchmarks with their own similarity",
    )


def suite_benchmarks(options: BenchmarkOptions) -> Iterator[Benchmark]:
    """Yield the benchmarks of a suite one by one, since each may fill the memory.

    Logs which benchmarks lack data, and where to get it. Raises UserError if the user named one of them.
    """
    suite = choose(load_suite([options.suite] if options.suite else ()), options.benchmarks)
    if options.split != "test":
        suite = {name: _on_split(name, config, options.split) for name, config in suite.items()}
    collections = CollectionReader(options.data_root)
    missing = {name: reason for name, config in suite.items() if (reason := collections.missing(config))}
    if named := next((name for name in missing if name in options.benchmarks), None):
        raise UserError(f"{missing[named]}. {named} needs {suite[named].source}, below data.root")
    available = {name: config for name, config in suite.items() if name not in missing}
    log.info("%d of %d benchmarks have data in %s", len(available), len(suite), options.data_root)
    if missing:
        log.info("skipped for lack of data: %s", ", ".join(missing))
    for source in dict.fromkeys(suite[name].source for name in missing):
        log.info("  to get: %s", source or "see the suite's file")
    if not available:
        raise UserError(f"data.root: {options.data_root} has no data for any of these benchmarks")
    for name, config in available.items():
        benchmark = build_benchmark(name, config, collections, options.max_queries, options.max_documents)
        if options.similarity and benchmark.similarity:
            benchmark = replace(benchmark, similarity="", protocol=f"{benchmark.protocol}/similarity-of-the-command")
        yield replace(benchmark, task=options.task) if options.task else benchmark


def _on_split(name: str, config: BenchmarkConfig, split: str) -> BenchmarkConfig:
    """Return the benchmark with the queries of another split. Raises UserError if its linear model learns from them."""
    split = SPLIT_NAMES.get(split, split)
    if split in config.train_on:
        raise UserError(f"split: got {split}, but the linear model of {name} learns from it")
    return replace(config, splits=[split], protocol=f"{config.protocol}/split-{split}")


def collection_benchmarks(options: BenchmarkOptions, config: Config | None) -> list[Benchmark]:
    """Return the benchmark of a folder, or the benchmarks of a run's collections. config: configuration of the run."""
    if options.beir:
        return [_folder_benchmark(options, config)]
    if config is None:
        raise UserError("run, beir: no data to evaluate on; set run=FOLDER, or beir=FOLDER and task=NAME")
    from experiments.build.data import build_data  # only here, because Lightning takes seconds to import

    benchmarks = build_data(config).benchmarks(SPLIT_NAMES.get(options.split, options.split))
    if options.task:
        benchmarks = [benchmark for benchmark in benchmarks if benchmark.task == options.task]
    if not benchmarks:
        suffix = f" of task {options.task}" if options.task else ""
        raise UserError(f"split: the data{suffix} has no split {options.split!r} (usual splits: train, dev, test)")
    return benchmarks


def _folder_benchmark(options: BenchmarkOptions, config: Config | None) -> Benchmark:
    folder, task, split = options.beir, options.task, SPLIT_NAMES.get(options.split, options.split)
    if not task:
        raise UserError(f"task: required, the task whose expert ranks {folder}, for instance task=search")
    collection = reader_class_of(folder)(str(folder)).read()
    if split not in collection.qrels:
        raise UserError(f"split: {folder} has no {split!r}; expected one of {', '.join(collection.qrels)}")
    qrels = collection.qrels[split]
    queries = {query: collection.queries[query] for query in qrels}
    if options.exclude != "auto":
        exclude = options.exclude == "yes"
    elif config and task in config.task:
        exclude = config.task[task].kind == "link_prediction"
    else:  # equal ids prove nothing: many collections use the same numbers for queries and documents
        exclude = all(collection.corpus.get(query) == document for query, document in queries.items())
    return Benchmark(
        name=name_of(folder),
        task=task,
        split=split,
        corpus=collection.corpus,
        queries=queries,
        qrels=qrels,
        exclude_query=exclude,
        protocol=plain_protocol(name_of(folder), split, exclude),
    )


class CollectionReader:
    """Reads collections from a folder. It caches the last one, because the next benchmark often needs it too."""

    def __init__(self, root: Path):
        self.root, self.last_key, self.last = root, "", None

    def reader(self, config: BenchmarkConfig) -> Reader:
        paths = {key: str(self.root / value) for key, value in config.reader.items() if key in PATH_ARGUMENTS and value}
        return instantiate(config.reader | paths, "reader")

    def missing(self, config: BenchmarkConfig) -> str | None:
        """Return why the data cannot be read, or None if they are complete."""
        try:
            files = self.reader(config).sources()
            if config.names_first == "published":
                self.reader(config).named_labels_file()
        except UserError as error:
            return str(error)
        return None if files else f"{config.reader.get('folder')}: has no file of this benchmark"

    def read(self, config: BenchmarkConfig) -> Collection:
        key = json.dumps(config.reader, sort_keys=True)
        if key != self.last_key:
            self.last_key, self.last = "", None  # free the old collection before reading the new one
            self.last = self.reader(config).read()
            self.last_key = key
        return self.last


def build_benchmark(
    name: str, config: BenchmarkConfig, collections: CollectionReader, max_queries: int = 0, max_documents: int = 0
) -> Benchmark:
    """Build a benchmark with its data. Exceeding a maximum changes the protocol; 0 means no limit. Raises UserError."""
    with prefixed(f"{name}: "):
        collection = collections.read(config)
        queries, qrels = _merge_splits(collection, config.splits)
        protocol = config.protocol
        if 0 < max_queries < len(queries):
            protocol += f"/{max_queries}-of-{len(queries)}-queries"
            queries = {query: queries[query] for query in _evenly_spaced(list(queries), max_queries)}
            qrels = {query: qrels[query] for query in queries}
        training = _merge_splits(collection, config.train_on) if config.train_on else None
        corpus, candidates = _candidates(config, collection.corpus, queries, qrels)
        if candidates is None and training is None and 0 < max_documents < len(corpus):
            corpus = _smaller_corpus(corpus, qrels, max_documents)
            protocol += f"/{len(corpus)}-documents"
        first = _labels_ranked_first(config, collections, corpus, queries)
        if config.documents == "title":
            corpus = {id: Document(id, document.title) for id, document in corpus.items()}
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
        probe=config.probe,
    )


def _evenly_spaced(ids: Sequence[str], count: int) -> list[str]:
    """Choose evenly spaced ids, because the first ones are often similar."""
    return [ids[i * len(ids) // count] for i in range(count)] if count < len(ids) else list(ids)


def _smaller_corpus(corpus: Mapping[str, Document], qrels: Qrels, count: int) -> dict[str, Document]:
    """Keep `count` documents in corpus order: all relevant ones, and evenly spaced others."""
    relevant = {id for grades in qrels.values() for id, grade in grades.items() if grade > 0 and id in corpus}
    others = [id for id in corpus if id not in relevant]
    kept = relevant.union(_evenly_spaced(others, max(0, count - len(relevant))))
    return {id: document for id, document in corpus.items() if id in kept}


def _merge_splits(collection: Collection, splits: Sequence[str]) -> tuple[dict[str, Document], Qrels]:
    """Return the queries and judgements of several splits. Raises UserError if a query is in two of them."""
    qrels: dict[str, Mapping[str, int]] = {}
    for split in splits:
        if split not in collection.qrels:
            raise UserError(f"splits: the data have no split {split!r}; expected some of {', '.join(collection.qrels)}")
        if twice := next((query for query in collection.qrels[split] if query in qrels), None):
            raise UserError(f"splits: query {twice!r} is in two of {', '.join(splits)}")
        qrels |= collection.qrels[split]
    return {query: collection.queries[query] for query in qrels}, qrels


def _candidates(
    config: BenchmarkConfig, corpus: Mapping[str, Document], queries: Mapping[str, Document], qrels: Qrels
) -> tuple[Mapping[str, Document], dict[str, list[str]] | None]:
    """Return the documents to rank, and each query's candidates if queries have their own."""
    if config.candidates == "corpus":
        return corpus, None
    candidates = {query: [id for id in qrels[query] if id in corpus] for query in queries}
    if config.exclude_query:
        candidates = {query: [id for id in ids if id != query] for query, ids in candidates.items()}
    ranked = {id for ids in candidates.values() for id in ids}
    return {id: corpus[id] for id in corpus if id in ranked}, candidates


def _labels_ranked_first(
    config: BenchmarkConfig,
    collections: CollectionReader,
    corpus: Mapping[str, Document],
    queries: Mapping[str, Document],
) -> Mapping[str, Sequence[str]] | None:
    """Return the labels named in each query, or None if they are not ranked first."""
    if config.names_first == "no":
        return None
    if config.names_first == "words":
        return NameMatcher(corpus).match(queries.values())
    named = collections.reader(config).named_labels()
    if without := next((query for query in queries if query not in named), None):
        raise UserError(f"names_first: the published file has no names for query {without!r}")
    labels = collections.read(config).corpus
    unknown = [id for query in queries for id in named[query] if id not in labels]
    if unknown:
        raise UserError(f"names_first: {len(unknown)} ids of the published file are not labels, first {unknown[0]!r}")
    return {query: [id for id in named[query] if id in corpus] for query in queries}
