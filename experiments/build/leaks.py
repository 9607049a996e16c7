"""What of the evaluation stands in the training data, and what becomes of it (data.on_leak)."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from datamodules.files import read_json, write_json
from datamodules.leakage import Index, Overlap
from datamodules.readers import reader_class_of
from datamodules.readers.beir import BeirReader
from datamodules.readers.jsonl import JsonlReader
from datamodules.records import Document, UserError
from datamodules.store import locked
from datamodules.tasks import TaskDataModule
from experiments.config.schema import DataConfig

log = logging.getLogger(__name__)

TELL = 10.0  # seconds between two lines of the log
EXAMPLES = 20  # of each way and set that are kept for a report
VERSION = 3  # of what is kept


@dataclass
class Found:
    """Of one evaluated set: its size, and for each way how many of it were found, and some of them."""

    documents: int
    overlaps: dict[str, int]
    examples: dict[str, list[str]]


@dataclass
class Leaks:
    """sets: name -> what of it was found among `trained` texts. queries, documents: task -> rows of its table that
    would have to go: as queries, and as positives and hard negatives too.
    """

    trained: int = 0
    sets: dict[str, Found] = field(default_factory=dict)
    queries: dict[str, list[int]] = field(default_factory=dict)
    documents: dict[str, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(any(found.overlaps.values()) for found in self.sets.values())


def find_leaks(tasks: Sequence[TaskDataModule], folders: Sequence[str] = (), corpora: bool = False) -> Leaks:
    """Compare what the tasks train on with what is evaluated.

    A task's own dev and test queries are compared with its training queries, since its splits share documents by
    design; by id within a collection alone, since two may number other documents alike. folders: in BEIR layout or of
    our own JSON lines, whose queries and corpus are compared with all texts of the tasks, also those that are not
    trained on but may be mined. corpora: so are those of the tasks' own collections that have no train split, but for
    labels, which are not secret.
    """
    index, owners, sizes = Index(), {}, {}
    for owner, name, documents in _evaluated(tasks, folders, corpora):
        index.add(name, documents, ("title", "text") if owner is None else ("id", "title", "text"))
        owners[name], sizes[name] = owner, len(documents)
    if not index.documents:  # nothing is evaluated: no text of the training has to be looked at
        return Leaks()
    best: dict[tuple[str, str], dict[str, Overlap]] = {(n, way): {} for n in sizes for way in index.ways[n]}
    leaks, told = Leaks(), time.monotonic()
    for task in tasks:
        name, queries = task.task.name, set(task.examples.query_rows())
        rows = sorted({*queries, *_minable(task)} if None in owners.values() else queries)
        leaks.queries[name], leaks.documents[name] = [], []
        for row in rows:
            found = [
                overlap
                for overlap in index.overlaps(task.documents[row])
                if owners[overlap.name] is None
                or (row in queries and _is_own(overlap, owners[overlap.name], task, row))
            ]
            for overlap in found:
                seen = best[overlap.name, overlap.way]
                if overlap.evaluated.id not in seen or seen[overlap.evaluated.id].similarity < overlap.similarity:
                    seen[overlap.evaluated.id] = overlap
            if found:
                leaks.queries[name].append(row)
            if any(owners[overlap.name] is None for overlap in found):
                leaks.documents[name].append(row)
            leaks.trained += 1
            if time.monotonic() - told > TELL:
                told = time.monotonic()
                log.info("  %s texts of the training compared with the evaluation", f"{leaks.trained:,}")
    for name, size in sizes.items():
        ways = {way: list(best[name, way].values()) for way in index.ways[name]}
        counts = {way: len(found) for way, found in ways.items()}
        leaks.sets[name] = Found(size, counts, {way: [_shown(o) for o in f[:EXAMPLES]] for way, f in ways.items()})
    return leaks


def _minable(task: TaskDataModule) -> Iterator[int]:
    """Rows of the corpora of collections that are trained on."""
    for collection, (table, first) in zip(task.collections.values(), task.examples.parts, strict=True):
        yield from range(first, first + len(collection.corpus) if len(table) else first)


def _is_own(overlap: Overlap, owner: tuple[str, str], task: TaskDataModule, row: int) -> bool:
    """Whether an evaluated query is of the task, and, for an id, of the collection of its row."""
    name, collection = owner
    return name == task.task.name and (overlap.way != "id" or collection == task.collection_of(row))


def _evaluated(
    tasks: Sequence[TaskDataModule], folders: Sequence[str], corpora: bool
) -> Iterator[tuple[tuple[str, str] | None, str, list[Document]]]:
    """Task and collection, or None, name, and documents of everything that is evaluated on."""
    for task in tasks:
        for split in ("dev", "test"):
            for benchmark in task.benchmarks(split):
                owner = task.task.name, benchmark.name
                yield owner, f"{benchmark.name}, {split} queries", list(benchmark.queries.values())
        trained = task.examples_by_collection()
        for name, collection in task.collections.items() if corpora and task.corpus_is_evaluated else ():
            if name not in trained:
                yield None, f"{name}, corpus", list(collection.corpus.values())
    for folder in folders:
        collection = _folder(folder).read()
        yield None, f"{folder}, queries", list(collection.queries.values())
        yield None, f"{folder}, corpus", list(collection.corpus.values())


def _folder(folder: str) -> BeirReader | JsonlReader:
    """Raises UserError, naming the key, if there is no such folder."""
    try:
        reader = reader_class_of(folder)(folder)
        reader.sources()
    except UserError as error:
        raise UserError(f"an evaluation to be compared with (data.leaks_in, or beir of make audit): {error}") from error
    return reader


def _shown(overlap: Overlap) -> str:
    def text(document: Document) -> str:
        return f"{document.id!r} ({(document.title or document.text)[:60]!r})"

    return f"{text(overlap.evaluated)} is {text(overlap.trained)} by {overlap.way}, similarity {overlap.similarity:.2f}"


def answer_leaks(config: DataConfig, tasks: Sequence[TaskDataModule]) -> None:
    """Warn of leaks, take them out of the training data, or raise UserError, as data.on_leak says."""
    if config.on_leak == "ignore":
        return
    leaks = _kept(config, tasks)
    if not leaks:
        return
    told = [
        f"{name}: {', '.join(f'{count} by {way}' for way, count in found.overlaps.items() if count)}"
        for name, found in leaks.sets.items()
        if any(found.overlaps.values())
    ]
    summary = f"parts of the evaluation stand in the training data ({'; '.join(told)})"
    if config.on_leak == "error":
        raise UserError(f"{summary}. make audit shows them, data.on_leak=strip trains without them")
    if config.on_leak == "warn":
        log.warning("%s: make audit shows them, data.on_leak=strip trains without them", summary)
        return
    log.info("%s", summary)
    for task in tasks:
        before = len(task.examples)
        name = task.task.name
        task.strip(np.array(leaks.queries[name], dtype=np.int64), np.array(leaks.documents[name], dtype=np.int64))
        log.info("  %s: %d of %d examples are left out for it", name, before - len(task.examples), before)


def _kept(config: DataConfig, tasks: Sequence[TaskDataModule]) -> Leaks:
    """Leaks, found once for the same data."""
    if config.cache is None:
        return find_leaks(tasks, config.leaks_in)
    key = hashlib.blake2b(repr((VERSION, sorted(config.leaks_in))).encode(), digest_size=10)
    for task in tasks:
        marks = {name: collection.fingerprint() for name, collection in task.collections.items()}
        key.update(repr((task.task.name, task.queries_are_documents, marks)).encode())
    for folder in config.leaks_in:
        for source in _folder(folder).sources():
            status = source.stat()
            key.update(repr((str(source.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode())
    path = Path(config.cache).expanduser() / f"leaks-{key.hexdigest()}.json"
    with locked(path):  # of several ranks the first compares
        if path.is_file():
            content = read_json(path)
            return Leaks(**content | {"sets": {name: Found(**found) for name, found in content["sets"].items()}})
        log.info("comparing the training data with the evaluation (once; data.on_leak=ignore leaves it out)")
        leaks = find_leaks(tasks, config.leaks_in)
        try:
            write_json(path, asdict(leaks))
        except OSError as error:
            raise UserError(f"data.cache: {path.parent} cannot be written ({error})") from error
        return leaks
