"""Find evaluation texts that leak into the training data, and act on them (data.on_leak)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from datamodules.files import expanded, file_state, read_json, write_json
from datamodules.leakage import Index, Overlap
from datamodules.progress_lines import ProgressLines
from datamodules.readers import reader_class_of
from datamodules.readers.beir import BeirReader
from datamodules.readers.jsonl import JsonlReader
from datamodules.records import Document, UserError, explained, prefixed
from datamodules.store import locked
from experiments.config.schema import DataConfig

if TYPE_CHECKING:  # because Lightning takes seconds to import
    from datamodules.tasks import TaskDataModule

log = logging.getLogger(__name__)

EXAMPLES = 20  # examples kept per set and matching method
SPLITS = ("dev", "test")  # whose queries are compared with the training data
VERSION = 3  # version of the cached files


@dataclass
class EvaluatedSet:
    """A set of evaluation texts: its size, and the number and examples of its leaks by matching method."""

    documents: int
    overlaps: dict[str, int]
    examples: dict[str, list[str]]


@dataclass
class Leaks:
    """Evaluation texts in the training data.

    trained: number of training texts compared.
    sets: evaluated sets by name.
    queries: by task, rows to drop as queries.
    documents: by task, rows to drop as positives and hard negatives.
    """

    trained: int = 0
    sets: dict[str, EvaluatedSet] = field(default_factory=dict)
    queries: dict[str, list[int]] = field(default_factory=dict)
    documents: dict[str, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(any(evaluated.overlaps.values()) for evaluated in self.sets.values())


@dataclass(frozen=True)
class Source:
    """A set of evaluation texts. task: the task whose queries they are; None for corpora and other folders."""

    name: str
    documents: list[Document]
    task: str | None = None
    collection: str | None = None

    @property
    def ways(self) -> tuple[str, ...]:
        """Matching methods. Ids only count within a collection, because other collections may use the same ids."""
        return ("id", "title", "text") if self.task else ("title", "text")

    def concerns(self, overlap: Overlap, task: TaskDataModule, row: int, is_query: bool) -> bool:
        """Return whether an overlap with a row of a task is a leak."""
        if self.task is None:
            return True
        same_collection = overlap.way != "id" or self.collection == task.collection_of(row)
        return is_query and self.task == task.task.name and same_collection


def find_leaks(tasks: Sequence[TaskDataModule], folders: Sequence[str] = (), corpora: bool = False) -> Leaks:
    """Compare the training data of all tasks with the evaluation data.

    A task's dev and test queries are only compared with its training queries, because splits share documents by design.
    Texts of other folders are compared with all texts that training uses or mining may return.

    folders: evaluations in BEIR layout or JSON lines. corpora: also compare the corpora of collections without a train
    split, except labels, which are not secret.
    """
    index, sources = Index(), {}
    for source in _evaluated(tasks, folders, corpora):
        index.add(source.name, source.documents, source.ways)
        sources[source.name] = source
    if not index.documents:
        return Leaks()
    best: dict[tuple[str, str], dict[str, Overlap]] = {
        (name, way): {} for name, source in sources.items() for way in source.ways
    }
    any_text = any(source.task is None for source in sources.values())
    leaks, progress = Leaks(), ProgressLines("comparing training texts with the evaluation", "texts")
    for task in tasks:
        queries = set(task.examples.query_rows())
        leaks.queries[task.task.name], leaks.documents[task.task.name] = [], []
        for row in sorted({*queries, *_minable_rows(task)} if any_text else queries):
            overlaps = [
                overlap
                for overlap in index.overlaps(task.documents[row])
                if sources[overlap.name].concerns(overlap, task, row, row in queries)
            ]
            for overlap in overlaps:
                by_id = best[overlap.name, overlap.way]
                if by_id.setdefault(overlap.evaluated.id, overlap).similarity < overlap.similarity:
                    by_id[overlap.evaluated.id] = overlap
            if overlaps:
                leaks.queries[task.task.name].append(row)
            if any(sources[overlap.name].task is None for overlap in overlaps):
                leaks.documents[task.task.name].append(row)
            leaks.trained += 1
            progress.advance(1)
    leaks.sets = {name: _summarize(source, best) for name, source in sources.items()}
    return leaks


def _summarize(source: Source, best: dict[tuple[str, str], dict[str, Overlap]]) -> EvaluatedSet:
    overlaps = {way: list(best[source.name, way].values()) for way in source.ways}
    counts = {way: len(each) for way, each in overlaps.items()}
    examples = {way: [_describe(overlap) for overlap in each[:EXAMPLES]] for way, each in overlaps.items()}
    return EvaluatedSet(len(source.documents), counts, examples)


def _minable_rows(task: TaskDataModule) -> Iterator[int]:
    """Yield the corpus rows of collections with training examples."""
    for part in task.parts:
        if len(part.table):
            yield from part.corpus_rows.tolist()


def _evaluated(tasks: Sequence[TaskDataModule], folders: Sequence[str], corpora: bool) -> Iterator[Source]:
    """Yield all sets of evaluation texts."""
    for task in tasks:
        for split in SPLITS:
            for benchmark in task.benchmarks(split):
                queries = list(benchmark.queries.values())
                yield Source(f"{benchmark.name}, {split} queries", queries, task.task.name, benchmark.name)
        trained = task.examples_by_collection()
        for name, collection in task.collections.items() if corpora and task.corpus_is_evaluated else ():
            if name not in trained:
                yield Source(f"{name}, corpus", list(collection.corpus.values()))
    for folder in folders:
        collection = _reader(folder).read()
        yield Source(f"{folder}, queries", list(collection.queries.values()))
        yield Source(f"{folder}, corpus", list(collection.corpus.values()))


def _reader(folder: str) -> BeirReader | JsonlReader:
    """Return the reader of an evaluation's folder. Raises UserError if the folder is missing or its layout unknown."""
    with prefixed("evaluation to compare with (data.leaks_in, or beir of make audit): "):
        reader = reader_class_of(folder)(folder)
        reader.sources()
    return reader


def _describe(overlap: Overlap) -> str:
    def text(document: Document) -> str:
        return f"{document.id!r} ({(document.title or document.text)[:60]!r})"

    return f"{text(overlap.evaluated)} is {text(overlap.trained)} by {overlap.way}, similarity {overlap.similarity:.2f}"


def handle_leaks(config: DataConfig, tasks: Sequence[TaskDataModule], synthetic: Collection[str] = ()) -> None:
    """Find leaks. Depending on data.on_leak, log a warning, remove them, or raise UserError.

    synthetic: names of collections that a warning leaves out, because a few of their generated titles are the same.
    """
    quiet = synthetic if config.on_leak == "warn" else ()
    if config.on_leak == "ignore" or not (
        config.leaks_in or {name for t in tasks for name in t.collections} - set(quiet)
    ):
        return
    leaks = _cached_leaks(config, tasks)
    left_out = {f"{name}, {split} queries" for name in quiet for split in SPLITS}
    counts = [
        f"{name}: {', '.join(f'{count} by {way}' for way, count in evaluated.overlaps.items() if count)}"
        for name, evaluated in leaks.sets.items()
        if any(evaluated.overlaps.values()) and name not in left_out
    ]
    if not counts:
        return
    summary = f"evaluation texts are in the training data ({'; '.join(counts)})"
    if config.on_leak == "error":
        raise UserError(f"{summary}. make audit shows them; data.on_leak=strip trains without them")
    if config.on_leak == "warn":
        log.warning("%s: make audit shows them; data.on_leak=strip trains without them", summary)
        return
    log.info("%s", summary)
    for task in tasks:
        name, before = task.task.name, len(task.examples)
        task.strip(np.array(leaks.queries[name], dtype=np.int64), np.array(leaks.documents[name], dtype=np.int64))
        log.info("  %s: leaving out %d of %d examples because of leaks", name, before - len(task.examples), before)


def _cached_leaks(config: DataConfig, tasks: Sequence[TaskDataModule]) -> Leaks:
    """Return the leaks. They are computed once for the same data, and then read from data.cache."""
    if config.cache is None:
        return find_leaks(tasks, config.leaks_in)
    path = expanded(config.cache, "data.cache", ", or data.cache=null") / f"leaks-{_data_key(config, tasks)}.json"
    with locked(path):  # the first rank compares, the others wait
        if path.is_file():
            try:
                content = read_json(path, {"sets": dict})
                sets = {name: EvaluatedSet(**evaluated) for name, evaluated in content["sets"].items()}
                return Leaks(**content | {"sets": sets})
            except (UserError, TypeError) as error:
                log.warning("data.cache: %s is damaged (%s); comparing again", path, error)
        log.info("comparing the training data with the evaluation (only once; data.on_leak=ignore skips it)")
        leaks = find_leaks(tasks, config.leaks_in)
        with explained(f"data.cache: {path.parent} cannot be written"):
            write_json(path, asdict(leaks))
        return leaks


def _data_key(config: DataConfig, tasks: Sequence[TaskDataModule]) -> str:
    """Return a hash of all data that is compared."""
    key = hashlib.blake2b(repr((VERSION, sorted(config.leaks_in))).encode(), digest_size=10)
    for task in tasks:
        fingerprints = {name: collection.fingerprint() for name, collection in task.collections.items()}
        key.update(repr((task.task.name, task.queries_are_documents, fingerprints)).encode())
    for folder in config.leaks_in:
        for source in _reader(folder).sources():
            key.update(file_state(source).encode())
    return key.hexdigest()
