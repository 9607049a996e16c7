"""From what is asked for to benchmarks with their data: of a suite, of a folder, or of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datamodules.readers import reader_class_of
from datamodules.records import Benchmark, Collection, Document, Qrels, UserError, plain_protocol
from datamodules.tasks import Reader
from datamodules.text import NameMatcher
from experiments.build.data import build_data
from experiments.build.suite import BenchmarkConfig, choose, load_suite
from experiments.config.schema import Config
from experiments.config.targets import instantiate
from experiments.shared.console import whole_number

log = logging.getLogger(__name__)

PATHS = ("folder", "labels", "judgements")  # arguments of readers that are below data.root


def suite_of(values: Mapping[str, str], similarities: Sequence[str]) -> Iterator[Benchmark]:
    """The benchmarks that are asked for, one after the other, as each may fill the memory.

    Those whose data are not there are told with what to get; that is an error if they were named. Raises UserError.
    """
    wanted = values["benchmarks"].split(",")
    suite = choose(load_suite([Path(values["suite"])] if values["suite"] else ()), wanted)
    collections = Collections(Path(values["data.root"]))
    missing = {name: reason for name, config in suite.items() if (reason := collections.missing(config))}
    if named := next((name for name in missing if name in wanted), None):
        raise UserError(f"{missing[named]}. {named} needs {suite[named].source}, below data.root")
    there = {name: config for name, config in suite.items() if name not in missing}
    log.info("%d of %d benchmarks have their data in %s", len(there), len(suite), values["data.root"])
    if missing:
        log.info("not there, and not measured: %s", ", ".join(missing))
    for source in dict.fromkeys(suite[name].source for name in missing):
        log.info("  to get: %s", source or "see the suite's file")
    if not there:
        raise UserError(f"data.root: {values['data.root']} has the data of none of these benchmarks")
    limits = Limits(*(whole_number(key, values[key], least=0) for key in ("max_queries", "max_documents")))
    for name, config in there.items():
        benchmark = build(name, config, collections, limits)
        if similarities and benchmark.similarity:
            benchmark = replace(benchmark, similarity="", protocol=f"{benchmark.protocol}/similarity-of-the-command")
        yield benchmark


def benchmarks_of(values: Mapping[str, str], config: Config | None) -> list[Benchmark]:
    """Those of a folder (BEIR layout, JSON lines), or of a run's own collections. config: of the run.

    Raises UserError.
    """
    if values["beir"]:
        return [_beir_benchmark(values, config)]
    if config is None:
        raise UserError("which data? Give run=FOLDER of a run, or beir=FOLDER and task=NAME")
    found = build_data(config).benchmarks(values["split"])
    if values["task"]:
        found = [benchmark for benchmark in found if benchmark.task == values["task"]]
    if not found:
        of_task = f" of task {values['task']}" if values["task"] else ""
        raise UserError(f"split: the data{of_task} has no {values['split']!r} (usual are train, dev and test)")
    return found


def _beir_benchmark(values: Mapping[str, str], config: Config | None) -> Benchmark:
    folder, task, split = Path(values["beir"]), values["task"], values["split"]
    if not task:
        raise UserError(f"task: whose expert ranks {folder}? For instance task=search")
    collection = reader_class_of(folder)(str(folder)).read()
    if split not in collection.qrels:
        raise UserError(f"split: {folder} has no {split!r}, it has {', '.join(collection.qrels)}")
    qrels = collection.qrels[split]
    queries = {query: collection.queries[query] for query in qrels}
    if values["exclude"] != "auto":
        exclude = values["exclude"] == "yes"
    elif config and task in config.task:
        exclude = config.task[task].kind == "link_prediction"
    else:  # ids alone do not tell: many collections number queries and documents alike
        exclude = all(collection.corpus.get(query) == document for query, document in queries.items())
    return Benchmark(
        name=folder.name,
        task=task,
        split=split,
        corpus=collection.corpus,
        queries=queries,
        qrels=qrels,
        exclude_query=exclude,
        protocol=plain_protocol(folder.name, split, exclude),
    )


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
    """For a first look: of each benchmark some of the queries, and a smaller corpus; 0 for all."""

    queries: int = 0
    documents: int = 0


def build(name: str, config: BenchmarkConfig, collections: Collections, limits: Limits = Limits()) -> Benchmark:
    """A benchmark with its data. What limits cut makes a protocol of its own. Raises UserError."""
    try:
        collection = collections.of(config)
        queries, qrels = merged(collection, config.splits)
        protocol = config.protocol
        if 0 < limits.queries < len(queries):
            protocol += f"/{limits.queries}-of-{len(queries)}-queries"
            queries = {query: queries[query] for query in spread(list(queries), limits.queries)}
            qrels = {query: qrels[query] for query in queries}
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
        probe=config.probe,
    )


def spread(ids: Sequence[str], count: int) -> list[str]:
    """So many of the ids, evenly spaced: the first ones are often of one kind."""
    return [ids[i * len(ids) // count] for i in range(count)] if count < len(ids) else list(ids)


def smaller(corpus: Mapping[str, Document], qrels: Qrels, count: int) -> dict[str, Document]:
    """The relevant documents, and as many others as make count together, in the corpus's order."""
    relevant = {id for grades in qrels.values() for id, grade in grades.items() if grade > 0 and id in corpus}
    others = [id for id in corpus if id not in relevant]
    kept = relevant.union(spread(others, max(0, count - len(relevant))))
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
